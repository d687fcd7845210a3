"""Image classification at every level of a taxonomy, coarse to fine.

    python -m experiments.imagenet_mg                          # embedded images, 4 → 12 → 36 classes
    python -m experiments.imagenet_mg --config.preset=branches # one branch per level and view
    python -m experiments.imagenet_mg --config.data.source=tfds:cifar100 --config.data.dir=DIR
    python -m experiments.imagenet_mg --config.data.source=folder:DIR   # train/, val/ of one folder per class

Presets (`--config.preset`): `taps`, `branches`, `separable`, `ensemble`, and the baselines `flat`, `separate`
and `linear`; see `experiments.vision`. Sizes (`--config.size`): `cpu` trains in minutes on two
cores, `gpu` is the published width.

ImageNet on 8 GPUs, three levels, of which WordNet gives two (prepare the dataset once, or name the ILSVRC
folder itself by `folder:`):

    python -m mgjax.data.prepare imagenet2012 --data_dir=DIR --manual_dir=ARCHIVES
    python -m experiments.imagenet_mg --config.data.source=tfds:imagenet2012 --config.data.dir=DIR
        --config.data.levels=groups:20,groups:150,class --workdir=runs/imagenet

A tapped ResNet-50 of 26.1 M parameters, batches of 1,024 in bfloat16: 5, 5 and 10 epochs of the single levels at 160
pixels, then 60 of all together at 224; 2.0e18 FLOPs in 95,087 steps. Expected, not measured: at the 2,500 images
a second that a data-centre GPU trains ResNet-50 with, 1½ hours of computation; the host must then decode
20,000 images a second, which asks for some 100 cores. Flat training of such length gives 76 to 77 % top-1.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from experiments import common, vision
from experiments.vision import FORMS, VisionConfig
from mgjax import config as cfg
from mgjax.config import key


@dataclasses.dataclass(frozen=True)
class Config(VisionConfig):
    preset: str = key("auto", "how granularities are composed; auto is taps", choices=("auto", *FORMS))


SIZES = {
    # Convolutions of few pixels and many channels are what a CPU is fast at.
    "cpu": {"model.branch": "resnet", "model.stem": "patch", "model.downsample": "pool"},
    "gpu": {"model.branch": "resnet18", "model.dtype": "bfloat16", "plan.alone": (10.0,), "plan.joint": 60.0},
}
PRESETS = {
    # A linear model has no norm to tame a large step, and nothing to stage.
    "linear": {"optim.learning_rate": 0.003, "plan.alone": (0.0,), "plan.resolution": (1.0,), "plan.joint": 20.0},
    # Baselines are as large as what they are compared with.
    "flat": {"model.match": "taps"},
    "separate": {"model.match": "taps"},
}
# What extracts features in the preset `separable`, by kind of dataset and size. Attention does not bear every step of the
# recipes' learning rates: without clipping, one of four seeds diverged on CIFAR-100.
SEPARABLE = {
    ("procedural", "cpu"): {
        "model.branch": "separable",
        "model.projection": 64,
        "model.fusion_width": 128,
        "optim.clip": 1.0,
    },
    ("small", "cpu"): {"model.branch": "separable", "model.blocks": (2, 2, 2), "optim.clip": 1.0},
    ("large", "cpu"): {"model.branch": "separable", "optim.clip": 1.0},
    ("procedural", "gpu"): {"model.branch": "mobilenet_v2_cifar"},
    ("small", "gpu"): {"model.branch": "mobilenet_v2_cifar"},
    ("large", "gpu"): {"model.branch": "mobilenet_v2", "optim.weight_decay": 4e-5},
}
RECIPES = {
    ("procedural", "cpu"): {
        "model.widths": (24, 48, 96, 96),
        "model.blocks": (1, 1, 1, 1),
        "plan.alone": (2.0, 2.0, 3.0),
        "plan.joint": 6.0,
        "plan.batch_size": 96,
        "augment.padding": 2,
        "smoothing": 0.0,
    },
    ("procedural", "gpu"): {"model.stem": "cifar", "plan.alone": (2.0,), "plan.joint": 6.0, "augment.padding": 2},
    ("small", "cpu"): {
        "model.widths": (64, 128, 256),
        "plan.alone": (1.0, 6.0),
        "plan.resolution": (0.75,),
        "plan.joint": 5.0,
        "optim.learning_rate": 0.3,
    },
    ("small", "gpu"): {"model.stem": "cifar", "plan.batch_size": 512, "optim.learning_rate": 0.4},
    # Photographs of all sizes: the host fits them to squares, the device cuts from those.
    ("large", "cpu"): {
        "data.image_size": 72,
        "augment.size": 64,
        "augment.crop": (0.35, 1.0),
        "model.widths": (32, 64, 128, 256),
        "model.blocks": (1, 1, 1, 1),
        "plan.batch_size": 32,
        "plan.eval_batch_size": 32,
        "plan.alone": (2.0,),
        "plan.joint": 10.0,
        "optim.learning_rate": 0.05,
    },
    ("large", "gpu"): {
        "data.image_size": 256,
        "augment.size": 224,
        "augment.crop": (0.25, 1.0),
        "model.branch": "resnet50",
        "plan.batch_size": 1024,
        "plan.eval_batch_size": 1024,
        "plan.alone": (5.0, 5.0, 10.0),
        "plan.resolution": (0.715,),  # 160 of 224 pixels
        "plan.joint": 60.0,
        "optim.learning_rate": 0.4,
        "optim.weight_decay": 5e-5,
    },
}


def kind_of(source: str) -> str:
    """Which recipe a dataset takes; anything else can be said by keys."""
    if source == "procedural":
        return source
    large = source.startswith(("folder:", "csv:", "tfds:image")) and not source.startswith("tfds:imagenet_resized")
    return "large" if large else "small"


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Preset, size and recipe as values of keys, and one line that says what was chosen."""
    preset, size = given.get("preset", "auto"), given.get("size", "auto")
    for name in {"preset", "size"} & set(given):
        cfg.leaves(Config)[name].check(name, given[name])
    form = "taps" if preset == "auto" else preset
    chosen = size if size != "auto" else "cpu" if backend == "cpu" else "gpu"
    kind = kind_of(given.get("data.source", "procedural"))
    said = f"preset {form}, size {chosen}"
    if size == "auto" and chosen == "cpu":
        said += " (no accelerator: the CPU-sized preset; --config.size=gpu is the full one)"
    preset_values = SEPARABLE[kind, chosen] if form == "separable" else PRESETS.get(form, {})
    values = SIZES[chosen] | RECIPES[kind, chosen] | preset_values | {"preset": form, "size": chosen}
    if given.get("data.image_size") and "augment.size" in values:
        values["augment.size"] = given["data.image_size"] * 7 // 8  # as the recipes cut their own sizes
    if "model.widths" in given:
        values["model.blocks"] = (1,) * len(given["model.widths"])
    return values, said


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""
    return vision.train(config, workdir, meta)


if __name__ == "__main__":
    recipes = [*SIZES.values(), *PRESETS.values(), *SEPARABLE.values(), *RECIPES.values()]
    common.main("imagenet_mg", Config(), resolve, train, recipes, vision.see(FORMS), "path")
