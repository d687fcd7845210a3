"""The compiled steps: one for training, one for evaluation, per operating point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mgjax.contracts import Batch
from mgjax.granularity import OperatingPoint
from mgjax.train.optim import Optimizer
from mgjax.train.state import TrainState


def make_train_step(model, objective: Callable, augment: Callable, optimizer: Optimizer, seed: int, out_shardings: Any = None):
    """Returns the jitted `train_step(state, batch, learning_rate, *, op, trains, strength)`.

    `op`, `trains` (paths of the parameters that move) and `strength` (of the augmentation) are
    static: one compilation per combination. The state is donated. The step returns the new
    state and a dict of float32 scalars; `out_shardings` says where (state, scalars) come to lie,
    so that a state fits the executable that made it.

    What is frozen is not differentiated, and its values, moments and batch statistics stay as
    they are to the bit; the optimiser's state keeps its structure whatever trains.
    """

    @functools.partial(
        jax.jit, static_argnames=("op", "trains", "strength"), donate_argnames="state", out_shardings=out_shardings
    )
    def train_step(
        state: TrainState, batch: Batch, learning_rate, *, op: OperatingPoint, trains: frozenset[str], strength: float
    ):
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        with jax.named_scope("augment"):
            batch = augment(batch, augment_key, strength)
        flat = flatten_dict(state.params, sep="/")
        moving = {path: p for path, p in flat.items() if path in trains}
        frozen = {path: p for path, p in flat.items() if path not in trains}

        def loss_fn(moving):
            variables = {"params": unflatten_dict(frozen | moving, sep="/"), "batch_stats": state.stats}
            outputs, changed = model.apply(
                variables,
                batch.inputs,
                op,
                present=batch.present,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": model_key},
            )
            with jax.named_scope("objective"):
                loss, seen = objective(outputs, batch)
            return loss, (seen, changed.get("batch_stats", {}))

        (_, (seen, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(moving)
        with jax.named_scope("optimizer"):
            seen["grad_norm"] = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, flatten_dict(state.opt_state, sep="/"), moving)
            params = frozen | {path: p - learning_rate * updates[path] for path, p in moving.items()}
        state = TrainState(
            step=state.step + 1,
            params=unflatten_dict(params, sep="/"),
            stats=_keep_stats(stats, state.stats, state.params, trains),
            opt_state=unflatten_dict(opt_state, sep="/"),
        )
        return state, seen

    return train_step


def make_eval_step(model, metrics, normalise: Callable, out_shardings: Any = None):
    """Returns the jitted `eval_step(params, stats, batch, *, op)` → sums of the metrics."""

    @functools.partial(jax.jit, static_argnames=("op",), out_shardings=out_shardings)
    def eval_step(params, stats, batch: Batch, *, op: OperatingPoint):
        batch = normalise(batch)
        variables = {"params": params, "batch_stats": stats}
        outputs = model.apply(variables, batch.inputs, op, present=batch.present, train=False)
        return metrics.update(outputs, batch)

    return eval_step


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
