"""Data: sources → host batches → device augmentation. Knows no model."""

from mgjax.data.augment import Augment, AugmentConfig
from mgjax.data.crops import Crop
from mgjax.data.datasets import DataConfig, ImageDataset, load_dataset
from mgjax.data.images import DecodeError
from mgjax.data.partition import membership
from mgjax.data.pipeline import eval_batches, train_batches
from mgjax.data.sources import ArraySource, DataError, Dataset, EncodedSource, FileSource, Source, Subset

__all__ = [
    "ArraySource",
    "Augment",
    "AugmentConfig",
    "Crop",
    "DataConfig",
    "DataError",
    "Dataset",
    "DecodeError",
    "EncodedSource",
    "FileSource",
    "ImageDataset",
    "Source",
    "Subset",
    "eval_batches",
    "load_dataset",
    "membership",
    "train_batches",
]
