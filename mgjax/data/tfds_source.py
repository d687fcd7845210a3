"""`tfds:NAME`: prepared TFDS datasets through `data_source`, without TensorFlow."""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Mapping

import numpy as np

from mgjax.data.images import DecodeError, decode_rgb, fit
from mgjax.data.sources import DataError
from mgjax.taxonomy import Taxonomy, TaxonomyError

log = logging.getLogger(__name__)
LEVEL_NAMES = {"label": "class", "coarse_label": "superclass"}  # TFDS's feature → our level


class TfdsSource:
    """One split of a TFDS image dataset.

    Args:
        records: random access to examples whose `image` is still encoded.
        levels: level → feature that holds its label.
        name: for messages.
        size: side in pixels to which every image is fitted; None leaves images as they are,
            which then must all have one size.
        on_error: "error" raises for an image that does not decode; "mask" replaces it by a
            masked example and counts it in `bad`.
    """

    def __init__(self, records, levels: Mapping[str, str], name: str, size: int | None, on_error: str):
        self.records, self.levels, self.name, self.size, self.on_error = records, dict(levels), name, size, on_error
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of every image: (size, size, 3), or that of the first one that decodes."""
        if self.size:
            return (self.size, self.size, 3)
        for i in range(len(self)):
            image = self._image(i, self.records[i]["image"])
            if image is not None:
                return image.shape
        raise DataError(f"{self.name}: none of its {len(self)} images decodes")

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        records = [self.records[int(i)] for i in indices]
        images = [self._image(int(i), r["image"]) for i, r in zip(indices, records)]
        for i, image in zip(indices, images):
            if image is not None and image.shape != self.shape:
                raise DataError(
                    f"{self.name}: example {i} is {image.shape}, others are {self.shape}: "
                    "give one size with --config.data.image_size"
                )
        labels = {l: np.array([r[f] for r in records], np.int32) for l, f in self.levels.items()}
        blank = np.zeros(self.shape, np.uint8)
        return {
            "image": np.stack([blank if i is None else i for i in images]),
            "valid": np.array([i is not None for i in images]),
            **labels,
        }

    def labels(self) -> dict[str, np.ndarray]:
        """Feature → labels of all examples, without decoding an image."""
        rows = [[self.records[i][f] for f in self.levels.values()] for i in range(len(self))]
        return dict(zip(self.levels.values(), np.asarray(rows, np.int32).reshape(-1, len(self.levels)).T))

    def _image(self, index: int, data: bytes) -> np.ndarray | None:
        try:
            image = decode_rgb(data)
        except DecodeError as error:
            if self.on_error == "error":
                raise DataError(
                    f"{self.name}: the image of example {index} does not decode ({error}); "
                    "--config.data.on_error=mask goes on without it"
                ) from None
            if index not in self.bad:
                self.bad[index] = str(error)
                log.warning("%s: example %d is masked, %d so far: %s", self.name, index, len(self.bad), error)
            return None
        return fit(image, self.size) if self.size else image


def load_tfds(name: str, directory: str, levels: tuple[str, ...], size: int | None, on_error: str):
    """Opens a prepared dataset.

    Returns:
        ({"train": …, "validation"?: …, "test": …} of TfdsSource, Taxonomy).

    Raises:
        DataError: the directory or the dataset is not there, or has no train or test split.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    path = pathlib.Path(directory or "~/tensorflow_datasets").expanduser()
    help_text = (
        f"name the folder that holds {name.split('/')[0]}/ with --config.data.dir=DIR, or prepare it once with "
        f"TensorFlow installed (pip install 'mgjax[prepare]', in a checkout '.[prepare]'):\n  "
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{path}', "
        f"file_format='array_record').download_and_prepare()\""
    )
    if not path.is_dir():
        raise DataError(f"tfds:{name}: there is no directory '{path}'; {help_text}")
    if not any((path / name.partition(":")[0]).glob("**/features.json")):
        found = sorted({p.parent.parent.name for p in path.glob("*/*/features.json")})
        raise DataError(f"tfds:{name}: '{path}' holds {found or 'no prepared dataset'}, not '{name}'; {help_text}")
    builder = tfds.builder(name, data_dir=str(path))
    features, splits = builder.info.features, set(builder.info.splits)
    if "image" not in features:
        raise DataError(f"tfds:{name} has no feature 'image'; it has {sorted(features)}")
    # Some datasets publish no test labels; their validation split is then the test.
    names = {"train": "train", "test": "test" if "test" in splits else "validation"}
    if "test" in splits and "validation" in splits:
        names["validation"] = "validation"
    if missing := set(names.values()) - splits:
        raise DataError(f"tfds:{name} lacks the splits {sorted(missing)}; it has {sorted(splits)}")

    labels = {k: f for k, f in features.items() if getattr(f, "names", None)}
    chosen = levels or tuple(sorted(labels, key=lambda k: len(labels[k].names)))
    by_level = {LEVEL_NAMES.get(feature, feature): feature for feature in chosen}
    sources = {}
    for ours, theirs in names.items():
        try:
            records = builder.as_data_source(split=theirs, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:  # prepared as TFRecord, which has no random access
            raise DataError(f"tfds:{name} in '{path}' is not in the array_record format; {help_text}") from None
        sources[ours] = TfdsSource(records, by_level, f"tfds:{name} {theirs}", size, on_error)
        if not len(records):
            raise DataError(f"{sources[ours].name} is empty")
    try:
        several = sources["train"].labels() if len(chosen) > 1 else None
        taxonomy = Taxonomy.from_features(labels, chosen, labels=several, rename=LEVEL_NAMES)
    except TaxonomyError as error:
        raise TaxonomyError(f"tfds:{name}: {error}") from None
    return sources, taxonomy
