"""Losses: per-example values with a mask, so that what is not known counts for nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def masked_mean(values, mask):
    """Mean of `values` [B] where `mask` [B] holds; exactly 0 where it holds nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(logits, labels, mask, *, smoothing: float = 0.0, partner=None, share=None):
    """Mean softmax cross-entropy over the rows whose label is known.

    L = mean_b −Σ_c q[b, c] · log softmax(logits[b])[c],  q = (1 − ε) · onehot + ε / C

    Where examples are mixed (Zhang et al. 2017, arXiv:1710.09412), a row has two labels of
    weights λ = `share` and 1 − λ, and L is the weighted mean over all labels that are known.

    Args:
        logits: floating [B, C]; the loss is computed in float32 at least.
        labels: int [B]; −1 is unknown and counts for nothing.
        mask: bool [B]; False counts for nothing.
        smoothing: ε (Szegedy et al. 2015, arXiv:1512.00567).
        partner: int [B], labels of what was mixed in, −1 where unknown; None where nothing was.
        share: floating [B], λ; needed with `partner`.

    Returns:
        float32 scalar.

    Example:
        >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -1]), jnp.array([True, True]))), 4)
        1.3863
    """
    logits, classes = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), logits.shape[-1]

    def each(labels):
        target = optax.smooth_labels(jax.nn.one_hot(jnp.maximum(labels, 0), classes), smoothing)
        return optax.softmax_cross_entropy(logits, target), mask & (labels >= 0)

    if partner is None:
        return masked_mean(*each(labels))
    total = weight = 0.0
    for (loss, known), part in ((each(labels), share), (each(partner), 1 - share)):
        total += jnp.sum(jnp.where(known, part * loss, 0.0))
        weight += jnp.sum(jnp.where(known, part, 0.0))
    return total / jnp.where(weight > 0, weight, 1.0)


LOSSES = {"classification": cross_entropy}
