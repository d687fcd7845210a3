"""Normalisation chosen by argument."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mgjax.errors import InputError

NORMS = ("batch", "group", "layer", "none")


class Norm(nn.Module):
    """Normalises features; statistics in float32 whatever the compute dtype.

    Attributes:
        kind: "batch" (Ioffe & Szegedy 2015, arXiv:1502.03167; keeps `batch_stats`), "group" (Wu &
            He 2018, arXiv:1803.08494; in groups of at most `group_size` channels), "layer" (Ba et
            al. 2016, arXiv:1607.06450) or "none".
        momentum: of the running batch statistics: new = momentum · old + (1 − momentum) · batch.
        epsilon: added to the variance.
        group_size: channels per group.
        zero_scale: start with scale 0, so that a residual branch starts as nothing.
        dtype: of the result; parameters are float32.

    Raises:
        InputError: an unknown kind.

    Example:
        >>> import jax
        >>> Norm("group").init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 32)), train=True)[0].shape
        (2, 4, 4, 32)
    """

    kind: str = "batch"
    momentum: float = 0.9
    epsilon: float = 1e-5
    group_size: int = 16
    zero_scale: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: floating [B, ..., C] → the same shape."""
        scale_init = nn.initializers.zeros_init() if self.zero_scale else nn.initializers.ones_init()
        common = dict(epsilon=self.epsilon, dtype=self.dtype, scale_init=scale_init)
        if self.kind == "batch":
            return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm", **common)(x)
        if self.kind == "group":
            channels = x.shape[-1]
            size = max(s for s in range(1, min(self.group_size, channels) + 1) if channels % s == 0)
            return nn.GroupNorm(num_groups=channels // size, name="norm", **common)(x)
        if self.kind == "layer":
            return nn.LayerNorm(name="norm", **common)(x)
        if self.kind == "none":
            return x
        raise InputError(f"norm '{self.kind}' is none of {NORMS}")
