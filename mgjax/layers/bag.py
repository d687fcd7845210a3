"""The embedding of a set: categories with any number of values each, or what a user rated."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# A gather moves as many rows of the table as a bag is long, a product with the dense bag all of them, but many times faster.
_DENSE = 8


class EmbeddingBag(nn.Module):
    """The sum of the embeddings of a bag's members, over the root of their number n.

    y[b] = n[b]^-½ Σ_l (E[ids[b, l]] + values[b, l] · V[ids[b, l]]), and 0 where there is none.

    With values, such as ratings, it is how SVD++ sees what a user did (Koren 2008, doi:10.1145/1401890.1401944): E for having
    rated, V for how. Long bags of few kinds are added up before they meet the table, which gives the same.

    Attributes:
        size: ids that there are, 0 included, which is none.
        features: width of the output.
        valued: whether members have values.
        embedding_init: of the tables.
        dtype: of the computation; parameters are float32.

    Example:
        >>> ids = jnp.array([[3, 1, 0], [0, 0, 0]])
        >>> y, _ = EmbeddingBag(5, 4).init_with_output(jax.random.key(0), ids)
        >>> y.shape, y[1].tolist()
        ((2, 4), [0.0, 0.0, 0.0, 0.0])
    """

    size: int
    features: int
    valued: bool = False
    embedding_init: Callable = nn.initializers.normal(0.1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids, values=None):
        """ids: int [B] or [B, L]; values: floating, as ids → [B, features]. ValueError: values where there are none to be."""
        if (values is None) is self.valued:
            raise ValueError(f"an EmbeddingBag with valued={self.valued} was given {'no ' * (values is None)}values")
        tables = [self.param("embedding", self.embedding_init, (self.size, self.features)).astype(self.dtype)]
        if self.valued:
            tables.append(self.param("value_embedding", self.embedding_init, (self.size, self.features)).astype(self.dtype))
        if ids.ndim == 1:
            ids = ids[:, None]
            values = None if values is None else values[:, None]
        there = ids > 0
        weights = [there.astype(jnp.float32)]
        if self.valued:
            weights.append(jnp.where(there, values.astype(jnp.float32), 0))
        total = sum(self._sum(table, ids, weight) for table, weight in zip(tables, weights))
        return total * jax.lax.rsqrt(jnp.maximum(weights[0].sum(1, keepdims=True), 1)).astype(self.dtype)

    def _sum(self, table, ids, weight):
        if self.size <= _DENSE * ids.shape[1]:
            empty = jnp.zeros(self.size, jnp.float32)
            return jax.vmap(lambda i, w: empty.at[i].add(w))(ids, weight).astype(self.dtype) @ table
        return (table[ids] * weight[..., None].astype(self.dtype)).sum(1)
