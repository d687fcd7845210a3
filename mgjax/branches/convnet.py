"""A plain multi-layer convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import Conv, patches

POOLS = {"max": nn.max_pool, "mean": nn.avg_pool}
STEMS = ("none", "patch")


class ConvNet(Branch):
    """Stages of convolution, norm and activation, with 2×2 pooling between them.

    Simple, and fast on a CPU: no strides, and with the stem "patch" few pixels of many channels.
    Taps: `stage1`, `stage2`, …, before the pooling.

    Attributes:
        widths: channels per stage.
        blocks: convolutions per stage, or one number for all.
        kernel: side of the kernels.
        pool: what halves the map, "max" or "mean".
        stem: "none", or "patch": space to depth before the first convolution.
        patch: side of the blocks that the stem "patch" makes into channels.
        norm, activation, dtype: as in `mgjax.layers.Conv`; a convolution has a bias where there is no norm.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = ConvNet((8, 16), stem="patch")
        >>> branch.feature_info["stage2"]
        FeatureInfo(channels=16, reduction=4)
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 3)), taps=("stage2",), train=False)
        >>> features["stage2"].map.shape
        (1, 2, 2, 16)
    """

    widths: Sequence[int] = (64, 128, 256)
    blocks: Sequence[int] | int = 1
    kernel: int = 3
    pool: Literal["max", "mean"] = "max"
    stem: Literal["none", "patch"] = "none"
    patch: int = 2
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        if self.stem not in STEMS or self.pool not in POOLS:
            raise InputError(
                f"a ConvNet has a stem of {STEMS} and pools by {tuple(POOLS)}, not '{self.stem}' and '{self.pool}'"
            )
        per_stage(self.blocks, self.widths)
        first = self.patch if self.stem == "patch" else 1
        return {f"stage{i + 1}": FeatureInfo(width, first * 2**i) for i, width in enumerate(self.widths)}

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader, info = self.read(taps), self.feature_info
        check_image(x, max(info[t].reduction for t in taps))
        common = dict(norm=self.norm, activation=self.activation, use_bias=self.norm == "none", dtype=self.dtype)
        x = x.astype(self.dtype)
        if self.stem == "patch":
            x = patches(x, self.patch)
        for i, (width, count) in enumerate(zip(self.widths, per_stage(self.blocks, self.widths))):
            if i:
                x = POOLS[self.pool](x, (2, 2), (2, 2))
            for j in range(count):
                x = self.run(Conv(width, self.kernel, name=f"stage{i + 1}_conv{j + 1}", **common), x, train=train)
            if reader.offer(f"stage{i + 1}", x):
                break
        return reader.features
