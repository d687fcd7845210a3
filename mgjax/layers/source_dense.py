"""A dense layer over several sources of which any may be absent."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp


class SourceDense(nn.Module):
    """Concatenate, then linear; stored as one kernel per source, summed over what is present.

    y[b] = bias + Σ_s present[s, b] · x[s, b] · kernel[s]

    The parameters of a subset of the sources are a sub-tree of those of all sources, the order
    of declaration does not matter, and what is absent, NaN included, cannot alter the output.

    Attributes:
        features: width of the output.
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: no source.

    Example:
        >>> import jax
        >>> x = {"coarse": jnp.ones((2, 4)), "fine": jnp.ones((2, 8))}
        >>> y, variables = SourceDense(3).init_with_output(jax.random.key(0), x)
        >>> y.shape, sorted(variables["params"])
        ((2, 3), ['bias', 'coarse', 'fine'])
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Mapping, present: Mapping | None = None):
        """x: source → [B, C_s]; present: source → bool [B], all present where missing."""
        if not x:
            raise ValueError("SourceDense needs at least one source")
        total = self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)[None]
        for name in sorted(x):
            value = x[name]
            if present and name in present:
                value = jnp.where(present[name][:, None], value, 0)
            total = total + nn.Dense(self.features, use_bias=False, dtype=self.dtype, name=name)(value)
        return total
