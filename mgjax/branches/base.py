"""What all branches share."""

from __future__ import annotations

import flax.linen as nn

from mgjax.contracts import FeatureInfo, Features


class Branch(nn.Module):
    """Base of all branches; a subclass gives `feature_info` and `__call__`.

    Inside `__call__` it offers every tap to a `TapReader` and stops when that is done:

        reader = self.read(taps)
        for tap, layer in ...:
            x = layer(x)
            if reader.offer(tap, x):
                return reader.features
    """

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        """Every tap, in order of depth."""
        raise TypeError(f"{type(self).__name__} does not say what its taps are")

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

    def offer(self, tap: str, x) -> bool:
        """Keeps `x` ([B, H, W, C] or [B, C]) if `tap` is asked for; True once nothing is missing."""
        if tap in self.missing:
            self.missing.remove(tap)
            is_map = x.ndim == 4
            self.features[tap] = Features(vector=x.mean((1, 2)) if is_map else x, map=x if is_map else None)
        return not self.missing


def check_image(x, reduction: int = 1) -> None:
    """Raises ValueError unless `x` is a floating [B, H, W, C] of at least `reduction` pixels a side."""
    if x.ndim != 4 or min(x.shape[1:3]) < reduction:
        raise ValueError(f"the branch needs images [B, H, W, C] of at least {reduction} pixels a side, got {x.shape}")
