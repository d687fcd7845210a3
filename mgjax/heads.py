"""Heads: from features to the raw answer of one task."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from mgjax.contracts import Features
from mgjax.granularity import Task
from mgjax.layers import SourceDense


class ClassificationHead(nn.Module):
    """A linear classifier on everything that the head reads.

    Attributes:
        classes: number of classes.
        dropout: share of the inputs that is dropped in training.
        dtype: of the computation; by default float32, or float64 where the features are. Logits are float32 at least.
    """

    classes: int
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False):
        """features: source → Features → logits [B, classes]."""
        return _linear(self.classes, self.dropout, self.dtype, features, present, train)


class RegressionHead(nn.Module):
    """A linear map of everything that the head reads to the numbers that are predicted: center + spread · (W x + b).

    Attributes:
        outputs: how many numbers.
        dropout: share of the inputs that is dropped in training.
        center, spread: of the targets.
        bounds: between which answers lie. In training, what lies beyond them is left as it is, so that it has a gradient.
        dtype: of the computation; by default float32, or float64 where the features are. Predictions are float32 at least.
    """

    outputs: int
    dropout: float = 0.0
    dtype: jnp.dtype | None = None
    center: float = 0.0
    spread: float = 1.0
    bounds: tuple[float, float] | None = None

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False):
        """features: source → Features → predictions [B, outputs]."""
        said = self.center + self.spread * _linear(self.outputs, self.dropout, self.dtype, features, present, train)
        return said if train or not self.bounds else jnp.clip(said, *self.bounds)


def _linear(size: int, dropout: float, dtype, features: Mapping, present: Mapping | None, train: bool):
    """Everything that a head reads, through one dense layer; inside a compact `__call__`."""
    x = {name: f.vector for name, f in sorted(features.items())}
    if dropout and train:
        x = {name: nn.Dropout(dropout, name=f"dropout_{name}")(v, deterministic=False) for name, v in x.items()}
    dtype = dtype or jnp.result_type(jnp.float32, *x.values())
    said = SourceDense(size, dtype=dtype, name="dense")(x, present)
    return said.astype(jnp.promote_types(said.dtype, jnp.float32))


def head_of(task: Task, dropout: float = 0.0) -> nn.Module:
    """The head that answers a task."""
    if task.kind == "regression":
        return RegressionHead(task.classes, dropout, None, task.center, task.spread, task.bounds)
    return ClassificationHead(task.classes, dropout)
