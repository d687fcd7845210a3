"""The compiled steps: one for training, one for evaluation, per operating point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mgjax.contracts import Batch
from mgjax.granularity import DeclarationError, OperatingPoint
from mgjax.train.mesh import AXES, replicated
from mgjax.train.optim import Optimizer
from mgjax.train.state import TrainState, has_gradient


def make_train_step(
    model,
    objective,
    augment: Callable,
    optimizer: Optimizer,
    seed: int,
    *,
    mesh: Mesh,
    shardings: Any = None,
    accumulate: int = 1,
):
    """Returns the jitted `train_step(state, batch, learning_rate, *, op, trains, strength, pieces=1, weights=())`.

    `op`, `trains` (paths of the parameters that move), `strength` (of the augmentation), `pieces` and
    `weights` (as in `Stage`) are static: one compilation per combination. The learning rate is a scalar, or
    one per parameter group. The state is donated. The step returns the new state and a dict of float32 scalars.

    What is frozen is not differentiated, and its values, moments and batch statistics stay as
    they are to the bit; the optimiser's state keeps its structure whatever trains. Where loss or
    gradient is not finite (scalar `finite` = 0), nothing but the step count moves.

    Gradients go through the model's one seam, the features: what follows it is pulled back first, for each head alone
    where the objective balances by gradients, and what then flows into the features is pulled back through the branches.

    Args:
        objective: as `mgjax.objective.Objective`.
        shardings: of the state on the mesh, in and out.
        accumulate: parts of the batch (every `accumulate`-th row of each device) that are computed one
            after the other; gradient and scalars are the means over the parts, batch statistics see
            them one after the other.
    """
    placed = (shardings, replicated(mesh)) if shardings is not None else None

    @functools.partial(
        jax.jit,
        static_argnames=("op", "trains", "strength", "pieces", "weights"),
        donate_argnames="state",
        out_shardings=placed,
    )
    def train_step(
        state: TrainState,
        batch: Batch,
        learning_rate,
        *,
        op: OperatingPoint,
        trains: frozenset[str],
        strength: float,
        pieces: int = 1,
        weights: tuple[tuple[str, float], ...] = (),
    ):
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = _augmented(augment, batch, augment_key, strength, pieces)
        moving, frozen = _parted(state.params, trains)
        look = _due(objective, state)

        def grad_fn(carried, batch, rng, look):
            passed = _Pass(model, objective, moving, frozen, *carried, batch, rng, op=op, weights=weights, mesh=mesh)
            balance, memory = passed.balance(look)
            values = passed.losses.values
            seen = passed.losses.seen | {"loss": jnp.sum(values if objective.seam else balance * values)}
            if "weights" in memory:
                names = [h.name for h in objective.heads]
                seen |= {f"weight/{n}": w for n, w in zip(names, memory["weights"]) if f"loss/{n}" in seen}
            return (passed.stats, memory), seen, passed.gradient(balance)

        carried = state.stats, state.memory
        if accumulate == 1:
            (stats, memory), seen, grads = grad_fn(carried, batch, model_key, look)
        else:
            (stats, memory), seen, grads = _accumulated(grad_fn, carried, batch, model_key, look, accumulate, mesh)
        with jax.named_scope("optimizer"):
            if shardings is not None:  # each device reduces the part that it keeps
                place = flatten_dict(shardings.params, sep="/")
                grads = {path: jax.lax.with_sharding_constraint(g, place[path]) for path, g in grads.items()}
            seen["grad_norm"] = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, flatten_dict(state.opt_state, sep="/"), moving)
            params = frozen | optimizer.apply(moving, updates, learning_rate)
        after = TrainState(
            step=state.step,
            params=unflatten_dict(params, sep="/"),
            stats=_keep_stats(stats, state.stats, state.params, trains),
            opt_state=unflatten_dict(opt_state, sep="/"),
            ema=state.ema,
            memory=memory,
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


def make_contributions(
    model, objective, augment: Callable, optimizer: Optimizer, seed: int, *, mesh: Mesh, accumulate: int = 1
):
    """Returns the jitted `contributions(state, batch, *, op, trains, strength, pieces, weights)`.

    It says what a step at this state would be made of, as a dict of float32 scalars, and changes nothing:

    * `part/loss/HEAD` and `part/gradient/HEAD`: a head's balanced loss, and the norm of its gradient by all parameters
      that move;
    * `part/gradient/granularity_NAME`: the norm of what reaches the branches through that granularity;
    * `part/loss/penalty_NAME` and `part/gradient/penalty_NAME`: of every penalty in force, over the parameters that move.

    Each head and each granularity is pulled back alone, one after the other, so it costs several steps. Of a batch that is
    accumulated it sees the first part.
    """

    @functools.partial(
        jax.jit, static_argnames=("op", "trains", "strength", "pieces", "weights"), out_shardings=replicated(mesh)
    )
    def contributions(state: TrainState, batch: Batch, *, op, trains, strength, pieces=1, weights=()):
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = jax.tree.map(lambda x: x[::accumulate], _augmented(augment, batch, augment_key, strength, pieces))
        moving, frozen = _parted(state.params, trains)
        passed = _Pass(
            model, objective, moving, frozen, state.stats, state.memory, batch, model_key, op=op, weights=weights, mesh=mesh
        )
        balance, _ = passed.balance(_due(objective, state))
        answered = [i for i, h in enumerate(objective.heads) if f"loss/{h.name}" in passed.losses.seen]
        alone = jnp.eye(len(objective.heads), dtype=balance.dtype)[np.array(answered)]
        norms = jax.lax.map(lambda one: optax.tree.norm(passed.gradient(balance, one)), alone)
        said = {}
        for row, i in enumerate(answered):
            name = objective.heads[i].name
            said[f"part/loss/{name}"] = balance[i] * passed.losses.values[i]
            said[f"part/gradient/{name}"] = norms[row]
        for name in op.active:
            said[f"part/gradient/granularity_{name}"] = optax.tree.norm(passed.gradient_through(name, balance))
        for name, (value, gradient) in optimizer.penalties(moving).items():
            said[f"part/loss/penalty_{name}"], said[f"part/gradient/penalty_{name}"] = value, optax.tree.norm(gradient)
        return {k: v.astype(jnp.float32) for k, v in said.items()}

    return contributions


class _Pass:
    """One pass forward, cut at the seam, and what pulls gradients back through its two halves.

    Attributes:
        losses: what the heads cost.
        stats: batch statistics afterwards.
    """

    def __init__(self, model, objective, moving, frozen, stats, memory, batch: Batch, rng, *, op, weights, mesh: Mesh):
        dropout_key, self.rng = jax.random.split(rng)
        self.objective, self.shared = objective, model.shared(op)

        def applied(method: str, moving, stats, *args, **kwargs):
            params = unflatten_dict(_whole(frozen | moving, mesh), sep="/")
            result, changed = model.apply(
                {"params": params, "batch_stats": stats},
                *args,
                op,
                **kwargs,
                train=True,
                method=method,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            return result, changed.get("batch_stats", {})

        def answered(moving, features):
            features = _from_members(features, objective.members(batch))
            outputs, after = applied("answer", moving, self.stats, features, present=batch.present)
            with jax.named_scope("objective"):
                losses = objective.losses(outputs, batch, memory, weights)
            return losses.values, (losses, after)

        self.features, self._into_branches, self.stats = jax.vjp(
            lambda moving: applied("features", moving, stats, batch.inputs), moving, has_aux=True
        )
        self._of_features = lambda features: answered(moving, features)[0].sum()
        _, self._into_features, (self.losses, self.stats) = jax.vjp(answered, moving, self.features, has_aux=True)

    def balance(self, look):
        """Weights of the heads and the objective's state; gradients are looked at where `look`, a bool on the device, holds,
        or a head is known that was not at the last look. Weights of such methods are of what reaches the features, others of
        all of each loss. Where `look` is False, as in all parts of a batch but the first, the last weights hold."""
        values, known, _, memory = self.losses
        weigh = lambda gram: self.objective.weigh(memory, values, known, gram, self.rng)
        with jax.named_scope("balance"):
            if look is False and "weights" in memory:
                return memory["weights"], memory
            if not self.objective.seam:
                return weigh(None)
            look |= jnp.any(known & ~memory["known"])  # a stage begins with heads that were not there
            return jax.lax.cond(look, lambda: weigh(self._gram()), lambda: (memory["weights"], memory))

    def gradient(self, balance, of=1.0):
        """By the moving parameters, of the losses weighed by `balance` [heads]; `of` tells which of them."""
        balance = balance.astype(self.losses.values.dtype)
        of = of * jnp.ones_like(balance)
        of_heads, into = self._into_features(of * balance)
        if self.objective.seam:  # heads learn from their own losses as they are
            of_heads, _ = self._into_features(of)
        return jax.tree.map(jnp.add, of_heads, self._into_branches(into)[0])

    def gradient_through(self, granularity: str, balance):
        """That part of the gradient which reaches the branches through one granularity."""
        _, into = self._into_features(balance.astype(self.losses.values.dtype))
        only = {g: f if g == granularity else jax.tree.map(jnp.zeros_like, f) for g, f in into.items()}
        return self._into_branches(only)[0]

    def _gram(self):
        """Inner products of the heads' gradients by the features, float32 [heads, heads]."""
        reached = jax.tree.unflatten(jax.tree.structure(self.features), has_gradient(self._of_features, self.features))
        for name, of_name in reached.items():
            if sum(jax.tree.leaves(of_name)) > 1:
                raise DeclarationError(
                    f"granularity '{name}' is read in two forms, a map and its mean, whose gradients cannot be compared: take "
                    "a method of balancing that reads losses alone, or a fusion of vectors (concat, sum, gate, attention)"
                )
        one_hot = jnp.eye(len(self.objective.heads), dtype=self.losses.values.dtype)
        each = jax.vmap(lambda one: self._into_features(one)[1])(one_hot)
        gram = jnp.zeros((len(self.objective.heads),) * 2, jnp.float32)
        for names in self.shared:  # what several granularities read as one meets in one sum
            of_names = ([*zip(jax.tree.leaves(each[n]), jax.tree.leaves(reached[n]))] for n in names)
            for leaf in zip(*of_names):
                if parts := [g for g, some in leaf if some]:  # maps that no head reads are left out
                    total = functools.reduce(jnp.add, parts).reshape(len(gram), -1)
                    # Methods invert it: gradients that nearly depend on each other do not bear rough products.
                    gram += jnp.dot(total, total.T, precision="highest", preferred_element_type=jnp.float32)
        return gram


def _augmented(augment: Callable, batch: Batch, rng, strength: float, pieces: int) -> Batch:
    with jax.named_scope("augment"):
        return augment(batch, rng, strength) if pieces == 1 else augment(batch, rng, strength, pieces)


def _parted(params, trains: frozenset[str]) -> tuple[dict, dict]:
    """What moves and what does not, by path."""
    flat = flatten_dict(params, sep="/")
    return {p: v for p, v in flat.items() if p in trains}, {p: v for p, v in flat.items() if p not in trains}


def _due(objective, state: TrainState):
    """Whether the objective weighs its losses anew: by gradients every so many steps, by the losses alone at each."""
    return state.step % objective.balance.every == 0 if objective.seam else True


def _from_members(features: dict, members) -> dict:
    """A granularity learns nothing from an example that is no member of it, whatever reads its features."""

    def kept(x, member):
        return jnp.where(member.reshape(-1, *(1,) * (x.ndim - 1)), x, jax.lax.stop_gradient(x))

    return {
        name: jax.tree.map(lambda x, m=members[name]: kept(x, m), f) if name in members else f for name, f in features.items()
    }


def _whole(tree, mesh: Mesh):
    """Parameters whole on every device: each shard is gathered before it is used, and activations never are."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def _accumulated(grad_fn, carried, batch: Batch, rng, look, parts: int, mesh: Mesh):
    """Means of scalars and gradients over the parts of a batch, and what the last one left. Where losses are balanced by
    gradients, the first part is looked at."""
    # Rows of one device stay there: [rows, ...] → [rows / parts, parts, ...] → [parts, rows / parts, ...].
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    batches = jax.lax.with_sharding_constraint(jax.tree.map(split, batch), NamedSharding(mesh, PartitionSpec(None, AXES)))

    def one(carry, part):
        carried, *sums = carry
        carried, *new = grad_fn(carried, *part, False)
        return (carried, *jax.tree.map(jnp.add, sums, new)), None

    first, rest = jax.tree.map(lambda x: x[0], batches), jax.tree.map(lambda x: x[1:], batches)
    keys = jax.random.split(rng, parts)
    sums, _ = jax.lax.scan(one, grad_fn(carried, first, keys[0], look), (rest, keys[1:]))
    return sums[0], *jax.tree.map(lambda x: x / parts, sums[1:])


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
