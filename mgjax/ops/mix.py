"""Mixing of two examples, and erasing. The partner is the neighbour in a pair: rows 2k and 2k + 1.

With an even number of rows per device both are on one device, so that nothing is moved between
devices; a permutation of the whole batch would gather it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mgjax.ops.geometry import window_mask


def swap_pairs(x):
    """Every row's partner: rows 2k and 2k + 1 change places.

    Raises:
        ValueError: an odd number of rows.

    Example:
        >>> swap_pairs(jnp.arange(4)).tolist()
        [1, 0, 3, 2]
    """
    if x.shape[0] % 2:
        raise ValueError(f"mixing pairs the rows of a batch, and {x.shape[0]} rows cannot be paired; use an even batch size")
    return jnp.flip(x.reshape(x.shape[0] // 2, 2, *x.shape[1:]), 1).reshape(x.shape)


def symmetric_beta(key, alpha: float, rows: int):
    """Draws of Beta(α, α), float32 [rows].

    X = ½ ± ½ / √(1 + 1 / ((U^(−1/α) − 1) · cos²(2πV))) with uniform U and V (Devroye 1996,
    "Random variate generation in one line of code"): exact and without a loop, where a rejection
    sampler would walk over the rows.

    Args:
        alpha: above 0.
    """
    u, v, sign = jax.random.uniform(key, (3, rows), minval=jnp.finfo(jnp.float32).tiny)
    cos = jnp.cos(2 * jnp.pi * v)
    odds = jnp.expm1(-jnp.log(u) / alpha) * cos * cos  # inf for a small α: X is 0 or 1
    half = 0.5 / jnp.sqrt(1 + 1 / odds)
    return jnp.where(sign < 0.5, 0.5 - half, 0.5 + half)


def mixup(x, partner, share):
    """share · x + (1 − share) · partner (Zhang et al. 2017, arXiv:1710.09412). share: float32 [B]."""
    share = share.reshape(-1, *(1,) * (x.ndim - 1))
    return share * x + (1 - share) * partner


def cutmix(key, x, partner, share):
    """Puts a window of the partner into every image (Yun et al. 2019, arXiv:1905.04899).

    The window has the image's proportions and about 1 − share of its area; its centre lies
    anywhere, and what lies beyond the border is cut off.

    Args:
        x, partner: [B, H, W, C].
        share: float32 [B]; 1 leaves the image.

    Returns:
        The images, and float32 [B]: the exact share of pixels that are their own.
    """
    b, height, width = x.shape[:3]
    size = jnp.array([height, width], jnp.float32)[:, None]
    side = jnp.round(size * jnp.sqrt(1 - share)[None])
    start = jnp.floor(jax.random.uniform(key, (2, b)) * size) - jnp.floor(side / 2)
    low, high = jnp.clip(start, 0, size), jnp.clip(start + side, 0, size)
    taken = window_mask(jnp.concatenate([low, high]).T, height, width)
    area = (high - low).prod(0)
    return jnp.where(taken[..., None], partner, x), 1 - area / (height * width)


def erase(x, window, fill):
    """Fills a window of every image (Zhong et al. 2017, arXiv:1708.04896).

    Args:
        x: [B, H, W, C].
        window: floating [B, 4]; y0, x0, y1, x1 in pixels. One without area leaves the image.
        fill: [C].
    """
    inside = window_mask(window, *x.shape[1:3])
    return jnp.where(inside[..., None], fill[None, None, None], x)
