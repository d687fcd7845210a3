"""Fusions: from the features of several granularities to one.

Every fusion is called with `features` (granularity → Features) and `present` (granularity → bool
[B]; present where missing) and returns Features. What they share, and one table tests:

* Parameters belong to granularities or to the fusion, never to the set that happens to be there,
  so the parameters of a subset are a sub-tree of those of all.
* What is absent, NaN included, cannot alter the output; where nothing is present, it is finite.
* The order of declaration changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.contracts import Features
from mgjax.layers import FeaturePyramid, MultiHeadAttention, Norm, SourceDense, TransformerBlock


class Fusion(nn.Module):
    """Base of all fusions.

    Attributes:
        features: width of the fused vector.
        activation: of the projections; see each.
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: no granularity to fuse.
    """

    features: int
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    def project(self, name: str, x, kind: str = "project"):
        """A linear map of granularity `name`'s own to the width of the fusion; its bias tells it from others."""
        return nn.Dense(self.features, dtype=self.dtype, name=f"{kind}_{name}")(x)


class ConcatFusion(Fusion):
    """Concatenates the vectors, then one dense layer and an activation: see `SourceDense`.

    Example:
        >>> parts = {"coarse": Features(jnp.ones((2, 4))), "fine": Features(jnp.ones((2, 8)))}
        >>> ConcatFusion(16).init_with_output(jax.random.key(0), parts)[0].vector.shape
        (2, 16)
    """

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        vectors = {name: f.vector for name, f in features.items()}
        return Features(self.activation(SourceDense(self.features, dtype=self.dtype, name="dense")(vectors, present)))


class SumFusion(Fusion):
    """y = Σ_g activation(W_g · x_g + b_g) over the granularities that are present."""

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        features, there = _clean(features, present)
        parts = [
            jnp.where(there[name][:, None], self.activation(self.project(name, f.vector)), 0) for name, f in features.items()
        ]
        return Features(functools.reduce(jnp.add, parts))


class GateFusion(Fusion):
    """A convex combination: y = Σ_g α_g · activation(W_g · x_g + b_g), α the softmax of one score
    per granularity, w_g · x_g + c_g, over those that are present.

    A mixture of experts that are granularities (Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79).
    """

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        features, there = _clean(features, present)
        values = jnp.stack([self.activation(self.project(name, f.vector)) for name, f in features.items()], 1)
        scores = [nn.Dense(1, dtype=jnp.float32, name=f"gate_{name}")(f.vector) for name, f in features.items()]
        mask = jnp.stack(list(there.values()), 1)
        weights = jax.nn.softmax(jnp.where(mask, jnp.concatenate(scores, 1), jnp.finfo(jnp.float32).min))
        weights = jnp.where(mask, weights, 0).astype(self.dtype)
        return Features(jnp.einsum("bg,bgc->bc", weights, values))


class AttentionFusion(Fusion):
    """Self-attention over one token per granularity, then the mean of those that are present.

    Attributes:
        heads: of the attention; they divide `features`.
        blocks: transformer blocks, one after the other.

    Example:
        >>> parts = {"coarse": Features(jnp.ones((2, 4))), "fine": Features(jnp.ones((2, 8)))}
        >>> AttentionFusion(16, heads=2).init_with_output(jax.random.key(0), parts)[0].vector.shape
        (2, 16)
    """

    heads: int = 4
    blocks: int = 1

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        features, there = _clean(features, present)
        tokens = jnp.stack([self.project(name, f.vector) for name, f in features.items()], 1)
        mask = jnp.stack(list(there.values()), 1)
        for i in range(self.blocks):
            tokens = TransformerBlock(self.heads, dtype=self.dtype, name=f"block{i + 1}")(tokens, mask=mask, train=train)
        tokens = Norm("layer", dtype=self.dtype, name="norm")(tokens, train=train)
        return Features(_mean(tokens, mask))


class CrossAttentionFusion(Fusion):
    """Each granularity's vector asks the positions of all others, then the mean over those present.

    Between two granularities this is the exchange of CrossViT (Chen et al. 2021,
    arXiv:2103.14899): the one token that stands for a branch attends to the other's patches. A
    granularity without a map is one position, its vector.

    Attributes:
        heads: of the attention; they divide `features`.
    """

    heads: int = 4

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        features, there = _clean(features, present)
        norm = lambda name, x: Norm("layer", dtype=self.dtype, name=name)(x, train=train)
        token = {name: self.project(name, f.vector, "token") for name, f in features.items()}
        seen = {name: norm(f"norm_{name}", self.project(name, _positions(f), "positions")) for name, f in features.items()}
        mask = {name: jnp.broadcast_to(there[name][:, None], x.shape[:2]) for name, x in seen.items()}
        answers = []
        for name, x in token.items():
            if others := [n for n in seen if n != name]:
                context, valid = (jnp.concatenate([of[n] for n in others], 1) for of in (seen, mask))
                attention = MultiHeadAttention(self.heads, dtype=self.dtype, name=f"attention_{name}")
                x = x + attention(norm(f"query_{name}", x)[:, None], context, key_mask=valid)[:, 0]
            answers.append(x)
        answer = _mean(jnp.stack(answers, 1), jnp.stack(list(there.values()), 1))
        return Features(self.activation(norm("norm", answer)))


class PyramidFusion(Fusion):
    """A top-down feature pyramid over the maps, then the mean of its pooled levels.

    Lin et al. 2017, arXiv:1612.03144. The fused map is that of the finest granularity; a
    granularity without a map is a map of one position, its vector.
    """

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False) -> Features:
        features, there = _clean(features, present)
        maps = {name: f.vector[:, None, None] if f.map is None else f.map for name, f in features.items()}
        levels = FeaturePyramid(self.features, dtype=self.dtype, name="pyramid")(maps, there, train=train)
        pooled = jnp.stack([self.activation(level).mean((1, 2)) for level in levels.values()], 1)
        finest = max(sorted(maps), key=lambda n: maps[n].shape[1] * maps[n].shape[2])
        return Features(_mean(pooled, jnp.stack(list(there.values()), 1)), map=levels[finest])


FUSIONS: dict[str, type[Fusion]] = {
    "concat": ConcatFusion,
    "sum": SumFusion,
    "gate": GateFusion,
    "attention": AttentionFusion,
    "cross_attention": CrossAttentionFusion,
    "pyramid": PyramidFusion,
}


def _clean(features: Mapping[str, Features], present: Mapping | None) -> tuple[dict[str, Features], dict]:
    """By name: features with 0 for what is absent (0 · NaN would be NaN), and who is present."""
    if not features:
        raise ValueError("a fusion needs at least one source")
    rows = next(iter(features.values())).vector.shape[0]
    there = {name: (present or {}).get(name, jnp.ones(rows, bool)) for name in sorted(features)}
    keep = lambda x, mask: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    if present:
        features = {n: jax.tree.map(lambda x, n=n: keep(x, there[n]), f) for n, f in features.items()}
    return {name: features[name] for name in there}, there


def _positions(features: Features):
    """[B, positions, C]"""
    if features.map is None:
        return features.vector[:, None]
    return features.map.reshape(features.map.shape[0], -1, features.map.shape[-1])


def _mean(tokens, mask):
    """Mean of tokens [B, G, C] over those with mask [B, G]; 0 where there is none."""
    weights = mask.astype(tokens.dtype)
    return jnp.einsum("bg,bgc->bc", weights, tokens) / jnp.maximum(weights.sum(1), 1)[:, None]
