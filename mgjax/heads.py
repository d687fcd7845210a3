"""Heads: from features to the raw answer of one task."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from mgjax.contracts import Features
from mgjax.layers import SourceDense


class ClassificationHead(nn.Module):
    """A linear classifier on everything that the head reads.

    Attributes:
        classes: number of classes.
        dropout: share of the inputs that is dropped in training.

    It computes in float32, or in float64 where its features are.
    """

    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Mapping[str, Features], present: Mapping | None = None, *, train: bool = False):
        """features: source → Features → logits [B, classes]."""
        x = {name: f.vector for name, f in sorted(features.items())}
        if self.dropout and train:
            x = {name: nn.Dropout(self.dropout, name=f"dropout_{name}")(v, deterministic=False) for name, v in x.items()}
        dtype = jnp.result_type(jnp.float32, *x.values())
        return SourceDense(self.classes, dtype=dtype, name="dense")(x, present)


HEADS = {"classification": ClassificationHead}
