"""From a source to host batches: an endless, randomly accessible order for training, one padded
pass for evaluation. One integer, the number of examples seen, is the whole position."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from mgjax.contracts import Batch
from mgjax.data.sources import DataError, Source, shuffled
from mgjax.taxonomy import Taxonomy

# A batch is one element of the Grain pipeline, so these buffers are counted in batches.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


def _local_rows(batch_size: int, process: int, processes: int) -> slice:
    if batch_size % processes:
        raise DataError(f"a batch of {batch_size} cannot be divided among {processes} processes")
    local = batch_size // processes
    return slice(process * local, (process + 1) * local)


def _assemble(source: Source, indices: np.ndarray, taxonomy: Taxonomy, targets: tuple[str, ...], rows: int) -> Batch:
    """Reads examples and pads them with masked repeats of the first to `rows` rows."""
    padding = rows - len(indices)
    # A process whose part of the last batch is all padding still needs an example for its shapes.
    positions = np.concatenate([indices, np.full(padding, indices[0] if len(indices) else 0, indices.dtype)])
    example = source.take(positions)
    for level in taxonomy.levels:
        taxonomy.check(example[level], level, f" of the batch at {source.name} {positions[:3].tolist()}…")
    real = np.arange(rows) < len(indices)
    valid = real & example["valid"]
    if valid.any() and not valid.all():
        # Masked rows show a valid example again, so that batch statistics see no blank image.
        shown = np.where(valid, np.arange(rows), np.argmax(valid))
        example = {key: value[shown] for key, value in example.items()}
    labels = {l: np.where(valid, example[l], -1).astype(np.int32) for l in taxonomy.levels}
    return Batch(
        inputs={"image": example["image"]},
        targets=labels | {t: example[t] for t in targets},
        mask=valid,
        index=np.where(real, positions, -1).astype(np.int32),
    )


def train_batches(
    source: Source,
    taxonomy: Taxonomy,
    *,
    batch_size: int,
    seed: int,
    examples_seen: int,
    steps: int,
    targets: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yields `steps` batches of numpy arrays, from position `examples_seen` on.

    The order is that of `shuffled(len(source), seed)`: it depends on neither batch size nor
    process count, so both may change at any position.

    Args:
        batch_size: rows of the global batch, over all processes.
        targets: further keys of the examples that go into `Batch.targets`, such as "box".
        process, processes: this process takes its part of every global batch.

    Raises:
        DataError: a batch that the processes do not divide.
        TaxonomyError: a label outside the taxonomy.

    Example:
        >>> from mgjax.data.procedural import ProceduralSource, taxonomy
        >>> batches = train_batches(
        ...     ProceduralSource("train"), taxonomy(), batch_size=8, seed=0, examples_seen=0, steps=2)
        >>> next(batches).inputs["image"].shape
        (8, 32, 32, 3)
    """
    rows = _local_rows(batch_size, process, processes)
    order = shuffled(len(source), seed)

    def load(step: int) -> Batch:
        start = examples_seen + step * batch_size
        indices = np.array([order[start + row] for row in range(rows.start, rows.stop)])
        return _assemble(source, indices, taxonomy, targets, len(indices))

    return iter(grain.MapDataset.range(steps).map(load).to_iter_dataset(_READ))


def eval_batches(
    source: Source,
    taxonomy: Taxonomy,
    *,
    batch_size: int,
    targets: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yields every example once, in order; the last batch is padded with masked rows.

    Arguments and errors are those of `train_batches`.
    """
    rows = _local_rows(batch_size, process, processes)

    def load(step: int) -> Batch:
        start = step * batch_size
        indices = np.arange(start + rows.start, max(start + rows.start, min(start + rows.stop, len(source))))
        return _assemble(source, indices, taxonomy, targets, rows.stop - rows.start)

    return iter(grain.MapDataset.range(-(-len(source) // batch_size)).map(load).to_iter_dataset(_READ))
