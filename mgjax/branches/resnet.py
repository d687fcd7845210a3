"""Residual networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage, published, scale_width
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import Conv, DropPath, patches

EXPANSION = {"basic": 1, "bottleneck": 4}
STEMS = {"imagenet": 4, "cifar": 1, "patch": 2}  # reduction of each
DOWNSAMPLES = ("stride", "pool")


class ResidualBlock(nn.Module):
    """Basic (two 3×3) or bottleneck (1×1, 3×3, 1×1) residual block; stride on the 3×3 (v1.5)."""

    features: int
    kind: str
    stride: int
    norm: str
    activation: Callable
    dtype: jnp.dtype
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        common = dict(norm=self.norm, dtype=self.dtype)
        out = self.features * EXPANSION[self.kind]
        if self.kind == "basic":
            widths = ((self.features, 3, self.stride), (out, 3, 1))
        else:
            widths = ((self.features, 1, 1), (self.features, 3, self.stride), (out, 1, 1))
        y = x
        for i, (features, kernel, stride) in enumerate(widths):
            last = i == len(widths) - 1
            activation = None if last else self.activation
            y = Conv(features, kernel, stride, activation=activation, zero_scale=last, name=f"conv{i + 1}", **common)(
                y, train=train
            )
        if x.shape != y.shape:
            x = Conv(out, 1, self.stride, activation=None, name="shortcut", **common)(x, train=train)
        return self.activation(x + DropPath(self.drop_path)(y, train=train))


class ResNet(Branch):
    """ResNet (He et al. 2015, arXiv:1512.03385; bottlenecks with the stride on the 3×3).

    Taps: `stem`, `stage1`, `stage2`, … `ResNet.named("resnet50")` gives the published ones.

    Attributes:
        blocks: blocks per stage.
        widths: channels per stage (a bottleneck's output is four times as wide).
        kind: "basic" or "bottleneck".
        stem: "imagenet" (7×7 stride 2 and max-pooling: reduction 4), "cifar" (3×3, reduction 1)
            or "patch" (space to depth by 2, then 3×3: reduction 2, cheap on a CPU).
        stem_width: channels of the stem; by default the first width.
        downsample: how a stage after the first halves the map: "stride" (published) or "pool"
            (2×2 means before the block; on a CPU a strided convolution's gradient is slow).
        norm, activation, dtype: as in `mgjax.layers.Conv`.
        remat: compute blocks again in the backward pass instead of keeping what they computed.
        drop_path: probability of leaving out the last block, falling to 0 at the first.

    Example:
        >>> import jax
        >>> branch = ResNet.named("resnet18", stem="cifar")
        >>> branch.feature_info["stage4"]
        FeatureInfo(channels=512, reduction=8)
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> features, _ = branch.init_with_output(jax.random.key(0), images, taps=("stage2",), train=False)
        >>> features["stage2"].map.shape
        (1, 16, 16, 128)
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    kind: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["imagenet", "cifar", "patch"] = "imagenet"
    stem_width: int | None = None
    downsample: Literal["stride", "pool"] = "stride"
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    drop_path: float = 0.0

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> ResNet:
        """ "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152" as published.

        `width` multiplies the published channels, to multiples of 8; `options` override any attribute.
        """
        attributes = published("residual network", NAMED, name)
        return cls(**{"widths": tuple(scale_width(w, width) for w in cls.widths), **attributes, **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        if self.stem not in STEMS or self.downsample not in DOWNSAMPLES or self.kind not in EXPANSION:
            raise InputError(
                f"a residual network has a stem of {sorted(STEMS)}, downsamples by {DOWNSAMPLES} and has blocks of "
                f"{sorted(EXPANSION)}, not '{self.stem}', '{self.downsample}' and '{self.kind}'"
            )
        per_stage(self.blocks, self.widths)
        reduction = STEMS[self.stem]
        info = {"stem": FeatureInfo(self.stem_width or self.widths[0], reduction)}
        for i, width in enumerate(self.widths):
            info[f"stage{i + 1}"] = FeatureInfo(width * EXPANSION[self.kind], reduction * 2**i)
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader, info = self.read(taps), self.feature_info
        # Means over 2×2 need two pixels; a strided convolution is content with one.
        check_image(x, max(info[t].reduction for t in taps) if self.downsample == "pool" else info["stem"].reduction)
        common = dict(norm=self.norm, activation=self.activation, dtype=self.dtype)
        width = info["stem"].channels
        x = x.astype(self.dtype)
        if self.stem == "imagenet":
            x = Conv(width, 7, 2, name="stem", **common)(x, train=train)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            if self.stem == "patch":  # an odd side repeats its last pixel
                x = patches(x, 2)
            x = Conv(width, 3, name="stem", **common)(x, train=train)
        if reader.offer("stem", x):
            return reader.features
        done, total = 0, sum(self.blocks)
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            stride = 2 if i else 1
            if i and self.downsample == "pool":
                x, stride = nn.avg_pool(x, (2, 2), (2, 2)), 1
            for j in range(count):
                drop = self.drop_path * done / max(1, total - 1)
                name = f"stage{i + 1}_block{j + 1}"
                block = ResidualBlock(width, self.kind, stride if j == 0 else 1, drop_path=drop, name=name, **common)
                x, done = self.run(block, x, train=train), done + 1
            if reader.offer(f"stage{i + 1}", x):
                break
        return reader.features


NAMED = {
    "resnet18": dict(blocks=(2, 2, 2, 2), kind="basic"),
    "resnet34": dict(blocks=(3, 4, 6, 3), kind="basic"),
    "resnet50": dict(blocks=(3, 4, 6, 3), kind="bottleneck"),
    "resnet101": dict(blocks=(3, 4, 23, 3), kind="bottleneck"),
    "resnet152": dict(blocks=(3, 8, 36, 3), kind="bottleneck"),
}
