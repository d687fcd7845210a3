"""Forms of a multi-granularity image classifier, for a taxonomy of any depth.

* `taps`: one trunk, tapped at one depth per level; the coarser, the shallower.
* `branches`: one branch per level, each with its own view; the coarser, the lower the resolution.
* `separable`: one trunk of separable convolutions; each level's features are projected to a granularity of its own, with
  attention among its positions if asked for (`model.attention`), or among those that matter (`model.keep`), and fused.
* `ensemble`: submodels of one kind that each answer every level; their probabilities are averaged.
* `flat`: the finest level alone; a baseline. Its coarser answers are the finest one's ancestors.
* `separate`: one model per level, which share nothing; a baseline.
* `linear`: a linear classifier of the pixels per level; a yardstick.

A baseline can be made as large as another form: `model.match`. An experiment adds forms of its own
to the table and takes the rest from here: `VisionConfig`, and `train`, which goes from the dataset to the figures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments import common
from mgjax.branches import MLP, NAMED_BRANCHES, Branch, ConvNet, ResNet, SeparableNet, ViT
from mgjax.branches.base import scale_width
from mgjax.branches.resnet import DOWNSAMPLES, STEMS
from mgjax.config import ConfigError, key
from mgjax.data import AugmentConfig, DataConfig, Dataset, load_dataset
from mgjax.fusion import FUSIONS, Fusion
from mgjax.granularity import (
    DENOISERS,
    FUSED,
    WEIGHTINGS,
    Compose,
    Denoise,
    Granularity,
    Head,
    Identity,
    OperatingPoint,
    Resize,
    Task,
)
from mgjax.layers import ACTIVATIONS, activation
from mgjax.layers.norm import NORMS
from mgjax.model import MultiGranularityModel
from mgjax.objective import ObjectiveConfig
from mgjax.projection import GranularityProjection
from mgjax.taxonomy import Taxonomy
from mgjax.train import Stage, TrainConfig
from mgjax.train.stages import anneal, coarse_to_fine, growth, joint_only, progressive_jigsaw
from mgjax.views import scaled

BRANCHES = (*NAMED_BRANCHES, "resnet", "conv", "separable", "mlp")
PLANS = ("coarse_to_fine", "joint", "backbone_first", "progressive_resolution", "progressive_jigsaw", "growth")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    branch: str = key(
        "resnet18", "what extracts features; one with a number has the published blocks and widths", choices=BRANCHES
    )
    stem: str = key("imagenet", "of residual networks; conv and separable know patch alone", choices=tuple(STEMS))
    widths: tuple[int, ...] = key(
        (64, 128, 256), "channels per stage of resnet, conv and separable, units per layer of mlp", low=1
    )
    blocks: tuple[int, ...] = key((1, 1, 1), "blocks per stage of resnet, conv and separable", low=1)
    width: float = key(1.0, "factor on all numbers of channels", low=0.01)
    match: str = key("", "preset whose number of parameters is met by another width (empty: none)")
    downsample: str = key("stride", "how residual networks halve their maps", choices=DOWNSAMPLES)
    patch: int = key(16, "side of a vision transformer's patches, in pixels", low=1)
    norm: str = key("batch", "normalisation of what has no norm of its own", choices=NORMS)
    activation: str = key("auto", "of the branches; auto is what was published", choices=("auto", *ACTIVATIONS))
    dtype: str = key("float32", "of the computation; parameters and losses are float32", choices=tuple(DTYPES))
    fusion: str = key("concat", "of the granularities, where a form has a fusion", choices=tuple(FUSIONS))
    fusion_width: int = key(256, "of the fused vector", low=1)
    projection: int = key(128, "width of each granularity, where a form projects", low=1)
    attention: int = key(0, "blocks of attention among the positions of each granularity, where a form projects", low=0)
    keep: float = key(
        1.0, "share of the positions that each granularity keeps, by a learned score, where a form projects", low=0.01, high=1
    )
    members: int = key(2, "submodels of an ensemble", low=1)
    view_scale: float = key(1.0, "resolution to which every view is reduced, and then brought back", low=0.01, high=1)
    denoise: str = key("none", "what takes the noise from every view", choices=("none", *DENOISERS))
    dropout: float = key(0.0, "of the inputs of the heads", low=0, high=0.99)
    drop_path: float = key(
        0.0, "stochastic depth: probability of leaving out the last block of branches that have it", low=0, high=0.99
    )
    granularity_dropout: float = key(
        0.0, "probability that what reads several granularities lacks one, example by example", low=0, high=0.99
    )
    weighted_by: str = key("none", "how much examples count in what each granularity learns", choices=WEIGHTINGS)
    remat: bool = key(False, "keep only what blocks pass on, and compute the rest again: less memory, a third more FLOPs")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    kind: str = key("coarse_to_fine", "what the stages are; see mgjax.train.stages", choices=PLANS)
    batch_size: int = key(256, "examples per step, over all devices", low=1)
    eval_batch_size: int = key(480, "examples per evaluation step, over all devices", low=1)
    alone: tuple[float, ...] = key((2.0,), "epochs of each stage before the last, coarse to fine; the last is repeated", low=0)
    resolution: tuple[float, ...] = key((1.0,), "resolution in those stages; the last is repeated", low=0.01, high=1)
    pieces: tuple[int, ...] = key(
        (8, 4, 2), "of progressive_jigsaw in those stages, along each side; the last is repeated", low=1
    )
    strength: tuple[float, ...] = key(
        (1.0,), "of the augmentation in those stages; the last is repeated, and the last stage has 1", low=0, high=1
    )
    anneal: bool = key(False, "the learning rate falls through all stages; else it stays up in those before the last")
    joint: float = key(6.0, "epochs of the last stage, in which all granularities train together", low=0)
    max_steps: int = key(0, "end each stage after so many steps, for a quick look (0: no limit)", low=0)


@dataclasses.dataclass(frozen=True)
class VisionConfig(TrainConfig):
    """What every experiment on images can be told."""

    preset: str = key("auto", "how granularities are composed")
    size: str = key("auto", "of the model; auto goes by the device", choices=("auto", "cpu", "gpu"))
    seed: int = key(0, "of initialisation, order and augmentation")
    smoothing: float = key(0.1, "label smoothing", low=0, high=0.99)
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    plan: PlanConfig = PlanConfig()
    compile_cache: str = key(
        "auto", "folder that keeps compiled programs (auto: JAX_COMPILATION_CACHE_DIR or the user's cache; empty: none)"
    )


class Form(NamedTuple):
    """What a form declares.

    Attributes:
        granularities, heads, branches, fusion, projections: of the model.
    """

    granularities: list[Granularity]
    heads: list[Head]
    branches: dict[str, Branch]
    fusion: Fusion | None = None
    projections: Mapping[str, GranularityProjection] = {}


def taps(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    trunk = branch_of(config, shape)
    granularities = [Granularity(l, "trunk", tap, view_of(config)) for l, tap in zip(levels, taps_of(trunk, len(levels)))]
    # Finer features help a coarse classifier if it does not shape them: Chang et al. 2021.
    heads = [Head(l, {l: "grad"} | {finer: "stop" for finer in levels[i + 1 :]}) for i, l in enumerate(levels)]
    return Form(granularities, heads, {"trunk": trunk})


def branches(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    scales = [2.0 ** (i + 1 - len(levels)) for i in range(len(levels))]
    made = {l: branch_of(config, shape, s) for l, s in zip(levels, scales)}
    granularities = [Granularity(l, l, deepest(made[l]), view_of(config, s)) for l, s in zip(levels, scales)]
    heads = [Head(l, {l: "grad", FUSED: "stop"}) for l in levels[:-1]] + [Head(levels[-1], {FUSED: "grad"})]
    return Form(granularities, heads, made, fusion_of(config))


def separable(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    trunk = branch_of(config, shape)
    granularities = [Granularity(l, "trunk", tap, view_of(config)) for l, tap in zip(levels, taps_of(trunk, len(levels)))]
    heads = [Head(l, {l: "grad", FUSED: "stop"}) for l in levels[:-1]] + [Head(levels[-1], {FUSED: "grad"})]
    project = GranularityProjection(
        config.projection,
        keep=config.keep if config.keep < 1 else None,
        blocks=config.attention,
        norm=config.norm,
        activation=nn.relu if config.activation == "auto" else activation(config.activation),
        dtype=DTYPES[config.dtype],
    )
    if config.keep < 1 and config.fusion in ("cross_attention", "pyramid"):
        raise ConfigError(f"model.fusion={config.fusion} reads maps, of which model.keep={config.keep} leaves none")
    if config.attention and config.projection % project.heads:
        raise ConfigError(f"{project.heads} heads of attention do not divide model.projection={config.projection}")
    return Form(granularities, heads, {"trunk": trunk}, fusion_of(config), {l: project.clone() for l in levels})


def ensemble(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    members = [f"member{i + 1}" for i in range(config.members)]
    made = {m: branch_of(config, shape) for m in members}
    granularities = [Granularity(m, m, deepest(made[m]), view_of(config)) for m in members]
    return Form(granularities, [Head(l, {m: "grad"}, f"{l}_{m}") for m in members for l in levels], made)


def separate(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    made = {l: branch_of(config, shape) for l in levels}
    granularities = [Granularity(l, l, deepest(made[l]), view_of(config)) for l in levels]
    return Form(granularities, [Head(l, {l: "grad"}) for l in levels], made)


def flat(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    return separate(config, levels[-1:], shape)


def linear(config: ModelConfig, levels: Sequence[str], shape: Sequence[int]) -> Form:
    pixels = Granularity("pixels", "pixels", "input", view_of(config))
    heads = [Head(l, {"pixels": "grad"}) for l in levels]
    return Form([pixels], heads, {"pixels": MLP(math.prod(shape), ())})


FORMS: dict[str, Callable[..., Form]] = {f.__name__: f for f in (taps, branches, separable, ensemble, flat, separate, linear)}


def build_model(
    config: ModelConfig, form: str, taxonomy: Taxonomy, image_shape: Sequence[int], forms: Mapping = FORMS
) -> MultiGranularityModel:
    """Declares and composes the model of a form.

    Where `config.match` names another form, all channels are scaled so that both have about the
    same number of parameters.

    Raises:
        InputError: an unknown form, or numbers that make no branch.
    """
    for name in (form, config.match or form):
        if name not in forms:
            raise ConfigError(f"no preset '{name}'; there are {', '.join(forms)}")

    def build(form: str, width: float) -> MultiGranularityModel:
        made = forms[form](dataclasses.replace(config, width=width), taxonomy.levels, image_shape)
        answered = {h.task for h in made.heads}
        tasks = [Task(l, l, taxonomy.size(l), l) for l in taxonomy.levels if l in answered]
        granularities = [dataclasses.replace(g, weighted_by=config.weighted_by) for g in made.granularities]
        return MultiGranularityModel(
            granularities, tasks, made.heads, made.branches, made.fusion, config.dropout, made.projections,
            config.granularity_dropout,
        )  # fmt: skip

    if config.match in ("", form):
        return build(form, config.width)
    image = {"image": jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)}
    wanted = _count(build(config.match, config.width), image)
    sizes = {}
    width = config.width
    for _ in range(6):  # parameters grow about as the square of the width
        sizes[width] = _count(build(form, width), image)
        width *= (wanted / sizes[width]) ** 0.5
    width = min(sizes, key=lambda w: abs(sizes[w] - wanted))
    print(f"{form}: {sizes[width]:,} parameters, to meet the {wanted:,} of {config.match}")
    return build(form, width)


def build_plan(config: PlanConfig, model: MultiGranularityModel, examples: int, alike: int = 1) -> tuple[Stage, ...]:
    """The stages of a plan of `config.kind`: by default one per granularity, coarse to fine, then all of them jointly.

    Where there is one granularity, or every head has a branch of its own and nothing is fused, there
    is nothing to stage: all train side by side, for as many epochs as the single stages of `alike`
    granularities have.

    Args:
        examples: in an epoch.
        alike: granularities of the staged model that a baseline is compared with.

    Raises:
        ConfigError: no epochs or resolution; a lower resolution for a branch of fixed input size; growth where
            granularities share a branch.
    """

    def steps(epochs: float) -> int:
        count = max(1, round(epochs * examples / config.batch_size)) if epochs > 0 else 0
        return min(count, config.max_steps) if config.max_steps else count

    alone = [(g.name, single(model, g.name)) for g in model.granularities]
    early = False  # one stage instead of several
    match config.kind:
        case "joint":
            return joint_only(model.everything, steps=max(1, steps(config.joint)), batch_size=config.batch_size)
        case "progressive_resolution":
            alone = [(f"resolution_{r:g}", model.everything) for r in config.resolution]
        case "backbone_first":
            alone = [("backbone", alone[-1][1])]
        case "coarse_to_fine" | "progressive_jigsaw":
            if early := not model.fusion and (len(alone) == 1 or len(model.branches) == len(model.heads)):
                alone = [("early", model.everything)]
    resolution = [_at(config.resolution, i) for i in range(len(alone))]
    epochs = [_at(config.alone, i) for i in range(len(alone))]
    if early:
        epochs = [sum(_at(config.alone, i) for i in range(alike))]
    if any(r != 1 for r in resolution) and any(isinstance(b, MLP) for b in model.branches.values()):
        raise ConfigError("an MLP sees inputs of one size alone: set --config.plan.resolution=1")
    alone = [(name, dataclasses.replace(op, resolution=r)) for (name, op), r in zip(alone, resolution)]
    lengths = dict(
        steps_alone=[steps(e) for e in epochs], steps_together=max(1, steps(config.joint)), batch_size=config.batch_size
    )
    strength = {name: _at(config.strength, i) for i, (name, _) in enumerate(alone)}
    plan = _kind_of_plan(config, model, alone, lengths)
    plan = tuple(dataclasses.replace(stage, augment=strength.get(stage.name, stage.augment)) for stage in plan)
    return anneal(plan) if config.anneal else plan


def _kind_of_plan(config: PlanConfig, model: MultiGranularityModel, alone: Sequence, lengths: Mapping) -> tuple[Stage, ...]:
    match config.kind:
        case "progressive_jigsaw":
            pieces = [_at(config.pieces, i) for i in range(len(alone))]
            return progressive_jigsaw(alone, model.everything, pieces=pieces, **lengths)
        case "growth":
            of = [g.branch for g in model.granularities]
            if len(of) < 2 or len(set(of)) < len(of):
                raise ConfigError("plan.kind=growth needs a branch per granularity, two or more: --config.preset=branches")
            grows = [(f"branches_{a}", f"branches_{b}") for a, b in itertools.pairwise(of)]
            return growth(alone, model.everything, grows=grows, **lengths)
    # Whatever trains before all granularities do: one of them, the backbone, or all at a lower resolution.
    return coarse_to_fine(alone, model.everything, **lengths)


def single(model: MultiGranularityModel, granularity: str) -> OperatingPoint:
    """One granularity, and the tasks of the heads that learn from it, or else from the fusion."""
    for source in (granularity, FUSED):
        if tasks := {h.task for h in model.heads if (source, "grad") in h.reads}:
            break
    return OperatingPoint((granularity,), tuple(tasks))


def points_of(model: MultiGranularityModel) -> dict[str, OperatingPoint]:
    """Each granularity alone, then all together, at full resolution."""
    alone = {g.name: single(model, g.name) for g in model.granularities} if len(model.granularities) > 1 else {}
    return alone | {"all": model.everything}


def seen_shape(config: VisionConfig, data: Dataset) -> tuple[int, int, int]:
    """(height, width, channels) of what the augmentation hands to the model."""
    side = config.augment.size
    return (side, side, data.image_shape[2]) if side else data.image_shape


def train(
    config: VisionConfig, workdir: pathlib.Path, meta: dict, forms: Mapping = FORMS, alike: int | None = None
) -> tuple[dict, list]:
    """From the dataset to the figures of the summary, and examples for the report.

    Args:
        forms: the experiment's, of which `config.preset` is one.
        alike: as in `build_plan`; by default as many as there are levels.
    """
    data = load_dataset(config.data)
    model = build_model(config.model, config.preset, data.taxonomy, seen_shape(config, data), forms)
    plan = build_plan(config.plan, model, len(data.train), alike or len(data.taxonomy.levels))
    return common.train_model(config, data, model, plan, points_of(model), workdir, meta)


def _count(model: MultiGranularityModel, inputs: Mapping) -> int:
    init = lambda x: model.init(jax.random.key(0), x, model.everything, train=False)
    return sum(p.size for p in jax.tree.leaves(jax.eval_shape(init, inputs)["params"]))


def _at(values: tuple, i: int) -> Any:
    if not values:
        raise ConfigError("plan.alone, plan.resolution, plan.strength and plan.pieces need at least one number each")
    return values[min(i, len(values) - 1)]


def view_of(config: ModelConfig, scale: float = 1.0):
    """The image, denoised if asked for, at `scale` times its size, of no more than `view_scale` times its resolution."""
    detail = min(scale, config.view_scale)
    size = Identity() if scale == detail == 1 else Resize(scale, detail)
    return size if config.denoise == "none" else Compose((Denoise(config.denoise), size))


def fusion_of(config: ModelConfig) -> Fusion:
    """The fusion of a config."""
    return FUSIONS[config.fusion](config.fusion_width, dtype=DTYPES[config.dtype])


def deepest(branch: Branch) -> str:
    """The last tap."""
    return list(branch.feature_info)[-1]


def taps_of(branch: Branch, count: int) -> list[str]:
    """`count` taps, the shallower for the coarser: the deepest ones, of a reduction each if there are as many, or spread
    evenly where all are of one size."""
    taps = list(branch.feature_info)
    if len(set(branch.feature_info.values())) == 1:
        return [taps[max(0, round((i + 1) * len(taps) / count) - 1)] for i in range(count)]
    of_reduction = {info.reduction: tap for tap, info in branch.feature_info.items()}
    if len(of_reduction) >= count:
        taps = list(of_reduction.values())
    return [taps[max(0, len(taps) - count + i)] for i in range(count)]


def branch_of(config: ModelConfig, image_shape: Sequence[int], scale: float = 1.0) -> Branch:
    """The branch of a config, with as many stages as a view of that scale has pixels for."""
    branch = _fitting_branch(config, image_shape, scale)
    if not config.drop_path:
        return branch
    if not hasattr(branch, "drop_path"):
        raise ConfigError(f"'{config.branch}' has no stochastic depth: leave out --config.model.drop_path")
    return branch.clone(drop_path=config.drop_path)


def _fitting_branch(config: ModelConfig, image_shape: Sequence[int], scale: float) -> Branch:
    if config.branch in ("resnet", "conv", "separable") and len(config.blocks) != len(config.widths):
        raise ConfigError(
            f"a width per stage is needed: --config.model.blocks has {config.blocks}, --config.model.widths {config.widths}"
        )
    height, width = (scaled(side, scale) for side in image_shape[:2])
    side = min(height, width)
    common: dict[str, Any] = dict(dtype=DTYPES[config.dtype], remat=config.remat)
    if config.activation != "auto":
        common["activation"] = activation(config.activation)
    published = NAMED_BRANCHES.get(config.branch)
    if config.norm != "batch" and config.branch.startswith(("vgg", "vit", "convnext")):
        raise ConfigError(f"'{config.branch}' has the norm that it was published with, not model.norm={config.norm}")
    if published and isinstance(branch := published(width=config.width, **common), ViT):
        patch = config.patch if branch.stem == "patch" else 1
        branch = branch.clone(patch=patch, image_size=(height, width))
        if (reduction := branch.feature_info["final"].reduction) * 2 > side:
            raise ConfigError(f"patches of {reduction} pixels are too large for views of {height}×{width}: set model.patch")
        return branch
    if published:
        if isinstance(branch, ResNet):
            branch = branch.clone(stem=config.stem, downsample=config.downsample, norm=config.norm)
        elif config.norm != "batch":
            branch = branch.clone(norm=config.norm)
        blocks, widths, make = branch.blocks, branch.widths, branch.clone
    else:
        common["norm"] = config.norm
        blocks, widths = config.blocks, tuple(scale_width(w, config.width, 4) for w in config.widths)
        if config.branch == "mlp":
            return MLP(height * width * image_shape[2], widths, **{k: v for k, v in common.items() if k != "remat"})
        if config.branch == "resnet":
            common |= dict(stem=config.stem, stem_width=widths[0], downsample=config.downsample)
        elif config.branch == "conv":
            common["stem"] = "patch" if config.stem == "patch" else "none"
        elif config.stem == "patch":
            common["stem_patch"] = 2
        kind = {"resnet": ResNet, "conv": ConvNet, "separable": SeparableNet}[config.branch]
        make = functools.partial(kind, **common)
    # A map narrower than two pixels tells nothing that its mean does not.
    cut = lambda n: make(blocks=blocks[:n], widths=widths[:n])
    fits = [n for n in range(1, len(widths) + 1) if cut(n).feature_info[deepest(cut(n))].reduction * 2 <= side]
    return cut(max(fits, default=1))
