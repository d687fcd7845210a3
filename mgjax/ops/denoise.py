"""Denoising of image batches: median, bilateral filter, non-local means.

All take floating [B, H, W, C] of any range and go on beyond the borders with the last row or
column.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MEDIAN_LIMIT = 7  # the comparisons grow with the fourth power of the size


def median(x, size: int = 3):
    """The median of size × size pixels, channel by channel.

    Minima and maxima of shifted images, without a sort: of half the values and one more the
    smallest and the largest cannot be the median, so they make way for one that is left.

    Args:
        x: floating [B, H, W, C].
        size: odd, 3 to 7.

    Raises:
        ValueError: another size.

    Example:
        >>> spot = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2].set(9.0)
        >>> float(median(spot).max())
        0.0
    """
    if _odd("median", "size", size) > MEDIAN_LIMIT:
        raise ValueError(f"median: a size of {size} pixels is above {MEDIAN_LIMIT}")
    rest = [part for _, _, part in _shifts(x, size // 2)]
    held, rest = rest[: len(rest) // 2 + 2], rest[len(rest) // 2 + 2 :]
    while len(held) > 1:
        for i in range(len(held) - 1):
            held[i], held[i + 1] = jnp.minimum(held[i], held[i + 1]), jnp.maximum(held[i], held[i + 1])
        for i in range(len(held) - 2, 0, -1):
            held[i - 1], held[i] = jnp.minimum(held[i - 1], held[i]), jnp.maximum(held[i - 1], held[i])
        held = held[1:-1] + rest[:1]
        rest = rest[1:]
    return held[0]


def bilateral(x, size: int = 5, sigma_color: float = 0.1, sigma_space: float = 1.0):
    """Smooths where colours are alike, and keeps edges (Tomasi and Manduchi 1998).

    y[p] = Σ_q w(p, q) x[q] / Σ_q w(p, q),  w = exp(−|p − q|² / 2σ_space² − |x[p] − x[q]|² / 2σ_color²)

    Args:
        x: floating [B, H, W, C]; colours differ by their Euclidean distance over the channels.
        size: of the square window, odd.
        sigma_color: in the units of `x`.
        sigma_space: in pixels.

    Raises:
        ValueError: an even size, or a sigma that is not above 0.
    """
    _odd("bilateral", "size", size)
    _positive("bilateral", sigma_color=sigma_color, sigma_space=sigma_space)
    total, weights = jnp.zeros_like(x), jnp.zeros_like(x[..., :1])
    for dy, dx, part in _shifts(x, size // 2):
        distance = jnp.square(part - x).sum(-1, keepdims=True)
        weight = jnp.exp(-(dy * dy + dx * dx) / (2 * sigma_space**2) - distance / (2 * sigma_color**2))
        total, weights = total + weight * part, weights + weight
    return total / weights


def non_local_means(x, size: int = 3, search: int = 7, strength: float = 0.1, noise: float = 0.0):
    """Averages pixels whose surroundings are alike (Buades et al. 2005).

    y[p] = Σ_q w(p, q) x[q] / Σ_q w(p, q),  w = exp(−max(d²(p, q) − 2 noise², 0) / strength²)

    d² is the mean square difference between the patches around p and q, over pixels and channels.

    Args:
        x: floating [B, H, W, C].
        size: of the square patches, odd.
        search: of the square window of q around p, odd.
        strength: h, in the units of `x`.
        noise: standard deviation of the noise, in the units of `x`.

    Raises:
        ValueError: an even size, or a strength that is not above 0.
    """
    reach, half = _odd("non_local_means", "search", search) // 2, _odd("non_local_means", "size", size) // 2
    _positive("non_local_means", strength=strength)
    b, h, w, c = x.shape
    wide = _pad(x, reach + half)
    patches = (b, h + 2 * half, w + 2 * half, c)
    own = jax.lax.slice_in_dim(wide, reach, reach + patches[1], axis=1)
    own = jax.lax.slice_in_dim(own, reach, reach + patches[2], axis=2)

    def add(sums, at):
        total, weights = sums
        other = jax.lax.dynamic_slice(wide, (0, at[0], at[1], 0), patches)
        distance = jnp.square(own - other).mean(-1, keepdims=True)
        distance = sum(distance[:, i : i + h] for i in range(size))
        distance = sum(distance[:, :, i : i + w] for i in range(size)) / size**2
        weight = jnp.exp(-jnp.maximum(distance - 2 * noise**2, 0) / strength**2)
        other = other[:, half : half + h, half : half + w]
        return (total + weight * other, weights + weight), None

    # One offset after the other: the window may hold hundreds, each with whole images as its result.
    offsets = jnp.stack(jnp.meshgrid(jnp.arange(search), jnp.arange(search)), -1).reshape(-1, 2)
    (total, weights), _ = jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(x[..., :1])), offsets)
    return total / weights


def _shifts(x, reach: int):
    """(dy, dx, the image as seen from there), for all offsets within reach."""
    h, w = x.shape[1:3]
    wide = _pad(x, reach)
    steps = range(-reach, reach + 1)
    return [(dy, dx, wide[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w]) for dy in steps for dx in steps]


def _pad(x, border: int):
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")


def _odd(op: str, name: str, size: int) -> int:
    if size < 3 or size % 2 == 0:
        raise ValueError(f"{op}: {name} is {size}; it is odd and at least 3")
    return size


def _positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}; it is above 0")
