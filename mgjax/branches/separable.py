"""A small network of depthwise-separable convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage
from mgjax.contracts import FeatureInfo
from mgjax.layers import Conv, SeparableConv, patches


class SeparableNet(Branch):
    """A dense stem, then stages of depthwise-separable convolutions (Howard et al. 2017,
    arXiv:1704.04861); each stage after the first halves the map.

    Taps: `stem`, `stage1`, `stage2`, …

    Attributes:
        widths: channels per stage.
        blocks: separable convolutions per stage.
        stem_width: channels of the stem; by default half the first width.
        stem_stride: 1 for small images, 2 for ImageNet's.
        stem_patch: side of the blocks of pixels that become channels before the stem, which saves a CPU the large maps.
        kernel: side of the depthwise kernels.
        norm, activation, dtype: as in `mgjax.layers.Conv`.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = SeparableNet(widths=(16, 32))
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 3)), taps=("stage2",), train=False)
        >>> features["stage2"].vector.shape
        (1, 32)
    """

    widths: Sequence[int] = (64, 128, 256)
    blocks: Sequence[int] | int = 2
    stem_width: int | None = None
    stem_stride: int = 1
    stem_patch: int = 1
    kernel: int = 3
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        per_stage(self.blocks, self.widths)
        first = self.stem_patch * self.stem_stride
        info = {"stem": FeatureInfo(self.stem_width or self.widths[0] // 2, first)}
        for i, width in enumerate(self.widths):
            info[f"stage{i + 1}"] = FeatureInfo(width, first * 2**i)
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader, info = self.read(taps), self.feature_info
        check_image(x, self.stem_patch)
        common = dict(norm=self.norm, activation=self.activation, dtype=self.dtype)
        x = patches(x.astype(self.dtype), self.stem_patch)
        x = Conv(info["stem"].channels, 3, self.stem_stride, name="stem", **common)(x, train=train)
        if reader.offer("stem", x):
            return reader.features
        for i, (width, count) in enumerate(zip(self.widths, per_stage(self.blocks, self.widths))):
            for j in range(count):
                stride = 2 if i and j == 0 else 1
                block = SeparableConv(width, self.kernel, stride, name=f"stage{i + 1}_block{j + 1}", **common)
                x = self.run(block, x, train=train)
            if reader.offer(f"stage{i + 1}", x):
                break
        return reader.features
