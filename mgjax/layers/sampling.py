"""Dynamic sampling of tokens: what follows sees only the positions that matter."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgjax.errors import InputError
from mgjax.layers.norm import Norm


class Sampled(NamedTuple):
    """The tokens that were kept, in the order of their positions.

    Attributes:
        tokens: [B, k, C].
        positions: int32 [B, k], increasing; those of a map count row by row.
        mask: bool [B, k]; False where only masked positions were left to keep.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array


class TokenSampling(nn.Module):
    """Keeps the k positions of the highest learned score, so that what follows costs in proportion to k.

    score = w · norm(x) + b, in float32; a token that is kept is x · σ(score), through which the scorer
    gets its gradient: Gao & Ji 2019, Graph U-Nets, arXiv:1905.05178. Tokens are sampled likewise, per
    example, by DynamicViT (Rao et al. 2021, arXiv:2106.02034) and, with a static k as here, by
    Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258). Of equal scores the first position wins.

    What is not kept alters neither result nor gradient. Masked positions are kept last, stay masked,
    and give 0 whatever lies there, NaN included.

    Attributes:
        keep: k as an int, or as a float in (0, 1] the share of the positions, rounded up; so 1 is a
            single token and 1.0 is all.
        norm: of what is scored, "layer" or "none": a score depends on no other token.
        dtype: of the result; the parameters and all of the scoring are float32.

    Raises:
        InputError: a k below 1 or above the number of positions, a share outside (0, 1], another norm,
            an `x` that is neither tokens nor a map, a mask that is not boolean or of another shape.

    Example:
        >>> layer, x = TokenSampling(keep=0.25), jnp.ones((2, 4, 4, 8))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> sampled = layer.apply(variables, x)
        >>> sampled.tokens.shape, sampled.positions[0].tolist()
        ((2, 4, 8), [0, 1, 2, 3])
    """

    keep: int | float
    norm: str = "layer"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, mask=None) -> Sampled:
        """x: tokens [B, L, C] or a map [B, H, W, C]; mask: bool, its shape without C → `Sampled`."""
        if x.ndim not in (3, 4):
            raise InputError(f"tokens [B, L, C] or a map [B, H, W, C] can be sampled, not {x.shape}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
            raise InputError(f"the mask of {x.shape} is bool {x.shape[:-1]}, not {mask.dtype} {mask.shape}")
        if self.norm not in ("layer", "none"):
            # Statistics over other tokens would let a masked one contribute.
            raise InputError(f"what is scored is normalised by 'layer' or 'none', not '{self.norm}'")
        given = x.shape
        x = x.reshape(given[0], -1, given[-1])
        k = self._kept(x.shape[1], given)
        if mask is not None:
            mask = mask.reshape(x.shape[:2])
            x = jnp.where(mask[..., None], x, 0)  # before anything is computed: 0 · NaN is NaN
        scored = Norm(self.norm, name="norm")(x.astype(jnp.float32), train=False)
        scores = nn.Dense(1, name="score")(scored)[..., 0]
        positions = _highest(scores, mask, k)
        take = lambda a: jnp.take_along_axis(a, positions.reshape(*positions.shape, *(1,) * (a.ndim - 2)), 1)
        # The gate comes after the gather, so that the work is that of k tokens, forwards and backwards.
        gate = nn.sigmoid(take(scores))[..., None]
        there = jnp.ones(positions.shape, bool) if mask is None else take(mask)
        return Sampled((take(x) * gate).astype(self.dtype), positions, there)

    @nn.nowrap
    def _kept(self, length: int, shape) -> int:
        """k, for `length` positions of an input of `shape`."""
        if isinstance(self.keep, (float, np.floating)):
            if not 0 < self.keep <= 1:
                raise InputError(f"the share of tokens to keep lies in (0, 1], not {self.keep}; a number of them is an int")
            # 0.1 · 30 is a little more than 3, which must not become 4.
            k = max(1, math.ceil(round(self.keep * length, 6)))
        else:
            k = self.keep
        if not 1 <= k <= length:
            raise InputError(f"{k} tokens cannot be kept of the {length} of {shape}")
        return k


def _highest(scores, mask, k: int):
    """Positions of the k highest scores, int32 [B, k], increasing; those that are masked come last."""
    scores = jax.lax.stop_gradient(scores)
    # Of what is masked any number is less than any other, NaN included.
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.maximum(jnp.where(jnp.isnan(scores), lowest, scores), lowest)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    # `lax.top_k` would gather the scores of a batch that lies on several devices; a sort does not.
    position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    _, order = jax.lax.sort((-scores, position), dimension=1, num_keys=2)
    return jnp.sort(order[:, :k], 1)
