"""Training: one compiled step, a plan of stages around it. Knows no branch, head, dataset or modality."""

from mgjax.train.checkpoint import CheckpointConfig, CheckpointError, load_variables
from mgjax.train.guards import GuardConfig, NonFiniteError, StopConfig
from mgjax.train.loop import FREE, Feeds, Interrupted, LogConfig, TrainConfig, fit
from mgjax.train.mesh import MeshConfig
from mgjax.train.meter import ProfileConfig
from mgjax.train.optim import OptimConfig, ParamGroup
from mgjax.train.stages import (
    Stage,
    backbone_first,
    coarse_to_fine,
    growth,
    joint_only,
    progressive_jigsaw,
    progressive_resolution,
)

__all__ = [
    "FREE",
    "CheckpointConfig",
    "CheckpointError",
    "Feeds",
    "GuardConfig",
    "Interrupted",
    "LogConfig",
    "MeshConfig",
    "NonFiniteError",
    "OptimConfig",
    "ParamGroup",
    "ProfileConfig",
    "Stage",
    "StopConfig",
    "TrainConfig",
    "backbone_first",
    "coarse_to_fine",
    "fit",
    "growth",
    "joint_only",
    "load_variables",
    "progressive_jigsaw",
    "progressive_resolution",
]
