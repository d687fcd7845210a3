"""Branches that read tokens: int [B, L], 0 where there is none (`mgjax.granularity.Characters`, `Words`, `Sentence`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.branches.base import Branch
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError
from mgjax.layers import Norm, SeparableConv, TransformerBlock

_LOW = -1e9  # of what is not there, where the highest is taken


def check_tokens(x) -> None:
    """Raises InputError unless `x` is int [B, L]."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"the branch needs tokens, int [B, L], got {x.dtype} {x.shape}")


def pooled(x, there, how: str):
    """[B, L, C] → [B, C] over the positions that are there; 0 where none is.

    Args:
        there: bool [B, L].
        how: "max", "mean", or "root", the sum over the root of their number, which is as large for long texts as for short.
    """
    if how == "max":
        return jnp.where(there.any(1)[:, None], jnp.where(there[..., None], x, _LOW).max(1), 0)
    total = jnp.where(there[..., None], x, 0).sum(1)
    count = jnp.maximum(there.sum(1), 1)[:, None].astype(x.dtype)
    return total / (jnp.sqrt(count) if how == "root" else count)


class Tokens(nn.Module):
    """Embeds tokens, those that are not there as 0.

    Attributes:
        vocabulary: numbers that there are, 0 included.
        features: width.
        dropout: share of each example's numbers that is dropped in training.
        dtype: of the computation.

    Example:
        >>> import jax
        >>> x = jnp.array([[3, 1, 0]])
        >>> Tokens(5, 4).init_with_output(jax.random.key(0), x, train=False)[0][0, 2].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    vocabulary: int
    features: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool):
        """x: int [B, L] → [B, L, features]."""
        table = nn.Embed(self.vocabulary, self.features, dtype=self.dtype, name="table")
        y = jnp.where((x > 0)[..., None], table(x), 0)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


class TokenMean(Branch):
    """The mean of the tokens' embeddings: a baseline that knows no order (Joulin et al. 2016, arXiv:1607.01759).

    Tap `mean`.

    Attributes:
        vocabulary, features, dropout, dtype: as in `Tokens`.
        how: "mean", or "root", as in `pooled`.

    Example:
        >>> import jax
        >>> x = jnp.array([[3, 1, 0], [0, 0, 0]])
        >>> features, _ = TokenMean(5, 4).init_with_output(jax.random.key(0), x, taps=("mean",), train=False)
        >>> features["mean"].vector.shape
        (2, 4)
    """

    vocabulary: int
    features: int = 128
    dropout: float = 0.0
    how: str = "mean"
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {"mean": FeatureInfo(self.features)}

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: int [B, L] → {tap: Features}."""
        check_tokens(x)
        reader = self.read(taps)
        tokens = Tokens(self.vocabulary, self.features, self.dropout, self.dtype, name="tokens")(x, train=train)
        reader.offer("mean", pooled(tokens, x > 0, self.how))
        return reader.features


class TokenCounts(Branch):
    """How often each token stands in a text, weighed, as a vector of length 1; 0 where there is none. No parameter.

    A linear head on it is a linear model of n-grams (Joachims 1998, doi:10.1007/BFb0026683). Gradient
    descent learns rare tokens more slowly than common ones; Adam scales that away. Tap `counts`.

    Attributes:
        vocabulary: numbers that there are, 0 included.
        dtype: of the vector.

    Example:
        >>> import jax
        >>> x = {"ids": jnp.array([[3, 1, 3, 0]]), "weights": jnp.array([[2.0, 3.0, 2.0, 0.0]])}
        >>> features = TokenCounts(5).apply({}, x, taps=("counts",), train=False)
        >>> (10 * features["counts"].vector[0]).round().astype(int).tolist()
        [0, 6, 0, 8, 0]
    """

    vocabulary: int
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {"counts": FeatureInfo(self.vocabulary)}

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: int [B, L], or {"ids": int, "weights": floating [B, L]} → {tap: Features}."""
        ids, weights = (x["ids"], x["weights"]) if isinstance(x, Mapping) else (x, jnp.float32(1))
        check_tokens(ids)
        reader, there = self.read(taps), jnp.where(ids > 0, weights, 0).astype(jnp.float32)
        empty = jnp.zeros(self.vocabulary, jnp.float32)
        counts = jax.vmap(lambda i, w: empty.at[i].add(w))(ids, there)
        squares = (counts**2).sum(1, keepdims=True)
        reader.offer("counts", (counts * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))).astype(self.dtype))
        return reader.features


class TextConv(Branch):
    """Separable convolutions along a text, residual, each tapped by its highest value (after Kim 2014, arXiv:1408.5882).

    Taps `embedding`, `stage1`, `stage2`, … What stands beyond the end of a text changes nothing, but with norm "batch".

    Attributes:
        vocabulary: as in `Tokens`.
        embedding: width of the tokens.
        widths: channels per stage; each has one convolution.
        kernel: tokens that a convolution sees.
        dropout: of the embeddings.
        norm, activation, dtype: as in `mgjax.layers.SeparableConv`.

    Example:
        >>> import jax
        >>> x = jnp.array([[3, 1, 0], [0, 0, 0]])
        >>> branch = TextConv(5, 8, widths=(16, 16))
        >>> features, _ = branch.init_with_output(jax.random.key(0), x, taps=("stage2",), train=False)
        >>> features["stage2"].vector.shape
        (2, 16)
    """

    vocabulary: int
    embedding: int = 128
    widths: Sequence[int] = (256,)
    kernel: int = 3
    dropout: float = 0.0
    norm: str = "layer"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {"embedding": FeatureInfo(self.embedding)} | {
            f"stage{i + 1}": FeatureInfo(width) for i, width in enumerate(self.widths)
        }

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: int [B, L] → {tap: Features}."""
        check_tokens(x)
        reader, there = self.read(taps), x > 0
        y = Tokens(self.vocabulary, self.embedding, self.dropout, self.dtype, name="tokens")(x, train=train)
        if reader.offer("embedding", pooled(y, there, "max")):
            return reader.features
        for i, width in enumerate(self.widths):
            conv = SeparableConv(
                width, self.kernel, norm=self.norm, activation=self.activation, dtype=self.dtype, name=f"stage{i + 1}"
            )
            z = jnp.where(there[..., None], conv(y, train=train), 0)
            y = y + z if z.shape == y.shape else z
            if reader.offer(f"stage{i + 1}", pooled(y, there, "max")):
                break
        return reader.features


class TextTransformer(Branch):
    """A bidirectional transformer encoder (Vaswani et al. 2017, arXiv:1706.03762; the norm first), tapped by its mean.

    Taps `block1`, `block2`, …, each after a norm of its own.

    Attributes:
        vocabulary: as in `Tokens`.
        length: of the longest text.
        features: width.
        blocks, heads, mlp_ratio: of the encoder.
        dropout: of embeddings and of what the blocks say.
        drop_path: probability of leaving out the last block, falling to 0 at the first.
        dtype: of the computation.

    Example:
        >>> import jax
        >>> x = jnp.array([[3, 1, 0], [0, 0, 0]])
        >>> branch = TextTransformer(5, length=3, features=8, blocks=1, heads=2)
        >>> features, _ = branch.init_with_output(jax.random.key(0), x, taps=("block1",), train=False)
        >>> features["block1"].vector.shape
        (2, 8)
    """

    vocabulary: int
    length: int
    features: int = 128
    blocks: int = 2
    heads: int = 4
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {f"block{i + 1}": FeatureInfo(self.features) for i in range(self.blocks)}

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: int [B, L], L ≤ length → {tap: Features}."""
        check_tokens(x)
        if x.shape[1] > self.length:
            raise InputError(f"TextTransformer(length={self.length}) got texts of {x.shape[1]} tokens")
        reader, there = self.read(taps), x > 0
        y = Tokens(self.vocabulary, self.features, self.dropout, self.dtype, name="tokens")(x, train=train)
        place = self.param("place", nn.initializers.normal(0.02), (self.length, self.features))
        y = y + place[None, : x.shape[1]].astype(self.dtype)
        for i in range(self.blocks):
            drop_path = self.drop_path * i / max(1, self.blocks - 1)
            block = TransformerBlock(
                self.heads, self.mlp_ratio, dropout=self.dropout, drop_path=drop_path, dtype=self.dtype, name=f"block{i + 1}"
            )
            y = block(y, mask=there, train=train)
            tap = f"block{i + 1}"
            if tap in taps:
                z = Norm("layer", dtype=self.dtype, name=f"norm{i + 1}")(y, train=train)
                if reader.offer(tap, pooled(z, there, "mean")):
                    break
        return reader.features
