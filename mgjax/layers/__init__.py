"""Linen layers, each importable alone: `from mgjax.layers import SeparableConv`."""

from mgjax.layers.conv import Conv, DepthwiseConv, SeparableConv
from mgjax.layers.norm import Norm
from mgjax.layers.source_dense import SourceDense

__all__ = ["Conv", "DepthwiseConv", "Norm", "SeparableConv", "SourceDense"]
