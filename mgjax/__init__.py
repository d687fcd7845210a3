"""mgjax: multi-granularity models in JAX and Flax.

Importing it defines no flag, touches no device and needs no experiment.
"""

from mgjax.contracts import Batch, FeatureInfo, Features, Outputs
from mgjax.granularity import Granularity, Head, Identity, OperatingPoint, Resize, Task
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "FeatureInfo",
    "Features",
    "Granularity",
    "Head",
    "Identity",
    "MultiGranularityModel",
    "OperatingPoint",
    "Outputs",
    "Resize",
    "Task",
    "Taxonomy",
]
