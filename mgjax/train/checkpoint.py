"""Checkpoints: Orbax behind one module."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from mgjax.config import key
from mgjax.errors import InputError
from mgjax.train.state import TrainState


class CheckpointError(InputError):
    """A checkpoint that does not belong to this run, or cannot be read."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(200, "steps between two checkpoints; one more stands at each stage's end", low=1)
    keep: int = key(2, "newest checkpoints that are kept", low=1)


class Checkpoints:
    """Saves and restores (state, position, meta) under a folder; asynchronous and atomic.

    Args:
        directory: of the checkpoints; made if it is missing.
        meta: what identifies the run; a checkpoint with another one is refused. Values are
            JSON-ready; nested mappings are compared key by key.
        free: dotted keys of `meta` that may change between two runs.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, meta: Mapping, free: tuple[str, ...] = ()):
        self.directory, self.meta, self.free = directory, dict(meta), free
        self.manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True),
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
            CheckpointError: Orbax did not accept the checkpoint.
        """
        if number in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave(dict(position)),
            meta=ocp.args.JsonSave(self.meta),
        )
        if not self.manager.save(number, args=items, force=True):
            raise CheckpointError(f"'{self.directory}': checkpoint {number} was not saved")

    def restore(self, template: TrainState) -> tuple[TrainState, dict] | None:
        """The newest checkpoint as (state, position), or None where there is none.

        Args:
            template: a state of this run; gives structure, shapes, dtypes and shardings.

        Raises:
            CheckpointError: another taxonomy or config, or parameters that differ in path,
                shape or dtype; each difference is named.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(position=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        found = self.manager.restore(step, args=args)
        self._check_meta(found.meta, step)
        self._check_leaves(template, step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        return state, found.position

    def close(self) -> None:
        """Waits for what is being saved."""
        self.manager.wait_until_finished()
        self.manager.close()

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


def load_variables(workdir: str | pathlib.Path) -> dict:
    """The newest parameters and batch statistics of a run, ready for `model.apply`.

    Args:
        workdir: of the run.

    Returns:
        `{"params": …, "batch_stats": …}`, nested dicts of numpy arrays.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    directory = pathlib.Path(workdir, "checkpoints")
    found = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
    if not found:
        raise CheckpointError(f"'{workdir}' holds no checkpoint")
    with ocp.PyTreeCheckpointer() as reader:
        path = (directory / str(max(found)) / "state").absolute()
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {"params": state["params"], "batch_stats": state["stats"]}


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
