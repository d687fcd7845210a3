"""What all branches share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from mgjax.contracts import FeatureInfo, Features
from mgjax.errors import InputError


class Branch(nn.Module):
    """Base of all branches; a subclass gives `feature_info` and `__call__`.

    Inside `__call__` it offers every tap to a `TapReader` and stops when that is done:

        reader = self.read(taps)
        for tap, layer in ...:
            x = layer(x)
            if reader.offer(tap, x):
                return reader.features

    Blocks go through `self.run`, so that they can be rematerialised.
    """

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        """Every tap, in order of depth."""
        raise TypeError(f"{type(self).__name__} does not say what its taps are")

    @nn.nowrap
    def run(self, block: nn.Module, x, *, train: bool):
        """`block(x, train=train)`; with an attribute `remat`, what happens inside is not kept for the backward pass,
        but computed again there."""
        if not getattr(self, "remat", False):
            return block(x, train=train)
        return nn.remat(lambda block, x: block(x, train=train))(block, x)

    def read(self, taps) -> TapReader:
        """Raises ValueError for a tap that the branch does not have, or for none."""
        known = list(self.feature_info)
        if not taps or set(taps) - set(known):
            raise ValueError(f"{type(self).__name__} was asked for taps {sorted(taps)}; it has {known}")
        return TapReader(taps)


class TapReader:
    """Collects Features at the taps that are asked for."""

    def __init__(self, taps):
        self.missing = set(taps)
        self.features: dict[str, Features] = {}

    def offer(self, tap: str, x, vector=None) -> bool:
        """Keeps `x` ([B, H, W, C] or [B, C]) if `tap` is asked for; True once nothing is missing.

        The vector of a map is its mean, unless `vector` ([B, C]) is given.
        """
        if tap in self.missing:
            self.missing.remove(tap)
            is_map = x.ndim == 4
            if vector is None:
                vector = x.mean((1, 2)) if is_map else x
            self.features[tap] = Features(vector=vector, map=x if is_map else None)
        return not self.missing


def check_image(x, reduction: int = 1) -> None:
    """Raises InputError unless `x` is a floating [B, H, W, C] of at least `reduction` pixels a side."""
    if x.ndim != 4 or min(x.shape[1:3]) < reduction:
        raise InputError(f"the branch needs images [B, H, W, C] of at least {reduction} pixels a side, got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"the branch needs floating images, got {x.dtype} {x.shape}: normalise them first")


def per_stage(blocks: Sequence[int] | int, widths: Sequence[int]) -> tuple[int, ...]:
    """Blocks of each stage; one number is that of all. InputError unless there are as many as widths, and some."""
    blocks = (blocks,) * len(widths) if isinstance(blocks, int) else tuple(blocks)
    if len(blocks) != len(widths) or not widths:
        raise InputError(f"a width per stage is needed: blocks {blocks}, widths {tuple(widths)}")
    return blocks


def published(kind: str, table: Mapping, name: str) -> dict:
    """The attributes of a published network; InputError, naming those that there are, for another name."""
    if name not in table:
        raise InputError(f"no {kind} '{name}'; there are {sorted(table)}")
    return dict(table[name])


def scale_width(channels: int, width: float, multiple: int = 8) -> int:
    """`channels` times `width`, rounded to a multiple that is not 0; unchanged at width 1.

    Example:
        >>> scale_width(64, 0.3), scale_width(64, 0.01), scale_width(36, 1.0)
        (16, 8, 36)
    """
    if width <= 0:
        raise InputError(f"a width multiplier is a positive number, not {width}")
    return channels if width == 1 else max(1, round(channels * width / multiple)) * multiple
