"""Batches from worker processes, which end with whoever asked for them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags

from mgjax.data.sources import share_cores

# One thread per worker reads; what is ready waits behind it, and once more on the way here.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)


def read_in_processes(batches: grain.MapDataset, workers: int) -> Iterator:
    """An iterator over a Grain dataset that `workers` processes read, element by element in turn, in its order.

    Processes are spawned: everything in the dataset is pickled, and the module of the command is imported again, so
    it must not run by being imported. They end when the iterator does, is closed or dropped, and when this process
    ends, however it ends.
    """
    if not flags.FLAGS.is_parsed():  # Grain reads flags; a program without absl never parses them
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return _Workers(batches.to_iter_dataset(_READ).mp_prefetch(options, worker_init_fn=_begin))


class _Workers:
    """An iterator whose processes are closed with it."""

    def __init__(self, dataset: grain.IterDataset):
        self._elements = iter(dataset)
        # Also at exit, before multiprocessing waits for processes that know of no end.
        self.close = weakref.finalize(self, _close, self._elements)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        if not self.close.alive:
            raise StopIteration
        try:
            # Plain arrays, each of which holds its shared memory until nobody looks at it any more.
            return jax.tree.map(np.asarray, next(self._elements))
        except Exception:  # the end, among others
            self.close()
            raise


def _close(elements: grain.DatasetIterator) -> None:
    elements.close()
    gc.collect()  # Grain's iterators hold themselves in circles, and with them the last batch's shared memory


def _begin(worker: int, workers: int) -> None:
    """Prepares a worker process."""
    # A signal to the whole group is for the first process to act upon; it may want further batches before it stops.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # should anything ask, no accelerator is taken
    share_cores(workers)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
