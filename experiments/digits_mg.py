"""Handwritten digits seen locally and globally.

    python -m experiments.digits_mg                        # scikit-learn's 1,797 bundled digits
    python -m experiments.digits_mg --config.data.dir=DIR  # MNIST, prepared by TFDS in DIR

The **local** branch sees strokes: none of its positions sees more than 12 pixels across, and only
their mean is passed on (a bag of local features, as Brendel & Bethge 2019, arXiv:1904.00760). The
**global** branch convolves and pools until it has seen the whole digit. Presets (`--config.preset`):

* `fused`: both, trained one after the other, then together; the one head reads their fusion, which
  does not mind that in the first stages only one of them is there.
* `local`, `global`: one of them alone, as wide as it takes to have as many parameters as `fused`.

MNIST on two cores without a GPU, seed 0: 3:06 of training, 99.57 % of the test images; figures of
three seeds of each preset stand in the README.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import common, vision
from experiments.vision import Form, ModelConfig, VisionConfig
from mgjax.branches import ConvNet
from mgjax.branches.base import scale_width
from mgjax.config import ConfigError, key
from mgjax.granularity import FUSED, Granularity, Head
from mgjax.layers import activation

LOCAL, GLOBAL = "local", "global"


def fused(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return _form(config, levels, (LOCAL, GLOBAL))


def local_alone(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return _form(config, levels, (LOCAL,))


def global_alone(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return _form(config, levels, (GLOBAL,))


def _form(config: ModelConfig, levels: Sequence[str], names: Sequence[str]) -> Form:
    if not len(config.widths) == len(config.blocks) >= 2:
        raise ConfigError(
            "model.widths and model.blocks name the local branch's one stage, then the global one's: two numbers each or "
            f"more, as many of both, not {config.widths} and {config.blocks}"
        )
    widths = [scale_width(w, config.width, 4) for w in config.widths]
    common = dict(stem="patch", norm=config.norm, dtype=vision.DTYPES[config.dtype], remat=config.remat)
    if config.activation != "auto":
        common["activation"] = activation(config.activation)
    branches = {
        # Patches of 4 pixels, two convolutions of 2×2, nothing pooled: each position sees 4 · (1 + 1 + 1) = 12 across.
        LOCAL: ConvNet(widths[:1], config.blocks[:1], kernel=2, patch=4, **common),
        GLOBAL: ConvNet(widths[1:], config.blocks[1:], pool="mean", **common),
    }
    granularities = [Granularity(n, n, vision.deepest(branches[n]), vision.view_of(config)) for n in names]
    if len(names) == 1:
        return Form(granularities, [Head(l, {names[0]: "grad"}) for l in levels], {n: branches[n] for n in names})
    return Form(granularities, [Head(l, {FUSED: "grad"}) for l in levels], branches, vision.fusion_of(config))


FORMS = {"fused": fused, LOCAL: local_alone, GLOBAL: global_alone}


@dataclasses.dataclass(frozen=True)
class Config(VisionConfig):
    preset: str = key("fused", "what is seen", choices=tuple(FORMS))


RECIPE = {
    "augment.flip": False,
    "augment.padding": 2,
    "augment.rotate": 12.0,
    "augment.zoom": 0.1,
    "augment.shear": 0.1,
    "model.widths": (48, 32, 64, 96),
    "model.blocks": (2, 1, 2, 1),
    "model.fusion_width": 64,
    "plan.alone": (1.0,),
    "plan.joint": 11.0,
    "plan.batch_size": 128,
    "optim.learning_rate": 0.2,
    "smoothing": 0.0,
}
FIXED = ("branch", "stem", "downsample", "patch", "members", "projection", "attention", "keep", "drop_path")
UNUSED = {"size"} | {f"model.{k}" for k in FIXED}
SOURCES = {
    "tfds:mnist": {},
    # 1,797 images: more passes over them.
    "sklearn:digits": {"data.image_size": 28, "plan.alone": (10.0,), "plan.joint": 40.0},
}


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Recipe and dataset as values of keys, and one line that says what was chosen."""
    if unused := sorted(UNUSED & set(given)):
        raise ConfigError(f"--config.{unused[0]} does not apply here: both branches are convolutional, and see what they see")
    source = given.get("data.source") or ("tfds:mnist" if given.get("data.dir") else "sklearn:digits")
    preset = given.get("preset", "fused")
    chosen = RECIPE | SOURCES.get(source, {}) | {"data.source": source, "model.match": "" if preset == "fused" else "fused"}
    return chosen, f"preset {preset} on {source}"


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""
    return vision.train(config, workdir, meta, FORMS, alike=2)


if __name__ == "__main__":
    common.main("digits_mg", Config(), resolve, train, [RECIPE, *SOURCES.values()], vision.see(FORMS), "path")
