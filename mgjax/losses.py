"""Losses: per-example values with a mask, so that what is not known counts for nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def masked_mean(values, mask):
    """Mean of `values` [B] where `mask` [B] holds; exactly 0 where it holds nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(logits, labels, mask, *, smoothing: float = 0.0):
    """Mean softmax cross-entropy over the rows whose label is known.

    L = mean_b −Σ_c q[b, c] · log softmax(logits[b])[c],  q = (1 − ε) · onehot + ε / C

    Args:
        logits: floating [B, C]; the loss is computed in float32.
        labels: int [B]; −1 is unknown and counts for nothing.
        mask: bool [B]; False counts for nothing.
        smoothing: ε (Szegedy et al. 2015, arXiv:1512.00567).

    Returns:
        float32 scalar.

    Example:
        >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -1]), jnp.array([True, True]))), 4)
        1.3863
    """
    known = mask & (labels >= 0)
    classes = logits.shape[-1]
    target = optax.smooth_labels(jax.nn.one_hot(jnp.maximum(labels, 0), classes), smoothing)
    return masked_mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), target), known)


LOSSES = {"classification": cross_entropy}
