"""The shapes of a depthwise convolution, as one hashable value."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """Everything static of a depthwise convolution of maps [B, H, W, C]; every pair is (vertical, horizontal).

    Attributes:
        size: of the input map.
        window: of the kernel.
        strides: of the windows.
        padding: zeros (before, after) each axis; below 0 it cuts.
        dilation: distance of the taps of a window.
        multiplier: output channels per input channel.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    multiplier: int

    @property
    def out(self) -> tuple[int, int]:
        """Size of the output map."""
        axes = zip(self.size, self.window, self.strides, self.padding, self.dilation)
        height, width = ((n + a + b - (k - 1) * d - 1) // s + 1 for n, k, s, (a, b), d in axes)
        return height, width

    @property
    def taps(self) -> list[tuple[int, int]]:
        """All (u, v) of the window, row by row."""
        return [(u, v) for u in range(self.window[0]) for v in range(self.window[1])]
