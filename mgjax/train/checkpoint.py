"""Checkpoints: Orbax behind one module."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from mgjax.config import key
from mgjax.errors import InputError
from mgjax.train.distributed import from_main, is_main
from mgjax.train.state import TrainState

log = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A checkpoint that does not belong to this run, or cannot be read or written."""


class _DamagedError(Exception):
    """A checkpoint of which a part is missing."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(200, "steps between two checkpoints; one more stands at each stage's end", low=1)
    keep: int = key(2, "newest checkpoints that are kept", low=1)
    clock_skew: float = key(300.0, "seconds by which this clock may stand before the newest checkpoint's", low=0)


class _Manager(ocp.CheckpointManager):
    """Leaves the notice of preemption to the loop, which polls it under numbers of its own: the service that all
    processes agree by counts the calls, and would be misled by those of every save."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Saves and restores (state, position, meta) under a folder; asynchronous and atomic.

    Args:
        directory: of the checkpoints; made if it is missing.
        meta: what identifies the run; a checkpoint with another one is refused. Values are
            JSON-ready; nested mappings are compared key by key.
        free: dotted keys of `meta` that may change between two runs.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, meta: Mapping, free: tuple[str, ...] = ()):
        self.directory, self.config, self.meta, self.free = directory, config, dict(meta), free
        self.manager = _Manager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                enable_async_checkpointing=True,
                # Two folders that save the same number at a time would meet at each other's barriers.
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
            ),
            # Named here, so that metadata can be read before anything is restored.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, number: int, state: TrainState, position: Mapping) -> None:
        """Starts to save; the state may be donated as soon as this returns.

        Args:
            number: grows along a run, and differs wherever `position` does.

        Raises:
            CheckpointError: Orbax did not accept the checkpoint, or could not write it or the one before.
        """
        if number in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave({**position, "saved_at": time.time()}),
            meta=ocp.args.JsonSave(self.meta),
        )
        with self._writing():
            saved = self.manager.save(number, args=items, force=True)
        if not saved:
            raise CheckpointError(f"'{self.directory}': checkpoint {number} was not saved")

    def poll(self) -> None:
        """Raises CheckpointError if what is being saved in the background could not be written."""
        with self._writing():
            self.manager.check_for_errors()

    def settle(self) -> None:
        """Waits for what is being saved. Raises CheckpointError if it could not be written."""
        with self._writing():
            self.manager.wait_until_finished()

    def restore(self, template: TrainState) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that can be read as (state, position), or None where there is none.

        A damaged one is moved to `damaged/` beside the folder, with a warning, and the one before is taken.

        Args:
            template: a state of this run; gives structure, shapes, dtypes and shardings, and may lie
                on another mesh than the one that was saved.

        Raises:
            CheckpointError: another taxonomy or config, or parameters that differ in path, shape or dtype
                (each difference is named); a checkpoint from the future; none that can be read.
        """
        if not self.manager.all_steps():
            return None
        while steps := sorted(self.manager.all_steps(), reverse=True):
            step, found = steps[0], None
            try:
                # Where several processes would each find the damage by themselves, one looks first: whoever failed
                # alone would leave the others waiting.
                if jax.process_count() > 1:
                    damage = self._damage(step) if is_main() else ""
                    if from_main(bool(damage)):
                        raise _DamagedError(damage)
                found = self._restore(step, template)
            except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # whatever a reader of half a file says
                of_the_system = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                if of_the_system or (jax.process_count() > 1 and not isinstance(error, _DamagedError)):
                    raise CheckpointError(f"'{self.directory}': checkpoint {step} cannot be read: {_short(error)}") from error
                self._put_aside(step, error)
            if found:
                return found
        raise CheckpointError(
            f"'{self.directory}' holds no checkpoint that can be read: all were damaged, and lie in "
            f"'{self._aside}' now. Choose another --workdir to begin afresh"
        )

    def discard_after(self, number: int) -> None:
        """Deletes the checkpoints with higher numbers, once nothing is being written."""
        self.settle()
        for step in self.manager.all_steps():
            if step > number:
                self.manager.delete(step)

    def close(self) -> None:
        """Waits for what is being saved. Raises CheckpointError if it could not be written."""
        try:
            self.settle()
        finally:
            self.manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Errors of the file system, wherever in Orbax's threads they happened, as one that names the folder."""
        try:
            yield
        except (CheckpointError, KeyboardInterrupt):
            raise
        except Exception as error:
            if not _of_the_disk(error):
                raise
            self.manager.reload()
            kept = max(self.manager.all_steps(), default=None)
            rest = f"checkpoint {kept} is whole" if kept is not None else "no checkpoint is there yet"
            raise CheckpointError(
                f"'{self.directory}': a checkpoint could not be written ({_short(error)}); {rest}. Make room, then repeat the "
                "command: it continues from there"
            ) from error

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, dict]:
        args = ocp.args.Composite(position=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        found = self.manager.restore(step, args=args)
        position = dict(found.position)
        self._check_meta(found.meta, step)
        self._check_clock(position.pop("saved_at"), step)
        self._check_leaves(template, step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        return self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state, position

    def _damage(self, step: int) -> str:
        """What keeps a checkpoint from being read, or nothing."""
        try:
            for item in ("position", "meta"):
                json.loads((self.directory / str(step) / item / "metadata").read_text())
            _read_state(self.directory / str(step))
        except Exception as error:
            return _short(error)
        return ""

    @property
    def _aside(self) -> pathlib.Path:
        return self.directory.parent / "damaged"

    def _put_aside(self, step: int, error: Exception) -> None:
        target = self._aside / f"{self.directory.name}-{step}"
        log.warning("checkpoint %d in '%s' is damaged (%s); it lies in '%s' now", step, self.directory, _short(error), target)
        if is_main():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        from_main(0)  # all wait for it
        self.manager.reload()

    def _check_clock(self, saved_at: float, step: int) -> None:
        # By the clock of the first process, lest one process stops alone.
        behind = from_main(int(min(max(saved_at - time.time(), 0), 2**31 - 1)))
        if behind > self.config.clock_skew:
            when = datetime.datetime.fromtimestamp(saved_at).isoformat(" ", "seconds")
            raise CheckpointError(
                f"the clock went backwards: checkpoint {step} in '{self.directory}' was written at {when}, {behind:,.0f} s "
                "after what this machine calls now. Set the clock, or allow for it: "
                f"--config.checkpoint.clock_skew={behind + 60:.0f}"
            )

    def _check_meta(self, theirs: Mapping, step: int) -> None:
        ours, theirs = _flat(self.meta), _flat(theirs)
        changed = [
            f"{k} is {ours.get(k, 'absent')!r} now and was {theirs.get(k, 'absent')!r}"
            for k in sorted(set(ours) | set(theirs))
            if ours.get(k, "absent") != theirs.get(k, "absent") and k not in self.free
        ]
        if changed:
            raise CheckpointError(
                f"'{self.directory}' holds a checkpoint ({step}) of another run: {'; '.join(changed[:5])}. "
                "Repeat the command that began it, or choose another --workdir"
            )

    def _check_leaves(self, template: TrainState, step: int) -> None:
        saved = {_name(path): leaf for path, leaf in _leaves(self.manager.item_metadata(step).state.tree)}
        wanted = {_name(path): leaf for path, leaf in _leaves(template)}
        wrong = [f"{name} is missing" for name in sorted(set(wanted) - set(saved))]
        wrong += [f"{name} is not part of the model" for name in sorted(set(saved) - set(wanted))]
        for name in sorted(set(saved) & set(wanted)):
            old, new = saved[name], wanted[name]
            if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
                wrong.append(f"{name} is {old.dtype}{list(old.shape)}, not {new.dtype}{list(new.shape)}")
        if wrong:
            raise CheckpointError(f"'{self.directory}', checkpoint {step}, does not fit the model: {'; '.join(wrong[:5])}")


def load_variables(workdir: str | pathlib.Path, which: str = "checkpoints") -> dict:
    """The parameters and batch statistics of a run, ready for `model.apply`.

    Where the run averages its parameters (`optim.ema`), these are the averages.

    Args:
        workdir: of the run.
        which: "checkpoints" for the newest, "best" for what validation chose.

    Returns:
        `{"params": …, "batch_stats": …}`, nested dicts of numpy arrays.

    Raises:
        CheckpointError: the folder holds no such checkpoint.
    """
    state = load_state(workdir, which)
    kept = state["ema"]["average"] if state.get("ema") else state
    return {"params": kept["params"], "batch_stats": kept["stats"] or {}}


def load_state(workdir: str | pathlib.Path, which: str = "checkpoints") -> dict:
    """The whole training state of a run, nested dicts of numpy arrays; see `load_variables`."""
    directory = pathlib.Path(workdir, which)
    found = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not found:
        raise CheckpointError(f"'{workdir}' holds no checkpoint in '{which}'")
    return _read_state(directory / str(max(found)))


def _read_state(checkpoint: pathlib.Path) -> dict:
    """The whole state of a checkpoint, as nested dicts of numpy arrays."""
    # The handler alone: a checkpointer would wait for the other processes.
    reader, path = ocp.PyTreeCheckpointHandler(), (checkpoint / "state").absolute()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).tree)
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)


def _of_the_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one of the file system."""
    while error is not None:
        # TensorStore has errors of its own, which only quote the system's.
        if (isinstance(error, OSError) and error.errno in _DISK) or any(
            quoted in str(error) for quoted in ("No space left", "RESOURCE_EXHAUSTED: ", "Disk quota", "Read-only file system")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path) -> str:
    """One name for a leaf, whether its containers are dataclasses, tuples or Orbax's dicts."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(p) for p in parts)


def _flat(tree: Mapping, prefix: str = "") -> dict:
    result = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = list(value) if isinstance(value, tuple) else value
    return result
