"""Fusions: from the features of several granularities to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp

from mgjax.contracts import Features
from mgjax.layers import SourceDense


class ConcatFusion(nn.Module):
    """Concatenates the pooled vectors, then one dense layer and an activation.

    Its parameters do not depend on which granularities are there: see `SourceDense`.

    Attributes:
        features: width of the fused vector.
        activation: applied last.
        dtype: of the computation; parameters are float32.

    Example:
        >>> import jax
        >>> parts = {"coarse": Features(jnp.ones((2, 4))), "fine": Features(jnp.ones((2, 8)))}
        >>> ConcatFusion(16).init_with_output(jax.random.key(0), parts)[0].vector.shape
        (2, 16)
    """

    features: int
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None) -> Features:
        """features: granularity → Features; present: granularity → bool [B], present if missing."""
        vectors = {name: f.vector for name, f in features.items()}
        x = SourceDense(self.features, dtype=self.dtype, name="dense")(vectors, present)
        return Features(vector=self.activation(x))
