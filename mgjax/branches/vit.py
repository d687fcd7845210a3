"""Vision transformers, on patches of the image or of a residual network's map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from mgjax import ops
from mgjax.branches.base import Branch, check_image, published, scale_width
from mgjax.branches.resnet import ResNet
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import Norm, PatchEmbed, TransformerBlock, activation

STEMS = ("patch", "resnet")
POOLS = ("cls", "mean")
# The first three stages of ResNet-50, the third as long as the third and fourth together, as in
# the paper's hybrid; group instead of batch normalisation, but without its standardised weights.
HYBRID = dict(blocks=(3, 4, 9), widths=(64, 128, 256), kind="bottleneck", norm="group")


class ViT(Branch):
    """Vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

    Taps: `embed` (patches with their positions), `block1`, `block2`, … (raw, as the next block
    reads them) and `final` (the last block, normalised). The map of a tap is its patch tokens, the
    vector its CLS token or their mean. The CLS token has seen nothing at `embed`: there it is the
    mean. `ViT.named("vit_s", patch=16)` gives the published ones.

    An image of another size than declared has the learned positions resampled (`ops.resize`:
    linear, antialiased), so that a model runs at any resolution.

    Attributes:
        features: channels of a token.
        depth: number of blocks.
        heads: of the attention.
        patch: side of a patch, in pixels of what the stem gives.
        image_size: side, or height and width, of the images that the positions are learned for.
        mlp_ratio: hidden width of the MLPs per channel.
        pool: "cls" (an extra token) or "mean" (no such token).
        stem: "patch" (patches of the image) or "resnet" (patches, usually of one position, of the
            last map of a residual network: a hybrid).
        stem_options: attributes of that `ResNet` which differ from `HYBRID`.
        norm, epsilon: of the blocks, see `mgjax.layers.Norm`.
        activation: of the MLPs; published is the exact "gelu".
        dropout: of tokens and of what attention and MLPs say, in training.
        drop_path: probability of leaving out the last block, falling to 0 at the first.
        dtype: of the computation; parameters are float32.
        remat: compute blocks again in the backward pass instead of keeping what they computed.

    Example:
        >>> import jax
        >>> branch = ViT(features=16, depth=2, heads=2, patch=4, image_size=8)
        >>> features, _ = branch.init_with_output(
        ...     jax.random.key(0), jnp.ones((1, 12, 12, 3)), taps=("final",), train=False)
        >>> features["final"].map.shape, features["final"].vector.shape
        ((1, 3, 3, 16), (1, 16))
    """

    features: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 16
    image_size: int | Sequence[int] = 224
    mlp_ratio: float = 4.0
    pool: Literal["cls", "mean"] = "cls"
    stem: Literal["patch", "resnet"] = "patch"
    stem_options: Mapping[str, Any] | None = None
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: Callable = activation("gelu")
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def named(cls, name: str, *, width: float = 1.0, **options) -> ViT:
        """ "vit_ti", "vit_s" or "vit_b" as published; "vit_s_hybrid" or "vit_b_hybrid" on a ResNet.

        `width` multiplies the published channels, to multiples of the heads, and those of a
        ResNet to multiples of 8; `options` override any attribute.
        """
        attributes = published("vision transformer", NAMED, name)
        attributes["features"] = scale_width(attributes["features"], width, attributes["heads"])
        if attributes.get("stem") == "resnet":
            widths = tuple(scale_width(w, width) for w in HYBRID["widths"])
            options["stem_options"] = {"widths": widths, **(options.get("stem_options") or {})}
        return cls(**{**attributes, **options})

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        if self.stem not in STEMS or self.pool not in POOLS:
            raise InputError(f"a ViT has a stem of {STEMS} and pools by {POOLS}, not '{self.stem}' and '{self.pool}'")
        info = FeatureInfo(self.features, self.patch * self._stem_reduction)
        return {tap: info for tap in ("embed", *(f"block{i + 1}" for i in range(self.depth)), "final")}

    @nn.nowrap
    def _resnet(self, **options) -> ResNet:
        common = dict(activation=nn.relu, dtype=self.dtype)
        return ResNet(**{**HYBRID, **common, **(self.stem_options or {}), **options})

    @property
    def _stem_reduction(self) -> int:
        return list(self._resnet(parent=None).feature_info.values())[-1].reduction if self.stem == "resnet" else 1

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, H, W, C] → {tap: Features}."""
        reader = self.read(taps)
        check_image(x)
        x = x.astype(self.dtype)
        if self.stem == "resnet":
            resnet = self._resnet(name="stem")
            deepest = list(resnet.feature_info)[-1]
            x = resnet(x, taps=(deepest,), train=train)[deepest].map
        x = PatchEmbed(self.features, self.patch, dtype=self.dtype, name="embed")(x)
        b, h, w, channels = x.shape
        extra = self.pool == "cls"
        grid, of_cls = self._positions(extra)
        x = x + ops.resize(grid, h, w).astype(self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = x.reshape(b, h * w, channels)
        if extra:
            cls = self.param("cls", nn.initializers.zeros_init(), (1, 1, channels)) + of_cls
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (b, 1, channels)), x], 1)
        x = drop(x)

        def offer(tap, x):
            tokens = x[:, int(extra) :].reshape(b, h, w, channels)
            return reader.offer(tap, tokens, x[:, 0] if extra and tap != "embed" else None)

        if offer("embed", x):
            return reader.features
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads,
                self.mlp_ratio,
                self.norm,
                self.epsilon,
                self.activation,
                self.dropout,
                self.drop_path * i / max(1, self.depth - 1),
                self.dtype,
                name=f"block{i + 1}",
            )
            x = self.run(block, x, train=train)
            if offer(f"block{i + 1}", x):
                return reader.features
        offer("final", Norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, name="norm")(x, train=train))
        return reader.features

    @nn.nowrap
    def _positions(self, extra: bool):
        """Learned positions for the declared image size: [1, H, W, C], and [1, 1, C] of the CLS token."""
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        height, width = (-(-side // (self.patch * self._stem_reduction)) for side in size)
        shape = (1, int(extra) + height * width, self.features)
        position = self.param("position", nn.initializers.truncated_normal(0.02), shape)
        return position[:, int(extra) :].reshape(1, height, width, self.features), position[:, :1]


_SIZES = {"vit_ti": dict(features=192, heads=3), "vit_s": dict(features=384, heads=6), "vit_b": dict(features=768, heads=12)}
NAMED = {
    **_SIZES,
    **{f"{name}_hybrid": dict(_SIZES[name], stem="resnet", patch=1) for name in ("vit_s", "vit_b")},
}
