"""Images cut into pieces that are put together in another order."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def jigsaw(key, x, pieces: int):
    """Cuts every image into pieces × pieces equal patches and puts them together at random, in an order of its own.

    What is smaller than a patch stays to be seen, what is larger is destroyed (Du et al. 2020, arXiv:2003.03838).

    Args:
        x: [B, H, W, C]; `pieces` divides H and W.
        pieces: patches along each side; static.

    Returns:
        [B, H, W, C], the same numbers elsewhere.

    Raises:
        ValueError: pieces that do not divide the images.

    Example:
        >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> shuffled = jigsaw(jax.random.key(0), x, 2)
        >>> bool((jnp.sort(shuffled.ravel()) == x.ravel()).all())
        True
    """
    b, height, width, channels = x.shape
    if pieces < 1 or height % pieces or width % pieces:
        raise ValueError(f"images of {height} × {width} pixels cannot be cut into {pieces} pieces a side")
    h, w = height // pieces, width // pieces
    cut = x.reshape(b, pieces, h, pieces, w, channels).swapaxes(2, 3).reshape(b, pieces * pieces, h * w * channels)
    order = jnp.argsort(jax.random.uniform(key, (b, pieces * pieces)), axis=1)
    cut = jnp.take_along_axis(cut, order[..., None], axis=1)
    return cut.reshape(b, pieces, pieces, h, w, channels).swapaxes(2, 3).reshape(x.shape)
