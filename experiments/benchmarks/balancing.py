"""What balancing costs: the training step of 8 granularities on one shared trunk, method by method.

    python -m experiments.benchmarks.balancing [--rounds=9] [--batch=128] [--granularities=8] [--json=FILE]

The step is that of mgjax with the small residual network of `experiments.cifar_mg`; each granularity has a classifier of 100
classes of its own on the trunk's last features. Each round times every method once, in turn, over so many steps that one look
at the gradients is among them; printed are ratios to equal weights round by round: medians with quartiles. Methods that look
at gradients are timed with their default interval, and, in a row of its own, with a look at every step, where gradients are
computed anew each time and nothing is kept from the step before.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mgjax import Granularity, Head, MultiGranularityModel, Task
from mgjax.balancing import BALANCERS, Balancer, balancer
from mgjax.branches import ResNet
from mgjax.contracts import Batch
from mgjax.data import Augment
from mgjax.objective import Objective
from mgjax.train import OptimConfig
from mgjax.train.mesh import make_mesh, scalar_to_device, to_device
from mgjax.train.monitor import hardware
from mgjax.train.optim import make_optimizer
from mgjax.train.state import create_state, needed_paths
from mgjax.train.step import make_train_step

CLASSES = 100
SEED = 0


def model_of(granularities: int, side: int = 32) -> MultiGranularityModel:
    """So many granularities, each with a task and a head, that read one tap of one trunk."""
    names = [f"granularity{i + 1}" for i in range(granularities)]
    widths = (24, 48, 96) if side >= 16 else (4, 8)
    return MultiGranularityModel(
        [Granularity(n, "trunk", f"stage{len(widths)}") for n in names],
        [Task(n, n, CLASSES) for n in names],
        [Head(n, {n: "grad"}) for n in names],
        {"trunk": ResNet((1,) * len(widths), widths, stem="patch", downsample="pool")},
    )


class Case:
    """A compiled step and the state that it goes on from."""

    def __init__(self, balance: Balancer, granularities: int, batch: int, side: int):
        model, mesh = model_of(granularities, side), make_mesh(devices=jax.devices()[:1])
        objective, optimizer = Objective(model.tasks, model.heads, balance=balance), make_optimizer(OptimConfig())
        augment = Augment((120.0,) * 3, (60.0,) * 3)
        rng = np.random.default_rng(SEED)
        host = Batch(
            {"image": rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)},
            {t.target: rng.integers(0, CLASSES, batch).astype(np.int32) for t in model.tasks},
            np.ones(batch, bool),
            np.arange(batch, dtype=np.int32),
        )
        inputs = jax.eval_shape(lambda b: augment.normalise(b).inputs, host)
        self.state = create_state(model, optimizer, inputs, SEED, mesh, memory=objective.init)
        self.batch, self.rate = to_device(host, mesh), scalar_to_device(0.05, mesh)
        step = make_train_step(model, objective, augment, optimizer, SEED, mesh=mesh)
        asked = dict(op=model.everything, trains=needed_paths(model, model.everything, inputs), strength=1.0)
        self.step: Callable = step.lower(self.state, self.batch, self.rate, **asked).compile()

    def seconds(self, steps: int) -> float:
        """Of a step, in the mean of so many."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, seen = self.step(self.state, self.batch, self.rate)
        jax.block_until_ready((self.state, seen))
        assert np.isfinite(seen["loss"]), "the benchmark's loss is not finite"
        return (time.perf_counter() - began) / steps


def cases_of(granularities: int, batch: int, side: int) -> dict[tuple[str, int], Case]:
    """(method, interval) → case; equal weights come first."""
    wanted = [("equal", balancer("equal"))]
    for name in BALANCERS:
        if name != "equal":
            chosen = balancer(name)
            wanted.append((name, chosen))
            if chosen.seam and chosen.every > 1:
                wanted.append((name, dataclasses.replace(chosen, every=1)))
    return {(name, b.every if b.seam else 0): Case(b, granularities, batch, side) for name, b in wanted}


def measure(granularities: int = 8, batch: int = 128, rounds: int = 9, side: int = 32) -> dict[str, float]:
    """Times all methods in turn. Returns flat figures: milliseconds, ratios to equal weights, quartiles."""
    cases = cases_of(granularities, batch, side)
    steps = max(every for _, every in cases) or 1
    taken: dict = {key: [] for key in cases}
    for i, (key, case) in itertools.product(range(rounds + 1), cases.items()):
        seconds = case.seconds(steps)
        if i:  # the first round warms up
            taken[key].append(seconds)
    figures = {}
    equal = np.array(taken["equal", 0])
    for (name, every), of_case in taken.items():
        title = f"{name} every {every}" if every else name
        ratio = np.array(of_case) / equal
        figures[f"{title} ms"] = round(1e3 * float(np.median(of_case)), 3)
        if name != "equal":
            low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
            figures |= {f"{title} / equal": round(float(middle), 4)}
            figures |= {f"{title} / equal {q}": round(float(v), 4) for q, v in (("lower", low), ("upper", high))}
    return figures


def show(figures: dict[str, float]) -> None:
    table = Table()
    for column in ("method", "gradients", "ms a step", "/ equal weights", "quartiles"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for key, value in figures.items():
        if key.endswith(" ms"):
            title = key.removesuffix(" ms")
            name, _, every = title.partition(" every ")
            ratio = figures.get(f"{title} / equal")
            ends = (figures.get(f"{title} / equal {q}") for q in ("lower", "upper"))
            looked = f"every {every} steps" if every not in ("", "1") else "every step" if every else "none"
            spread = "–".join(f"{v:.3f}" for v in ends) if ratio else ""
            table.add_row(name, looked, f"{value:.1f}", f"{ratio:.3f}×" if ratio else "1", spread)
    Console(highlight=False).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--granularities", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels; below 16 the network is a tiny one")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, {hardware()}; batch {options.batch}, {options.granularities} granularities, seed {SEED}")
    figures = measure(options.granularities, options.batch, options.rounds, options.side)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
