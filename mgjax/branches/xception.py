"""Xception: residual blocks of separable convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage, published, scale_width
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import Conv, LinearSeparable, XceptionBlock


class Xception(Branch):
    """Xception (Chollet 2016, arXiv:1610.02357), padded and normalised as in Keras, where it was published.

    A stem of two 3×3 convolutions; stages of `XceptionBlock`s, whose first block strides and has two
    separable convolutions, the others three; at last separable convolutions without a residual.
    Taps: `stem`, `stage1`, `stage2`, … (sums that the next block activates) and `exit`.
    `Xception.named("xception")` gives the published one.

    Attributes:
        blocks: blocks per stage.
        widths: channels per stage.
        stem_widths: channels of the two convolutions of the stem.
        exit_widths: channels of the last separable convolutions; with none there is no tap `exit`.
        stem_stride: of the first convolution.
        stem_padding: of both convolutions, see `mgjax.layers.conv.pads`. Published is "VALID": with it a
            map has up to three positions less than its reduction says.
        entry_stages: as many stages widen at once, the others (as the published exit flow) in the last
            convolution of their first block.
        halvings: as many stages halve the map, the others keep it.
        drop_path: probability of leaving out the last block, falling to 0 at the first.
        padding: of the poolings, "SAME" (published) or "symmetric".
        norm, activation, dtype: as in `mgjax.layers.Conv`.
        epsilon: of the norms.
        impl: as in `mgjax.layers.DepthwiseConv`.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = Xception.named("xception_cifar", width=0.125)
        >>> branch.feature_info["exit"]
        FeatureInfo(channels=256, reduction=8)
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> features, _ = branch.init_with_output(jax.random.key(0), images, taps=("stage2",), train=False)
        >>> features["stage2"].map.shape
        (1, 8, 8, 32)
    """

    blocks: Sequence[int] = (1, 1, 9, 1)
    widths: Sequence[int] = (128, 256, 728, 1024)
    stem_widths: Sequence[int] = (32, 64)
    exit_widths: Sequence[int] = (1536, 2048)
    stem_stride: int = 2
    stem_padding: str = "VALID"
    entry_stages: int = 3
    halvings: int = 4
    drop_path: float = 0.0
    padding: str = "SAME"
    norm: str = "batch"
    activation: Callable = nn.relu
    epsilon: float = 1e-3
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> Xception:
        """ "xception" as published, or "xception_cifar" for images of 32×32.

        The latter differs in that the stem has stride 1 and pads its maps, and that the last stage does
        not stride: its last map is 4×4. It has as many parameters as the published one.
        `width` multiplies the published channels, to multiples of 8; `options` override any attribute.
        """
        scaled = {
            which: tuple(scale_width(w, width) for w in getattr(cls, which))
            for which in ("widths", "stem_widths", "exit_widths")
        }
        return cls(**{**scaled, **published("Xception", NAMED, name), **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        per_stage(self.blocks, self.widths)
        if self.stem_padding not in ("VALID", "SAME", "symmetric"):
            raise InputError(f"the stem of an Xception pads VALID, SAME or symmetric, not '{self.stem_padding}'")
        if len(self.stem_widths) != 2:
            raise InputError(f"the stem of an Xception has two convolutions, not the widths {tuple(self.stem_widths)}")
        info = {"stem": FeatureInfo(self.stem_widths[1], self.stem_stride)}
        for i, width in enumerate(self.widths):
            info[f"stage{i + 1}"] = FeatureInfo(width, self.stem_stride * 2 ** min(i + 1, self.halvings))
        if self.exit_widths:
            info["exit"] = FeatureInfo(self.exit_widths[-1], info[f"stage{len(self.widths)}"].reduction)
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader = self.read(taps)
        # Without padding the two convolutions of the stem need 3 positions each.
        check_image(x, 2 * self.stem_stride + 3 if self.stem_padding == "VALID" else 1)
        common = dict(norm=self.norm, activation=self.activation, epsilon=self.epsilon, dtype=self.dtype)
        x = x.astype(self.dtype)
        for i, width in enumerate(self.stem_widths):
            stride = 1 if i else self.stem_stride
            x = Conv(width, 3, stride, padding=self.stem_padding, name=f"stem{i + 1}", **common)(x, train=train)
        if reader.offer("stem", x):
            return reader.features
        done, total = 0, sum(self.blocks)
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            for j in range(count):
                first = x.shape[-1] if i >= self.entry_stages else width
                block = XceptionBlock(
                    (width,) * 3 if j else (first, width),
                    stride=2 if j == 0 and i < self.halvings else 1,
                    preactivate=done > 0,  # the stem has activated
                    padding=self.padding,
                    drop_path=self.drop_path * done / max(1, total - 1),
                    impl=self.impl,
                    name=f"stage{i + 1}_block{j + 1}",
                    **common,
                )
                x = self.run(block, x, train=train)
                done += 1
            if reader.offer(f"stage{i + 1}", x):
                return reader.features
        for i, width in enumerate(self.exit_widths):
            layer = LinearSeparable(width, impl=self.impl, name=f"exit{i + 1}", **common)
            x = self.run(layer, x, train=train)
        reader.offer("exit", x)
        return reader.features


NAMED = {"xception": {}, "xception_cifar": dict(stem_stride=1, stem_padding="symmetric", halvings=3)}
