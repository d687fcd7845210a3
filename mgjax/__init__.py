"""mgjax: multi-granularity models in JAX and Flax.

Importing it defines no flag, touches no device and needs no experiment.
"""

from mgjax.contracts import Batch, FeatureInfo, Features, Outputs
from mgjax.granularity import (
    Compose,
    Denoise,
    Granularity,
    Grey,
    Head,
    Identity,
    OperatingPoint,
    Region,
    Resize,
    Task,
)
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy

__version__ = "0.4.0"
__all__ = [
    "Batch",
    "Compose",
    "Denoise",
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
    "Task",
    "Taxonomy",
]
