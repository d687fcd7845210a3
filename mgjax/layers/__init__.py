"""Linen layers, each importable alone: `from mgjax.layers import SeparableConv`."""

from mgjax.layers.activations import ACTIVATIONS, activation
from mgjax.layers.attention import AttentionPool, MultiHeadAttention
from mgjax.layers.bag import EmbeddingBag
from mgjax.layers.blocks import ConvNeXtBlock, InvertedResidual, LinearSeparable, XceptionBlock
from mgjax.layers.conv import Conv, DepthwiseConv, Projection, SeparableConv, SqueezeExcite
from mgjax.layers.nested import NestedConv, NestedDense
from mgjax.layers.norm import Norm
from mgjax.layers.pyramid import FeaturePyramid
from mgjax.layers.sampling import Sampled, TokenSampling
from mgjax.layers.source_dense import SourceDense
from mgjax.layers.transformer import DropPath, MLPBlock, PatchEmbed, TransformerBlock, patches

__all__ = [
    "ACTIVATIONS",
    "AttentionPool",
    "Conv",
    "ConvNeXtBlock",
    "DepthwiseConv",
    "DropPath",
    "EmbeddingBag",
    "FeaturePyramid",
    "InvertedResidual",
    "LinearSeparable",
    "MLPBlock",
    "MultiHeadAttention",
    "NestedConv",
    "NestedDense",
    "Norm",
    "PatchEmbed",
    "Projection",
    "Sampled",
    "SeparableConv",
    "SourceDense",
    "SqueezeExcite",
    "TokenSampling",
    "TransformerBlock",
    "XceptionBlock",
    "activation",
    "patches",
]
