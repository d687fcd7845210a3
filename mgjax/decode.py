"""Decoding: the one function from Outputs to answers, for evaluation and prediction alike.

Over a taxonomy the answer is always a path, consistent by construction, for leaves of uneven
depth too. What is known at every level is pooled along the tree: the distribution over a node's
children is the renormalised geometric mean of what each head that sees so deep says of it (a
logarithmic opinion pool, Genest & Zidek 1986, doi:10.1214/ss/1177013825, applied to each
conditional). One head alone is therefore left as it is, and evidence is not counted twice. Other
methods stand beside it, for validation to choose among.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from mgjax.contracts import Array, Outputs
from mgjax.granularity import Head, Task
from mgjax.taxonomy import Taxonomy

Method = Literal["combined", "product", "lifted", "top_down"]
METHODS: tuple[Method, ...] = ("combined", "product", "lifted", "top_down")
_FLOOR = 1e-30  # keeps the logarithm of a lifted probability finite in float32


@struct.dataclass
class Path:
    """A decoded answer at every level down to the deepest that was answered.

    Attributes:
        log_probs: level → float32 [B, size(level)]; a coarse label's probability is the sum of
            its children's.
        labels: level → int32 [B]; a path: each label's parent is the label above.
    """

    log_probs: dict[str, Array]
    labels: dict[str, Array]


def task_log_probs(outputs: Outputs, heads: Sequence[Head], tasks: Sequence[Task]) -> dict[str, Array]:
    """Task → float32 [B, classes]: logarithms of the mean of its heads' probabilities.

    Tasks that no head answered are left out.
    """
    result = {}
    for task in tasks:
        of_heads = [
            jax.nn.log_softmax(outputs.logits[h.name]) for h in heads if h.task == task.name and h.name in outputs.logits
        ]
        if of_heads:
            result[task.name] = jax.nn.logsumexp(jnp.stack(of_heads), 0) - jnp.log(len(of_heads))
    return result


def decode(log_probs: Mapping[str, Array], taxonomy: Taxonomy, method: Method = "combined") -> Path:
    """Decodes what the heads say of some levels to one path.

    Args:
        log_probs: level → [B, size(level)], for any non-empty set of levels.
        taxonomy: of those levels.
        method: "combined" (the leaf with the most evidence from all levels), "product" (the leaf
            for which the product of all levels' probabilities along its path is highest: a
            product of experts, Hinton 2002, doi:10.1162/089976602760128018), "lifted" (the
            finest level's argmax, and its ancestors) or "top_down" (the best label of the
            coarsest level, then the best among its children, and so on).

    Raises:
        ValueError: no level, an unknown method.

    Example:
        >>> import numpy as np
        >>> tree = Taxonomy.from_names({"super": ["a", "b"], "sub": ["a1", "a2", "b1"]}, {"sub": [0, 0, 1]})
        >>> says = {"super": np.log([[0.9, 0.1]]), "sub": np.log([[0.3, 0.3, 0.4]])}
        >>> {m: int(decode(says, tree, m).labels["super"][0]) for m in METHODS}
        {'combined': 0, 'product': 0, 'lifted': 1, 'top_down': 0}
    """
    if not log_probs:
        raise ValueError("nothing to decode: no level was answered")
    levels = [l for l in taxonomy.levels if l in log_probs]
    tree = taxonomy.upto(levels[-1])
    log_probs = {l: jnp.asarray(log_probs[l], jnp.float32) for l in levels}
    if method == "combined":
        pooled = _pool(log_probs, tree)
        leaf = jnp.argmax(pooled[levels[-1]], -1)
    elif method in ("product", "lifted"):
        finest = levels[-1]
        counted = levels if method == "product" else [finest]
        score = sum(log_probs[l][:, tree.ancestors(finest, l)] for l in counted)
        score = jax.nn.log_softmax(score) if method == "product" else score
        pooled = {l: lift(score, finest, l, tree) for l in tree.levels}
        leaf = jnp.argmax(score, -1)
    elif method == "top_down":
        pooled = _top_down_probs(log_probs, tree)
        leaf = None
        for above, level in zip((None, *tree.levels), tree.levels):
            score = pooled[level]
            if above is not None:
                score = jnp.where(tree.ancestors(level, above)[None] == leaf[:, None], score, -jnp.inf)
            leaf = jnp.argmax(score, -1)
    else:
        raise ValueError(f"decode knows {METHODS}, not '{method}'")
    paths = jnp.asarray(tree.paths)[leaf]
    return Path(pooled, {l: paths[:, i].astype(jnp.int32) for i, l in enumerate(tree.levels)})


def lift(log_probs, source: str, target: str, tree: Taxonomy):
    """Log probabilities of a coarser level: P(target) = Σ P(source) over the labels below it.

    Args:
        log_probs: floating [B, size(source)].
        source, target: levels, `target` the coarser one, or the same.
        tree: of those levels.

    Returns:
        [B, size(target)]; finite, since probabilities are 1e-30 at least.

    Raises:
        TaxonomyError: an unknown level, or a target that is finer than the source.

    Example:
        >>> tree = Taxonomy.from_names({"super": ["a", "b"], "sub": ["a1", "a2", "b1"]}, {"sub": [0, 0, 1]})
        >>> [round(float(p), 3) for p in jnp.exp(lift(jnp.log(jnp.array([[0.2, 0.3, 0.5]])), "sub", "super", tree))[0]]
        [0.5, 0.5]
    """
    if source == target:
        return log_probs
    return jnp.log(jnp.exp(log_probs) @ jnp.asarray(tree.ancestor_matrix(source, target)) + _FLOOR)


def _conditional(log_probs, level: str, above: str | None, tree: Taxonomy):
    """log P(label | its parent) from log P(label), renormalised among siblings."""
    if above is None:
        return jax.nn.log_softmax(log_probs)
    parent, count = tree.ancestors(level, above), tree.size(above)
    by_label = functools.partial(jax.ops.segment_max, segment_ids=parent, num_segments=count)
    highest = jax.lax.stop_gradient(by_label(log_probs.T).T)[:, parent]
    shifted = jnp.exp(log_probs - highest)
    total = jax.ops.segment_sum(shifted.T, parent, count).T[:, parent]
    return log_probs - highest - jnp.log(total)


def _chain(evidence: Mapping[str, list], tree: Taxonomy) -> dict[str, Array]:
    """level → what is said of it, to level → log probability, conditional upon conditional."""
    result: dict[str, Array] = {}
    above = None
    for level in tree.levels:
        said = [_conditional(e, level, above, tree) for e in evidence[level]]
        step = _conditional(sum(said) / len(said), level, above, tree)
        result[level] = step if above is None else result[above][:, tree.ancestors(level, above)] + step
        above = level
    return result


def _pool(log_probs: Mapping[str, Array], tree: Taxonomy) -> dict[str, Array]:
    """At each level everything that this level's head and all deeper ones say of it counts."""
    evidence = {
        level: [lift(p, l, level, tree) for l, p in log_probs.items() if tree.index(l) >= i]
        for i, level in enumerate(tree.levels)
    }
    return _chain(evidence, tree)


def _top_down_probs(log_probs: Mapping[str, Array], tree: Taxonomy) -> dict[str, Array]:
    """At each level only its own head counts, or the next deeper one where it has none."""
    evidence = {}
    for i, level in enumerate(tree.levels):
        nearest = next(l for l in tree.levels[i:] if l in log_probs)
        evidence[level] = [lift(log_probs[nearest], nearest, level, tree)]
    return _chain(evidence, tree)
