"""Branches: Linen modules that turn a view into Features at the taps that are asked for.

A branch is a Linen module with

* `feature_info` → {tap: FeatureInfo}, in order of depth, known without running it;
* `__call__(x, *, taps, train)` → {tap: Features}, which traces nothing below the deepest tap.
"""

from mgjax.branches.base import Branch
from mgjax.branches.mlp import MLP
from mgjax.branches.resnet import ResNet
from mgjax.branches.separable import SeparableNet

__all__ = ["MLP", "Branch", "ResNet", "SeparableNet"]
