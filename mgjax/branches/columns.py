"""A branch that reads columns of a table: numbers, and categories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.branches.base import Branch
from mgjax.branches.mlp import MLP
from mgjax.contracts import FeatureInfo
from mgjax.errors import InputError


class TableNet(Branch):
    """Numbers as they are and categories embedded or one-hot, through a multi-layer perceptron; taps as those of `MLP`.

    With `widths=()`, tap `input` and one-hot categories a head on it is a linear or logistic regression.

    Attributes:
        numbers: how many there are.
        categories: size of each, that of no value and of an unseen one included.
        embedding: width of a category; 0: one-hot, where no value is all zeros.
        widths, norm, activation, dtype: as in `MLP`.

    Example:
        >>> x = {"numbers": jnp.ones((2, 3)), "categories": jnp.array([[2], [0]])}
        >>> branch = TableNet(3, (4,), widths=(8,))
        >>> features, _ = branch.init_with_output(jax.random.key(0), x, taps=("input", "layer1"), train=False)
        >>> features["input"].vector[:, 3:].tolist(), features["layer1"].vector.shape
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], (2, 8))
    """

    numbers: int
    categories: Sequence[int] = ()
    embedding: int = 0
    widths: Sequence[int] = (64, 64)
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @property
    def input_size(self) -> int:
        """Numbers that the perceptron sees."""
        return self.numbers + sum(self.embedding or size - 1 for size in self.categories)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return MLP(self.input_size, self.widths).feature_info

    @nn.compact
    def __call__(self, x: Mapping, *, taps, train: bool):
        """x: {"numbers": floating [B, N], "categories": int [B, M]} → {tap: Features}."""
        numbers, categories = x["numbers"], x["categories"]
        if numbers.shape[1:] != (self.numbers,) or categories.shape[1:] != (len(self.categories),):
            raise InputError(
                f"the branch needs {self.numbers} numbers and {len(self.categories)} categories a row, got {numbers.shape} "
                f"and {categories.shape}"
            )
        parts = [numbers.astype(self.dtype)]
        for i, size in enumerate(self.categories):
            if self.embedding:
                parts.append(nn.Embed(size, self.embedding, dtype=self.dtype, name=f"category{i + 1}")(categories[:, i]))
            else:
                parts.append(jax.nn.one_hot(categories[:, i] - 1, size - 1, dtype=self.dtype))
        net = MLP(self.input_size, self.widths, self.norm, self.activation, self.dtype, name="net")
        return net(jnp.concatenate(parts, 1), taps=taps, train=train)
