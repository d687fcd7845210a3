"""Forms of a multi-granularity image classifier, for a taxonomy of any depth.

* `taps`: one trunk, tapped at one depth per level; the coarser, the shallower.
* `branches`: one branch per level, each with its own view; the coarser, the lower the resolution.
* `ensemble`: submodels of one kind that each answer every level; their probabilities are averaged.
* `linear`: a linear classifier of the pixels per level; a yardstick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mgjax.branches import MLP, ResNet, SeparableNet
from mgjax.branches.resnet import DOWNSAMPLES, NAMED, STEMS
from mgjax.config import ConfigError, key
from mgjax.fusion import ConcatFusion
from mgjax.granularity import FUSED, Granularity, Head, Identity, OperatingPoint, Resize, Task
from mgjax.layers.norm import NORMS
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy
from mgjax.train import Stage, coarse_to_fine

FORMS = ("taps", "branches", "ensemble", "linear")
BRANCHES = (*NAMED, "resnet", "separable", "mlp")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    branch: str = key("resnet18", "what extracts features; a number gives the published blocks and widths", choices=BRANCHES)
    stem: str = key("imagenet", "of residual networks", choices=tuple(STEMS))
    widths: tuple[int, ...] = key((64, 128, 256), "channels per stage of resnet and separable, units per layer of mlp", low=1)
    blocks: tuple[int, ...] = key((1, 1, 1), "blocks per stage of resnet and separable", low=1)
    downsample: str = key("stride", "how resnet halves its maps", choices=DOWNSAMPLES)
    norm: str = key("batch", "normalisation", choices=NORMS)
    dtype: str = key("float32", "of the computation; parameters and losses are float32", choices=tuple(DTYPES))
    fusion_width: int = key(256, "of the fused vector, where a form has a fusion", low=1)
    members: int = key(2, "submodels of an ensemble", low=1)
    view_scale: float = key(1.0, "resolution to which every view is reduced, and then brought back", low=0.01, high=1)
    dropout: float = key(0.0, "of the inputs of the heads", low=0, high=0.99)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    batch_size: int = key(256, "examples per step, over all devices", low=1)
    eval_batch_size: int = key(480, "examples per evaluation step, over all devices", low=1)
    alone: tuple[float, ...] = key(
        (2.0,), "epochs of each single-granularity stage, coarse to fine; the last is repeated", low=0
    )
    resolution: tuple[float, ...] = key((1.0,), "resolution in those stages; the last is repeated", low=0.01, high=1)
    joint: float = key(6.0, "epochs of the last stage, in which all granularities train together", low=0)
    max_steps: int = key(0, "end each stage after so many steps, for a quick look (0: no limit)", low=0)


def build_model(config: ModelConfig, form: str, taxonomy: Taxonomy, image_shape: Sequence[int]) -> MultiGranularityModel:
    """Declares and composes the model of a form.

    Raises:
        InputError: an unknown form, or numbers that make no branch.
    """
    levels = taxonomy.levels
    tasks = [Task(level, level, taxonomy.size(level), level) for level in levels]
    full = _view(1.0, config.view_scale)
    fusion = None
    if form == "taps":
        branches = {"trunk": _branch(config, image_shape)}
        taps = list(branches["trunk"].feature_info)[-len(levels) :]
        taps = [taps[0]] * (len(levels) - len(taps)) + taps
        granularities = [Granularity(level, "trunk", tap, full) for level, tap in zip(levels, taps)]
        # Finer features help a coarse classifier if it does not shape them: Chang et al. 2021.
        heads = [Head(l, {l: "grad"} | {finer: "stop" for finer in levels[i + 1 :]}) for i, l in enumerate(levels)]
    elif form == "branches":
        scales = [2.0 ** (i + 1 - len(levels)) for i in range(len(levels))]
        branches = {l: _branch(config, image_shape, s) for l, s in zip(levels, scales)}
        granularities = [
            Granularity(l, l, list(branches[l].feature_info)[-1], _view(s, config.view_scale)) for l, s in zip(levels, scales)
        ]
        fusion = ConcatFusion(config.fusion_width, dtype=DTYPES[config.dtype])
        heads = [Head(l, {l: "grad", FUSED: "stop"}) for l in levels[:-1]] + [Head(levels[-1], {FUSED: "grad"})]
    elif form == "ensemble":
        members = [f"member{i + 1}" for i in range(config.members)]
        branches = {m: _branch(config, image_shape) for m in members}
        granularities = [Granularity(m, m, list(branches[m].feature_info)[-1], full) for m in members]
        heads = [Head(l, {m: "grad"}, f"{l}_{m}") for m in members for l in levels]
    elif form == "linear":
        branches = {"pixels": MLP(math.prod(image_shape), ())}
        granularities = [Granularity("pixels", "pixels", "input", full)]
        heads = [Head(l, {"pixels": "grad"}) for l in levels]
    else:
        raise ConfigError(f"no preset '{form}'; there are {', '.join(FORMS)}")
    return MultiGranularityModel(granularities, tasks, heads, branches, fusion, config.dropout)


def build_plan(config: PlanConfig, model: MultiGranularityModel, form: str, examples: int) -> tuple[Stage, ...]:
    """Coarse to fine, then jointly: one stage per granularity, then all of them.

    Raises:
        ConfigError: no epochs or resolution; a lower resolution for a branch of fixed input size.
    """

    def steps(epochs: float) -> int:
        count = max(1, round(epochs * examples / config.batch_size)) if epochs > 0 else 0
        return min(count, config.max_steps) if config.max_steps else count

    names = [g.name for g in model.granularities]
    all_tasks = model.everything.tasks
    alone = []
    for i, name in enumerate(names if len(names) > 1 else []):
        # Where a granularity is a level, it alone is asked for; a member of an ensemble answers all.
        tasks = (name,) if form in ("taps", "branches") else all_tasks
        resolution = _at(config.resolution, i)
        if resolution != 1 and any(isinstance(b, MLP) for b in model.branches.values()):
            raise ConfigError("an MLP sees inputs of one size alone: set --config.plan.resolution=1")
        alone.append((name, OperatingPoint((name,), tasks, resolution)))
    return coarse_to_fine(
        alone,
        model.everything,
        steps_alone=[steps(_at(config.alone, i)) for i in range(len(alone))],
        steps_together=max(1, steps(config.joint)),
        batch_size=config.batch_size,
    )


def _at(values: tuple, i: int) -> Any:
    if not values:
        raise ConfigError("plan.alone and plan.resolution need at least one number each")
    return values[min(i, len(values) - 1)]


def _view(scale: float, detail: float):
    """The image at `scale` times its size, with no more than `detail` times its resolution."""
    return Identity() if scale == detail == 1 else Resize(scale, min(scale, detail))


def _branch(config: ModelConfig, image_shape: Sequence[int], scale: float = 1.0):
    """The branch of a config, with as many stages as a view of that scale has pixels for."""
    if config.branch in ("resnet", "separable") and len(config.blocks) != len(config.widths):
        raise ConfigError(f"a width per stage is needed: model.blocks {config.blocks}, model.widths {config.widths}")
    side = round(min(image_shape[:2]) * scale)
    common = dict(norm=config.norm, dtype=DTYPES[config.dtype])
    if config.branch == "mlp":
        size = round(image_shape[0] * scale) * round(image_shape[1] * scale) * image_shape[2]
        return MLP(size, config.widths, **common)
    if config.branch == "separable":
        make = lambda n: SeparableNet(config.widths[:n], config.blocks[:n], **common)
        count = len(config.widths)
    elif config.branch == "resnet":
        options = dict(stem=config.stem, stem_width=config.widths[0], downsample=config.downsample)
        make = lambda n: ResNet(config.blocks[:n], config.widths[:n], **options, **common)
        count = len(config.widths)
    else:
        whole = ResNet.named(config.branch, stem=config.stem, downsample=config.downsample, **common)
        make = lambda n: whole.clone(blocks=whole.blocks[:n], widths=whole.widths[:n])
        count = len(whole.widths)
    # A map narrower than two pixels tells nothing that its mean does not.
    fits = [n for n in range(1, count + 1) if list(make(n).feature_info.values())[-1].reduction * 2 <= side]
    return make(max(fits, default=1))
