"""How well scores rank: NDCG and recall among the first k."""

from __future__ import annotations

import numpy as np


def ranking_figures(scores: np.ndarray, relevant: np.ndarray, candidates: np.ndarray, k: int = 10) -> dict[str, float]:
    """Means over the rows that have something relevant, each ranking its candidates from the highest score down.

    NDCG@k = Σ_{r ≤ k} rel_r / log2(1 + r), over what the best order would have (Järvelin & Kekäläinen 2002,
    doi:10.1145/582415.582418); recall@k = how many of the relevant stand among the first k, over how many there are. Of equal
    scores the first counts as higher.

    Args:
        scores: floating [rows, items].
        relevant: bool [rows, items]; what of the candidates is right.
        candidates: bool [rows, items]; what is ranked.
        k: how many are looked at.

    Returns:
        `ndcg@k`, `recall@k`, and `users`, the rows that count.

    Raises:
        ValueError: something relevant that is no candidate, a candidate without a finite score, or no row that counts.

    Example:
        >>> scores, relevant = np.array([[3.0, 2.0, 1.0]]), np.array([[False, True, False]])
        >>> {name: round(v, 3) for name, v in ranking_figures(scores, relevant, np.ones((1, 3), bool), k=2).items()}
        {'ndcg@2': 0.631, 'recall@2': 1.0, 'users': 1}
    """
    if (relevant & ~candidates).any():
        raise ValueError("something is relevant that is no candidate")
    if not np.isfinite(scores[candidates]).all():
        raise ValueError("a candidate has no finite score")
    rows = relevant.any(1)
    if not rows.any():
        raise ValueError("no row has anything relevant")
    scores, relevant, candidates = scores[rows], relevant[rows], candidates[rows]
    first = np.argsort(-np.where(candidates, scores, -np.inf), axis=1, kind="stable")[:, :k]
    hits = np.take_along_axis(relevant, first, 1)
    gain = 1 / np.log2(np.arange(hits.shape[1]) + 2)
    count = relevant.sum(1)
    best = np.cumsum(gain)[np.minimum(count, hits.shape[1]) - 1]
    return {
        f"ndcg@{k}": float((hits @ gain / best).mean()),
        f"recall@{k}": float((hits.sum(1) / count).mean()),
        "users": int(rows.sum()),
    }
