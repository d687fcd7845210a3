"""Sources: random access to the examples of one split, as dicts of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import grain
import numpy as np

from mgjax.errors import InputError


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


class ArraySource:
    """A source in memory.

    Args:
        arrays: key → array; all share their first axis.
        name: for messages.

    Raises:
        DataError: arrays of different lengths, or none.

    Example:
        >>> source = ArraySource({"image": np.zeros((3, 2, 2, 3), np.uint8), "class": np.arange(3)})
        >>> source.take(np.array([2, 0]))["class"].tolist()
        [2, 0]
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays"):
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{name}: arrays of one length are needed, got {lengths}")
        self.name = name
        self.arrays = {"valid": np.ones(next(iter(lengths.values())), bool)} | dict(arrays)

    def __len__(self) -> int:
        return len(self.arrays["valid"])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {key: value[indices] for key, value in self.arrays.items()}


class Subset:
    """Some examples of another source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self.source, self.indices, self.name = source, np.asarray(indices), name

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.source.take(self.indices[indices])


def in_memory(source: Source, chunk: int = 1024) -> ArraySource:
    """Reads a whole source once, so that later passes only index arrays."""
    parts = [source.take(np.arange(i, min(i + chunk, len(source)))) for i in range(0, len(source), chunk)]
    return ArraySource({key: np.concatenate([p[key] for p in parts]) for key in parts[0]}, source.name)


def split(source: Source, count: int, seed: int = 0) -> tuple[Subset, Subset]:
    """Splits off `count` examples; who goes where depends on `seed` and the length alone.

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
        Subset(source, np.flatnonzero(chosen), f"{source.name} (validation)"),
    )


def shuffled(length: int, seed: int) -> Sequence[int]:
    """An endless order with random access: position i of epoch e is `order[e · length + i]`.

    Every epoch is a permutation of its own, computed per position, so it takes no memory.
    """
    return grain.MapDataset.range(length).seed(seed).shuffle().repeat()
