"""Several processes of one run, on JAX's own multi-controller runtime."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgjax.errors import InputError

# What a launcher that JAX knows leaves in the environment of each of several processes.
_LAUNCHERS: dict[str, Callable[[Mapping], bool]] = {
    "SLURM": lambda env: "SLURM_STEP_NODELIST" in env and _count(env, "SLURM_STEP_NUM_TASKS") > 1,
    "Open MPI": lambda env: "OMPI_MCA_orte_hnp_uri" in env and _count(env, "OMPI_COMM_WORLD_SIZE") > 1,
    "TPU pod": lambda env: "," in env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", "")),
}

# How many processes other launchers, or newer ones, have started.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


class AgreedError(InputError):
    """An error that all processes have been told of."""


def _count(env: Mapping, *names: str) -> int:
    """The first of these numbers that the environment has, or 1. Raises InputError for what is no number."""
    for name in names:
        if env.get(name):
            if not env[name].isdigit():
                raise InputError(f"{name} is '{env[name]}' in the environment, which is no number")
            return int(env[name])
    return 1


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> None:
    """Joins the processes of a run, before any device is touched; does nothing where there is one.

    In this order: the arguments, or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    (in an indexed Job of Kubernetes also `JOB_COMPLETION_INDEX`); SLURM, Open MPI and TPU pods, whose
    environment JAX reads by itself; else a single process.

    Args:
        coordinator: `host:port` of process 0.
        timeout: seconds to wait for the others.

    Raises:
        InputError: a part of the three is missing or out of range. Where the others do not come in
            time, the process says so with its id and ends with status 2.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    number = lambda given, *names: _count(env, *names) if given is None and any(env.get(n) for n in names) else given
    if coordinator:
        num_processes = number(num_processes, "JAX_NUM_PROCESSES")
        process_id = number(process_id, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
        if num_processes is None or process_id is None:
            raise InputError(f"--coordinator={coordinator} needs --num_processes and --process_id too")
        if not 0 <= process_id < num_processes:
            raise InputError(f"--process_id={process_id} is not one of the {num_processes} processes 0 to {num_processes - 1}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator is HOST:PORT of process 0, not '{coordinator}'")
        who = f"process {process_id} of {num_processes}, coordinator {coordinator}"
        arguments = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif num_processes is not None or process_id is not None:
        raise InputError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0")
    else:
        launcher = next((name for name, there in _LAUNCHERS.items() if there(env)), None)
        if launcher is None:
            if (count := _count(env, *_COUNTS)) > 1:
                raise InputError(
                    f"a launcher has started {count} processes, and JAX does not know it: say who is who with --coordinator, "
                    "--num_processes and --process_id, or they would be as many runs"
                )
            return
        rank = next((env[n] for n in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID") if n in env), "?")
        who, arguments = f"process {rank}, started by {launcher}", {}
    print(f"{who}: waiting for the others", flush=True)
    # JAX aborts with a stack trace, which names nobody, when its own time is over.
    late = threading.Timer(timeout, _give_up, (who, timeout))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 30)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{who}: the processes could not be joined: {error}") from None
    finally:
        late.cancel()


def _give_up(who: str, timeout: int) -> None:
    sys.stderr.write(
        f"error: {who}: not all processes came within {timeout} s. Those that did have said that they wait; one that has not "
        "was never started, has another --num_processes, or does not reach the coordinator (--join_timeout waits longer)\n"
    )
    sys.stderr.flush()
    os._exit(2)


def is_main() -> bool:
    """Whether this process speaks and writes for all: process 0."""
    return jax.process_index() == 0


def agreed(error: str = "") -> None:
    """Raises AgreedError in every process if any of them has an error; call it where all do.

    A process that alone stopped would leave the others waiting for it.

    Example:
        >>> agreed("")  # no error
    """
    if jax.process_count() > 1:
        said = multihost_utils.process_allgather(np.frombuffer(error.encode()[:800].ljust(800), np.uint8))
        error = next((t for row in np.asarray(said) if (t := bytes(row).decode(errors="replace").strip())), "")
    if error:
        raise AgreedError(error)


def leave_alone(error: BaseException) -> None:
    """Ends this process at once, where several run, after an error that only this one has.

    Its regular end would wait for the others, who wait for it; so they hear of it.
    """
    if jax.process_count() > 1 and not isinstance(error, AgreedError):
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, InputError):
            sys.stderr.write(f"error: {who}: {error}\n")
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def from_main(value: int) -> int:
    """An integer of process 0, in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
