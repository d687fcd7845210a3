"""Forms of a multi-granularity image classifier, for a taxonomy of any depth.

* `taps`: one trunk, tapped at one depth per level; the coarser, the shallower.
* `branches`: one branch per level, each with its own view; the coarser, the lower the resolution.
* `ensemble`: submodels of one kind that each answer every level; their probabilities are averaged.
* `linear`: a linear classifier of the pixels per level; a yardstick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mgjax.branches import MLP, ResNet, SeparableNet
from mgjax.config import ConfigError, key
from mgjax.fusion import ConcatFusion
from mgjax.granularity import FUSED, Granularity, Head, Identity, OperatingPoint, Resize, Task
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy
from mgjax.train import Stage, coarse_to_fine

FORMS = ("taps", "branches", "ensemble", "linear")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    form: str = key("taps", f"how granularities are composed: {', '.join(FORMS)}")
    branch: str = key("resnet18", "'resnet18', 'resnet34', 'resnet50' (published widths), 'resnet', 'separable' or 'mlp'")
    stem: str = key("imagenet", "of residual networks: 'imagenet', 'cifar' or 'patch'")
    widths: tuple[int, ...] = key((64, 128, 256), "channels per stage of 'resnet' and 'separable', units per layer of 'mlp'")
    blocks: tuple[int, ...] = key((1, 1, 1), "blocks per stage of 'resnet' and 'separable'")
    downsample: str = key("stride", "of 'resnet': 'stride' or 'pool'")
    norm: str = key("batch", "'batch', 'group', 'layer' or 'none'")
    dtype: str = key("float32", "of the computation: 'float32' or 'bfloat16'; parameters and losses are float32")
    fusion_width: int = key(256, "of the fused vector, where a form has a fusion")
    members: int = key(2, "submodels of an ensemble")
    view_scale: float = key(1.0, "factor on the resolution of every view")
    dropout: float = key(0.0, "of the inputs of the heads")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    batch_size: int = key(256, "examples per step, over all devices")
    eval_batch_size: int = key(480, "examples per evaluation step, over all devices")
    alone: tuple[float, ...] = key((2.0,), "epochs of each single-granularity stage, coarse to fine; the last is repeated")
    resolution: tuple[float, ...] = key((1.0,), "resolution in those stages; the last is repeated")
    joint: float = key(6.0, "epochs of the last stage, in which all granularities train together")
    max_steps: int = key(0, "end each stage after so many steps, for a quick look (0: no limit)")


def build_model(config: ModelConfig, taxonomy: Taxonomy, image_shape: Sequence[int]) -> MultiGranularityModel:
    """Declares and composes the model of a form.

    Raises:
        ConfigError: a form, branch or dtype that does not exist.
    """
    levels = taxonomy.levels
    tasks = [Task(level, level, taxonomy.size(level), level) for level in levels]
    full = _view(config.view_scale)
    fusion = None
    if config.form == "taps":
        branches = {"trunk": _branch(config, image_shape, config.view_scale)}
        taps = list(branches["trunk"].feature_info)[-len(levels) :]
        taps = [taps[0]] * (len(levels) - len(taps)) + taps
        granularities = [Granularity(level, "trunk", tap, full) for level, tap in zip(levels, taps)]
        # Finer features help a coarse classifier if it does not shape them: Chang et al. 2021.
        heads = [Head(l, {l: "grad"} | {finer: "stop" for finer in levels[i + 1 :]}) for i, l in enumerate(levels)]
    elif config.form == "branches":
        scales = [config.view_scale * 2.0 ** (i + 1 - len(levels)) for i in range(len(levels))]
        branches = {l: _branch(config, image_shape, s) for l, s in zip(levels, scales)}
        granularities = [Granularity(l, l, list(branches[l].feature_info)[-1], _view(s)) for l, s in zip(levels, scales)]
        fusion = ConcatFusion(config.fusion_width, dtype=_dtype(config))
        heads = [Head(l, {l: "grad", FUSED: "stop"}) for l in levels[:-1]] + [Head(levels[-1], {FUSED: "grad"})]
    elif config.form == "ensemble":
        members = [f"member{i + 1}" for i in range(config.members)]
        branches = {m: _branch(config, image_shape, config.view_scale) for m in members}
        granularities = [Granularity(m, m, list(branches[m].feature_info)[-1], full) for m in members]
        heads = [Head(l, {m: "grad"}, f"{l}_{m}") for m in members for l in levels]
    elif config.form == "linear":
        size = round(image_shape[0] * config.view_scale) * round(image_shape[1] * config.view_scale) * image_shape[2]
        branches = {"pixels": MLP(size, ())}
        granularities = [Granularity("pixels", "pixels", "input", full)]
        heads = [Head(l, {"pixels": "grad"}) for l in levels]
    else:
        raise ConfigError(f"model.form is one of {FORMS}, not '{config.form}'")
    return MultiGranularityModel(granularities, tasks, heads, branches, fusion, config.dropout)


def build_plan(config: PlanConfig, model: MultiGranularityModel, form: str, examples: int) -> tuple[Stage, ...]:
    """Coarse to fine, then jointly: one stage per granularity, then all of them."""

    def steps(epochs: float) -> int:
        count = max(1, round(epochs * examples / config.batch_size)) if epochs > 0 else 0
        return min(count, config.max_steps) if config.max_steps else count

    names = [g.name for g in model.granularities]
    all_tasks = model.everything.tasks
    alone = []
    for i, name in enumerate(names if len(names) > 1 else []):
        # Where a granularity is a level, it alone is asked for; a member of an ensemble answers all.
        tasks = (name,) if form in ("taps", "branches") else all_tasks
        alone.append((name, OperatingPoint((name,), tasks, _at(config.resolution, i))))
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


def _view(scale: float):
    return Identity() if scale == 1 else Resize(scale)


def _dtype(config: ModelConfig):
    if config.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is one of {sorted(DTYPES)}, not '{config.dtype}'")
    return DTYPES[config.dtype]


def _branch(config: ModelConfig, image_shape: Sequence[int], scale: float):
    """The branch of a config, with as many stages as a view of that scale has pixels for."""
    side = round(min(image_shape[:2]) * scale)
    common = dict(norm=config.norm, dtype=_dtype(config))
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
        whole = ResNet.named(config.branch, stem=config.stem, **common)
        make = lambda n: whole.clone(blocks=whole.blocks[:n], widths=whole.widths[:n])
        count = len(whole.widths)
    # A map narrower than two pixels tells nothing that its mean does not.
    fits = [n for n in range(1, count + 1) if list(make(n).feature_info.values())[-1].reduction * 2 <= side]
    return make(max(fits, default=1))
