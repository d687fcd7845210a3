"""Sources: random access to the examples of one split, as dicts of arrays."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import cv2
import numpy as np
from grain.experimental import index_shuffle

from mgjax.contracts import Batch
from mgjax.data.crops import Window, Windows
from mgjax.data.images import DecodeError, decode_crop, decode_rgb, fit, read_header
from mgjax.errors import InputError
from mgjax.taxonomy import UNKNOWN, Taxonomy

log = logging.getLogger(__name__)


class DataError(InputError):
    """A dataset that is missing, empty or not what it should be."""


class Source(Protocol):
    """The examples of one split.

    `take(indices)` returns a dict of arrays whose first axis runs along `indices`. `"valid"`
    (bool) is False for an example that could not be read: it is masked, never filtered, since
    filtering would shift the positions of all others.
    """

    name: str

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of a dataset and the taxonomy of their labels.

    Attributes:
        name: as its loader was told.
        train, validation, test: sources. Validation chooses; test is read once, at the end.
        taxonomy: of the labels, every level of which is a key of the examples; None where there are none.
        inputs: keys of the examples that branches see.
        targets: keys that tasks are about, beside the levels.
        present: granularities that not all examples have: the key `present/NAME` says which.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    taxonomy: Taxonomy | None = None
    inputs: tuple[str, ...] = ("image",)
    targets: tuple[str, ...] = ()
    present: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The examples, in a word or two."""
        return "examples"

    def record(self) -> dict:
        """What must be known to make new examples like these, ready for JSON; the taxonomy apart."""
        return {"inputs": list(self.inputs), "targets": list(self.targets)}

    def show(self, batch: Batch) -> Sequence[np.ndarray | str]:
        """What a person is shown of a batch of the test split: uint8 images [H, W, 3], texts, or nothing."""
        return ()

    def describe(self) -> str:
        """One line: how many, of what, with which labels."""
        counts = ", ".join(f"{len(getattr(self, split)):,} {name}" for split, name in _SPLITS.items())
        levels = [f"{l} ({self.taxonomy.size(l)})" for l in self.taxonomy.levels] if self.taxonomy else []
        about = [f"levels {', '.join(levels)}"] * bool(levels) + [f"targets {', '.join(self.targets)}"] * bool(self.targets)
        return f"{self.name}: {counts} {self.what}; {'; '.join(about)}"


_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


class ArraySource:
    """A source in memory.

    Args:
        arrays: key → array; all share their first axis.
        name: for messages.
        origin: what they were read from, if it can tell more of the same examples: further columns, how large
            the images' files are.

    Raises:
        DataError: arrays of different lengths, or none.

    Example:
        >>> source = ArraySource({"image": np.zeros((3, 2, 2, 3), np.uint8), "class": np.arange(3)})
        >>> source.take(np.array([2, 0]))["class"].tolist()
        [2, 0]
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays", origin: Source | None = None):
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{name}: arrays of one length are needed, got {lengths}")
        self.name, self.origin = name, origin
        self.arrays = {"valid": np.ones(next(iter(lengths.values())), bool)} | dict(arrays)

    def __len__(self) -> int:
        return len(self.arrays["valid"])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {key: value[indices] for key, value in self.arrays.items()}


class Subset:
    """Some examples of another source, in the order given; of encoded images it takes windows too."""

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self.source, self.indices, self.name = source, np.asarray(indices), name

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray, windows: Windows | None = None) -> dict[str, np.ndarray]:
        chosen = self.indices[indices]
        return self.source.take(chosen) if windows is None else self.source.take(chosen, windows)


class Unlabelled:
    """Another source, some of whose examples are unknown (-1) at one level; of encoded images it takes windows too.

    Args:
        source: what is wrapped.
        level: the level.
        hidden: bool [len(source)]; the examples that lose their label.

    Example:
        >>> source = Unlabelled(ArraySource({"class": np.arange(3)}), "class", np.array([True, False, True]))
        >>> source.take(np.array([1, 2]))["class"].tolist()
        [1, -1]
    """

    def __init__(self, source: Source, level: str, hidden: np.ndarray):
        self.source, self.level, self.hidden, self.name = source, level, hidden, source.name

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, indices: np.ndarray, windows: Windows | None = None) -> dict[str, np.ndarray]:
        example = self.source.take(indices) if windows is None else self.source.take(indices, windows)
        return dict(example) | {self.level: self.hide(example[self.level], indices)}

    def hide(self, labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The labels of the examples at `indices`, without those that are lost."""
        return np.where(self.hidden[indices], np.int32(UNKNOWN), np.asarray(labels, np.int32))


def base_of(source: Source) -> Source:
    """What a source is taken from, in the end."""
    while isinstance(source, Subset | Unlabelled):
        source = source.source
    return source


class EncodedSource:
    """Examples whose images are files' bytes, decoded when they are taken; subclasses say what `read` reads.

    Args:
        name: for messages.
        size: side in pixels to which every image is fitted; None leaves images as they are,
            which then must all have one size.
        on_error: "error" raises for an image that does not decode; "mask" replaces it by a
            masked example and counts it in `bad`.
    """

    _cut = staticmethod(decode_crop)

    def __init__(self, name: str, size: int | None, on_error: str):
        self.name, self.size, self.on_error = name, size, on_error
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[bytes, Mapping[str, int]]:
        """The encoded image and its label at each level. Raises DecodeError where there are no bytes."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        return f"example {index}"

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of every image: (size, size, 3), or that of the first one that decodes."""
        if self.size:
            return (self.size, self.size, 3)
        for i in range(len(self)):
            image, _ = self._example(i)
            if image is not None:
                return image.shape
        raise DataError(f"{self.name}: none of its {len(self)} images decodes")

    def take(self, indices: np.ndarray, windows: Windows | None = None) -> dict[str, np.ndarray]:
        """As `Source.take`; with `windows`, each image is cut from the file's full resolution instead of fitted."""
        shape = self.shape if windows is None else (windows.size, windows.size, 3)
        indices = [int(i) for i in indices]
        images = np.zeros((len(indices), *shape), np.uint8)
        rows = [None] * len(indices) if windows is None else [Window(*row) for row in windows.rows.tolist()]
        if len(indices) >= 2 * _WORKERS > 2:  # OpenCV and the file system work without Python's lock
            cuts = [len(indices) * i // _WORKERS for i in range(_WORKERS + 1)]
            chunks = [(indices[a:b], rows[a:b], images[a:b]) for a, b in itertools.pairwise(cuts)]
            parts = _pool().map(lambda chunk: list(map(self._example, *chunk)), chunks)
            examples = [example for part in parts for example in part]
        else:
            examples = list(map(self._example, indices, rows, images))
        for i, (image, _), place in zip(indices, examples, images):
            if image is not None and image.shape != shape:
                raise DataError(
                    f"{self.name}: {self.describe(i)} is {image.shape}, others are {shape}: "
                    "give one size with --config.data.image_size"
                )
            if image is not None and windows is None:
                place[:] = image
        return {
            "image": images,
            "valid": np.array([image is not None for image, _ in examples]),
            **{level: np.array([labels[level] for _, labels in examples], np.int32) for level in examples[0][1]},
        }

    def labels_of(self, index: int) -> Mapping[str, int]:
        """The labels of an example whose image cannot be read."""
        return self.read(index)[1]

    def column(self, key: str, indices: np.ndarray) -> np.ndarray | None:
        """[len(indices)]; a label, or what else is known of examples without their images. None for an unknown key."""
        found = [self.labels_of(int(i)).get(key) for i in indices]
        return None if None in found else np.array(found)

    def head(self, index: int) -> bytes:
        """The first bytes of the encoded image, as many as say how large it is, or all. Raises as `read`."""
        return self.read(index)[0]

    def sides(self, indices: np.ndarray) -> np.ndarray:
        """int64 [len(indices)]; pixels of the images' shorter sides before they are fitted, -1 for one that is masked.

        JPEG and PNG say it in their header; of other formats the image is decoded.
        """
        parts = np.array_split(indices, 1 + len(indices) // 1024)
        return np.concatenate(list(_pool().map(lambda part: np.array([self._side(int(i)) for i in part], np.int64), parts)))

    def _side(self, index: int) -> int:
        try:
            shape = read_header(self.head(index)).shape
            if shape is None:
                data = self.read(index)[0]
                shape = read_header(data).shape or decode_rgb(data).shape[:2]
        except DecodeError as error:
            self._refuse(index, error)
            return -1
        return min(shape)

    def _example(
        self, index: int, window: Window | None = None, place: np.ndarray | None = None
    ) -> tuple[np.ndarray | None, Mapping[str, int]]:
        """Image and labels; what a window cuts is written to `place`, uint8 [size, size, 3]."""
        try:
            data, labels = self.read(index)
            if window is not None:
                return self._cut(data, window, len(place), place), labels
            image = decode_rgb(data, self.size)
        except DecodeError as error:
            self._refuse(index, error)
            return None, self.labels_of(index)
        return fit(image, self.size) if self.size else image, labels

    def _refuse(self, index: int, error: DecodeError) -> None:
        """Counts an image that does not decode, or raises DataError, as `on_error` has it."""
        if self.on_error == "error":
            raise DataError(
                f"{self.name}: the image of {self.describe(index)} does not decode ({error}); "
                "--config.data.on_error=mask goes on without it"
            ) from None
        if index not in self.bad:
            self.bad[index] = str(error)
            log.warning("%s: %s is masked, %d so far: %s", self.name, self.describe(index), len(self.bad), error)


_LABELLED = 0x1ABE1  # tells the draw of who is labelled from other draws of the same seed
_HEAD = 1 << 16  # bytes of a file, of which the first ones say how large its image is
_WORKERS = min(16, os.cpu_count() or 1)


def share_cores(processes: int) -> None:
    """This process is one of so many that decode: it takes as few of the cores."""
    global _WORKERS
    _WORKERS = min(16, max(1, (os.cpu_count() or 1) // processes))
    cv2.setNumThreads(1)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_WORKERS, "decode")


class FileSource(EncodedSource):
    """Image files below a folder.

    Args:
        root: the folder; what it stands for may be named by a longer path.
        paths: of the files, relative to `root`.
        labels: level → int32 [examples].
        name, size, on_error: as in `EncodedSource`.
        columns: what else is known of the examples: key → array [examples]. It tells who is a member of a
            granularity, and stands in no batch.
    """

    def __init__(
        self,
        root: pathlib.Path,
        paths: Sequence[str],
        labels: Mapping[str, np.ndarray],
        name: str,
        size: int | None,
        on_error: str,
        columns: Mapping[str, np.ndarray] | None = None,
    ):
        super().__init__(name, size, on_error)
        self.root, self.paths, self.labels = root, list(paths), dict(labels)
        self.columns = dict(columns or {})

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[bytes, Mapping[str, int]]:
        return self.head(index, None), self.labels_of(index)

    def head(self, index: int, count: int | None = _HEAD) -> bytes:
        try:
            with open(self.root / self.paths[index], "rb", buffering=0) as file:
                return file.read(count) if count else file.readall()
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from None

    def labels_of(self, index: int) -> Mapping[str, int]:
        return {level: labels[index] for level, labels in self.labels.items()}

    def column(self, key: str, indices: np.ndarray) -> np.ndarray | None:
        found = self.labels.get(key, self.columns.get(key))
        return None if found is None else found[indices]

    def describe(self, index: int) -> str:
        return f"example {index} ('{self.paths[index]}')"


def in_memory(source: Source, chunk: int = 1024) -> ArraySource:
    """Reads a whole source once, so that later passes only index arrays; what it was read from stays known."""
    parts = [source.take(np.arange(i, min(i + chunk, len(source)))) for i in range(0, len(source), chunk)]
    return ArraySource({key: np.concatenate([p[key] for p in parts]) for key in parts[0]}, source.name, source)


def split(source: Source, count: int, seed: int = 0, name: str = "validation") -> tuple[Subset, Subset]:
    """Splits off `count` examples, called `name`; who goes where depends on `seed` and the length alone.

    Returns:
        (the rest, the `count` examples), each in the order of the source.

    Raises:
        DataError: nothing would be left on one side.
    """
    if not 0 < count < len(source):
        raise DataError(f"{source.name}: {count} of {len(source)} examples cannot be split off: one side would be empty")
    order = shuffled(len(source), seed)
    chosen = np.zeros(len(source), bool)
    chosen[[order[i] for i in range(count)]] = True
    return (
        Subset(source, np.flatnonzero(~chosen), source.name),
        Subset(source, np.flatnonzero(chosen), f"{source.name} ({name})"),
    )


def split_rows(
    name: str,
    given: Sequence[str],
    *,
    test: float,
    validation: float,
    folds: int = 0,
    fold: int = 1,
    seed: int = 0,
    limit: int = 0,
) -> dict[str, list[int]]:
    """Split → rows of a table, each in the order of the table.

    Args:
        name: for messages.
        given: split of each row: "train", "validation" or "test".
        test, validation: shares of train that are split off where the table has no such split.
        folds, fold: the test is the `fold`-th of so many parts of train, and what the table calls test is left out; 0: none.
        seed: of what is drawn.
        limit: no more rows of each split; 0: all.

    Raises:
        DataError: a fold or share that does not exist, an empty split.

    Example:
        >>> {s: len(rows) for s, rows in split_rows("toy", ["train"] * 10, test=0.2, validation=0.25).items()}
        {'train': 6, 'test': 2, 'validation': 2}
    """
    rows = {s: [i for i, of in enumerate(given) if of == s] for s in ("train", "validation", "test")}
    rows = {s: at for s, at in rows.items() if at}
    if "train" not in rows:
        raise DataError(f"{name}: no example is of the split train")

    def share(of: float, what: str) -> None:
        if not 0 < of < 1:
            raise DataError(f"{name}: data.{what} is a share in (0, 1), not {of}")
        whole = rows["train"]
        rest, chosen = split(ArraySource({"row": np.array(whole)}, name), max(1, round(of * len(whole))), seed, what)
        rows["train"], rows[what] = [whole[i] for i in rest.indices], [whole[i] for i in chosen.indices]

    if folds:
        if not (1 < folds <= len(rows["train"]) and 1 <= fold <= folds):
            raise DataError(f"{name}: data.fold={fold} of data.folds={folds}: two folds or more, and one of them")
        order = shuffled(len(rows["train"]), seed)
        of = {rows["train"][order[i]]: i % folds for i in range(len(rows["train"]))}
        rows["train"], rows["test"] = (sorted(i for i, f in of.items() if (f == fold - 1) is own) for own in (False, True))
    elif "test" not in rows:
        share(test, "test")
    if "validation" not in rows:
        share(validation, "validation")
    return {s: at[:limit] if limit else at for s, at in rows.items()}


def partly_labelled(source: Source, level: str, share: float, seed: int, drop: bool = False) -> Source:
    """A source of which only a share of the examples has a label at `level`; the others keep those of other levels.

    Who keeps it depends on `seed` and the length alone, and who does at one share does at every larger one.

    Args:
        share: in (0, 1]; round(share · examples) labels are left, at least one.
        drop: the others are left out, in place of losing their label.

    Raises:
        DataError: a share that is not in (0, 1].

    Example:
        >>> source = ArraySource({"class": np.arange(10)})
        >>> kept, dropped = (partly_labelled(source, "class", 0.3, seed=0, drop=d) for d in (False, True))
        >>> labels = kept.take(np.arange(10))["class"]
        >>> labels[labels >= 0].tolist() == dropped.take(np.arange(3))["class"].tolist()
        True
    """
    if not 0 < share <= 1:
        raise DataError(f"data.labelled is a share in (0, 1], not {share}")
    count = max(1, round(share * len(source)))
    if count == len(source):
        return source
    hidden = np.ones(len(source), bool)
    # The order of training often has the same seed; without another one here its first steps would show the labelled alone.
    hidden[shuffled(len(source), seed + _LABELLED).take(0, count)] = False
    return Subset(source, np.flatnonzero(~hidden), source.name) if drop else Unlabelled(source, level, hidden)


def with_test(sources: Mapping[str, Source], share: float, seed: int) -> dict[str, Source]:
    """The splits with a test among them: validation, where there is no test, or a share of train.

    Raises:
        DataError: a share that is not in (0, 1), or leaves nothing on one side.
    """
    sources = dict(sources)
    if "test" not in sources:
        if "validation" in sources:
            sources["test"] = sources.pop("validation")
        elif not 0 < share < 1:
            raise DataError(
                f"{sources['train'].name} has no test split; data.test is the share in (0, 1) to make one, not {share}"
            )
        else:
            train = sources["train"]
            sources["train"], sources["test"] = split(train, max(1, round(share * len(train))), seed, "test")
    return sources


class Shuffled:
    """An endless order with random access: position i of epoch e is `order[e · length + i]`.

    Every epoch is a permutation of its own, computed per position, so it takes no memory. It is the order of
    `grain.MapDataset.range(length).seed(seed).shuffle().repeat()`, without a walk through three datasets per position.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        # As Grain derives it for the node below the one that has the seed.
        self.seed = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint32)[0])

    def __getitem__(self, position: int) -> int:
        epoch, within = divmod(position, self.length)
        return index_shuffle(within, self.length - 1, (self.seed + epoch) % 2**32, 4)

    def take(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]; the positions from `start` on."""
        return np.array([self[i] for i in range(start, stop)], np.int64)


def shuffled(length: int, seed: int) -> Shuffled:
    """The order in which `length` examples are trained on; see `Shuffled`."""
    return Shuffled(length, seed)
