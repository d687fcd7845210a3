"""Attention over maps and tokens, with masks that hold whatever lies behind them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.errors import InputError

dense_init = nn.initializers.xavier_uniform()


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in several heads; the softmax is in float32.

    Vaswani et al. 2017, arXiv:1706.03762. Queries come from `x`; keys and values from `context`,
    which may have another width and number of positions, or from `x` itself.

    What a mask hides cannot alter the result or a gradient; NaN and infinities included, where it is
    hidden from every query, as by `key_mask`. A query that may see nothing gives 0.

    Attributes:
        heads: number of heads.
        features: width of the result and of all heads together; by default that of `x`.
        use_bias: of the projections to queries, keys and values; that of the result has one.
        dtype: of the computation; parameters are float32.

    Raises:
        InputError: heads that do not divide the width.
        ValueError: a mask that is not boolean, or of another shape.

    Example:
        >>> layer, x = MultiHeadAttention(heads=2), jnp.ones((1, 4, 4, 8))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (1, 4, 4, 8)
        >>> text, there = jnp.ones((1, 5, 12)), jnp.array([[True, True, True, False, False]])
        >>> layer.init_with_output(jax.random.key(0), x, text, key_mask=there)[0].shape
        (1, 4, 4, 8)
    """

    heads: int
    features: int | None = None
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context=None, *, key_mask=None, mask=None):
        """Args:
            x: a map [B, H, W, C] or tokens [B, L, C].
            context: the same, of any width and size; by default `x`.
            key_mask: bool, the shape of the context without channels; False where there is nothing.
            mask: bool [B, queries, keys] or [B, heads, queries, keys], any of them 1; False where
                a query may not look.

        Returns:
            The shape of `x`, with `features` channels.
        """
        width = self.features or x.shape[-1]
        if width % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {width}; choose a multiple")
        for given in (x, x if context is None else context):
            if given.ndim not in (3, 4):
                raise ValueError(f"attention needs tokens [B, L, C] or a map [B, H, W, C], got {given.shape}")
        allowed = _allowed((x if context is None else context).shape[:-1], key_mask, mask)
        queries = _flat(x)
        keys = queries if context is None else _flat(context)
        # Hidden tokens become 0 before anything is computed: 0 · NaN is NaN, in the gradient as well.
        if allowed is not None:
            keys = jnp.where(allowed.any((1, 2))[:, :, None], keys, 0)
        if key_mask is not None and context is None:
            queries = jnp.where(key_mask.reshape(*queries.shape[:2], 1), queries, 0)
        common = dict(kernel_init=dense_init, dtype=self.dtype)
        project = lambda name, t: nn.Dense(width, use_bias=self.use_bias, name=name, **common)(t).reshape(
            *t.shape[:2], self.heads, width // self.heads
        )
        y = jax.nn.dot_product_attention(project("query", queries), project("key", keys), project("value", keys), mask=allowed)
        if allowed is not None:
            some = allowed.any(-1).transpose(0, 2, 1)[..., None]  # [B, queries, heads, 1]
            y = jnp.where(some, y, 0)
        y = nn.Dense(width, name="out", **common)(y.reshape(*y.shape[:2], width))
        if allowed is not None:
            y = jnp.where(some.any(2), y, 0)
        return y.reshape(*x.shape[:-1], width)


class AttentionPool(nn.Module):
    """Pools tokens or a map to one vector: learned queries attend over the positions.

    Lee et al. 2019, Set Transformer, arXiv:1810.00825.

    Attributes:
        heads: number of heads.
        queries: learned queries, whose answers stand side by side in the result.
        features: width of one answer; by default that of the input.
        dtype: of the computation; parameters are float32.

    Example:
        >>> AttentionPool(heads=2).init_with_output(jax.random.key(0), jnp.ones((3, 4, 4, 8)))[0].shape
        (3, 8)
    """

    heads: int = 1
    queries: int = 1
    features: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, mask=None):
        """x: a map [B, H, W, C] or tokens [B, L, C]; mask: bool, its shape without C → [B, queries · features].

        An example of which nothing is there gives 0.
        """
        width = self.features or x.shape[-1]
        query = self.param("query", nn.initializers.truncated_normal(0.02), (1, self.queries, width))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape[1:]))
        y = MultiHeadAttention(self.heads, dtype=self.dtype, name="attention")(query, x, key_mask=mask)
        return y.reshape(x.shape[0], self.queries * width)


def _flat(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _allowed(positions, key_mask, mask):
    """Both masks as one, bool [B, heads or 1, queries or 1, keys], or None."""
    for name, value in (("key_mask", key_mask), ("mask", mask)):
        if value is not None and value.dtype != jnp.bool_:
            raise ValueError(f"{name} must be boolean (True: may be seen), got {value.dtype}")
    if key_mask is not None and key_mask.shape != positions:
        raise ValueError(f"key_mask has shape {key_mask.shape}; the keys have {positions}")
    if mask is not None:
        if mask.ndim not in (3, 4):
            raise ValueError(f"mask is [B, queries, keys] or [B, heads, queries, keys], got {mask.shape}")
        mask = mask if mask.ndim == 4 else mask[:, None]
    if key_mask is None:
        return mask
    key_mask = key_mask.reshape(positions[0], 1, 1, -1)
    return key_mask if mask is None else key_mask & mask
