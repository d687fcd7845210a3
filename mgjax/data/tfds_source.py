"""`tfds:NAME`: prepared TFDS datasets through `data_source`, without TensorFlow."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from mgjax.data.labels import Labels, class_taxonomy
from mgjax.data.sources import DataError, EncodedSource, Source
from mgjax.taxonomy import UNKNOWN, Taxonomy, TaxonomyError
from mgjax.taxonomy.wordnet import is_wnid

LEVEL_NAMES = {"label": "class", "coarse_label": "superclass"}  # TFDS's feature → our level
_PROBED = 64  # examples that tell whether a split has labels


class TfdsSource(EncodedSource):
    """One split of a TFDS image dataset.

    Args:
        records: random access to examples whose `image` is still encoded.
        levels: level → feature that holds its label.
        name, size, on_error: as in `EncodedSource`.
        lifted: level → int32 [classes]: what the feature's label is at that level (default: itself).
    """

    def __init__(
        self,
        records,
        levels: Mapping[str, str],
        name: str,
        size: int | None,
        on_error: str,
        lifted: Labels | None = None,
    ):
        super().__init__(name, size, on_error)
        self.records, self.levels, self.lifted = records, dict(levels), lifted or {}

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[bytes, Mapping[str, int]]:
        record = self.records[index]
        labels = {level: int(record[feature]) for level, feature in self.levels.items()}
        known = {l: int(t[labels[l]]) if labels[l] >= 0 else UNKNOWN for l, t in self.lifted.items()}
        return record["image"], labels | known

    def labels(self) -> dict[str, np.ndarray]:
        """Feature → labels of all examples, without decoding an image."""
        rows = [[self.records[i][f] for f in self.levels.values()] for i in range(len(self))]
        return dict(zip(self.levels.values(), np.asarray(rows, np.int32).reshape(-1, len(self.levels)).T))


def load_tfds(
    name: str, directory: str, taxonomy: str, levels: Sequence[str], size: int | None, on_error: str
) -> tuple[dict[str, Source], Taxonomy]:
    """Opens a prepared dataset.

    Args:
        taxonomy: as in `class_taxonomy`, for the ClassLabel `label`, or else the one with most classes. Without it,
            classes that are all wnids get WordNet's levels, and otherwise all ClassLabels are levels.
        levels: ClassLabel features that are levels, coarse to fine, or what `class_taxonomy` takes.
        size, on_error: as in `EncodedSource`.

    Returns:
        ({"train": …, "validation"?: …, "test": …} of TfdsSource, Taxonomy). Where the test split is missing, or its
        labels are not published, the validation split is the test.

    Raises:
        DataError: the directory or the dataset is not there, or has no train or test split.
        TaxonomyError: labels that form no forest.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    path = pathlib.Path(directory or "~/tensorflow_datasets").expanduser()
    given = f" --data_dir {shlex.quote(str(path))}" if directory else ""
    help_text = (
        f"name the folder that holds {name.split('/')[0]}/ with --config.data.dir=DIR, or prepare it once: "
        f"python -m mgjax.data.prepare {name}{given}"
    )
    if not path.is_dir():
        raise DataError(f"tfds:{name}: there is no directory '{path}'; {help_text}")
    if not any((path / name.partition(":")[0]).glob("**/features.json")):
        found = sorted({p.parent.parent.name for p in path.glob("*/*/features.json")})
        raise DataError(f"tfds:{name}: '{path}' holds {found or 'no prepared dataset'}, not '{name}'; {help_text}")
    builder = tfds.builder(name, data_dir=str(path))
    features = builder.info.features
    if "image" not in features:
        raise DataError(f"tfds:{name} has no feature 'image'; it has {sorted(features)}")
    by_size = sorted(
        (k for k, f in features.items() if getattr(f, "names", None) and f.shape == ()), key=lambda k: len(features[k].names)
    )
    labels = {k: features[k] for k in by_size}
    finest = "label" if "label" in labels else by_size[-1] if by_size else None
    wnids = finest is not None and all(map(is_wnid, labels[finest].names)) and not set(levels) & set(labels)
    tree, lifted = None, None
    if finest is not None and (taxonomy or wnids):
        tree, lifted = class_taxonomy(labels[finest].names, taxonomy, levels, f"tfds:{name}")
        by_level = dict.fromkeys(tree.levels, finest)
    else:
        if unknown := [l for l in levels if l not in labels]:
            raise TaxonomyError(f"tfds:{name}: no ClassLabel feature {unknown}; there are {sorted(labels)}")
        by_level = {LEVEL_NAMES.get(feature, feature): feature for feature in levels or by_size}

    def open_split(split: str) -> TfdsSource:
        try:
            records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:  # prepared as TFRecord, which has no random access
            raise DataError(f"tfds:{name} in '{path}' is not in the array_record format; {help_text}") from None
        if not len(records):
            raise DataError(f"tfds:{name} {split} is empty")
        return TfdsSource(records, by_level, f"tfds:{name} {split}", size, on_error, lifted)

    sources = {split: open_split(split) for split in ("train", "validation", "test") if split in builder.info.splits}
    if "test" in sources and "validation" in sources and not _labelled(sources["test"]):
        del sources["test"]
    if "test" not in sources and "validation" in sources:
        sources["test"] = sources.pop("validation")
    if missing := [split for split in ("train", "test") if split not in sources]:
        raise DataError(f"tfds:{name} lacks the splits {missing}; it has {sorted(builder.info.splits)}")
    if tree is None:
        try:
            several = sources["train"].labels() if len(by_level) > 1 else None
            tree = Taxonomy.from_features(labels, tuple(by_level.values()), labels=several, rename=LEVEL_NAMES)
        except TaxonomyError as error:
            raise TaxonomyError(f"tfds:{name}: {error}") from None
    return sources, tree


def _labelled(source: TfdsSource) -> bool:
    """Whether the labels of a split are published; ImageNet's test labels, for one, are not."""
    probed = range(min(_PROBED, len(source)))
    return any(source.records[i][feature] >= 0 for i in probed for feature in source.levels.values())
