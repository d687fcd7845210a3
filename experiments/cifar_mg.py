"""CIFAR-100 with both label levels, 20 superclasses → 100 classes: what staging and balancing are worth.

    python -m experiments.cifar_mg --config.data.dir=DIR                          # preset staged
    python -m experiments.cifar_mg --config.data.dir=DIR --config.preset=flat     # the classes alone
    python -m experiments.cifar_mg --config.data.dir=DIR --config.preset=balanced-pcgrad
    python -m experiments.ablation cifar_mg --presets=flat,joint,staged --seeds=0,1,2 --set data.dir=DIR

Presets (`--config.preset`); all have the same trunk and, by default, about as many training FLOPs:

* `flat`: one classifier of the 100 classes; its superclasses are the ancestors of what it says. A baseline.
* `superclass`: one classifier of the 20 superclasses. A baseline.
* `joint`: both classifiers read the trunk's last features.
* `stopgrad`: the superclasses are read off a shallower tap, and off the last features without a gradient into them (Chang et
  al. 2021, arXiv:2011.09040).
* `staged`: as `stopgrad`, but first at half of the resolution, then at three quarters, then in full. One granularity after the
  other is `--config.plan.kind=coarse_to_fine`.
* `balanced-METHOD`: as `joint`, with the two losses balanced by a method of `mgjax.balancing`.

A prepared CIFAR-100 (`python -m mgjax.data.prepare cifar100 --data_dir=DIR`) is read; any other dataset of two levels or
more is named by `--config.data.source`. Sizes (`--config.size`): `cpu` is a small residual network that trains for 4 minutes
on one core; `gpu` is ResNet-18 in bfloat16 for 60 epochs, and has not been run yet.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import common, vision
from experiments.vision import Form, ModelConfig, VisionConfig, branch_of, deepest, separate, taps, view_of
from mgjax import config as cfg
from mgjax.balancing import BALANCERS
from mgjax.config import key
from mgjax.granularity import Granularity, Head

METHODS = [name for name in BALANCERS if name != "equal"]


def flat(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return separate(config, levels[-1:], shape)


def superclass(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return separate(config, levels[:1], shape)


def joint(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    trunk = branch_of(config, shape)
    shared = Granularity("shared", "trunk", deepest(trunk), view_of(config))
    return Form([shared], [Head(l, {"shared": "grad"}) for l in levels], {"trunk": trunk})


FORMS = {"flat": flat, "superclass": superclass, "joint": joint, "stopgrad": taps, "staged": taps}
FORMS |= {f"balanced-{method}": joint for method in METHODS}


@dataclasses.dataclass(frozen=True)
class Config(VisionConfig):
    preset: str = key("staged", "what is trained, and how", choices=tuple(FORMS))


SIZES = {
    # Convolutions of few pixels and many channels are what a CPU is fast at.
    "cpu": {
        "model.branch": "resnet",
        "model.stem": "patch",
        "model.downsample": "pool",
        "model.widths": (16, 32, 64),
        "model.blocks": (1, 1, 1),
        "plan.batch_size": 128,
        "plan.eval_batch_size": 500,
        "plan.joint": 8.3,
        "optim.learning_rate": 0.4,
        "optim.schedule": "linear",
        "augment.padding": 0,  # so few epochs are not overfitted
    },
    "gpu": {
        "model.branch": "resnet18",
        "model.stem": "cifar",
        "model.dtype": "bfloat16",
        "plan.batch_size": 512,
        "plan.eval_batch_size": 1000,
        "plan.joint": 60.0,
        "optim.learning_rate": 0.4,
    },
}
# Epochs of the stages, by size: as many FLOPs as the others have in their one stage.
STAGED = {
    "cpu": {"plan.alone": (2.0, 5.0), "plan.joint": 4.8},
    "gpu": {"plan.alone": (10.0, 30.0), "plan.joint": 40.0},
}


# What presets set besides.
CHOSEN = dict.fromkeys(("plan.kind", "plan.resolution", "plan.anneal", "objective.balance", "data.source", "data.validation"))


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Preset and size as values of keys, and one line that says what was chosen."""
    for name in {"preset", "size"} & set(given):
        cfg.leaves(Config)[name].check(name, given[name])
    preset, size = given.get("preset", "staged"), given.get("size", "auto")
    size = size if size != "auto" else "cpu" if backend == "cpu" else "gpu"
    values = {"data.source": "tfds:cifar100", "data.validation": 0.1, "preset": preset, "size": size} | SIZES[size]
    if preset == "staged":
        values |= {"plan.kind": "progressive_resolution", "plan.resolution": (0.5, 0.75), "plan.anneal": True} | STAGED[size]
    else:
        values |= {"plan.kind": "joint"}
    if preset.startswith("balanced-"):
        values["objective.balance"] = preset.removeprefix("balanced-")
    if "model.widths" in given:
        values["model.blocks"] = (1,) * len(given["model.widths"])
    return values, f"preset {preset}, size {size}"


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""
    return vision.train(config, workdir, meta, FORMS, alike=2)


if __name__ == "__main__":
    recipes = [*SIZES.values(), *STAGED.values(), CHOSEN]
    common.main("cifar_mg", Config(), resolve, train, recipes, vision.see(FORMS), "path")
