"""Training: one compiled step, a plan of stages around it. Knows no branch, head, dataset or modality."""

from mgjax.train.checkpoint import CheckpointConfig, CheckpointError, load_variables
from mgjax.train.guards import GuardConfig, NonFiniteError, StopConfig
from mgjax.train.loop import FREE, Feeds, Interrupted, LogConfig, TrainConfig, fit
from mgjax.train.mesh import MeshConfig
from mgjax.train.meter import ProfileConfig
from mgjax.train.optim import OptimConfig
from mgjax.train.stages import Stage, coarse_to_fine

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
    "ProfileConfig",
    "Stage",
    "StopConfig",
    "TrainConfig",
    "coarse_to_fine",
    "fit",
    "load_variables",
]
