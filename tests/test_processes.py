"""Several processes of one run, as real processes on this machine, which are always ended."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mgjax.errors import InputError
from mgjax.train import distributed
from mgjax.train.checkpoint import load_state

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Tiny, and without batch statistics, which would see parts of other batches on other meshes.
KEYS = {
    "data.limit": "96",
    "model.widths": "4,8",
    "model.blocks": "1,1",
    "model.norm": "group",
    "plan.batch_size": "16",
    "plan.eval_batch_size": "48",
    "plan.alone": "1,0",
    "plan.max_steps": "4",
    "log.every": "1",
    "checkpoint.every": "2",
    "checkpoint.keep": "9",
}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def command(workdir, *more, **keys):
    keys = [f"--config.{k}={v}" for k, v in (KEYS | {k.replace("__", "."): v for k, v in keys.items()}).items()]
    return [sys.executable, "-m", "experiments.imagenet_mg", *keys, f"--workdir={workdir}", *more]


@contextlib.contextmanager
def started(workdir, count, devices=8, join_timeout=120, only=None, **keys):
    """`count` processes of one run, with `devices` among them; whatever happens, they are ended."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}"}
    port, processes = free_port(), []
    try:
        for i in range(count) if only is None else only:
            several = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
            several.append(f"--join_timeout={join_timeout}")
            log = open(f"{workdir}-process{i}.log", "w")
            made = subprocess.Popen(
                command(workdir, *(several if count > 1 else []), **keys),
                cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            log.close()
            processes.append(made)
        yield processes
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()


def said(workdir, i=0):
    return pathlib.Path(f"{workdir}-process{i}.log").read_text(errors="replace")


def finish(processes, workdir, timeout=240):
    codes = [p.wait(timeout) for p in processes]
    return codes, "\n".join(said(workdir, i) for i in range(len(processes)))


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def wait_for(condition, processes, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(p.poll() is None for p in processes), "it ended, or took too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process and by two, of 8 devices in all."""
    folder = tmp_path_factory.mktemp("processes")
    for count in (1, 2):
        with started(folder / f"by{count}", count) as processes:
            codes, text = finish(processes, folder / f"by{count}")
            assert codes == [0] * count, text
    return folder


def test_two_processes_compute_what_one_does(runs):
    one, two = losses(runs / "by1"), losses(runs / "by2")
    assert len(one) == 8
    np.testing.assert_allclose(two[:5], one[:5], rtol=1e-5)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    summaries = [json.loads((runs / name / "summary.json").read_text()) for name in ("by1", "by2")]
    assert [s["processes"] for s in summaries] == [1, 2]
    assert [s["mesh"] for s in summaries] == [{"data": 8, "fsdp": 1}] * 2
    assert summaries[0]["test"]["examples"] == summaries[1]["test"]["examples"] == 96


def test_only_the_first_process_speaks_and_writes(runs):
    quiet = said(runs / "by2", 1)
    assert "process 1 of 2" in quiet and "waiting for the others" in quiet
    assert not any(word in quiet for word in ("workdir:", "stage", "summary", "full path"))
    assert (runs / "by2" / "report.html").exists()
    assert len(list((runs / "by2" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_checkpoint_is_continued_by_another_number_of_processes(runs, tmp_path, first, then):
    """Stopped after the first stage by SIGTERM to one process alone; both save the same step and leave."""
    workdir = tmp_path / "W"
    slow = {"plan__max_steps": "400", "plan__alone": "1000,0"}  # so long that it is met in the middle
    with started(workdir, first, **slow) as processes:
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(losses(workdir)) > 3, processes)
        processes[-1].send_signal(signal.SIGTERM)
        codes, text = finish(processes, workdir)
    assert set(codes) == {128 + signal.SIGTERM}, text
    assert "stopped at step" in said(workdir), text
    at = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    state = load_state(workdir)
    assert state["step"] == at
    with started(workdir, then, **slow) as processes:
        wait_for(lambda: "continuing at step" in said(workdir) and len(losses(workdir)) > at + 2, processes)
        processes[0].send_signal(signal.SIGTERM)
        codes, text = finish(processes, workdir)
    assert set(codes) == {128 + signal.SIGTERM} and f"continuing at step {at}," in text, text
    assert losses(workdir) and len(losses(workdir)) == load_state(workdir)["step"]


def test_a_process_that_never_joins(tmp_path):
    with started(tmp_path / "W", 2, join_timeout=3, only=[0]) as processes:
        began = time.monotonic()
        codes, text = finish(processes, tmp_path / "W", 90)
    assert codes == [2] and time.monotonic() - began < 60
    assert "error: process 0 of 2" in text and "not all processes came within 3 s" in text
    assert not (tmp_path / "W").exists()


def test_an_error_of_one_process_ends_all(tmp_path):
    """Bad bytes in what the second process reads: it says so at once, and the other does not wait for ever."""
    import cv2

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(8):
                cv2.imwrite(
                    str(tmp_path / "images" / split / label / f"{i}.png"), rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
                )
    other = tmp_path / "other" / "images"
    shutil.copytree(tmp_path / "images", other)
    keys = {
        "data__source": f"folder:{tmp_path / 'images'}",
        "data__image_size": "16",
        "augment__size": "16",
        "plan__alone": "0",
    }
    keys |= {
        "plan__batch_size": "8",
        "plan__eval_batch_size": "8",
        "data__cache_gb": "0",
        "plan__max_steps": "5000",
        "plan__joint": "10000",
    }
    with started(tmp_path / "W", 2, **keys) as processes:
        wait_for(lambda: (tmp_path / "W" / "metrics.jsonl").exists() and len(losses(tmp_path / "W")) > 3, processes)
        for path in (tmp_path / "images" / "train").rglob("*.png"):
            path.write_bytes(b"no image")
        codes, text = finish(processes, tmp_path / "W", 150)
    assert 2 in codes and 0 not in codes, text
    assert re.search(r"error: process \d of 2: .* does not decode", text), text


def test_a_workdir_of_another_run_is_refused_by_all(runs):
    with started(runs / "by2", 2, seed="7") as processes:
        codes, text = finish(processes, runs / "by2")
    assert codes == [2, 2], text
    assert text.count("holds another run (config.seed was 0, is 7)") == 2


@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (("localhost:1", None, None), {}, "needs --num_processes and --process_id"),
        (("localhost:1", 2, 2), {}, "--process_id=2 is not one of the 2 processes 0 to 1"),
        (("localhost", 2, 0), {}, "--coordinator is HOST:PORT of process 0, not 'localhost'"),
        ((None, 2, None), {}, "need --coordinator=HOST:PORT"),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}, "needs --num_processes"),
        (("a:1", None, 0), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two' in the environment, which is no number"),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "4"}, "a launcher has started 4 processes, and JAX does not know it"),
    ],
)
def test_processes_that_are_badly_named(arguments, environment, says, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=says):
        distributed.start(*arguments)


@pytest.mark.parametrize(
    "environment, arguments",
    [
        ({}, None),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {}),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0:1234", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "3"},
            {"coordinator_address": "job-0:1234", "num_processes": 8, "process_id": 3},
        ),
    ],
)
def test_launchers_are_recognised_by_their_environment(environment, arguments, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: called.append(given))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    distributed.start(timeout=5)
    assert called == ([] if arguments is None else [arguments | {"initialization_timeout": 35}])
    assert ("waiting for the others" in capsys.readouterr().out) == (arguments is not None)
