"""Losses: per-example values, what is known of them, and their mean, so that what is not known counts for nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgjax.errors import InputError
from mgjax.taxonomy import Taxonomy


def weighted_mean(values, weights, axis=None):
    """Σ w · v / Σ w over all entries; exactly 0, and so is its gradient, where no weight is above 0.

    Args:
        values: floating, any shape; what has weight 0 may hold anything, NaN included.
        weights: of the same shape; bool, or floating and at least 0.
        axis: over which the mean runs; None is all.

    Example:
        >>> float(weighted_mean(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([1.0, 0.5, 0.0])))
        2.0
    """
    weights = weights.astype(jnp.result_type(jnp.float32, values))
    total = jnp.sum(weights * jnp.where(weights > 0, values, 0.0), axis)
    whole = weights.sum(axis)
    return total / jnp.where(whole > 0, whole, 1.0)


def masked_mean(values, mask):
    """Mean of `values` [B] where `mask` [B] holds; exactly 0 where it holds nowhere."""
    return weighted_mean(values, mask)


def soft_targets(
    taxonomy: Taxonomy, level: str, *, smoothing: float = 0.0, follow: bool = False, beta: float | None = None
) -> np.ndarray:
    """What a classifier is taught for every label: a table of distributions.

    * Smoothing (Szegedy et al. 2015, arXiv:1512.00567): q = (1 − ε) · onehot + ε / C.
    * Smoothing that follows the taxonomy: ε is split equally among the root and the levels above `level`, and at each of them
      evenly over the classes below the label's ancestor there, so that more of it goes to near classes.
    * Soft labels by tree distance (Bertinetto et al. 2020, arXiv:1912.09393): q_c ∝ exp(−β · d(c, y)), d the height of the
      lowest common ancestor as a share of the tree's, the tree being cut at `level`.

    Args:
        taxonomy: of the labels.
        level: of the classes.
        smoothing: ε, in [0, 1).
        follow: smoothing follows the taxonomy.
        beta: β, above 0, for soft labels; None for none.

    Returns:
        float32 [classes, classes]; row y is the target of label y, and sums to 1.

    Raises:
        InputError: both smoothing and beta, a value out of its bounds, an unknown level.

    Example:
        >>> tree = Taxonomy.from_names({"super": ["a", "b"], "sub": ["a1", "a2", "b1", "b2"]}, {"sub": [0, 0, 1, 1]})
        >>> soft_targets(tree, "sub", smoothing=0.4, follow=True)[0].tolist()  # half of 0.4 among a1 and a2, half among all
        [0.75, 0.15000000596046448, 0.05000000074505806, 0.05000000074505806]
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"label smoothing is {smoothing}; it lies in [0, 1)")
    depth, classes = taxonomy.index(level), taxonomy.size(level)
    if beta is not None:
        if smoothing:
            raise InputError(f"soft labels (beta {beta}) and smoothing ({smoothing}) exclude each other: set one to 0")
        if not 0 < beta < np.inf:
            raise InputError(f"beta is {beta}; it lies above 0")
        scores = np.exp(-beta * _lca_heights(taxonomy.upto(level)))
        return np.float32(scores / scores.sum(1, keepdims=True))
    above = [np.zeros(classes, int)]  # the root, of which all are descendants
    if follow:
        above += [taxonomy.ancestors(level, l) for l in taxonomy.levels[:depth]]
    alike = [np.float64(a[:, None] == a[None]) for a in above]
    spread = sum(a / a.sum(1, keepdims=True) for a in alike) / len(alike)
    return np.float32((1 - smoothing) * np.eye(classes) + smoothing * spread)


def _lca_heights(tree: Taxonomy) -> np.ndarray:
    """[leaves, leaves]: height of the lowest common ancestor as a share of the root's."""
    leaves = np.arange(len(tree.names[-1]))
    depth = tree.lca_depth(leaves[:, None], leaves[None])
    heights = np.stack([np.full(len(leaves), tree.root_height), *(h[p] for h, p in zip(tree.heights, tree.paths.T))], 1)
    return np.take_along_axis(heights, depth, 1) / tree.root_height


def classification_loss(logits, labels, targets=0.0, *, taxonomy: Taxonomy | None = None, level: str | None = None):
    """Softmax cross-entropy per example, with labels at whatever level they are known.

    L[b] = −Σ_c q[y, c] · log p[c] where the label y of the classifier's own level is known, or follows from a finer one.
    Where only coarser ones are known, L[b] = −log Σ_c p[c] over the classes c below the finest of them: the probability of
    what is known, smoothed by nothing.

    Args:
        logits: floating [B, C]; the loss is computed in float32 at least.
        labels: int [B], −1 where unknown; with a taxonomy, level → int [B].
        targets: label smoothing, or a table [C, C] of `soft_targets`.
        taxonomy: relates the levels.
        level: of the classifier; needed with a taxonomy.

    Returns:
        (float32 [B] losses, bool [B] whether anything is known of them); where nothing is, the loss is 0, and so is its
        gradient, whatever the logits are.

    Raises:
        InputError: a level that the taxonomy has not; logits, targets and level of different numbers of classes.

    Example:
        >>> tree = Taxonomy.from_names({"super": ["a", "b"], "sub": ["a1", "a2", "b1", "b2"]}, {"sub": [0, 0, 1, 1]})
        >>> labels = {"super": jnp.array([0, 1, -1]), "sub": jnp.array([1, -1, -1])}
        >>> loss, known = classification_loss(jnp.zeros((3, 4)), labels, taxonomy=tree, level="sub")
        >>> [round(float(x), 3) for x in loss], known.tolist()  # log 4, log 2, nothing
        ([1.386, 0.693, 0.0], [True, True, False])
    """
    rows, classes = logits.shape
    if np.ndim(targets) and targets.shape != (classes, classes):
        raise InputError(f"the logits are of {classes} classes, the table of targets has the shape {targets.shape}")
    if taxonomy is None:
        own, coarser = labels, []
    else:
        depth = taxonomy.index(level)
        if taxonomy.size(level) != classes:
            raise InputError(f"the logits are of {classes} classes, level '{level}' has {taxonomy.size(level)}")
        own = labels.get(level, jnp.full(rows, -1))
        for finer in (l for l in taxonomy.levels[depth + 1 :] if l in labels):
            lifted = jnp.asarray(taxonomy.ancestors(finer, level))[jnp.maximum(labels[finer], 0)]
            own = jnp.where((own < 0) & (labels[finer] >= 0), lifted, own)
        coarser = [l for l in reversed(taxonomy.levels[:depth]) if l in labels]
    label, known = jnp.maximum(own, 0), own >= 0
    # Logits of rows of which nothing is known are no part of anything: their gradient is 0 even where they are not finite.
    some = functools.reduce(jnp.logical_or, [labels[l] >= 0 for l in coarser], known)
    logits = jnp.where(some[:, None], logits, 0.0)
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    if np.ndim(targets):
        target = jnp.asarray(targets, log_p.dtype)[label]
    else:
        target = optax.smooth_labels(jax.nn.one_hot(label, classes, dtype=log_p.dtype), targets)
    loss = jnp.where(known, -jnp.sum(target * log_p, -1), 0.0)
    for above in coarser:
        new = ~known & (labels[above] >= 0)
        below = jnp.asarray(taxonomy.ancestors(level, above))[None] == jnp.maximum(labels[above], 0)[:, None]
        marginal = jax.nn.logsumexp(log_p, -1, where=below)
        loss, known = jnp.where(new, -marginal, loss), known | new
    return loss, known


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
    sides = [(labels, jnp.ones(mask.shape))] if partner is None else [(labels, share), (partner, 1 - share)]
    losses, weights = [], []
    for of_side, part in sides:
        loss, known = classification_loss(logits, jnp.where(mask, of_side, -1), smoothing)
        losses.append(loss)
        weights.append(part * known)
    return weighted_mean(jnp.stack(losses), jnp.stack(weights))


def distillation(logits, teacher, temperature: float = 4.0):
    """What a classifier has yet to learn from another, per example.

    L[b] = T² · KL(softmax(t[b] / T) ‖ softmax(z[b] / T)), t the teacher's logits or log probabilities (Hinton et al. 2015,
    arXiv:1503.02531). No gradient flows into the teacher.

    Args:
        logits: floating [B, C], z.
        teacher: floating [B, C], t.
        temperature: T, above 0.

    Returns:
        float32 [B], at least 0 but for rounding.

    Example:
        >>> z = jnp.array([[2.0, 0.0, -1.0]])
        >>> float(distillation(z, z + 3.0)[0]), float(distillation(z, -z)[0]) > 1
        (0.0, True)
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    said, taught = (jax.nn.log_softmax(x.astype(dtype) / temperature) for x in (logits, jax.lax.stop_gradient(teacher)))
    share = jnp.exp(taught)
    return temperature**2 * jnp.sum(share * jnp.where(share > 0, taught - said, 0.0), -1)  # 0 · log 0 = 0


def multilabel_loss(logits, targets):
    """Mean binary cross-entropy over the labels of each example, of which it may have any number.

    Args:
        logits: floating [B, C]; the loss is computed in float32 at least.
        targets: floating [B, C], from 0 to 1; what is not finite, as NaN, is unknown and counts for nothing.

    Returns:
        (float32 [B] losses, bool [B] whether any label is known); where none is, the loss is 0, and so is its gradient.

    Raises:
        InputError: targets of another shape than the logits.

    Example:
        >>> loss, known = multilabel_loss(jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [jnp.nan, jnp.nan]]))
        >>> [round(float(x), 4) for x in loss], known.tolist()
        ([0.6931, 0.0], [True, False])
    """
    if targets.shape != logits.shape:
        raise InputError(f"logits {logits.shape} and targets {targets.shape} are not of the same labels")
    known = jnp.isfinite(targets)
    logits = jnp.where(known, logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), 0.0)
    each = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, targets, 0.0))
    return jnp.where(known, each, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1), known.any(-1)


def squared_error(predictions, targets):
    """½ · Σ_d (ŷ[b, d] − y[b, d])² per example.

    Args:
        predictions: floating [B, D], ŷ.
        targets: floating [B, D], or [B] where D is 1; what is not finite, as NaN, is unknown and counts for nothing.

    Returns:
        (float32 [B] losses, bool [B] whether any number is known); the sum runs over the numbers that are known.

    Raises:
        InputError: targets of another shape than the predictions.

    Example:
        >>> loss, known = squared_error(jnp.array([[3.0], [1.0]]), jnp.array([1.0, jnp.nan]))
        >>> loss.tolist(), known.tolist()
        ([2.0, 0.0], [True, False])
    """
    targets = targets[:, None] if targets.ndim == 1 else targets
    if targets.shape != predictions.shape:
        raise InputError(
            f"predictions {predictions.shape} and targets {targets.shape} are not of the same numbers: a task's `classes` says "
            "how many numbers its target holds"
        )
    known = jnp.isfinite(targets)
    error = predictions.astype(jnp.promote_types(predictions.dtype, jnp.float32)) - targets
    return 0.5 * jnp.sum(jnp.where(known, error, 0.0) ** 2, -1), known.any(-1)
