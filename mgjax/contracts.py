"""The data that passes between modules: Batch → Features → Outputs. All are pytrees."""

from __future__ import annotations

import dataclasses

import jax
from flax import struct
from jaxtyping import Bool, Float, Int, Shaped

Array = jax.Array
Images = Shaped[Array, "batch height width channels"]
Maps = Float[Array, "batch height width channels"]
Vectors = Float[Array, "batch channels"]
Labels = Int[Array, "batch"]
Mask = Bool[Array, "batch"]
Shares = Float[Array, "batch"]


@struct.dataclass
class Batch:
    """Examples side by side; every array has the batch as its first axis.

    Attributes:
        inputs: what branches see, by modality: `{"image": uint8 [B, H, W, 3]}`.
        targets: what tasks are about: labels int32 [B] (-1 = unknown) by level, numbers of a regression
            float32 [B] or [B, D] (NaN = unknown), `box` float32
            [B, 4] or [B, N, 4] (y0, x0, y1, x1 in pixels, edges of the box; one without area is
            no box), `mask` uint8 [B, H, W].
        mask: bool [B]; False for a padded or undecodable row, which counts for nothing.
        index: int32 [B]; position of the example in its split (-1 for padding).
        present: granularity → bool [B]; one that is missing here is present everywhere.
        weights: granularity → float32 [B]; how much the example counts in what that granularity learns, 0 where
            it is no member of it; 1 where missing.
        partner: targets of the example that was mixed into the row, under the keys of `targets`;
            empty where nothing is mixed.
        partner_weights, partner_index: its `weights` and `index`.
        share: float32 [B], 0 to 1; how much of the row is its own, the rest being its partner's.
            None where nothing is mixed.
    """

    inputs: dict[str, Array]
    targets: dict[str, Array]
    mask: Mask
    index: Labels
    present: dict[str, Mask] = struct.field(default_factory=dict)
    weights: dict[str, Shares] = struct.field(default_factory=dict)
    partner: dict[str, Array] = struct.field(default_factory=dict)
    share: Shares | None = None
    partner_weights: dict[str, Shares] = struct.field(default_factory=dict)
    partner_index: Labels | None = None

    @property
    def size(self) -> int:
        """Number of rows, padded ones included."""
        return self.mask.shape[0]


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """What a branch promises of one tap, so that nothing has to probe shapes.

    Attributes:
        channels: size of the last axis of map and vector.
        reduction: input pixels per map position along one axis; None where there is no map.
    """

    channels: int
    reduction: int | None = None


@struct.dataclass
class Features:
    """What a branch saw at one tap.

    Attributes:
        vector: [B, C]; pooled over the positions of the map.
        map: [B, H, W, C] or None.
    """

    vector: Vectors
    map: Maps | None = None


@struct.dataclass
class Outputs:
    """Raw answers, before decoding.

    Attributes:
        logits: head name → float32 [B, classes]; of a regression, the numbers that are predicted.
    """

    logits: dict[str, Float[Array, "batch classes"]]
