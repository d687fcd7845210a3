"""Feature pyramids: maps of several resolutions that see each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax import ops
from mgjax.errors import InputError
from mgjax.layers.conv import Conv

DIRECTIONS = ("top_down", "bidirectional")


class FeaturePyramid(nn.Module):
    """Brings maps of several resolutions to one width and lets each see the others.

    "top_down" (Lin et al. 2017, FPN, arXiv:1612.03144): from the coarsest map to the finest,
    each is added to the next; a 3×3 convolution then smooths it. "bidirectional" (Liu et al.
    2018, PANet, arXiv:1803.01534; Tan et al. 2020, BiFPN, arXiv:1911.09070, with sums in place of
    its learned weights) goes back from the finest to the coarsest as well.

    Sizes need not be multiples of each other: a map grows by repeating its nearest positions, as
    in Lin et al., and shrinks by `ops.resize`. Maps are ordered by size, then by name; the order
    of the dict does not matter. Parameters belong to names, so those of a subset of the maps are a
    sub-tree of those of all. To the others, a map that is absent is as if it were not there, if each
    size is a multiple of the next.

    Attributes:
        features: channels of every output.
        direction: see above.
        norm, activation, dtype: as in `Conv`; a convolution has a bias where there is no norm.

    Raises:
        InputError: an unknown direction.
        ValueError: no maps, or something that is no map.

    Example:
        >>> import jax
        >>> maps = {"fine": jnp.ones((1, 8, 8, 4)), "coarse": jnp.ones((1, 3, 3, 16))}
        >>> out, _ = FeaturePyramid(8).init_with_output(jax.random.key(0), maps, train=False)
        >>> {name: m.shape for name, m in out.items()}
        {'fine': (1, 8, 8, 8), 'coarse': (1, 3, 3, 8)}
    """

    features: int
    direction: Literal["top_down", "bidirectional"] = "top_down"
    norm: str = "none"
    activation: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Mapping, present: Mapping | None = None, *, train: bool) -> dict:
        """Args:
            maps: name → [B, H, W, C], of any sizes and widths.
            present: name → bool [B]; present where missing.

        Returns:
            name → [B, H, W, features], in the order of `maps`.
        """
        if self.direction not in DIRECTIONS:
            raise InputError(f"a feature pyramid goes {' or '.join(DIRECTIONS)}, not '{self.direction}'")
        if not maps or any(m.ndim != 4 for m in maps.values()):
            raise ValueError(f"a feature pyramid needs maps [B, H, W, C], got { {n: m.shape for n, m in maps.items()} }")

        def conv(kind, name, kernel, x):
            return Conv(
                self.features,
                kernel,
                norm=self.norm,
                activation=self.activation,
                use_bias=self.norm == "none",
                dtype=self.dtype,
                name=f"{kind}_{name}",
            )(x, train=train)

        order = sorted(maps, key=lambda n: (-maps[n].shape[1] * maps[n].shape[2], n))  # the finest first

        def keep(name, x, instead=0):
            there = (present or {}).get(name)
            return x if there is None else jnp.where(there[:, None, None, None], x, instead)

        # Zeroed before as well as behind the convolution: 0 · NaN would be NaN in its gradient.
        lateral = {n: keep(n, conv("lateral", n, 1, keep(n, maps[n]))) for n in order}
        down, coarser = {}, None
        for n in reversed(order):
            above = jnp.zeros_like(lateral[n]) if coarser is None else _resized(coarser, lateral[n].shape)
            total = lateral[n] + above
            # Where a map is absent, what came from above goes on as it was.
            down[n] = coarser = total if self.direction == "top_down" else keep(n, conv("merge", n, 3, total), above)
        if self.direction == "top_down":
            return {n: conv("output", n, 3, down[n]) for n in maps}
        out, finer = {}, None
        for n in order:
            below = jnp.zeros_like(lateral[n]) if finer is None else _resized(finer, lateral[n].shape)
            out[n] = conv("output", n, 3, lateral[n] + down[n] + below)
            finer = keep(n, out[n], below)
        return {n: out[n] for n in maps}


def _resized(x, shape):
    size = shape[1:3]
    if size[0] >= x.shape[1] and size[1] >= x.shape[2]:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "nearest")
    return ops.resize(x, *size)
