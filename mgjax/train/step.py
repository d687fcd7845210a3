"""The compiled steps: one for training, one for evaluation, per operating point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mgjax.contracts import Batch
from mgjax.granularity import OperatingPoint
from mgjax.train.mesh import AXES, replicated
from mgjax.train.optim import Optimizer
from mgjax.train.state import TrainState


def make_train_step(
    model,
    objective: Callable,
    augment: Callable,
    optimizer: Optimizer,
    seed: int,
    *,
    mesh: Mesh,
    shardings: Any = None,
    accumulate: int = 1,
):
    """Returns the jitted `train_step(state, batch, learning_rate, *, op, trains, strength)`.

    `op`, `trains` (paths of the parameters that move) and `strength` (of the augmentation) are
    static: one compilation per combination. The state is donated. The step returns the new
    state and a dict of float32 scalars.

    What is frozen is not differentiated, and its values, moments and batch statistics stay as
    they are to the bit; the optimiser's state keeps its structure whatever trains. Where loss or
    gradient is not finite (scalar `finite` = 0), nothing but the step count moves.

    Args:
        shardings: of the state on the mesh, in and out.
        accumulate: parts of the batch (every `accumulate`-th row of each device) that are computed one
            after the other; gradient and scalars are the means over the parts, batch statistics see
            them one after the other.
    """
    placed = (shardings, replicated(mesh)) if shardings is not None else None

    @functools.partial(jax.jit, static_argnames=("op", "trains", "strength"), donate_argnames="state", out_shardings=placed)
    def train_step(
        state: TrainState, batch: Batch, learning_rate, *, op: OperatingPoint, trains: frozenset[str], strength: float
    ):
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        with jax.named_scope("augment"):
            batch = augment(batch, augment_key, strength)
        flat = flatten_dict(state.params, sep="/")
        moving = {path: p for path, p in flat.items() if path in trains}
        frozen = {path: p for path, p in flat.items() if path not in trains}

        def loss_fn(moving, stats, batch, rng):
            params = unflatten_dict(_whole(frozen | moving, mesh), sep="/")
            outputs, changed = model.apply(
                {"params": params, "batch_stats": stats},
                batch.inputs,
                op,
                present=batch.present,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": rng},
            )
            with jax.named_scope("objective"):
                loss, seen = objective(outputs, batch)
            return loss, (seen, changed.get("batch_stats", {}))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (_, (seen, stats)), grads = grad_fn(moving, state.stats, batch, model_key)
        else:
            seen, stats, grads = _accumulated(grad_fn, moving, state.stats, batch, model_key, accumulate, mesh)
        with jax.named_scope("optimizer"):
            if shardings is not None:  # each device reduces the part that it keeps
                place = flatten_dict(shardings.params, sep="/")
                grads = {path: jax.lax.with_sharding_constraint(g, place[path]) for path, g in grads.items()}
            seen["grad_norm"] = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, flatten_dict(state.opt_state, sep="/"), moving)
            params = frozen | {path: p - learning_rate * updates[path] for path, p in moving.items()}
        after = TrainState(
            step=state.step,
            params=unflatten_dict(params, sep="/"),
            stats=_keep_stats(stats, state.stats, state.params, trains),
            opt_state=unflatten_dict(opt_state, sep="/"),
            ema=state.ema,
        )
        if state.ema:
            after = after.replace(ema=_averaged(state, after, optimizer))
        finite = jnp.isfinite(seen["loss"]) & jnp.isfinite(seen["grad_norm"])
        after = jax.tree.map(lambda new, old: new if new is old else jnp.where(finite, new, old), after, state)
        return after.replace(step=state.step + 1), seen | {"finite": finite.astype(jnp.float32)}

    return train_step


def make_eval_step(model, metrics, normalise: Callable, mesh: Mesh):
    """Returns the jitted `eval_step(variables, batch, *, op)` → sums of the metrics, on every device."""

    @functools.partial(jax.jit, static_argnames=("op",), out_shardings=replicated(mesh))
    def eval_step(variables, batch: Batch, *, op: OperatingPoint):
        batch = normalise(batch)
        outputs = model.apply(_whole(variables, mesh), batch.inputs, op, present=batch.present, train=False)
        return metrics.update(outputs, batch)

    return eval_step


def _whole(tree, mesh: Mesh):
    """Parameters whole on every device: each shard is gathered before it is used, and activations never are."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def _accumulated(grad_fn, moving, stats, batch: Batch, rng, parts: int, mesh: Mesh):
    """Means of scalars and gradients over the parts of a batch, and the last batch statistics."""
    # Rows of one device stay there: [rows, ...] → [rows / parts, parts, ...] → [parts, rows / parts, ...].
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    batches = jax.lax.with_sharding_constraint(jax.tree.map(split, batch), NamedSharding(mesh, PartitionSpec(None, AXES)))

    def one(carry, part):
        stats, seen, grads = carry
        (_, (new, stats)), g = grad_fn(moving, stats, *part)
        return (stats, *jax.tree.map(jnp.add, (seen, grads), (new, g))), None

    first, rest = jax.tree.map(lambda x: x[0], batches), jax.tree.map(lambda x: x[1:], batches)
    keys = jax.random.split(rng, parts)
    (_, (seen, stats)), grads = grad_fn(moving, stats, first, keys[0])
    (stats, seen, grads), _ = jax.lax.scan(one, (stats, seen, grads), (rest, keys[1:]))
    seen, grads = jax.tree.map(lambda x: x / parts, (seen, grads))
    return seen, stats, grads


def _averaged(before: TrainState, after: TrainState, optimizer: Optimizer) -> dict:
    """The averages after a step: of what has moved, and as they were of everything else."""
    old, new = ({"params": s.params, "stats": s.stats} for s in (before, after))
    average, count = before.ema["average"], before.ema["count"]
    moved = jax.tree.map(lambda a, b: a is not b, old, new)
    return {
        "average": jax.tree.map(lambda m, a, c, x: optimizer.average(a, c, x) if m else a, moved, average, count, new),
        "count": jax.tree.map(lambda m, c: c + 1 if m else c, moved, count),
    }


def _keep_stats(new, old, params, trains: frozenset[str]):
    """New batch statistics where their layer trains, the old ones elsewhere.

    The layer is the innermost module around the statistic that has parameters: a norm without a
    scale goes by the block that holds it.
    """
    params = list(flatten_dict(params, sep="/"))
    old, new = flatten_dict(old, sep="/"), flatten_dict(new, sep="/")

    def moves(path: str) -> bool:
        module = path
        while module:
            module = module.rpartition("/")[0]
            if inside := [p for p in params if p.startswith(f"{module}/" if module else "")]:
                return any(p in trains for p in inside)
        return False

    return unflatten_dict({path: new[path] if moves(path) else value for path, value in old.items()}, sep="/")
