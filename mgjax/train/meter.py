"""What a run costs and where its time goes: compilations, memory, share of the peak, profiles."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Iterable

import jax

from mgjax.config import ConfigError, key

# Dense bfloat16 FLOP/s of one device, by the start of its `device_kind`; makers' data sheets.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,  # float16
    "Tesla T4": 65e12,  # float16
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(kind: str | None = None) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device kind, by default of this machine's; None where it is not known.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3") / 1e12
        989.4
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    fitting = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def peak_memory(compiled: Iterable) -> dict:
    """Most bytes in use on one device, and how that is known.

    Args:
        compiled: the executables of the run; their analysis serves where the device keeps no statistics.
    """
    used = [s.get("peak_bytes_in_use", 0) for d in jax.local_devices() if (s := d.memory_stats())]
    if used and max(used):
        return {"bytes": max(used), "by": "device statistics"}
    sizes = []
    for c in compiled:
        if (m := c.memory_analysis()) is not None:
            sizes.append(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)
    return {"bytes": max(sizes, default=None), "by": "the compiled train step's analysis"}


class Compilations:
    """Counts the compilations of this process, cached ones included, and their seconds, from its making on."""

    _count, _seconds = 0, 0.0
    _listens = False

    def __init__(self):
        if not Compilations._listens:
            jax.monitoring.register_event_duration_secs_listener(Compilations._note)
            Compilations._listens = True
        self.before = Compilations._count, Compilations._seconds

    @staticmethod
    def _note(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            Compilations._count += 1
            Compilations._seconds += seconds

    def figures(self) -> dict:
        """Programs and seconds so far."""
        return {
            "programs": Compilations._count - self.before[0],
            "seconds": round(Compilations._seconds - self.before[1], 2),
        }


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, so that the next start need not compile.

    A damaged entry, such as a killed process leaves, costs a warning and a compilation.

    Args:
        folder: where; "auto" is JAX_COMPILATION_CACHE_DIR, or else one for each kind of processor
            in ~/.cache, since programs for a CPU are made for its very instructions; "" is nowhere.

    Raises:
        ConfigError: a folder that cannot be written to.
    """
    if not folder:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder == "auto":
        if jax.config.jax_compilation_cache_dir:
            return
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        path = base / "mgjax" / f"xla-{_processor()}"
    else:
        path = pathlib.Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise OSError("it cannot be written to")
    except OSError as error:
        if folder == "auto":  # a home that cannot be written to is no reason to stop
            return
        raise ConfigError(f"--config.compile_cache={folder}: {error}") from None
    jax.config.update("jax_compilation_cache_dir", str(path))


def _processor() -> str:
    """A short name of the CPU's instruction set."""
    said = platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        said += "".join(next((l for l in lines if l.startswith(start)), "") for start in ("model name", "flags", "Features"))
    except OSError:
        said += platform.processor()
    return hashlib.sha256(said.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    start: int = key(10, "step of this process before which the profile begins", low=0)
    steps: int = key(0, "steps to profile (0: none); the trace lies in WORKDIR/profile", low=0)


class Profiler:
    """A window of steps under `jax.profiler`, with a mark on each step.

    Args:
        folder: where the trace goes.
    """

    def __init__(self, config: ProfileConfig, folder: pathlib.Path):
        self.config, self.folder = config, folder
        self.seen, self.running = 0, False

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """The context in which step `number` of the run is dispatched."""
        if self.config.steps and self.seen == self.config.start:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        self.seen += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, result) -> bool:
        """Ends the window when its last step is done; whether it did."""
        if not self.running or self.seen < self.config.start + self.config.steps:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a window that is still open."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


class Pace:
    """How fast steps go, and what they wait for.

    Validation and saving are left out: call `restart` behind them.

    Args:
        devices: that compute a step.
    """

    def __init__(self, devices: int):
        self.peak = peak_flops()
        self.devices = devices
        self.total = dict(seconds=0.0, waited=0.0, flops=0)
        self.start(0)

    def start(self, done: int) -> None:
        """A stage begins, or goes on, after `done` steps."""
        self.done, self.since = done, time.monotonic()
        self.restart()

    def restart(self) -> None:
        """The time since the last reading counts for nothing."""
        self.at, self.waited, self.flops = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for a batch of the host."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def stepped(self, flops: int) -> None:
        """One more step was dispatched, of so many FLOPs of dot products and convolutions."""
        self.flops += flops

    def speed(self, done: int) -> float:
        """Steps per second since `start`."""
        return (done - self.done) / max(1e-9, time.monotonic() - self.since)

    def read(self) -> dict[str, float]:
        """Since the last reading: `data_wait`, the share of the time spent waiting for batches, and, where the peak
        of the device is known, `mfu`, model FLOPs a second as a share of it."""
        seconds = max(1e-9, time.perf_counter() - self.at)
        result = {"data_wait": round(self.waited / seconds, 4)} | self._mfu(self.flops, seconds)
        self._count(seconds)
        self.restart()
        return result

    def whole(self) -> dict[str, float | None]:
        """The same of the whole run, as far as it was read."""
        seconds = self.total["seconds"]
        if not seconds:
            return {"data_wait": None, "mfu": None}
        return {"data_wait": round(self.total["waited"] / seconds, 4), "mfu": None} | self._mfu(self.total["flops"], seconds)

    def _mfu(self, flops: int, seconds: float) -> dict[str, float]:
        return {"mfu": float(f"{flops / (seconds * self.devices * self.peak):.4g}")} if self.peak else {}

    def _count(self, seconds: float) -> None:
        for name, value in dict(seconds=seconds, waited=self.waited, flops=self.flops).items():
            self.total[name] += value
