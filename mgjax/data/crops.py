"""Windows of random resized crops, for images that are cut on the host, where they are decoded.

A window is drawn before anything is known of the image, from a seed and a position in the endless order alone, and
placed once the image's shape is known. So neither batch size nor processes nor a restart changes it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from mgjax.errors import InputError

_RATIO = 4 / 3  # windows are of proportions 3 : 4 to 4 : 3


class Window(NamedTuple):
    """Where an image is cut, whatever its shape.

    Attributes:
        share: of the image's area; less where a side would be longer than the image's.
        ratio: width by height, in pixels.
        top, left: 0 to 1; of the room that the window leaves above and beside it.
    """

    share: float
    ratio: float
    top: float
    left: float

    def sides(self, height: int, width: int) -> tuple[float, float]:
        """(height, width) of the window, in pixels of the image, not rounded."""
        area = self.share * height * width
        return min(math.sqrt(area / self.ratio), height), min(math.sqrt(area * self.ratio), width)

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(y0, x0, y1, x1) in whole pixels of an image of that shape; at least one pixel.

        Example:
            >>> Window(share=0.25, ratio=1.0, top=0.0, left=1.0).place(100, 100)
            (0, 50, 50, 100)
        """
        high, wide = (max(1, round(side)) for side in self.sides(height, width))
        y, x = round(self.top * (height - high)), round(self.left * (width - wide))
        return y, x, y + high, x + wide


class Windows(NamedTuple):
    """A window for each row of a batch.

    Attributes:
        size: side in pixels to which all are resampled.
        rows: float64 [B, 4]; the fields of `Window`.
    """

    size: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Crop:
    """Random resized crops (Szegedy et al. 2014, arXiv:1409.4842), as `Augment.crop` has them on the device.

    Attributes:
        size: side of what comes out, in pixels.
        share: smallest and largest share of the image's area.
        seed: of the windows.
        strength: 0 to 1; below 1, areas shrink towards the whole image and proportions towards 1.

    Raises:
        InputError: a value out of its bounds.

    Example:
        >>> crop = Crop(224, (0.25, 1.0), seed=0)
        >>> bool((crop.draw(96, 32).rows == crop.draw(64, 64).rows[32:]).all())
        True
    """

    size: int
    share: tuple[float, float] = (0.25, 1.0)
    seed: int = 0
    strength: float = 1.0

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"crops of {self.size} pixels: at least 1 is needed")
        if len(self.share) != 2 or not 0 < self.share[0] <= self.share[1] <= 1:
            raise InputError(f"augment.crop is {self.share}; two shares are needed, 0 < smallest <= largest <= 1")
        if not 0 <= self.strength <= 1:
            raise InputError(f"the strength of the augmentation is {self.strength}; it lies between 0 and 1")

    def draw(self, start: int, rows: int) -> Windows:
        """The windows of the positions `start` to `start + rows` of the endless order."""
        # Philox makes four numbers of a key and a counter: the counter is the position.
        bits = np.random.Philox(key=self.seed % 2**64, counter=start).random_raw(4 * rows).reshape(rows, 4)
        share, ratio, top, left = ((bits >> np.uint64(11)) * 2.0**-53).T
        least, most = (1 - self.strength * (1 - s) for s in self.share)
        ratio = _RATIO ** (self.strength * (2 * ratio - 1))
        return Windows(self.size, np.stack([least + (most - least) * share, ratio, top, left], 1))
