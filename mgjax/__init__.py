"""mgjax: multi-granularity models in JAX and Flax.

Importing it defines no flag, touches no device and needs no experiment.
"""

from mgjax.contracts import Batch, FeatureInfo, Features, Outputs
from mgjax.granularity import (
    Cluster,
    Column,
    Compose,
    Denoise,
    Everyone,
    Granularity,
    Grey,
    Head,
    Identity,
    OperatingPoint,
    Region,
    Resize,
    Resolution,
    Subtree,
    Task,
)
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy

__version__ = "0.8.0"
__all__ = [
    "Batch",
    "Cluster",
    "Column",
    "Compose",
    "Denoise",
    "Everyone",
    "FeatureInfo",
    "Features",
    "Granularity",
    "Grey",
    "Head",
    "Identity",
    "MultiGranularityModel",
    "OperatingPoint",
    "Outputs",
    "Region",
    "Resize",
    "Resolution",
    "Subtree",
    "Task",
    "Taxonomy",
]
