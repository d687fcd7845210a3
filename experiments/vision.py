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
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import common
from experiments.plans import RunConfig, build_plan, points_of
from experiments.predict import Seen
from mgjax.branches import MLP, NAMED_BRANCHES, Branch, ConvNet, ResNet, SeparableNet, ViT
from mgjax.branches.base import scale_width
from mgjax.branches.resnet import DOWNSAMPLES, STEMS
from mgjax.config import ConfigError, key
from mgjax.contracts import Batch
from mgjax.data import Augment, AugmentConfig, Crop, DataConfig, DecodeError, load_dataset
from mgjax.data.images import decode_rgb, fit
from mgjax.errors import InputError
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
    Resize,
    Task,
)
from mgjax.layers import ACTIVATIONS, activation
from mgjax.layers.norm import NORMS
from mgjax.metrics import ClassificationMetrics
from mgjax.model import MultiGranularityModel
from mgjax.projection import GranularityProjection
from mgjax.taxonomy import Taxonomy
from mgjax.views import scaled

BRANCHES = (*NAMED_BRANCHES, "resnet", "conv", "separable", "mlp")
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
class VisionConfig(RunConfig):
    """What every experiment on images can be told."""

    size: str = key("auto", "of the model; auto goes by the device", choices=("auto", "cpu", "gpu"))
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()


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


def _seen_shape(config: VisionConfig, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(height, width, channels) of what the augmentation hands to the model."""
    side = config.augment.size
    return (side, side, shape[2]) if side else shape


def train(
    config: VisionConfig, workdir: pathlib.Path, meta: dict, forms: Mapping = FORMS, alike: int | None = None
) -> tuple[dict, list]:
    """From the dataset to the figures of the summary, and examples for the report.

    Args:
        forms: the experiment's, of which `config.preset` is one.
        alike: as in `build_plan`; by default as many as there are levels.
    """
    data = load_dataset(config.data)
    model = build_model(config.model, config.preset, data.taxonomy, _seen_shape(config, data.image_shape), forms)
    plan = build_plan(config.plan, model, len(data.train), alike or len(data.taxonomy.levels))
    on_host = config.data.crop == "host"  # then each image is cut where it is decoded, and not again
    kept = dataclasses.replace(config.augment, crop=(), padding=0) if on_host else config.augment
    augment = Augment.from_config(kept, data.mean, data.std, data.image_shape)
    if augment.mixup or augment.cutmix:
        for stage in plan:  # pairs that lie across two devices would have to travel
            if stage.augment and stage.batch_size % (2 * jax.device_count()):
                raise InputError(
                    f"stage '{stage.name}': mixing needs an even number of rows on each of {jax.device_count()} devices; "
                    f"a batch of {stage.batch_size} has not: --config.plan.batch_size"
                )
    side = config.augment.size or data.image_shape[0]
    crop = lambda stage: Crop(side, config.augment.crop, config.seed, float(stage.augment)) if stage.augment else None
    metrics = ClassificationMetrics(data.taxonomy, model.tasks, model.heads, config.decoder)
    facts = common.train_model(
        config, data, model, plan, points_of(model), workdir, meta,
        augment=augment, metrics=metrics, crop=crop if on_host else lambda stage: None,
    )  # fmt: skip
    return facts, common.examples(config, data, model, facts.pop("variables"), augment, plan[-1].op)


def see(forms: Mapping) -> Callable:
    """What `predict.answer` needs, of an experiment with these forms: image files, fitted and normalised as the test's were."""

    def seen(config: VisionConfig, record: Mapping, tree: Taxonomy) -> Seen:
        shape = tuple(record["image_shape"])
        augment = Augment.from_config(config.augment, record["mean"], record["std"], shape)

        def encode(rows: Sequence[Mapping]) -> Mapping:
            images = np.stack([_read_image(row["path"], shape) for row in rows])
            return augment.normalise(Batch({"image": images}, {}, np.ones(len(rows), bool), np.arange(len(rows)))).inputs

        return Seen(build_model(config.model, config.preset, tree, _seen_shape(config, shape), forms), tree, encode)

    return seen


def _read_image(path: str, shape: Sequence[int]) -> np.ndarray:
    try:
        image = decode_rgb(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise InputError(f"'{path}' does not decode: {error}") from None
    return image if image.shape == tuple(shape) else fit(image, shape[0])


def _count(model: MultiGranularityModel, inputs: Mapping) -> int:
    init = lambda x: model.init(jax.random.key(0), x, model.everything, train=False)
    return sum(p.size for p in jax.tree.leaves(jax.eval_shape(init, inputs)["params"]))


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
