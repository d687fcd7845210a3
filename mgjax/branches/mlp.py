"""A multi-layer perceptron on the flattened input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.branches.base import Branch
from mgjax.contracts import FeatureInfo
from mgjax.layers import Norm


class MLP(Branch):
    """Dense layers with norm and activation; taps `layer1`, `layer2`, … and `input`.

    With `widths=()` and tap `input` a head on it is a linear classifier of the raw input.

    Attributes:
        input_size: numbers per example, once flattened.
        widths: units per hidden layer.
        norm, activation, dtype: as in `mgjax.layers.Conv`.

    Example:
        >>> import jax
        >>> features, _ = MLP(12, (8,)).init_with_output(
        ...     jax.random.key(0), jnp.ones((5, 2, 2, 3)), taps=("layer1",), train=False)
        >>> features["layer1"].vector.shape
        (5, 8)
    """

    input_size: int
    widths: Sequence[int] = (256, 256)
    norm: str = "batch"
    activation: Callable = nn.relu
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        return {"input": FeatureInfo(self.input_size)} | {
            f"layer{i + 1}": FeatureInfo(width) for i, width in enumerate(self.widths)
        }

    @nn.compact
    def __call__(self, x, *, taps, train: bool):
        """x: floating [B, ...] → {tap: Features}, without maps."""
        reader = self.read(taps)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        if x.shape[1] != self.input_size:
            raise ValueError(f"MLP(input_size={self.input_size}) got {x.shape[1]} numbers per example")
        if reader.offer("input", x):
            return reader.features
        for i, width in enumerate(self.widths):
            # The norm has a shift of its own.
            x = nn.Dense(width, use_bias=self.norm == "none", dtype=self.dtype, name=f"layer{i + 1}")(x)
            x = self.activation(Norm(self.norm, dtype=self.dtype, name=f"norm{i + 1}")(x, train=train))
            if reader.offer(f"layer{i + 1}", x):
                break
        return reader.features
