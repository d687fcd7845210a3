"""What a run shows and writes: progress, metrics.jsonl, TensorBoard events, facts about the machine."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mgjax.errors import InputError


def accelerator_hint() -> str | None:
    """The command that mends it, where an NVIDIA GPU answers and JAX sees none; else None."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu" or not shutil.which("nvidia-smi"):
        return None
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode or "GPU" not in asked.stdout:
        return None
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # ours says what to do, and comes first
    if jax.default_backend() != "cpu":
        return None
    return f"an NVIDIA GPU answers, but JAX sees none; this mends it: {sys.executable} -m pip install -U 'jax[cuda]'"


def hardware() -> str:
    """The devices and the machine, in words."""
    devices = jax.devices()
    kind = f"{len(devices)} × {devices[0].device_kind}"
    model = platform.processor() or platform.machine()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{kind}; {os.cpu_count()} cores {model}; {platform.system()} {platform.machine()}"


def write_json(path: pathlib.Path, value) -> None:
    """Writes whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _finite(value):
    """NaN and infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Monitor:
    """Shows progress on the console and appends scalars to the run's logs.

    On a terminal there is one bar; elsewhere, one line every `interval` seconds.

    Args:
        workdir: of the run; `metrics.jsonl` and `tensorboard/` go there.
        step: records of later steps, left by a run that was stopped, are dropped.
        interval: seconds between two lines, where there is no terminal.
        quiet: shows and writes nothing, as all processes but the first do.
        wandb: project of Weights & Biases, to which records go too; imported only then.
        meta: what Weights & Biases shows as the run's config.

    Raises:
        InputError: Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        interval: float = 10.0,
        quiet: bool = False,
        wandb: str = "",
        meta: Mapping | None = None,
    ):
        self.path, self.interval, self.quiet = workdir / "metrics.jsonl", interval, quiet
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bar, self.events, self.wandb, self.last = None, None, None, time.monotonic()
        if quiet:
            return
        if wandb:
            self.wandb = _wandb(wandb, workdir, meta)
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Drops the records of all later steps."""
        if self.quiet:
            return
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        part = self.path.with_name(".metrics.jsonl.part")
        part.write_text("".join(line + "\n" for line in kept))
        part.replace(self.path)
        if self.events:
            self.events.close()
        self.events = _Events(self.path.parent / "tensorboard", step)

    def start(self, stage: str, steps: int, done: int) -> None:
        """A stage begins, `done` of its steps having been done before."""
        self.stop()
        if self.console.is_terminal and not self.quiet:
            self.bar = Progress(
                TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                # Whatever the terminal has room for.
                TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.console,
                expand=True,
            )
            self.task = self.bar.add_task(stage, total=steps, completed=done, left="", said="compiling")
            self.bar.start()
        else:
            self.say(f"stage {stage}: {steps} steps, compiling")
            self.last = time.monotonic()

    def progress(self, stage: str, done: int, steps: int, shown: str, rate: float, left: float) -> None:
        """Shows how far it is; cheap enough for every step."""
        said, left = f"{shown}  {rate:,.0f} examples/s", f"{clock(left)} left"
        if self.bar:
            self.bar.update(self.task, completed=done, left=left, said=said)
        elif time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.say(f"{stage} {done}/{steps}  {said}  {left}")

    def stop(self) -> None:
        """A stage has ended, or is being left."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def say(self, line: str) -> None:
        """Prints one line."""
        self.console.print(line, markup=False)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one record of scalars. Raises InputError where it cannot be written."""
        if self.quiet:
            return
        numbers = {name: value for name, value in scalars.items() if isinstance(value, (int, float))}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(_finite({"step": step, **scalars}), allow_nan=False) + "\n")
            self.events.write(step, numbers)
        except OSError as error:
            raise InputError(
                f"'{self.path}' cannot be written to ({error.strerror}); the newest checkpoint is whole"
            ) from error
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        self.stop()
        if self.events:
            with contextlib.suppress(OSError):  # a full disk, of which the checkpoints tell
                self.events.close()
        if self.wandb:
            self.wandb.finish()


class _Events:
    """TensorBoard's events, written in this thread: the writer that tensorboardX offers writes in one of its own, and
    blocks for ever where the disk is full.

    Args:
        step: events of later steps, which an earlier start has written, are void.
    """

    _made = 0

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(exist_ok=True)
        _Events._made += 1
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}.{_Events._made}"
        self.file, self.flushed = RecordWriter(str(folder / name)), time.monotonic()
        self._add(file_version="brain.Event:2")
        if step:
            self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **what) -> None:
        self.file.write(Event(wall_time=time.time(), **what).SerializeToString())

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step=step, summary=scalar(name, value))
        if time.monotonic() - self.flushed > 10:
            self.file.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        self.file.close()


def _wandb(project: str, workdir: pathlib.Path, meta: Mapping | None):
    """A run of Weights & Biases that goes on where the one of this workdir ended."""
    try:
        import wandb
    except ImportError:
        raise InputError("--config.log.wandb needs Weights & Biases: pip install wandb") from None
    kept = workdir / "wandb-id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project, dir=str(workdir), id=kept.read_text(), name=workdir.name, resume="allow", config=dict(meta or {})
    )


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a run that was killed while writing
        return float("inf")
