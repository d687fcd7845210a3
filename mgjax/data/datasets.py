"""Datasets of images by name: their splits, ready to be read, and their taxonomy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.data import procedural
from mgjax.data.folder_source import load_folder
from mgjax.data.images import fit
from mgjax.data.labels import class_taxonomy
from mgjax.data.sources import (
    ArraySource,
    DataError,
    Dataset,
    EncodedSource,
    Source,
    Subset,
    base_of,
    in_memory,
    partly_labelled,
    shuffled,
    split,
    with_test,
)
from mgjax.data.table_source import load_table
from mgjax.data.tfds_source import load_tfds


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = key(
        "procedural",
        "dataset: 'procedural' (embedded), 'tfds:NAME' (prepared, see data.dir), 'folder:PATH' (a folder per class), "
        "'csv:FILE' (a table of images and labels) or 'sklearn:digits' (1,797 digits that scikit-learn brings)",
    )
    dir: str = key("", "folder of prepared TFDS datasets (empty: ~/tensorflow_datasets)")
    taxonomy: str = key(
        "", "of the classes: path of a .csv, .json or .nwk, or 'wordnet' (empty: WordNet's for wnids, else none)"
    )
    levels: tuple[str, ...] = key(
        (),
        "levels, coarse to fine: label features or columns; levels of data.taxonomy to keep; names for nested folders; "
        "of WordNet groups:N, depth:N, named:A+B+other or class, each also as NAME=ITEM (empty: all, or WordNet's default)",
    )
    image_size: int = key(0, "fit images to squares of this side, in pixels (0: as they are)", low=0)
    validation: float = key(0.05, "share of train that is split off for validation where the dataset has none")
    test: float = key(0.2, "share of train that is split off for the test where a folder or table has no other split")
    labelled: float = key(
        1.0,
        "share of the training examples that keep the label of the finest level; the others keep their coarser ones",
        low=0,
        high=1,
    )
    unlabelled: str = key(
        "keep", "what becomes of the others: they stay in training, or are left out of it", choices=("keep", "drop")
    )
    crop: str = key(
        "device",
        "where random resized crops are cut: on the device from the fitted images, or on the host from the whole files",
        choices=("device", "host"),
    )
    workers: int = key(0, "processes that read and decode ahead (0: threads of this one)", low=0)
    on_error: str = key("error", "an image that does not decode stops the run, or is masked", choices=("error", "mask"))
    cache_gb: float = key(4.0, "decoded splits up to this size are kept in memory, in GB", low=0)
    limit: int = key(0, "use only so many examples of each split, for a quick look (0: all)", low=0)
    seed: int = key(0, "of the splits that are split off, of who is labelled, and of the procedural images")


@dataclasses.dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images, and what they are normalised by.

    Attributes:
        image_shape: (height, width, channels).
        mean, std: per channel, of uint8 images, from a sample of train.
    """

    image_shape: tuple[int, int, int] = (0, 0, 0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def what(self) -> str:
        return f"images {self.image_shape}"

    def show(self, batch: Batch) -> np.ndarray:
        return batch.inputs["image"]

    def record(self) -> dict:
        return super().record() | {k: list(getattr(self, k)) for k in ("image_shape", "mean", "std")}


def load_dataset(config: DataConfig) -> ImageDataset:
    """Loads a dataset by its name.

    Raises:
        DataError: an unknown or missing dataset, an empty split, a policy that does not exist.
        TaxonomyError: labels that form no forest, or lie outside it.
    """
    if config.on_error not in ("error", "mask"):
        raise DataError(f"data.on_error is 'error' or 'mask', not '{config.on_error}'")
    if config.crop not in ("device", "host"):
        raise DataError(f"data.crop is 'device' or 'host', not '{config.crop}'")
    if config.unlabelled not in ("keep", "drop"):
        raise DataError(f"data.unlabelled is 'keep' or 'drop', not '{config.unlabelled}'")
    if config.limit < 0 or config.image_size < 0:
        raise DataError(f"data.limit is {config.limit} and data.image_size {config.image_size}; neither can be below 0")
    kind, _, name = config.source.partition(":")
    of_labels = (config.taxonomy, config.levels, config.image_size or None, config.on_error)
    if config.source == "procedural":
        if config.levels or config.image_size or config.taxonomy:
            raise DataError("data.levels, data.taxonomy and data.image_size do not apply to 'procedural'")
        sources = {s: procedural.ProceduralSource(s, config.seed) for s in procedural.COUNTS}
        taxonomy = procedural.taxonomy()
    elif kind == "tfds" and name:
        sources, taxonomy = load_tfds(name, config.dir, *of_labels)
    elif kind in ("folder", "csv") and name:
        load = load_folder if kind == "folder" else load_table
        sources, taxonomy = load(name, *of_labels, config.test, config.seed)
    elif config.source == "sklearn:digits":
        sources, taxonomy = _bundled_digits(*of_labels, config.test, config.seed)
    else:
        raise DataError(
            f"no dataset '{config.source}': 'procedural', 'sklearn:digits' or 'tfds:NAME' (such as tfds:cifar100), "
            "or images of your own by 'folder:PATH' or 'csv:FILE'"
        )

    for source in sources.values():
        if not len(source):
            raise DataError(f"{source.name} is empty")
    if config.limit:
        sources = {s: _limited(v, config.limit, spread=kind in ("folder", "csv")) for s, v in sources.items()}
    shapes = {s: v.take(np.arange(1))["image"].shape[1:] for s, v in sources.items()}
    shape = shapes["train"]
    if len(set(shapes.values())) > 1:
        raise DataError(f"{config.source}: the splits differ in size, {shapes}: give one with --config.data.image_size")
    if config.crop == "host" and not isinstance(base_of(sources["train"]), EncodedSource):
        raise DataError(f"{config.source} has no image files that the host could cut: set --config.data.crop=device")
    # What the host cuts is decoded anew for every window.
    keep = lambda s, v: v if s == "train" and config.crop == "host" else _cached(v, shape, config.cache_gb)
    sources = {s: keep(s, v) for s, v in sources.items()}
    if "validation" not in sources:
        if not 0 < config.validation < 1:
            raise DataError(f"data.validation is a share in (0, 1), not {config.validation}")
        count = math.ceil(config.validation * len(sources["train"]))
        sources["train"], validation = split(sources["train"], count, config.seed)
        sources["validation"] = _cached(validation, shape, config.cache_gb) if config.crop == "host" else validation

    order = shuffled(len(sources["train"]), config.seed)
    sample = sources["train"].take(order.take(0, min(1024, len(sources["train"]))))
    pixels = sample["image"][sample["valid"]].astype(np.float64)
    if not len(pixels):
        raise DataError(f"{sources['train'].name}: none of the first images decodes")
    drop = config.unlabelled == "drop"
    sources["train"] = partly_labelled(sources["train"], taxonomy.levels[-1], config.labelled, config.seed, drop)
    return ImageDataset(
        config.source,
        **sources,
        taxonomy=taxonomy,
        image_shape=shape,
        mean=tuple(pixels.mean((0, 1, 2)).tolist()),
        std=tuple(np.maximum(pixels.std((0, 1, 2)), 1.0).tolist()),
    )


def _bundled_digits(taxonomy: str, levels: Sequence[str], size: int | None, on_error: str, test: float, seed: int):
    """The 8×8 digits of scikit-learn (Alpaydin & Kaynak 1998), from 0 to 16, as uint8 images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("'sklearn:digits' comes with scikit-learn, which is not installed: pip install scikit-learn") from None
    digits = load_digits()
    images = [np.repeat(np.uint8(np.minimum(16 * image, 255))[..., None], 3, 2) for image in digits.images]
    tree, of_class = class_taxonomy([str(n) for n in digits.target_names], taxonomy, levels, "sklearn:digits")
    labels = {level: table[digits.target] for level, table in of_class.items()}
    arrays = {"image": np.stack([fit(i, size) if size else i for i in images])} | labels
    return with_test({"train": ArraySource(arrays, "sklearn:digits")}, test, seed), tree


def _limited(source: Source, limit: int, spread: bool) -> Subset:
    """The first examples, or, where they are sorted by class, some from everywhere."""
    count = min(limit, len(source))
    return Subset(source, np.arange(count) * len(source) // count if spread else np.arange(count), source.name)


def _cached(source: Source, shape, limit_gb: float) -> Source:
    small = len(source) * math.prod(shape) <= limit_gb * 1e9
    return in_memory(source) if small and not isinstance(base_of(source), ArraySource) else source
