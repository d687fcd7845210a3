"""Training: one compiled step, a plan of stages around it. Knows no branch, head, dataset or modality."""

from mgjax.train.checkpoint import CheckpointConfig, CheckpointError, load_variables
from mgjax.train.loop import Feeds, Interrupted, LogConfig, fit
from mgjax.train.optim import OptimConfig
from mgjax.train.stages import Stage, coarse_to_fine

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Feeds",
    "Interrupted",
    "LogConfig",
    "OptimConfig",
    "Stage",
    "coarse_to_fine",
    "fit",
    "load_variables",
]
