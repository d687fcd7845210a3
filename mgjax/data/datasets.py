"""Datasets by name: their splits, ready to be read, and their taxonomy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mgjax.config import key
from mgjax.data import procedural
from mgjax.data.sources import DataError, Source, Subset, in_memory, shuffled, split
from mgjax.data.tfds_source import load_tfds
from mgjax.taxonomy import Taxonomy


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = key("procedural", "dataset: 'procedural' (embedded) or 'tfds:NAME' (prepared, see data.dir)")
    dir: str = key("", "folder of prepared TFDS datasets (empty: ~/tensorflow_datasets)")
    levels: tuple[str, ...] = key((), "label features that are levels, coarse to fine (empty: all, by number of classes)")
    image_size: int = key(0, "fit images to squares of this side, in pixels (0: as they are)", low=0)
    validation: float = key(0.05, "share of train that is split off for validation where the dataset has none")
    on_error: str = key("error", "an image that does not decode stops the run, or is masked", choices=("error", "mask"))
    cache_gb: float = key(4.0, "decoded splits up to this size are kept in memory, in GB", low=0)
    limit: int = key(0, "use only so many examples of each split, for a quick look (0: all)", low=0)
    seed: int = key(0, "of the validation split and of the procedural images")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of a dataset and the taxonomy of their labels.

    Attributes:
        name: as in `DataConfig.source`.
        train, validation, test: sources. Validation chooses; test is read once, at the end.
        taxonomy: of the labels; every level is a key of the examples.
        image_shape: (height, width, channels).
        mean, std: per channel, of uint8 images, from a sample of train.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    taxonomy: Taxonomy
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_dataset(config: DataConfig) -> Dataset:
    """Loads a dataset by its name.

    Raises:
        DataError: an unknown or missing dataset, an empty split, a policy that does not exist.
        TaxonomyError: labels that form no forest, or lie outside it.
    """
    if config.on_error not in ("error", "mask"):
        raise DataError(f"data.on_error is 'error' or 'mask', not '{config.on_error}'")
    if config.limit < 0 or config.image_size < 0:
        raise DataError(f"data.limit is {config.limit} and data.image_size {config.image_size}; neither can be below 0")
    kind, _, name = config.source.partition(":")
    if config.source == "procedural":
        if config.levels or config.image_size:
            raise DataError("data.levels and data.image_size do not apply to 'procedural'")
        sources = {s: procedural.ProceduralSource(s, config.seed) for s in procedural.COUNTS}
        taxonomy = procedural.taxonomy()
    elif kind == "tfds" and name:
        sources, taxonomy = load_tfds(name, config.dir, config.levels, config.image_size or None, config.on_error)
    else:
        raise DataError(f"no dataset '{config.source}': 'procedural' or 'tfds:NAME', such as tfds:cifar100")

    for source in sources.values():
        if not len(source):
            raise DataError(f"{source.name} is empty")
    if config.limit:
        sources = {s: Subset(v, np.arange(min(config.limit, len(v))), v.name) for s, v in sources.items()}
    shape = sources["train"].take(np.arange(1))["image"].shape[1:]
    sources = {s: _cached(v, shape, config.cache_gb) for s, v in sources.items()}
    if "validation" not in sources:
        if not 0 < config.validation < 1:
            raise DataError(f"data.validation is a share in (0, 1), not {config.validation}")
        count = math.ceil(config.validation * len(sources["train"]))
        sources["train"], sources["validation"] = split(sources["train"], count, config.seed)

    order = shuffled(len(sources["train"]), config.seed)
    sample = sources["train"].take(np.array([order[i] for i in range(min(1024, len(sources["train"])))]))
    pixels = sample["image"][sample["valid"]].astype(np.float64)
    if not len(pixels):
        raise DataError(f"{sources['train'].name}: none of the first images decodes")
    return Dataset(
        config.source,
        **sources,
        taxonomy=taxonomy,
        image_shape=shape,
        mean=tuple(pixels.mean((0, 1, 2)).tolist()),
        std=tuple(np.maximum(pixels.std((0, 1, 2)), 1.0).tolist()),
    )


def _cached(source: Source, shape, limit_gb: float) -> Source:
    small = len(source) * math.prod(shape) <= limit_gb * 1e9
    return in_memory(source) if small else source
