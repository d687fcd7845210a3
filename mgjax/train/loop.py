"""The loop around the one compiled step: stages, evaluation, checkpoints, resume, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console

from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.flops import Flops, count_jaxpr
from mgjax.granularity import DeclarationError, OperatingPoint
from mgjax.train.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from mgjax.train.distributed import is_main
from mgjax.train.guards import Best, GuardConfig, NonFiniteError, StopConfig, check_metric, check_patience, keep_batch
from mgjax.train.mesh import (
    MeshConfig,
    batch_sharding,
    gathered,
    make_mesh,
    scalar_to_device,
    sharding_table,
    to_device,
)
from mgjax.train.meter import Compilations, Pace, ProfileConfig, Profiler, peak_memory
from mgjax.train.monitor import Monitor, clock
from mgjax.train.optim import OptimConfig, ParamGroup, make_optimizer
from mgjax.train.position import Position
from mgjax.train.signals import StopSignals
from mgjax.train.stages import Stage, check_batch_size, check_plan, schedule_of, trained_paths
from mgjax.train.state import TrainState, check_growth, count_params, create_state, grow, init_fn, needed_paths
from mgjax.train.step import make_contributions, make_eval_step, make_train_step

log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """The run was asked to stop: it has finished its step, saved and reported."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = key(20, "steps between two records in metrics.jsonl and TensorBoard", low=1)
    validate_every: int = key(0, "steps between two validations inside a stage (0: at its end alone)", low=0)
    contributions: int = key(
        0,
        "steps between two records of what each head, granularity and penalty contributes to loss and gradient, which costs "
        "a few steps each time (0: none)",
        low=0,
    )
    wandb: str = key("", "project of Weights & Biases to which records go too (empty: none)")


@dataclasses.dataclass(frozen=True)
class Feeds:
    """Where batches come from; each call starts a fresh iterator of host batches.

    Attributes:
        train: (stage, examples_seen, steps) → batches.
        validation, test: () → batches.
        eval_batch_size: rows of the global evaluation batch.
        examples: of an epoch; 0 = epochs are not told.
    """

    train: Callable[[Stage, int, int], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    eval_batch_size: int
    examples: int = 0


def fetch(tree: Any) -> Any:
    """The one place where the loop waits for values of the device."""
    return jax.device_get(tree)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a plan is run; every part has its own keys."""

    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    stop: StopConfig = StopConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()


# Keys of TrainConfig that may change when a run is continued: they do not change what it computes, or are there
# to be changed, as the policy that gets a run past a bad batch is.
FREE = (
    *(f"mesh.{f.name}" for f in dataclasses.fields(MeshConfig)),
    *(f"checkpoint.{f.name}" for f in dataclasses.fields(CheckpointConfig)),
    *(f"guard.{f.name}" for f in dataclasses.fields(GuardConfig)),
    "log.every",
    "log.contributions",
    "log.wandb",
    *(f"profile.{f.name}" for f in dataclasses.fields(ProfileConfig)),
    "stop.use",
)


def fit(
    *,
    model,
    objective,
    metrics,
    augment,
    plan: Sequence[Stage],
    feeds: Feeds,
    seed: int,
    workdir: pathlib.Path,
    meta: dict,
    free: tuple[str, ...] = (),
    points: Mapping[str, OperatingPoint] | None = None,
    config: TrainConfig = TrainConfig(),
    groups: Sequence[ParamGroup] = (),
) -> dict:
    """Trains by plan, evaluates on validation after each stage and on test at the end.

    Where `workdir` holds a checkpoint of the same run, it continues, on whatever mesh and number of
    processes. All processes call it alike; process 0 alone writes and speaks.

    Args:
        model: has `init`/`apply` of (inputs, op) and `everything`, as MultiGranularityModel.
        objective: as `mgjax.objective.Objective`: the losses of all heads, what weighs them, and what it keeps.
        metrics: `update(outputs, batch)` → sums inside jit, `compute(sums, full)` → figures, and
            three ways to show them, as ClassificationMetrics has.
        augment: (batch, rng, strength) → normalised batch; `.normalise(batch)` for evaluation.
        meta, free: see `Checkpoints`.
        points: name → further operating point at which the trained model is tested.
        groups: how parameters are optimised that are not optimised as `config.optim` says. If there are any, every parameter
            belongs to one: end with `ParamGroup("*")`, which takes the rest as `config.optim` has it.

    Returns:
        params, train_flops, steps, seconds (training and validation, compilation included),
        stages, test, points (name → test figures), compile, memory, mfu and what else happened, ready
        for JSON; and variables, the trained parameters and batch statistics for `model.apply`, as
        numpy arrays.

    Raises:
        InputError: a plan, mesh, batch size or checkpoint that does not fit, before any training; a
            loss that is not finite, if that ends the run; a checkpoint that could not be written.
        Interrupted: SIGTERM or Ctrl-C; the second one stops at once.
    """
    with StopSignals() as signals:
        # What will run is checked before anything does.
        compilations, optim = Compilations(), config.optim
        mesh = make_mesh(config.mesh)
        check_plan(plan, mesh.size, optim.accumulate)
        check_batch_size(feeds.eval_batch_size, mesh.size, "evaluation")
        check_metric(config.stop.metric, metrics.names, "--config.stop.metric")
        learned = []
        for stage in plan:
            check_metric(stage.metric, metrics.names, f"the metric of stage '{stage.name}'")
            patience = config.stop.patience if stage.patience is None else stage.patience
            check_patience(patience, config.log.validate_every, stage.name)
            tasks = objective.learned(stage.op.tasks, stage.weights, f"stage '{stage.name}'")
            learned.append(dataclasses.replace(stage.op, tasks=tasks))
        # What is not augmented may be of another size than what is.
        examples = {s.augment: s for s in reversed(plan)}
        examples = {strength: next(feeds.train(stage, 0, 1)) for strength, stage in examples.items()}
        inputs = jax.eval_shape(lambda b: augment.normalise(b).inputs, examples[plan[0].augment])
        # What no loss counts of has no gradient: it stays as it is, and does not decay.
        trains = [trained_paths(stage, needed_paths(model, op, inputs)) for stage, op in zip(plan, learned)]
        params = jax.eval_shape(init_fn(model, model.everything, inputs), jax.random.key(0))["params"]
        params = flatten_dict(params, sep="/")
        for source, target in (pair for stage in plan for pair in stage.grows):
            check_growth(params, source, target)
        optimizer = make_optimizer(optim, groups, params)
        rates = [optimizer.rates(*schedule_of(stage, optim)) for stage in plan]

        state = create_state(model, optimizer, inputs, seed, mesh, config.mesh.shard_above, objective.init)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        train_step = make_train_step(
            model, objective, augment, optimizer, seed,
            mesh=mesh, shardings=shardings, accumulate=optim.accumulate,
        )  # fmt: skip
        eval_step = make_eval_step(model, metrics, augment.normalise, mesh)
        if config.mesh.show and is_main():
            Console(width=120).print(sharding_table(flatten_dict(state.params, sep="/")))
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, meta, free)
        best = Checkpoints(workdir / "best", dataclasses.replace(config.checkpoint, keep=2), meta, free)
        state, position = checkpoints.restore(state) or (state, {})
        position = Position.of(position)
        best.discard_after(position.best.number)  # what came after the checkpoint comes again
        rate = scalar_to_device(rates[0][0], mesh)
        static = [
            dict(op=s.op, trains=t, strength=s.augment, pieces=s.pieces, weights=tuple(s.weights)) for s, t in zip(plan, trains)
        ]
        traced = [
            train_step.trace(state, _abstract(examples[s.augment], s.batch_size, mesh), rate, **asked)
            for s, asked in zip(plan, static)
        ]
        # Stages that differ in nothing that is compiled share one executable.
        sameness = [(s.batch_size, *asked.values()) for s, asked in zip(plan, static)]
        compiled = Executables(lambda same: traced[sameness.index(same)].lower().compile())
        contributions = make_contributions(model, objective, augment, optimizer, seed, mesh=mesh, accumulate=optim.accumulate)

        monitor = Monitor(workdir, position.step, quiet=not is_main(), wandb=config.log.wandb, meta=meta)
        run = _Run(
            state, position, mesh, plan, feeds, checkpoints, best, monitor, config, workdir,
            profiler=Profiler(config.profile, workdir / "profile"),
            step_fn=lambda i: compiled[sameness[i]],
            contributions=lambda i, state, batch: contributions(state, batch, **static[i]),
            end_epoch=jax.jit(
                lambda state: state.replace(memory=objective.end_epoch(state.memory)), out_shardings=shardings, donate_argnums=0
            ),
            grow=lambda pairs: jax.jit(lambda state: grow(state, pairs), out_shardings=shardings),
            rates=rates,
            eval_step=eval_step,
            metrics=metrics,
            flops=[count_jaxpr(t.jaxpr.jaxpr) for t in traced],
            trained=[count_params(state, t) for t in trains],
            points=points or {},
            signals=signals,
        )  # fmt: skip
        try:
            report = run.all_stages()
        finally:
            failed = isinstance(sys.exc_info()[1], Exception)
            with contextlib.ExitStack() as closing:
                for part in (best, checkpoints, monitor, run.profiler):
                    # What ended the run is what is told.
                    closing.callback(_quietly if failed else _plainly, part.close)
        return report | {
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "compile": {"train_programs": len(compiled)} | compilations.figures(),
            "memory": peak_memory(compiled.values()),
        }


class Executables(dict):
    """Compiled programs by what they were compiled for; one is compiled when it is first asked for."""

    def __init__(self, compile: Callable):
        super().__init__()
        self.compile = compile

    def __missing__(self, what):
        self[what] = self.compile(what)
        return self[what]


class _Unread(NamedTuple):
    """A step whose scalars are still on the device."""

    step: int
    done: int
    examples_seen: int
    rate: float
    batch: Batch
    scalars: Mapping


class _RolledBack(Exception):
    """State and position are those of a checkpoint again."""


@dataclasses.dataclass
class _Run:
    """What changes while a plan runs, and the two loops over it: stages, and steps in a stage."""

    state: TrainState
    position: Position
    mesh: jax.sharding.Mesh
    plan: Sequence[Stage]
    feeds: Feeds
    checkpoints: Checkpoints
    best: Checkpoints
    monitor: Monitor
    config: TrainConfig
    workdir: pathlib.Path
    profiler: Profiler
    step_fn: Callable
    contributions: Callable
    end_epoch: Callable
    grow: Callable
    rates: list[np.ndarray]
    eval_step: Callable
    metrics: Any
    flops: list[Flops]
    trained: list[int]
    points: Mapping[str, OperatingPoint]
    signals: StopSignals
    unread: _Unread | None = None

    def __post_init__(self):
        self.began = time.monotonic() - self.position.seconds
        self.pace = Pace(self.mesh.size)

    def all_stages(self) -> dict:
        if self.position.step:
            self.monitor.say(f"continuing at step {self.position.step}, after {clock(self.position.seconds)} of training")
        elif self.config.guard.nonfinite == "rollback":
            self.save()  # there is always a checkpoint to roll back to
        while self.position.stage < len(self.plan):
            stage = self.plan[self.position.stage]
            self.stage_began = time.monotonic() - self.position.stage_seconds
            self.leave_if_asked()
            try:
                self.one_stage(stage)
                self.end_of_stage(stage)
            except _RolledBack:
                pass
        position = self.position
        seconds = position.seconds
        if self.config.stop.use == "best" and position.best.number >= 0:
            self.best.discard_after(position.best.number)
            self.state, saved = self.best.restore(self.state) or (self.state, {"best": {}})
            if saved["best"].get("number") != position.best.number:
                raise CheckpointError(f"'{self.best.directory}': checkpoint {position.best.number}, the best, is not there")
        # Only now is the test split read, once per operating point; nothing is chosen by it.
        test = self.evaluate(self.feeds.test(), self.plan[-1].op, full=True)
        at = {op: test for op in self.points.values() if op == self.plan[-1].op}
        points = {name: at.get(op) or self.evaluate(self.feeds.test(), op) for name, op in self.points.items()}
        return {
            "params": count_params(self.state),
            "train_flops": sum(s["flops"] for s in position.stages),
            "steps": position.step,
            "seconds": round(seconds, 2),
            "stages": position.stages,
            "tested": self.config.stop.use,
            "best": dataclasses.asdict(position.best) if position.best.metric else None,
            "skipped": position.skipped,
            "rollbacks": position.rollbacks,
            **self.pace.whole(),
            "test": test,
            "points": points,
            "variables": fetch(gathered(self.state.variables, self.mesh)),
        }

    def end_of_stage(self, stage: Stage) -> None:
        position = self.position
        val = self.evaluate(self.feeds.validation(), stage.op)
        seconds = round(time.monotonic() - self.stage_began, 2)
        report = {
            "name": stage.name,
            "steps": position.step_in_stage,
            "seconds": seconds,
            "flops": self.flops[position.stage].total * position.step_in_stage,
            "params": self.trained[position.stage],
            "point": next((n for n, op in self.points.items() if op.asks_as(stage.op)), None),
            "val": val,
        }
        self.write_validation(val)
        self.monitor.say(f"stage {stage.name}: validation {self.metrics.headline(val)}  in {clock(seconds)}")
        position.stages.append(report)
        position.stage, position.step_in_stage, position.stage_seconds = position.stage + 1, 0, 0.0
        position.ended = position.grown = False
        self.judge(val)
        position.best.end_stage()
        self.save()

    def one_stage(self, stage: Stage) -> None:
        """Trains to the end of a stage, from wherever it is. Raises _RolledBack."""
        position, config = self.position, self.config
        validate_every, rates = config.log.validate_every, self.rates[position.stage]
        self.start_grown(stage)
        self.monitor.start(stage.name, stage.steps, position.step_in_stage)
        batches, coming, train_step = None, None, None
        # What is due follows from the position alone, so that a run continues in the midst of it.
        while True:
            done = position.step_in_stage
            inside = 0 < done < stage.steps
            if inside and validate_every and done % validate_every == 0 and position.validated < position.step:
                self.validate(stage)
            if inside and position.step % config.checkpoint.every == 0 and not position.ended:
                self.save()
            if position.ended or done == stage.steps:
                break
            if batches is None:
                batches = iter(self.feeds.train(stage, position.examples_seen, stage.steps - done))
                train_step, coming = self.step_fn(position.stage), self.take(batches)
                self.pace.start(done)  # without compilation, and the start of what reads
            if coming is None:
                raise RuntimeError(f"stage '{stage.name}': the data ended after {done} of {stage.steps} steps")
            self.tell_epoch()
            (batch, placed), rate = coming, scalar_to_device(rates[done], self.mesh)
            if config.log.contributions and position.step % config.log.contributions == 0:
                self.read_scalars(stage)  # records are in order
                said = fetch(self.contributions(position.stage, self.state, placed))
                self.monitor.write(position.step + 1, {k: float(v) for k, v in said.items()} | {"stage": stage.name})
                self.pace.restart()
            # Whatever would wait for the device, except for the one fetch, is an error where transfers can be told.
            with jax.transfer_guard_device_to_host("disallow"):
                with self.profiler.step(position.step + 1), jax.transfer_guard("disallow"):
                    self.state, scalars = train_step(self.state, placed, rate)
                # While it computes: the next batch is read and sent, and the scalars of the last step are read.
                coming = self.take(batches) if done + 1 < stage.steps else None
            self.read_scalars(stage)
            position.step += 1
            position.step_in_stage += 1
            position.examples_seen += stage.batch_size
            position.stage_seconds = time.monotonic() - self.stage_began
            self.pace.stepped(self.flops[position.stage].matmul)
            self.unread = _Unread(
                position.step, position.step_in_stage, position.examples_seen, float(rates[done][0]), batch, scalars
            )
            if self.due(stage):
                self.read_scalars(stage)  # nothing unread is left behind
            self.leave_if_asked()
            self.checkpoints.poll()
            if self.profiler.after(scalars):
                self.monitor.say(f"profile of {config.profile.steps} steps: {self.workdir / 'profile'}")
        self.monitor.stop()

    def start_grown(self, stage: Stage) -> None:
        """Lets a stage begin with what other parts have learned; once, however often it is started."""
        if stage.grows and not self.position.grown:
            params = flatten_dict(self.state.params, sep="/")
            for source, target in stage.grows:
                taken = check_growth(params, source, target)
                self.monitor.say(f"stage {stage.name}: {taken:,} parameters of {target} start from those of {source}")
            self.state = self.grow(stage.grows)(self.state)
        self.position.grown = True

    def tell_epoch(self) -> None:
        """Tells the objective of each whole pass over the data, once."""
        epoch = self.position.examples_seen // self.feeds.examples if self.feeds.examples else 0
        while self.position.epoch < epoch:
            if jax.tree.leaves(self.state.memory):
                self.state = self.end_epoch(self.state)
            self.position.epoch += 1

    def due(self, stage: Stage) -> bool:
        """Whether something else than a step comes next: a validation, a checkpoint, the end of the stage."""
        done, every = self.position.step_in_stage, self.config.log.validate_every
        return bool(
            done == stage.steps or (every and done % every == 0) or self.position.step % self.config.checkpoint.every == 0
        )

    def take(self, batches: Iterator[Batch]) -> tuple[Batch, Batch] | None:
        """The next batch, on the host and on its way to the device; None after the last one."""
        with self.pace.waiting():
            batch = next(batches, None)
        return None if batch is None else (batch, to_device(batch, self.mesh))

    def validate(self, stage: Stage) -> None:
        """In the midst of a stage; may end it."""
        figures = self.evaluate(self.feeds.validation(), stage.op)
        self.write_validation(figures)
        self.position.validated = self.position.step
        patience = self.config.stop.patience if stage.patience is None else stage.patience
        best, known = self.position.best, self.metrics.scalars(figures)
        if stage.metric and stage.metric not in known:
            raise DeclarationError(f"stage '{stage.name}' does not answer its metric '{stage.metric}'; it has {sorted(known)}")
        named = [m for m in (stage.metric, self.config.stop.metric) if m in known]
        metric = named[0] if named else self.metrics.own(figures)
        if best.see_stage(metric, known[metric]) >= patience > 0:
            self.position.ended = True
            self.monitor.say(
                f"stage {stage.name} ends early: no better {metric} than {best.in_stage:.4f} in {patience} validations"
            )
        self.judge(figures)
        if best.number == self.position.number:
            self.save()  # the newest checkpoint names a best one that is there
        self.pace.restart()

    def judge(self, figures: Mapping) -> None:
        """Compares a validation with the best one, which is saved, if the stage answers that task."""
        metric, known = self.config.stop.metric or self.metrics.main, self.metrics.scalars(figures)
        if metric in known and self.position.best.see(metric, known[metric], self.position.number):
            self.checkpoints.settle()  # the one that names the best before this one
            self.best.save(self.position.number, self.state, self.record())

    def read_scalars(self, stage: Stage) -> None:
        """Reads what the last step said of itself, and does what a loss that is not finite asks for."""
        if not self.unread:
            return
        last, self.unread = self.unread, None
        scalars = {k: float(v) for k, v in fetch(last.scalars).items()}
        if scalars["finite"] < 1:
            self.not_finite(stage, last, scalars)
        else:
            self.position.skipped_in_row = 0
        speed = self.pace.speed(last.done) * stage.batch_size
        # Time left by FLOPs, since a later stage may cost more per example.
        i = self.position.stage
        cost = self.flops[i].total / stage.batch_size
        rest = sum(f.total * s.steps for f, s in zip(self.flops[i + 1 :], self.plan[i + 1 :]))
        left = (cost * (stage.steps - last.done) * stage.batch_size + rest) / max(1e-9, cost * speed)
        self.monitor.progress(stage.name, last.done, stage.steps, self.metrics.progress(scalars), speed, left)
        if last.step % self.config.log.every == 0:
            extra = {"stage": stage.name, "learning_rate": last.rate, "examples_per_second": round(speed, 2)}
            self.monitor.write(last.step, scalars | extra | self.pace.read())

    def not_finite(self, stage: Stage, last: _Unread, scalars: Mapping) -> None:
        """Keeps the batch, and stops, goes on or rolls back."""
        policy, position, limit = self.config.guard.nonfinite, self.position, self.config.guard.limit
        kept = keep_batch(last.batch, last.step, self.workdir)
        named = ", ".join(str(i) for i in np.asarray(last.batch.index)[:8])
        said = (
            f"step {last.step}, stage '{stage.name}': the loss is {scalars['loss']}, the gradient's norm "
            f"{scalars['grad_norm']}; the batch, examples {named}, …, {kept}"
        )
        position.skipped += 1
        position.skipped_in_row += 1
        if policy == "stop" or (policy == "skip" and position.skipped_in_row > limit):
            again = " in a row" if policy == "skip" else ""
            raise NonFiniteError(
                f"{said}. {position.skipped_in_row} batch{'es' * bool(again)}{again} not finite: lower "
                "--config.optim.learning_rate, set --config.optim.clip, or go on with --config.guard.nonfinite=skip or rollback"
            )
        if policy == "rollback":
            if position.rollbacks >= limit:
                raise NonFiniteError(f"{said}. This was after {limit} rollbacks: --config.guard.limit")
            self.roll_back(last, position)
            self.monitor.say(f"{said}. Rolled back to step {self.position.step}; that data is passed over")
            raise _RolledBack
        self.monitor.say(f"{said}. Skipped")

    def roll_back(self, last: _Unread, position: Position) -> None:
        """To the newest checkpoint, but with the data behind the batch that was not finite."""
        self.checkpoints.discard_after(position.number)  # waits for what is being saved
        self.state, saved = self.checkpoints.restore(self.state)
        self.position = dataclasses.replace(
            Position.of(saved),
            examples_seen=last.examples_seen,
            skipped=position.skipped,
            rollbacks=position.rollbacks + 1,
            stage_seconds=position.stage_seconds,
        )
        if self.position.best.number not in self.best.manager.all_steps():
            self.position.best = Best()  # a later one has taken its place, and is undone
        self.best.discard_after(self.position.best.number)
        self.monitor.rewind(self.position.step)
        self.save()  # the data that is passed over stays so, and the count counts, whatever happens next

    def write_validation(self, figures: dict) -> None:
        self.monitor.write(self.position.step, {f"val/{k}": v for k, v in self.metrics.scalars(figures).items()})

    def evaluate(self, batches: Iterator[Batch], op: OperatingPoint, full: bool = False) -> dict:
        sums = None
        for batch in batches:
            new = self.eval_step(self.state.variables, to_device(batch, self.mesh), op=op)
            sums = new if sums is None else _add(sums, new)
            self.leave_if_asked()
        return self.metrics.compute(fetch(sums), full)

    def record(self) -> dict:
        """The position, as it goes into a checkpoint."""
        self.position.seconds = time.monotonic() - self.began
        return dataclasses.asdict(self.position)

    def save(self) -> None:
        self.best.settle()  # what the position names is there before it is
        self.checkpoints.save(self.position.number, self.state, self.record())
        self.pace.restart()

    def leave_if_asked(self) -> None:
        if number := self.signals.asked():
            if self.unread:
                self.read_scalars(self.plan[self.position.stage])
            self.save()
            self.monitor.stop()
            self.monitor.say(f"stopped at step {self.position.step}; the same command with --workdir={self.workdir} continues")
            raise Interrupted(128 + number)


def _plainly(close: Callable) -> None:
    close()


def _quietly(close: Callable) -> None:
    """Closes, and only mentions what goes wrong."""
    try:
        close()
    except Exception as error:
        log.warning("after the error that ended the run: %s", error)


# One program per pair of batches, not one per metric.
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def _abstract(batch: Batch, rows: int, mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch of `rows` rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), batch)
