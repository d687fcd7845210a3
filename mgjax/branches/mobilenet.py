"""Networks for small machines: MobileNet, of separable convolutions and of inverted residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage, published, scale_width
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers.blocks import InvertedResidual
from mgjax.layers.conv import Conv, Pointwise, SeparableConv

PADDINGS = ("symmetric", "SAME")  # those that every stage can have on a map of any size


class MobileNetV1(Branch):
    """MobileNet (Howard et al. 2017, arXiv:1704.04861): a dense stem, then separable convolutions.

    Taps: `stem`, `stage1`, `stage2`, … A stage ends before the map is halved again. `MobileNetV1.named("mobilenet_v1")`
    gives the published network without its last dense layer.

    Attributes:
        widths: channels per stage.
        blocks: separable convolutions per stage.
        strides: of the first block of each stage; what goes beyond the last stage is not used, so that a network can be cut.
        stem_width, stem_stride: of the 3×3 convolution that comes first.
        norm, activation, use_bias, dtype: as in `mgjax.layers.Conv`.
        epsilon: as there; weights of Keras were trained with 1e-3.
        padding: "symmetric", or "SAME" as TensorFlow's weights were trained with; see `mgjax.layers.conv.pads`.
        impl: of the depthwise convolutions, see `mgjax.ops.depthwise_conv`.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Raises:
        InputError: numbers of stages that differ, or another padding.

    Example:
        >>> import jax
        >>> branch = MobileNetV1.named("mobilenet_v1", width=0.25)
        >>> branch.feature_info["stage5"]
        FeatureInfo(channels=256, reduction=32)
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 32, 32, 3)), taps=("stage2",), train=False)
        >>> features["stage2"].map.shape
        (1, 8, 8, 32)
    """

    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    blocks: Sequence[int] | int = (1, 2, 2, 6, 2)
    strides: Sequence[int] | int = (1, 2, 2, 2, 2)
    stem_width: int = 32
    stem_stride: int = 2
    norm: str = "batch"
    activation: Callable = nn.relu6
    use_bias: bool = False
    epsilon: float = 1e-5
    padding: str = "symmetric"
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> MobileNetV1:
        """ "mobilenet_v1" as published, or "mobilenet_v1_cifar", whose stem does not halve the map.

        `width` multiplies the channels, to multiples of 8, which all published ones (0.25, 0.5, 0.75) are;
        `options` override any attribute.
        """
        attributes = published("MobileNetV1", NAMED_V1, name) | {
            "widths": tuple(scale_width(w, width) for w in cls.widths),
            "stem_width": scale_width(cls.stem_width, width),
        }
        return cls(**{**attributes, **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return _info(self)

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader = self.read(taps)
        check_image(x)
        common = _common(self)
        x = Conv(self.stem_width, 3, self.stem_stride, name="stem", **common)(x.astype(self.dtype), train=train)
        if reader.offer("stem", x):
            return reader.features
        strides = _at_least(self, "strides")
        for i, (width, count) in enumerate(zip(self.widths, per_stage(self.blocks, self.widths))):
            for j in range(count):
                stride = 1 if j else strides[i]
                block = SeparableConv(width, 3, stride, impl=self.impl, name=f"stage{i + 1}_block{j + 1}", **common)
                x = self.run(block, x, train=train)
            if reader.offer(f"stage{i + 1}", x):
                break
        return reader.features


class MobileNetV2(Branch):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with linear bottlenecks.

    Taps: `stem`, `stage1`, `stage2`, … (the rows of the paper's table 2; several may share a reduction) and `head`, the
    1×1 convolution behind the last. `MobileNetV2.named("mobilenet_v2")` gives the published network without its last dense
    layer.

    Attributes:
        widths: channels per stage.
        blocks: inverted residuals per stage.
        strides, expansions: of the first block and of all blocks of each stage; what goes beyond the last stage is not used,
            so that a network can be cut.
        stem_width, stem_stride: of the 3×3 convolution that comes first.
        head_width: channels of the 1×1 convolution that comes last; None for none.
        norm, activation, use_bias, dtype: as in `mgjax.layers.Conv`.
        epsilon: as there; weights of Keras were trained with 1e-3.
        padding: "symmetric", or "SAME" as TensorFlow's weights were trained with; see `mgjax.layers.conv.pads`.
        impl: of the depthwise convolutions, see `mgjax.ops.depthwise_conv`.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Raises:
        InputError: numbers of stages that differ, or another padding.

    Example:
        >>> import jax
        >>> branch = MobileNetV2.named("mobilenet_v2", width=0.5)
        >>> branch.feature_info["stage7"], branch.feature_info["head"]
        (FeatureInfo(channels=160, reduction=32), FeatureInfo(channels=1280, reduction=32))
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 32, 32, 3)), taps=("stage2",), train=False)
        >>> features["stage2"].map.shape
        (1, 8, 8, 16)
    """

    widths: Sequence[int] = (16, 24, 32, 64, 96, 160, 320)
    blocks: Sequence[int] | int = (1, 2, 3, 4, 3, 3, 1)
    strides: Sequence[int] | int = (1, 2, 2, 2, 1, 2, 1)
    expansions: Sequence[float] | float = (1, 6, 6, 6, 6, 6, 6)
    stem_width: int = 32
    stem_stride: int = 2
    head_width: int | None = 1280
    norm: str = "batch"
    activation: Callable = nn.relu6
    use_bias: bool = False
    epsilon: float = 1e-5
    padding: str = "symmetric"
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> MobileNetV2:
        """ "mobilenet_v2" as published, or "mobilenet_v2_cifar", of which neither stem nor second stage halve the map.

        `width` multiplies the channels, made divisible by 8 (`make_divisible`); below 1 it leaves the head as wide as it is,
        as published. `options` override any attribute.
        """
        if width <= 0:
            raise InputError(f"a width multiplier is a positive number, not {width}")
        attributes = published("MobileNetV2", NAMED_V2, name) | {
            "widths": tuple(make_divisible(w * width) for w in cls.widths),
            "stem_width": make_divisible(cls.stem_width * width),
            "head_width": make_divisible(cls.head_width * max(1.0, width)),
        }
        return cls(**{**attributes, **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        _at_least(self, "expansions")
        info = _info(self)
        if self.head_width:
            info["head"] = FeatureInfo(self.head_width, list(info.values())[-1].reduction)
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader = self.read(taps)
        check_image(x)
        common = _common(self)
        x = Conv(self.stem_width, 3, self.stem_stride, name="stem", **common)(x.astype(self.dtype), train=train)
        if reader.offer("stem", x):
            return reader.features
        strides, expansions = _at_least(self, "strides"), _at_least(self, "expansions")
        for i, (width, count) in enumerate(zip(self.widths, per_stage(self.blocks, self.widths))):
            for j in range(count):
                stride, name = 1 if j else strides[i], f"stage{i + 1}_block{j + 1}"
                block = InvertedResidual(width, expansions[i], 3, stride, impl=self.impl, name=name, **common)
                x = self.run(block, x, train=train)
            if reader.offer(f"stage{i + 1}", x):
                return reader.features
        del common["padding"]
        reader.offer("head", Pointwise(self.head_width, name="head", **common)(x, train=train))
        return reader.features


def make_divisible(channels: float, multiple: int = 8) -> int:
    """The nearest multiple that is not 0, halves upwards; the next one where that would lose more than a tenth.

    MobileNetV2's rule for its width multiplier.

    Example:
        >>> make_divisible(20), make_divisible(11), make_divisible(0.5)
        (24, 16, 8)
    """
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


def _common(branch: MobileNetV1 | MobileNetV2) -> dict:
    names = ("norm", "activation", "use_bias", "epsilon", "padding", "dtype")
    return {name: getattr(branch, name) for name in names}


def _at_least(branch: MobileNetV1 | MobileNetV2, attribute: str) -> tuple:
    """An attribute of every stage; one number is that of all. InputError where it has fewer than there are widths."""
    values, stages = getattr(branch, attribute), len(branch.widths)
    values = (values,) * stages if isinstance(values, (int, float)) else tuple(values)
    if len(values) < stages:
        raise InputError(f"{type(branch).__name__} has {stages} stages, but {attribute} for {len(values)}: {values}")
    return values


def _info(branch: MobileNetV1 | MobileNetV2) -> dict[str, FeatureInfo]:
    """Of stem and stages."""
    if branch.padding not in PADDINGS:
        raise InputError(f"{type(branch).__name__} pads {' or '.join(PADDINGS)}, not '{branch.padding}'")
    per_stage(branch.blocks, branch.widths)
    reduction = branch.stem_stride
    info = {"stem": FeatureInfo(branch.stem_width, reduction)}
    for i, (width, stride) in enumerate(zip(branch.widths, _at_least(branch, "strides"))):
        info[f"stage{i + 1}"] = FeatureInfo(width, reduction := reduction * stride)
    return info


NAMED_V1 = {"mobilenet_v1": {}, "mobilenet_v1_cifar": dict(stem_stride=1)}
NAMED_V2 = {"mobilenet_v2": {}, "mobilenet_v2_cifar": dict(stem_stride=1, strides=(1, 1, 2, 2, 1, 2, 1))}
