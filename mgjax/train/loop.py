"""The loop around the one compiled step: stages, evaluation, checkpoints, resume, report."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.flops import count_jaxpr
from mgjax.granularity import OperatingPoint
from mgjax.train.checkpoint import CheckpointConfig, Checkpoints
from mgjax.train.monitor import Monitor, clock
from mgjax.train.optim import OptimConfig, make_optimizer, make_schedule
from mgjax.train.stages import Stage, check_batch_size, check_plan, trained_paths
from mgjax.train.state import (
    TrainState,
    batch_sharding,
    count_params,
    create_state,
    make_mesh,
    needed_paths,
    replicated,
    to_device,
)
from mgjax.train.step import make_eval_step, make_train_step


class Interrupted(SystemExit):
    """The run was asked to stop: it has finished its step, saved and reported."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = key(20, "steps between two records in metrics.jsonl and TensorBoard", low=1)
    validate_every: int = key(0, "steps between two validations inside a stage (0: at its end alone)", low=0)


@dataclasses.dataclass(frozen=True)
class Feeds:
    """Where batches come from; each call starts a fresh iterator of host batches.

    Attributes:
        train: (stage, examples_seen, steps) → batches.
        validation, test: () → batches.
        eval_batch_size: rows of the global evaluation batch.
    """

    train: Callable[[Stage, int, int], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    eval_batch_size: int


def fetch(tree: Any) -> Any:
    """The one place where the loop waits for values of the device."""
    return jax.device_get(tree)


def fit(
    *,
    model,
    objective: Callable,
    metrics,
    augment,
    plan: Sequence[Stage],
    feeds: Feeds,
    seed: int,
    workdir: pathlib.Path,
    meta: dict,
    free: tuple[str, ...] = (),
    points: Mapping[str, OperatingPoint] | None = None,
    optim: OptimConfig = OptimConfig(),
    checkpoint: CheckpointConfig = CheckpointConfig(),
    log: LogConfig = LogConfig(),
) -> dict:
    """Trains by plan, evaluates on validation after each stage and on test at the end.

    Where `workdir` holds a checkpoint of the same run, it continues.

    Args:
        model: has `init`/`apply` of (inputs, op) and `everything`, as MultiGranularityModel.
        objective: (outputs, batch) → (loss, named scalars).
        metrics: `update(outputs, batch)` → sums inside jit, `compute(sums, full)` → figures, and
            three ways to show them, as ClassificationMetrics has.
        augment: (batch, rng, strength) → normalised batch; `.normalise(batch)` for evaluation.
        meta, free: see `Checkpoints`.
        points: name → further operating point at which the trained model is tested.

    Returns:
        params, train_flops, steps, seconds (training and validation, compilation included),
        stages, test, points (name → test figures), ready for JSON; and variables, the trained
        parameters and batch statistics for `model.apply`, as numpy arrays.

    Raises:
        InputError: a plan, batch size or checkpoint that does not fit; before any training.
        Interrupted: SIGTERM or Ctrl-C; the second one stops at once.
    """
    with _Signals() as signals:
        # What will run is checked before anything does.
        mesh = make_mesh()
        check_plan(plan, mesh.size)
        check_batch_size(feeds.eval_batch_size, mesh.size, "evaluation")
        example = next(feeds.train(plan[0], 0, 1))
        inputs = jax.eval_shape(lambda b: augment.normalise(b).inputs, example)
        optimizer = make_optimizer(optim)
        trains = [trained_paths(stage, needed_paths(model, stage.op, inputs)) for stage in plan]

        state = create_state(model, optimizer, inputs, seed, mesh)
        placed = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
        train_step = make_train_step(model, objective, augment, optimizer, seed, placed)
        eval_step = make_eval_step(model, metrics, augment.normalise, replicated(mesh))
        checkpoints = Checkpoints(workdir / "checkpoints", checkpoint, meta, free)
        state, position = checkpoints.restore(state) or (state, dataclasses.asdict(Position()))
        position = Position(**position)
        traced = [
            train_step.trace(
                state, _abstract(example, s.batch_size, mesh), np.float32(0), op=s.op, trains=t, strength=s.augment
            )
            for s, t in zip(plan, trains)
        ]
        # Stages that differ in nothing that is compiled share one executable.
        sameness = [(s.op, s.batch_size, t, s.augment) for s, t in zip(plan, trains)]
        compiled = functools.cache(lambda same: traced[sameness.index(same)].lower().compile())

        run = _Run(
            state, position, mesh, plan, feeds, checkpoints, Monitor(workdir, position.step), optim, checkpoint, log, workdir,
            step_fn=lambda i: compiled(sameness[i]),
            eval_step=eval_step,
            metrics=metrics,
            flops=[count_jaxpr(t.jaxpr.jaxpr).total * s.steps for t, s in zip(traced, plan)],
            trained=[count_params(state, t) for t in trains],
            points=points or {},
            signals=signals,
        )  # fmt: skip
        try:
            return run.all_stages()
        finally:
            run.monitor.close()
            checkpoints.close()


@dataclasses.dataclass
class Position:
    """Where a run is; goes into every checkpoint.

    Attributes:
        step: steps done over all stages.
        stage, step_in_stage: index of the stage, and steps done in it.
        examples_seen: position in the data.
        seconds, stage_seconds: spent so far, over all starts.
        stages: reports of the finished stages.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    examples_seen: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    stages: list = dataclasses.field(default_factory=list)

    @property
    def number(self) -> int:
        """Of a checkpoint here: the end of a stage is a place of its own, behind its last step."""
        return self.step + self.stage


@dataclasses.dataclass
class _Run:
    """What changes while a plan runs, and the two loops over it: stages, and steps in a stage."""

    state: TrainState
    position: Position
    mesh: jax.sharding.Mesh
    plan: Sequence[Stage]
    feeds: Feeds
    checkpoints: Checkpoints
    monitor: Monitor
    optim: OptimConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    workdir: pathlib.Path
    step_fn: Callable
    eval_step: Callable
    metrics: Any
    flops: list[int]
    trained: list[int]
    points: Mapping[str, OperatingPoint]
    signals: _Signals
    unread: tuple | None = None

    def __post_init__(self):
        self.began = time.monotonic() - self.position.seconds

    def all_stages(self) -> dict:
        position = self.position
        if position.step:
            self.monitor.say(f"continuing at step {position.step}, after {clock(position.seconds)} of training")
        while position.stage < len(self.plan):
            stage = self.plan[position.stage]
            began = time.monotonic() - position.stage_seconds
            self.leave_if_asked()
            self.one_stage(stage, began)
            val = self.evaluate(self.feeds.validation(), stage.op)
            seconds = round(time.monotonic() - began, 2)
            flops = self.flops[position.stage]
            report = {
                "name": stage.name,
                "steps": stage.steps,
                "seconds": seconds,
                "flops": flops,
                "params": self.trained[position.stage],
                "point": next((n for n, op in self.points.items() if op.asks_as(stage.op)), None),
                "val": val,
            }
            self.write_validation(val)
            self.monitor.say(f"stage {stage.name}: validation {self.metrics.headline(val)}  in {clock(seconds)}")
            position.stages.append(report)
            position.stage, position.step_in_stage, position.stage_seconds = position.stage + 1, 0, 0.0
            self.save()
        seconds = position.seconds
        # Only now is the test split read, once per operating point; nothing is chosen by it.
        test = self.evaluate(self.feeds.test(), self.plan[-1].op, full=True)
        at = {op: test for op in self.points.values() if op == self.plan[-1].op}
        points = {name: at.get(op) or self.evaluate(self.feeds.test(), op) for name, op in self.points.items()}
        return {
            "params": count_params(self.state),
            "train_flops": sum(self.flops),
            "steps": position.step,
            "seconds": round(seconds, 2),
            "stages": position.stages,
            "test": test,
            "points": points,
            "variables": fetch({"params": self.state.params, "batch_stats": self.state.stats}),
        }

    def one_stage(self, stage: Stage, began: float) -> None:
        position = self.position
        warmup = self.optim.warmup if stage.warmup is None else stage.warmup
        schedule = make_schedule(self.optim.learning_rate * stage.learning_rate, stage.steps, warmup, stage.end)
        rates = np.asarray(jax.vmap(schedule)(np.arange(stage.steps)), np.float32)
        self.monitor.start(stage.name, stage.steps, position.step_in_stage)
        if position.step_in_stage < stage.steps:
            train_step = self.step_fn(position.stage)
        self.pace = position.step_in_stage, time.monotonic()
        for batch in self.feeds.train(stage, position.examples_seen, stage.steps - position.step_in_stage):
            rate = rates[position.step_in_stage]
            self.state, scalars = train_step(self.state, to_device(batch, self.mesh), rate)
            # Scalars are read one step late, when the device already has its next step.
            self.read_scalars(stage)
            position.step += 1
            position.step_in_stage += 1
            position.examples_seen += stage.batch_size
            position.stage_seconds = time.monotonic() - began
            self.unread = position.step, position.step_in_stage, float(rate), scalars
            last = position.step_in_stage == stage.steps
            validate = not last and self.log.validate_every and position.step_in_stage % self.log.validate_every == 0
            save = not last and position.step % self.checkpoint.every == 0
            if last or validate or save or self.signals.received:
                self.read_scalars(stage)  # nothing unread is left behind
            self.leave_if_asked()
            if save:
                self.save()
            if validate:
                self.write_validation(self.evaluate(self.feeds.validation(), stage.op))
        self.monitor.stop()
        if position.step_in_stage < stage.steps:
            raise RuntimeError(f"stage '{stage.name}': the data ended after {position.step_in_stage} of {stage.steps} steps")

    def read_scalars(self, stage: Stage) -> None:
        if not self.unread:
            return
        (step, done, rate, scalars), self.unread = self.unread, None
        scalars = {k: float(v) for k, v in fetch(scalars).items()}
        before, since = self.pace
        speed = (done - before) * stage.batch_size / max(1e-9, time.monotonic() - since)
        # Time left by FLOPs, since a later stage may cost more per example.
        i = self.position.stage
        per_example = self.flops[i] / (stage.steps * stage.batch_size)
        left = per_example * (stage.steps - done) * stage.batch_size + sum(self.flops[i + 1 :])
        shown = self.metrics.progress(scalars)
        self.monitor.progress(stage.name, done, stage.steps, shown, speed, left / (per_example * speed))
        if step % self.log.every == 0:
            extra = {"stage": stage.name, "learning_rate": rate, "examples_per_second": round(speed, 2)}
            self.monitor.write(step, scalars | extra)

    def write_validation(self, figures: dict) -> None:
        self.monitor.write(self.position.step, {f"val/{k}": v for k, v in self.metrics.scalars(figures).items()})

    def evaluate(self, batches: Iterator[Batch], op: OperatingPoint, full: bool = False) -> dict:
        sums = None
        for batch in batches:
            new = self.eval_step(self.state.params, self.state.stats, to_device(batch, self.mesh), op=op)
            sums = new if sums is None else _add(sums, new)
            self.leave_if_asked()
        return self.metrics.compute(fetch(sums), full)

    def save(self) -> None:
        self.position.seconds = time.monotonic() - self.began
        self.checkpoints.save(self.position.number, self.state, dataclasses.asdict(self.position))

    def leave_if_asked(self) -> None:
        if self.signals.received:
            self.save()
            self.monitor.stop()
            self.monitor.say(f"stopped at step {self.position.step}; the same command with --workdir={self.workdir} continues")
            raise Interrupted(128 + self.signals.received)


# One program per pair of batches, not one per metric.
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _abstract(batch: Batch, rows: int, mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch of `rows` rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), batch)


class _Signals:
    """Notes the first SIGTERM or Ctrl-C; the second has its usual effect."""

    def __init__(self):
        self.received, self.before = 0, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: someone else handles signals
                pass
        return self

    def _note(self, number, frame):
        self.received = number
        self._restore()
        # Not print: the signal may have come in the middle of one, which cannot be entered twice.
        os.write(2, b"\nstopping after the step in flight; once more stops at once\n")

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *error):
        self._restore()
