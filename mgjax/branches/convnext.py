"""ConvNeXt: a convolutional network with the proportions of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch, check_image, per_stage, published, scale_width
from mgjax.contracts import FeatureInfo
from mgjax.layers import ConvNeXtBlock, Norm, PatchEmbed, activation


class ConvNeXt(Branch):
    """ConvNeXt (Liu et al. 2022, arXiv:2201.03545).

    The stem embeds patches and normalises them; before every later stage the map is normalised, and
    patches of 2×2 of it are embedded. Taps: `stem`, `stage1`, `stage2`, … The vector of the last stage
    is its mean, normalised, which is what the published classifier reads; the others are plain means.
    `ConvNeXt.named("convnext_t")` gives the published ones.

    Attributes:
        blocks: blocks per stage.
        widths: channels per stage.
        stem_patch: side of the patches of the stem, its stride; a side of the image that is no multiple
            repeats its last pixels.
        halvings: as many stages after the first halve the map, the others keep it.
        kernel, mlp_ratio, layer_scale: of the blocks, see `mgjax.layers.ConvNeXtBlock`.
        drop_path: probability of leaving out the last block, falling to 0 at the first.
        norm: of the blocks and between them, see `mgjax.layers.Norm`.
        epsilon: of the norms.
        activation: of the blocks; published is the exact "gelu".
        impl: as in `mgjax.layers.DepthwiseConv`.
        dtype: of the computation; parameters are float32.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = ConvNeXt.named("convnext_t_cifar", width=0.25, blocks=(1, 1, 1, 1))
        >>> branch.feature_info["stage4"]
        FeatureInfo(channels=192, reduction=8)
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> features, _ = branch.init_with_output(jax.random.key(0), images, taps=("stage1",), train=False)
        >>> features["stage1"].map.shape
        (1, 16, 16, 24)
    """

    blocks: Sequence[int] = (3, 3, 9, 3)
    widths: Sequence[int] = (96, 192, 384, 768)
    stem_patch: int = 4
    halvings: int = 3
    kernel: int = 7
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: Callable = activation("gelu")
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> ConvNeXt:
        """ "convnext_t" or "convnext_s" as published, with "_cifar" behind it for images of 32×32.

        The latter differ in that the stem's patches are 2×2 pixels, and that the last stage does not
        halve the map, its patches being single positions: the last map is 4×4. `drop_path` is the
        published one, 0.1 or 0.4.
        `width` multiplies the published channels, to multiples of 8; `options` override any attribute.
        """
        widths = tuple(scale_width(w, width) for w in cls.widths)
        return cls(**{"widths": widths, **published("ConvNeXt", NAMED, name), **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        per_stage(self.blocks, self.widths)
        info = {"stem": FeatureInfo(self.widths[0], self.stem_patch)}
        for i, width in enumerate(self.widths):
            info[f"stage{i + 1}"] = FeatureInfo(width, self.stem_patch * 2 ** min(i, self.halvings))
        return info

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader = self.read(taps)
        check_image(x)
        norm = lambda name, x: Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name=name)(x, train=train)
        x = PatchEmbed(self.widths[0], self.stem_patch, dtype=self.dtype, name="stem")(x)
        x = norm("stem_norm", x)
        if reader.offer("stem", x):
            return reader.features
        done, total, last = 0, sum(self.blocks), len(self.widths) - 1
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            if i:
                x = norm(f"stage{i + 1}_norm", x)
                x = PatchEmbed(width, 2 if i <= self.halvings else 1, dtype=self.dtype, name=f"stage{i + 1}_embed")(x)
            for j in range(count):
                block = ConvNeXtBlock(
                    self.kernel,
                    self.mlp_ratio,
                    self.norm,
                    self.epsilon,
                    self.activation,
                    self.layer_scale,
                    self.drop_path * done / max(1, total - 1),
                    self.impl,
                    self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )
                x = self.run(block, x, train=train)
                done += 1
            if reader.offer(f"stage{i + 1}", x, norm("norm", x.mean((1, 2))) if i == last else None):
                break
        return reader.features


_SIZES = {"convnext_t": dict(blocks=(3, 3, 9, 3), drop_path=0.1), "convnext_s": dict(blocks=(3, 3, 27, 3), drop_path=0.4)}
NAMED = {**_SIZES, **{f"{name}_cifar": dict(size, stem_patch=2, halvings=2) for name, size in _SIZES.items()}}
