"""Projection: from what a branch saw at a tap to the features of one granularity."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from mgjax.contracts import Features
from mgjax.layers import Projection, TokenSampling, TransformerBlock


class GranularityProjection(nn.Module):
    """Separable projection of a map, then, if asked for, only the positions that matter, and attention among them.

    Attributes:
        features: width of the granularity.
        kernel: see `mgjax.layers.Projection`.
        keep: of the positions, see `mgjax.layers.TokenSampling`; None for all, without a score. Of what is left there is no
            map, and a fusion that reads maps sees its mean alone.
        blocks: of self-attention, one after the other. Where there is no map, there is nothing to keep or to attend to.
        heads: of the attention; they divide `features`.
        norm, activation, dtype: of the projection, as in `mgjax.layers.Conv`.
        impl: as in `mgjax.layers.DepthwiseConv`.

    Example:
        >>> import jax
        >>> seen = Features(jnp.ones((2, 16)), jnp.ones((2, 4, 4, 16)))
        >>> project = GranularityProjection(8, keep=0.5, blocks=1, heads=2)
        >>> project.init_with_output(jax.random.key(0), seen, train=False)[0].vector.shape
        (2, 8)
    """

    features: int
    kernel: int = 3
    keep: int | float | None = None
    blocks: int = 0
    heads: int = 4
    norm: str = "batch"
    activation: Callable = nn.relu
    impl: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, *, train: bool) -> Features:
        """Features of C channels → Features of `features` channels; the vector is the mean over what is left."""
        project = Projection(
            self.features, self.kernel, self.norm, self.activation, impl=self.impl, dtype=self.dtype, name="project"
        )
        if features.map is None:
            return Features(project(features.vector, train=train))
        x = project(features.map, train=train)
        if self.keep is not None:
            x = TokenSampling(self.keep, dtype=self.dtype, name="sample")(x).tokens
        for i in range(self.blocks):
            x = TransformerBlock(self.heads, dtype=self.dtype, name=f"block{i + 1}")(x, train=train)
        return Features(x.mean(tuple(range(1, x.ndim - 1))), map=x if x.ndim == 4 else None)
