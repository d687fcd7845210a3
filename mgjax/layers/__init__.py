"""Linen layers, each importable alone: `from mgjax.layers import SeparableConv`."""

from mgjax.layers.activations import ACTIVATIONS, activation
from mgjax.layers.attention import AttentionPool, MultiHeadAttention
from mgjax.layers.conv import Conv, DepthwiseConv, Projection, SeparableConv, SqueezeExcite
from mgjax.layers.nested import NestedConv, NestedDense
from mgjax.layers.norm import Norm
from mgjax.layers.pyramid import FeaturePyramid
from mgjax.layers.source_dense import SourceDense
from mgjax.layers.transformer import DropPath, MLPBlock, PatchEmbed, TransformerBlock, patches

__all__ = [
    "ACTIVATIONS",
    "AttentionPool",
    "Conv",
    "DepthwiseConv",
    "DropPath",
    "FeaturePyramid",
    "MLPBlock",
    "MultiHeadAttention",
    "NestedConv",
    "NestedDense",
    "Norm",
    "PatchEmbed",
    "Projection",
    "SeparableConv",
    "SourceDense",
    "SqueezeExcite",
    "TransformerBlock",
    "activation",
    "patches",
]
