"""Branches: Linen modules that turn a view into Features at the taps that are asked for.

A branch is a Linen module with

* `feature_info` → {tap: FeatureInfo}, in order of depth, known without running it;
* `__call__(x, *, taps, train)` → {tap: Features}, which traces nothing below the deepest tap.

`NAMED_BRANCHES` makes every published one by its name: `NAMED_BRANCHES["vgg16_bn"](width=0.5)`.
"""

import functools
from collections.abc import Callable

from mgjax.branches import convnext, mobilenet, resnet, vgg, vit, xception
from mgjax.branches.base import Branch
from mgjax.branches.columns import TableNet
from mgjax.branches.convnet import ConvNet
from mgjax.branches.convnext import ConvNeXt
from mgjax.branches.factors import Factors, FieldConv
from mgjax.branches.mlp import MLP
from mgjax.branches.mobilenet import MobileNetV1, MobileNetV2
from mgjax.branches.resnet import ResNet
from mgjax.branches.separable import SeparableNet
from mgjax.branches.text import TextConv, TextTransformer, TokenCounts, TokenMean
from mgjax.branches.vgg import VGG
from mgjax.branches.vit import ViT
from mgjax.branches.xception import Xception

NAMED_BRANCHES: dict[str, Callable[..., Branch]] = {
    name: functools.partial(branch.named, name)
    for branch, table in (
        (ResNet, resnet.NAMED),
        (VGG, vgg.NAMED),
        (ViT, vit.NAMED),
        (MobileNetV1, mobilenet.NAMED_V1),
        (MobileNetV2, mobilenet.NAMED_V2),
        (Xception, xception.NAMED),
        (ConvNeXt, convnext.NAMED),
    )
    for name in table
}

__all__ = [
    "MLP",
    "NAMED_BRANCHES",
    "VGG",
    "Branch",
    "ConvNeXt",
    "ConvNet",
    "Factors",
    "FieldConv",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "SeparableNet",
    "TableNet",
    "TextConv",
    "TextTransformer",
    "TokenCounts",
    "TokenMean",
    "ViT",
    "Xception",
]
