"""Branches that read who meets what: a user and an item, by their ids, their groups and what else they met."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import EmbeddingBag, SeparableConv


@dataclasses.dataclass(frozen=True)
class Field:
    """One input of a side: an id, the groups that it is of, or a history.

    Attributes:
        name: of the input, int [B] or [B, L], 0 where there is none.
        size: ids that there are, 0 included.
        valued: whether the input `NAME_values`, floating [B, L], says how much each counts.
    """

    name: str
    size: int
    valued: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it needs of a batch."""
        return (self.name, f"{self.name}_values") if self.valued else (self.name,)


def _embed(x: Mapping, field: Field, features: int, kind: str, init, dtype):
    if lacking := [n for n in field.inputs if n not in x]:
        raise InputError(f"the branch needs the input '{lacking[0]}'; its view has {sorted(x)}")
    bag = EmbeddingBag(field.size, features, field.valued, init, dtype, name=f"{kind}_{field.name}")
    return bag(*(x[n] for n in field.inputs))


class Factors(Branch):
    """A factorisation: the product of what is known of two sides, number by number, beside biases of their fields.

    With a user's id on the left and an item's on the right, a linear head on it is a biased matrix factorisation (Koren, Bell &
    Volinsky 2009, doi:10.1109/MC.2009.263); with a history on the left SVD++; with several fields on each side a factorisation
    machine between them (Rendle 2010, doi:10.1109/ICDM.2010.127). Tap `factors`: [biases, products].

    Attributes:
        left, right: fields of the two sides; of several, embeddings are added up. Without a field on one side there are
            biases alone.
        features: width of the embeddings.
        biases: width of the biases, which are an embedding too, of all fields without values; 0: none.
        dropout: share of each example's products that is dropped in training.
        scale: standard deviation of the embeddings; biases begin at 0.
        dtype: of the computation; parameters are float32.

    Raises:
        InputError: neither products nor biases, or an input that the view lacks.

    Example:
        >>> import jax
        >>> branch = Factors([Field("user", 9)], [Field("item", 5)], features=4, biases=2)
        >>> x = {"user": jnp.array([1, 8]), "item": jnp.array([4, 0])}
        >>> features, _ = branch.init_with_output(jax.random.key(0), x, taps=("factors",), train=False)
        >>> features["factors"].vector.shape, bool((features["factors"].vector[1] == 0).all())
        ((2, 6), True)
    """

    left: Sequence[Field]
    right: Sequence[Field]
    features: int = 64
    biases: int = 8
    dropout: float = 0.0
    scale: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        biases = self.biases if any(not f.valued for f in (*self.left, *self.right)) else 0
        return {"factors": FeatureInfo((self.features if self.left and self.right else 0) + biases)}

    @nn.compact
    def __call__(self, x: Mapping, *, taps, train: bool):
        """x: {field: int [B] or [B, L]} → {tap: Features}."""
        if not self.feature_info["factors"].channels:
            raise InputError("a factorisation needs a field on each side, or biases of one that has no values")
        reader = self.read(taps)
        init, zeros = nn.initializers.normal(self.scale), nn.initializers.zeros_init()
        parts = []
        plain = [f for f in (*self.left, *self.right) if not f.valued]
        if self.biases and plain:
            parts.append(sum(_embed(x, f, self.biases, "bias", zeros, self.dtype) for f in plain))
        if self.left and self.right:
            left, right = (
                sum(_embed(x, f, self.features, "factor", init, self.dtype) for f in side) / len(side) ** 0.5
                for side in (self.left, self.right)
            )
            parts.append(nn.Dropout(self.dropout, deterministic=not train)(left * right))
        reader.offer("factors", jnp.concatenate(parts, 1))
        return reader.features


class FieldConv(Branch):
    """Separable convolutions over the map of products of every field of one side with every field of the other.

    The map of outer products is what ConvNCF reads (He et al. 2018, arXiv:1808.03912), here with a field in place of a number
    along each side, so that neighbours of a convolution are fields in the order given. Taps `map`, `conv1`, `conv2`, …, each by
    its mean.

    Attributes:
        left, right: fields of the two sides, at least one each.
        features: width of the embeddings, which is the map's.
        widths: channels per convolution.
        dropout: share of the map that is dropped in training.
        norm: see `mgjax.layers.Norm`.
        scale, dtype: as in `Factors`.

    Raises:
        InputError: as `Factors`.

    Example:
        >>> import jax
        >>> branch = FieldConv([Field("user", 9), Field("age", 4)], [Field("item", 5)], features=4, widths=(6,))
        >>> x = {"user": jnp.array([1, 8]), "age": jnp.array([2, 0]), "item": jnp.array([4, 1])}
        >>> features, _ = branch.init_with_output(jax.random.key(0), x, taps=("map", "conv1"), train=False)
        >>> features["map"].map.shape, features["conv1"].vector.shape
        ((2, 2, 1, 4), (2, 6))
    """

    left: Sequence[Field]
    right: Sequence[Field]
    features: int = 32
    widths: Sequence[int] = (32,)
    dropout: float = 0.0
    norm: str = "layer"
    scale: float = 0.3
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {"map": FeatureInfo(self.features, 1)} | {f"conv{i + 1}": FeatureInfo(w, 1) for i, w in enumerate(self.widths)}

    @nn.compact
    def __call__(self, x: Mapping, *, taps, train: bool):
        """x: {field: int [B] or [B, L]} → {tap: Features} of maps [B, left fields, right fields, C]."""
        if not self.left or not self.right:
            raise InputError("a map of products needs a field on each side")
        reader = self.read(taps)
        init = nn.initializers.normal(self.scale)
        sides = [
            jnp.stack([_embed(x, f, self.features, "field", init, self.dtype) for f in side], 1)
            for side in (self.left, self.right)
        ]
        y = nn.Dropout(self.dropout, deterministic=not train)(sides[0][:, :, None] * sides[1][:, None])
        if reader.offer("map", y):
            return reader.features
        for i, width in enumerate(self.widths):
            y = SeparableConv(width, norm=self.norm, dtype=self.dtype, name=f"conv{i + 1}")(y, train=train)
            if reader.offer(f"conv{i + 1}", y):
                break
        return reader.features
