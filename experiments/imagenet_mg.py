"""Image classification at every level of a taxonomy, coarse to fine.

    python -m experiments.imagenet_mg                          # embedded images, 4 → 12 → 36 classes
    python -m experiments.imagenet_mg --config.preset=branches # one branch per level and view
    python -m experiments.imagenet_mg --config.data.source=tfds:cifar100 --config.data.dir=DIR

Presets (`--config.preset`): `taps`, `branches`, `ensemble`, `linear`; see `experiments.vision`.
Sizes (`--config.size`): `cpu` trains in minutes on two cores, `gpu` is the published width.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from experiments import common
from experiments.vision import FORMS, ModelConfig, PlanConfig, build_model, build_plan
from mgjax import config as cfg
from mgjax.config import key
from mgjax.data import Augment, DataConfig, eval_batches, load_dataset, train_batches
from mgjax.metrics import ClassificationMetrics
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, Feeds, LogConfig, OptimConfig, fit


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = key("auto", "how granularities are composed; auto is taps", choices=("auto", *FORMS))
    size: str = key("auto", "of the model; auto goes by the device", choices=("auto", "cpu", "gpu"))
    seed: int = key(0, "of initialisation, order and augmentation")
    flip: bool = key(True, "mirror training images at random")
    padding: int = key(4, "pixels by which training images are shifted at random", low=0)
    smoothing: float = key(0.1, "label smoothing", low=0, high=0.99)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    plan: PlanConfig = PlanConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


SIZES = {
    # Convolutions of few pixels and many channels are what a CPU is fast at.
    "cpu": {"model.branch": "resnet", "model.stem": "patch", "model.downsample": "pool"},
    "gpu": {"model.branch": "resnet18", "model.dtype": "bfloat16", "plan.alone": (10.0,), "plan.joint": 60.0},
}
PRESETS = {
    # A linear model has no norm to tame a large step.
    "linear": {"optim.learning_rate": 0.003, "plan.joint": 20.0},
}
RECIPES = {
    ("procedural", "cpu"): {
        "model.widths": (24, 48, 96, 96),
        "model.blocks": (1, 1, 1, 1),
        "plan.alone": (2.0, 2.0, 3.0),
        "plan.joint": 6.0,
        "plan.batch_size": 96,
        "padding": 2,
        "smoothing": 0.0,
    },
    ("procedural", "gpu"): {"model.stem": "cifar", "plan.alone": (2.0,), "plan.joint": 6.0, "padding": 2},
    ("small", "cpu"): {
        "model.widths": (64, 128, 256),
        "plan.alone": (1.0, 6.0),
        "plan.resolution": (0.75,),
        "plan.joint": 5.0,
        "optim.learning_rate": 0.3,
    },
    ("small", "gpu"): {"model.stem": "cifar", "plan.batch_size": 512, "optim.learning_rate": 0.4},
}


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Preset, size and recipe as values of keys, and one line that says what was chosen."""
    preset, size = given.get("preset", "auto"), given.get("size", "auto")
    for name in {"preset", "size"} & set(given):
        cfg.leaves(Config)[name].check(name, given[name])
    form = "taps" if preset == "auto" else preset
    chosen = size if size != "auto" else "cpu" if backend == "cpu" else "gpu"
    kind = "procedural" if given.get("data.source", "procedural") == "procedural" else "small"
    said = f"preset {form}, size {chosen}"
    if size == "auto" and chosen == "cpu":
        said += " (no accelerator: the CPU-sized preset; --config.size=gpu is the full one)"
    return SIZES[chosen] | RECIPES[kind, chosen] | PRESETS.get(form, {}) | {
        "preset": form,
        "size": chosen,
    }, said


def train(config: Config, workdir: pathlib.Path, meta: dict) -> dict:
    """From the dataset to the figures of the summary."""
    data = load_dataset(config.data)
    print(
        f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation, {len(data.test):,} test "
        f"images {data.image_shape}; levels {', '.join(f'{l} ({data.taxonomy.size(l)})' for l in data.taxonomy.levels)}"
    )
    model = build_model(config.model, config.preset, data.taxonomy, data.image_shape)
    plan = build_plan(config.plan, model, config.preset, len(data.train))
    process = dict(process=jax.process_index(), processes=jax.process_count())
    evaluated = lambda split: eval_batches(split, data.taxonomy, batch_size=config.plan.eval_batch_size, **process)
    feeds = Feeds(
        train=lambda stage, seen, steps: train_batches(
            data.train,
            data.taxonomy,
            batch_size=stage.batch_size,
            seed=config.seed,
            examples_seen=seen,
            steps=steps,
            **process,
        ),
        validation=lambda: evaluated(data.validation),
        test=lambda: evaluated(data.test),
        eval_batch_size=config.plan.eval_batch_size,
    )
    return fit(
        model=model,
        objective=Objective(model.tasks, model.heads, smoothing=config.smoothing),
        metrics=ClassificationMetrics(data.taxonomy, model.tasks, model.heads),
        augment=Augment(data.mean, data.std, config.flip, config.padding),
        plan=plan,
        feeds=feeds,
        seed=config.seed,
        workdir=workdir,
        meta=meta | {"taxonomy": data.taxonomy.fingerprint},
        free=common.FREE,
        optim=config.optim,
        checkpoint=config.checkpoint,
        log=config.log,
    )


def main(given: dict[str, Any]) -> None:
    common.run("imagenet_mg", Config(), given, resolve, train)


if __name__ == "__main__":
    set_by = "; preset, size and dataset may set another default"
    recipes = [*SIZES.values(), *PRESETS.values(), *RECIPES.values()]
    cfg.run(main, Config(), {dotted: set_by for recipe in recipes for dotted in recipe})
