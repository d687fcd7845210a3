"""A tiny model and dataset that train in seconds; shared by the tests of training."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from mgjax import Granularity, Head, MultiGranularityModel, OperatingPoint, Task, Taxonomy
from mgjax.branches import ResNet
from mgjax.data import ArraySource, Augment, eval_batches, train_batches
from mgjax.metrics import ClassificationMetrics
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, Feeds, LogConfig, OptimConfig, Stage, TrainConfig, coarse_to_fine, fit

TREE = Taxonomy.from_names({"super": ["a", "b"], "sub": ["a1", "a2", "b1", "b2"]}, {"sub": [0, 0, 1, 1]})
COARSE, FINE = OperatingPoint(("coarse",), ("super",)), OperatingPoint(("fine",), ("sub",))


def model(norm="batch", dtype=jnp.float32):
    return MultiGranularityModel(
        [Granularity("coarse", "trunk", "stage1"), Granularity("fine", "trunk", "stage2")],
        [Task("super", "super", 2, "super"), Task("sub", "sub", 4, "sub")],
        [Head("super", {"coarse": "grad", "fine": "stop"}), Head("sub", {"fine": "grad"})],
        {"trunk": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar", norm=norm, dtype=dtype)},
    )


def source(n=100, seed=0):
    """Classes differ in brightness and in which half is bright."""
    rng = np.random.default_rng(seed)
    sub = np.arange(n) % 4
    image = rng.integers(0, 60, (n, 8, 8, 3))
    image[sub >= 2] += 90
    image[sub % 2 == 0, :4] += 90
    return ArraySource({"image": image.astype(np.uint8), "super": TREE.parents[1][sub], "sub": sub.astype(np.int32)}, "toy")


def plan(steps=(3, 3, 4), batch_size=16):
    return coarse_to_fine(
        [("super", COARSE), ("sub", FINE)],
        model().everything,
        steps_alone=steps[:2],
        steps_together=steps[2],
        batch_size=batch_size,
    )


def watched(batches, at):
    """Calls `at(i)` before batch i is handed out."""
    for i, batch in enumerate(batches):
        at(i)
        yield batch


def feeds(at=lambda i: None, batch_size=24):
    train, held_out = source(), source(50, seed=1)
    evaluated = lambda: eval_batches(held_out, TREE, batch_size=batch_size)
    return Feeds(
        train=lambda stage, seen, steps: watched(
            train_batches(train, TREE, batch_size=stage.batch_size, seed=0, examples_seen=seen, steps=steps), at
        ),
        validation=evaluated,
        test=evaluated,
        eval_batch_size=batch_size,
    )


def run(workdir: pathlib.Path, **changes):
    m = changes.pop("model", model())
    parts = {f.name: changes.pop(f.name) for f in dataclasses.fields(TrainConfig) if f.name in changes}
    config = dict(optim=OptimConfig(learning_rate=0.05), checkpoint=CheckpointConfig(every=2, keep=3), log=LogConfig(every=1))
    arguments = dict(
        model=m,
        objective=Objective(m.tasks, m.heads),
        metrics=ClassificationMetrics(TREE, m.tasks, m.heads),
        augment=Augment((90.0,) * 3, (60.0,) * 3, padding=1),
        plan=plan(),
        feeds=feeds(),
        seed=0,
        workdir=workdir,
        meta={"experiment": "toy", "taxonomy": TREE.fingerprint, "config": {"a": 1, "free": 1}},
        free=("config.free",),
        config=TrainConfig(**config | parts),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    return fit(**arguments | changes)


__all__ = ["COARSE", "FINE", "TREE", "Stage", "feeds", "model", "plan", "run", "source"]
