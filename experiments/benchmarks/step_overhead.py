"""What our loop costs beside the step that it runs, and what several granularities cost in one step.

    python -m experiments.benchmarks.step_overhead [--pairs=20] [--steps=40] [--json=FILE] [--profile]

*The loop.* `mgjax.train.fit` as every experiment calls it (Grain, transfer, metrics, a record every 20 steps, console,
polling of checkpoints) against its own compiled step on a resident batch, on CIFAR-sized images in memory. Before a
batch is taken, every `--steps` steps, the feed pauses the loop: it waits until the device is idle, which ends a block,
and runs as many bare steps. A block is exactly that many batches, transfers, steps and readings of scalars. Grain reads
one batch for each that is taken, long before the next: in a pause it has nothing to do. A block begins with nothing
in flight, so that the host's work of one step in `--steps` is not hidden: the figure errs against the loop.

*Granularities.* One step of N granularities against N steps of one each, every one a program over a branch of its
own: N taps of one trunk (a transformer of 8 blocks, which the one step computes once, and the N steps down to each
tap), and N branches (transformers of 2 blocks) that share nothing but the augmented batch. The ratio of the FLOPs
says what sharing can give; N = 1 is one program twice.

Medians of ratios pair by pair, quartiles, range; at most 1.03 is wanted of the loop. CPU time is that of all threads, and
suffers less from what else runs. `--profile`: what the loop's own thread does in its blocks; slows it.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import datetime
import json
import pathlib
import pstats
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from experiments.vision import ModelConfig, build_model
from mgjax import Granularity, Head, MultiGranularityModel, Task, Taxonomy
from mgjax.branches import ViT
from mgjax.data import ArraySource, Augment, eval_batches, train_batches
from mgjax.flops import count_jaxpr
from mgjax.metrics import ClassificationMetrics
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, Feeds, MeshConfig, OptimConfig, Stage, TrainConfig, fit
from mgjax.train.mesh import make_mesh, scalar_to_device, to_device
from mgjax.train.meter import use_compilation_cache
from mgjax.train.monitor import hardware
from mgjax.train.optim import make_optimizer
from mgjax.train.stages import trained_paths
from mgjax.train.state import create_state, needed_paths
from mgjax.train.step import make_train_step

SIDE, SEED, WARM = 32, 0, 8  # pixels; of everything random; steps of the loop before the first block
BLOCKS = 8  # of the tapped trunk
LEVELS = {"super": [f"s{i}" for i in range(20)], "class": [f"c{i}" for i in range(100)]}
TREE = Taxonomy.from_names(LEVELS, {"class": [i // 5 for i in range(100)]})
AUGMENT = Augment((127.5,) * 3, (73.9,) * 3)


class Resident:
    """The compiled step of a stage, made as `fit` makes it, on a state and a batch that stay on the device."""

    def __init__(self, model: MultiGranularityModel, stage: Stage, source: ArraySource):
        mesh, optimizer, batch = make_mesh(), make_optimizer(OptimConfig()), next(batches(source, stage.batch_size, 0, 1))
        inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, batch)
        self.state = create_state(model, optimizer, inputs, SEED, mesh, MeshConfig().shard_above)
        step = make_train_step(
            model, Objective(model.tasks, model.heads), AUGMENT, optimizer, SEED,
            mesh=mesh, shardings=jax.tree.map(lambda x: x.sharding, self.state),
        )  # fmt: skip
        self.arguments = to_device(batch, mesh), scalar_to_device(np.float32([1e-3]), mesh)  # one per parameter group
        trains = trained_paths(stage, needed_paths(model, stage.op, inputs))
        traced = step.trace(self.state, *self.arguments, op=stage.op, trains=trains, strength=stage.augment)
        self.flops, self.compiled = count_jaxpr(traced.jaxpr.jaxpr).total, traced.lower().compile()

    def run(self, steps: int) -> None:
        """Dispatches so many steps, and does not wait for them."""
        for _ in range(steps):
            self.state, _ = self.compiled(self.state, *self.arguments)


def wait() -> np.ndarray:
    """Time and CPU time, in seconds, once all that was dispatched is computed (effects_barrier waits for no results)."""
    jax.block_until_ready(jax.live_arrays())
    return np.array([time.perf_counter(), time.process_time()])


def examples(count: int) -> ArraySource:
    """So many images in memory."""
    rng = np.random.default_rng(SEED)
    label = rng.integers(0, 100, count, np.int32)
    image = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    return ArraySource({"image": image, "class": label, "super": label // 5}, "benchmark")


def batches(source: ArraySource, size: int, seen: int, steps: int) -> Iterator:
    """As every experiment takes them."""
    return train_batches(source, TREE, batch_size=size, seed=SEED, examples_seen=seen, steps=steps)


def interleave(feed: Iterator, count: int, steps: int, bare: Resident, seconds: list, profile=None) -> Iterator:
    """Yields the `count` batches of a feed, and pauses the loop; (a block of it, as many bare steps) goes to `seconds`."""
    resumed = None
    for i in range(count):
        if i >= WARM and (i - WARM) % steps == 0:
            if profile:
                profile.disable()
            paused = wait()
            bare.run(steps)
            ended = wait()
            if resumed is not None:  # the first bare block warms up
                seconds.append((paused - resumed, ended - paused))
            if profile and i + steps < count:
                profile.enable()
            resumed = wait()
        yield next(feed)


def loop_model(width: float) -> MultiGranularityModel:
    """The trunk, tapped twice, that CIFAR-100 is trained with on a CPU."""
    config = ModelConfig(branch="resnet", stem="patch", downsample="pool", widths=(64, 128, 256), width=width)
    return build_model(config, "taps", TREE, (SIDE, SIDE, 3))


def run_loop(pairs: int, steps: int, size: int, width: float, images: int, profile=None) -> np.ndarray:
    """Seconds [2, 2, pairs]: time and CPU time of a step in the loop and of a bare step."""
    model, source, few, seconds = loop_model(width), examples(images), examples(size), []
    # The loop takes no batch behind the last step, so one more step lets it come to the last pause.
    stage = Stage("joint", model.everything, WARM + pairs * steps + 1, size)
    bare = Resident(model, stage, source)
    held_out = lambda: eval_batches(few, TREE, batch_size=size)
    train = lambda _, seen, count: interleave(batches(source, size, seen, count), count, steps, bare, seconds, profile)
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/console", "w") as file, contextlib.redirect_stdout(file):
        fit(
            model=model, objective=Objective(model.tasks, model.heads), augment=AUGMENT, plan=(stage,), seed=SEED,
            metrics=ClassificationMetrics(TREE, model.tasks, model.heads), feeds=Feeds(train, held_out, held_out, size),
            workdir=pathlib.Path(folder), meta={"experiment": "step_overhead", "config": {}},
            config=TrainConfig(checkpoint=CheckpointConfig(every=2 * stage.steps)),  # none falls into a block
        )  # fmt: skip
    return np.array(seconds).T / steps


def declared(form: str, count: int) -> tuple[MultiGranularityModel, list[MultiGranularityModel]]:
    """Granularities that are taps of one trunk, or have a branch each; and each alone, on no more than it needs."""
    at = [BLOCKS * (i + 1) // count for i in range(count)] if form == "taps" else [2] * count
    of = ["trunk" if form == "taps" else f"branch{i}" for i in range(count)]
    return composed(dict(zip(of, at)), at, of), [composed({name: depth}, [depth], [name]) for name, depth in zip(of, at)]


def composed(depths: dict[str, int], at: Sequence[int], of: Sequence[str]) -> MultiGranularityModel:
    """One granularity and head per tap: the block `at` of the branch `of`; branches have `depths` blocks."""
    names = [f"g{i}" for i in range(len(at))]
    vit = lambda depth: ViT(features=64, depth=depth, heads=4, patch=8, image_size=SIDE, pool="mean")
    return MultiGranularityModel(
        [Granularity(n, branch, f"block{block}") for n, branch, block in zip(names, of, at)],
        [Task(n, "class", 100) for n in names],
        [Head(n, {n: "grad"}) for n in names],
        {name: vit(depth) for name, depth in depths.items()},
    )


def compare(form: str, count: int, rounds: int, size: int = 32, steps: int = 4) -> tuple[np.ndarray, float]:
    """Seconds [2, rounds] of `count` granularities in one step and in several, and the ratio of their FLOPs."""
    (joint, alone), source = declared(form, count), examples(size)
    one, *several = (Resident(m, Stage("joint", m.everything, 1, size), source) for m in (joint, *alone))
    seconds = np.zeros((2, rounds + 1))
    for i in range(rounds + 1):
        for j in (i % 2, 1 - i % 2):
            began = wait()
            for _ in range(steps):
                for program in several if j else [one]:
                    program.run(1)
            seconds[j, i] = (wait() - began)[0] / steps
    return seconds[:, 1:], one.flops / sum(program.flops for program in several)  # the first round warms up


def spread(name: str, values: np.ndarray, digits: int) -> tuple[dict[str, float], str]:
    """Median, quartiles and range, under names of their own and in words."""
    of = {"": 0.5, " lower quartile": 0.25, " upper quartile": 0.75, " smallest": 0.0, " largest": 1.0}
    figures = {name + which: round(float(np.quantile(values, share)), 4) for which, share in of.items()}
    median, low, high, least, most = (f"{v:.{digits}f}" for v in figures.values())
    return figures, f"{name}: {median} (quartiles {low}–{high}; {least}–{most})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(pairs=20, steps=40, batch=64, images=50_000, rounds=9, most=8).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--width", type=float, default=0.5, help="factor on the channels of the loop's model")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    use_compilation_cache("auto")  # what is the same program is compiled once
    print("python -m experiments.benchmarks.step_overhead", shlex.join(sys.argv[1:] if arguments is None else arguments))
    print(f"{datetime.date.today()}, jax {jax.__version__}, {hardware()}; {options.pairs} pairs of {options.steps} steps")
    profile = cProfile.Profile() if options.profile else None
    (loop, bare), of_cpu = run_loop(options.pairs, options.steps, options.batch, options.width, options.images, profile)
    figures, ratios = {}, {"loop / bare": loop / bare, "loop / bare CPU time": of_cpu[0] / of_cpu[1]}
    for name, values in (ratios | {"bare step ms": bare * 1e3}).items():
        of, said = spread(name, values, 3)
        figures |= of
        print(said, flush=True)
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    for form in ("taps", "branches"):
        for n in (n for n in (1, 2, 4, 8) if n <= options.most):
            seconds, flops = compare(form, n, options.rounds)
            case, (one, several) = f"{form} N={n}", np.median(seconds, 1) * 1e3
            ratio, said = spread(f"{case} one / several", seconds[0] / seconds[1], 2)
            print(f"{said}; by FLOPs {flops:.2f}; {one:.1f} / {several:.1f} ms", flush=True)
            parts = {"one step ms": one, "several steps ms": several, "one / several by FLOPs": flops}
            figures |= ratio | {f"{case} {part}": round(float(v), 4) for part, v in parts.items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
