"""From a source to host batches: an endless, randomly accessible order for training, one padded
pass for evaluation. One integer, the number of examples seen, is the whole position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import grain
import numpy as np

from mgjax.contracts import Batch
from mgjax.data.crops import Crop, Windows
from mgjax.data.sources import ArraySource, DataError, EncodedSource, Source, base_of, shuffled
from mgjax.data.workers import read_in_processes
from mgjax.taxonomy import Taxonomy

# A batch is one element of the Grain pipeline, so these buffers are counted in batches.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


def _local_rows(batch_size: int, process: int, processes: int) -> slice:
    if batch_size % processes:
        raise DataError(f"a batch of {batch_size} cannot be divided among {processes} processes")
    local = batch_size // processes
    return slice(process * local, (process + 1) * local)


def _assemble(
    source: Source,
    indices: np.ndarray,
    taxonomy: Taxonomy | None,
    keys: Keys,
    rows: int,
    windows: Windows | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Batch:
    """Reads examples and pads them with masked repeats of the first to `rows` rows; `windows` needs all rows."""
    padding = rows - len(indices)
    # A process whose part of the last batch is all padding still needs an example for its shapes.
    positions = np.concatenate([indices, np.full(padding, indices[0] if len(indices) else 0, indices.dtype)])
    example = source.take(positions) if windows is None else source.take(positions, windows)
    levels = taxonomy.levels if taxonomy else ()
    for level in levels:
        taxonomy.check(example[level], level, f" of the batch at {source.name} {positions[:3].tolist()}…")
    real = np.arange(rows) < len(indices)
    valid = real & example["valid"]
    if valid.any() and not valid.all():
        # Masked rows show a valid example again, so that batch statistics see no blank image.
        shown = np.where(valid, np.arange(rows), np.argmax(valid))
        example = {key: value[shown] for key, value in example.items()}
    labels = {l: np.where(valid, example[l], -1).astype(np.int32) for l in levels}
    return Batch(
        inputs={key: example[key] for key in keys.inputs},
        targets=labels | {t: example[t] for t in keys.targets},
        mask=valid,
        index=np.where(real, positions, -1).astype(np.int32),
        present={name: example[f"present/{name}"] for name in keys.present},
        weights={name: np.where(valid, table[positions], np.float32(0)) for name, table in (weights or {}).items()},
    )


class Keys(NamedTuple):
    """Which keys of an example go into `Batch.inputs` and, beside the levels, `Batch.targets`; and granularities of which
    the key `present/NAME` says whether the example has them."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    present: tuple[str, ...]


def train_batches(
    source: Source,
    taxonomy: Taxonomy | None,
    *,
    batch_size: int,
    seed: int,
    examples_seen: int,
    steps: int,
    inputs: tuple[str, ...] = ("image",),
    targets: tuple[str, ...] = (),
    present: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    crop: Crop | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Batch]:
    """Yields `steps` batches of numpy arrays, from position `examples_seen` on.

    The order is that of `shuffled(len(source), seed)`, and windows belong to positions: neither depends on
    batch size, process count or workers, so all may change at any position.

    Args:
        taxonomy: its levels are targets; None where there are no levels.
        batch_size: rows of the global batch, over all processes.
        inputs: keys of the examples that go into `Batch.inputs`.
        targets: further keys that go into `Batch.targets`, such as "box".
        present: granularities that not all examples have: bool under the key `present/NAME`.
        process, processes: this process takes its part of every global batch.
        workers: processes that read ahead; 0 = threads of this one. Each takes whole batches in turn, and some
            seconds to start. Of examples in memory there is nothing to read: they are taken here.
        crop: cuts each image where it is decoded; needs a source of encoded images.
        weights: granularity → float [len(source)], as `membership` makes it; goes into `Batch.weights`.

    Raises:
        DataError: a batch that the processes do not divide, a crop of images that are decoded already, or weights
            of another number of examples, below 0 or not finite.
        TaxonomyError: a label outside the taxonomy.

    Example:
        >>> from mgjax.data.procedural import ProceduralSource, taxonomy
        >>> batches = train_batches(
        ...     ProceduralSource("train"), taxonomy(), batch_size=8, seed=0, examples_seen=0, steps=2)
        >>> next(batches).inputs["image"].shape
        (8, 32, 32, 3)
    """
    rows = _local_rows(batch_size, process, processes)
    if crop and not isinstance(base_of(source), EncodedSource):
        raise DataError(
            f"{source.name}: only images that are decoded one by one can be cut on the host: set --config.data.crop=device"
        )
    order, keys = shuffled(len(source), seed), Keys(inputs, targets, present)
    weights = {name: np.asarray(table, np.float32) for name, table in (weights or {}).items()}
    for name, table in weights.items():
        if table.shape != (len(source),):
            raise DataError(
                f"{source.name} has {len(source)} examples, but the weights of granularity '{name}' are of shape {table.shape}"
            )
        if not ((table >= 0) & (table < np.inf)).all():
            raise DataError(f"{source.name}: a weight of granularity '{name}' is below 0 or not finite")

    def load(step: int) -> Batch:
        start = examples_seen + step * batch_size + rows.start
        count = rows.stop - rows.start
        windows = crop.draw(start, count) if crop else None
        return _assemble(source, order.take(start, start + count), taxonomy, keys, count, windows, weights)

    return _read(load, steps, source, workers)


def eval_batches(
    source: Source,
    taxonomy: Taxonomy | None,
    *,
    batch_size: int,
    inputs: tuple[str, ...] = ("image",),
    targets: tuple[str, ...] = (),
    present: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields every example once, in order; the last batch is padded with masked rows.

    Arguments and errors are those of `train_batches`.
    """
    rows, keys = _local_rows(batch_size, process, processes), Keys(inputs, targets, present)

    def load(step: int) -> Batch:
        start = step * batch_size
        indices = np.arange(start + rows.start, max(start + rows.start, min(start + rows.stop, len(source))))
        return _assemble(source, indices, taxonomy, keys, rows.stop - rows.start)

    return _read(load, -(-len(source) // batch_size), source, workers)


def _read(load: Callable[[int], Batch], steps: int, source: Source, workers: int) -> Iterator[Batch]:
    """The batches of all steps in order, read ahead."""
    batches = grain.MapDataset.range(steps).map(load)
    if workers and not isinstance(base_of(source), ArraySource):
        return read_in_processes(batches, min(workers, steps))
    return iter(batches.to_iter_dataset(_READ))


class Plain:
    """No augmentation: of examples that the data have made ready."""

    def __call__(self, batch: Batch, rng, strength: float = 1.0, pieces: int = 1) -> Batch:
        if pieces != 1:
            raise DataError("only images are cut into pieces: plan.kind=progressive_jigsaw is for them")
        return batch

    def normalise(self, batch: Batch) -> Batch:
        return batch
