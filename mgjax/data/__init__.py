"""Data: sources → host batches → device augmentation. Knows no model."""

from mgjax.data.augment import Augment
from mgjax.data.datasets import DataConfig, Dataset, load_dataset
from mgjax.data.pipeline import eval_batches, train_batches
from mgjax.data.sources import ArraySource, DataError, Source, Subset

__all__ = [
    "ArraySource",
    "Augment",
    "DataConfig",
    "DataError",
    "Dataset",
    "Source",
    "Subset",
    "eval_batches",
    "load_dataset",
    "train_batches",
]
