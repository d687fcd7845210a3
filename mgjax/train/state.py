"""The training state: constant in structure over the whole plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Literal
from jax.sharding import Mesh

from mgjax.errors import InputError
from mgjax.granularity import DeclarationError, OperatingPoint
from mgjax.train.mesh import replicated, state_sharding
from mgjax.train.optim import Optimizer


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: int32; steps done over all stages. Randomness is folded from it and the seed.
        params: of all granularities, active or not.
        stats: batch statistics.
        opt_state: per parameter, see `Optimizer`.
        ema: `{"average": {"params": …, "stats": …}, "count": …}`, the averages and of how many
            steps each leaf is one; empty where nothing is averaged.
        memory: what the objective keeps: of how it balances losses and weighs examples.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    ema: Any
    memory: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict:
        """What is evaluated: the averages where there are any; ready for `model.apply`."""
        kept = self.ema["average"] if self.ema else {"params": self.params, "stats": self.stats}
        return {"params": kept["params"], "batch_stats": kept["stats"]}


def init_fn(model, op: OperatingPoint, inputs):
    """A function of a key that initialises what `op` needs; `inputs` are abstract."""

    def init(rng):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        return model.init(rng, zeros, op, train=False)

    return init


def create_state(
    model, optimizer: Optimizer, inputs, seed: int, mesh: Mesh, shard_above: int = 0, memory: Callable[[], Any] = dict
) -> TrainState:
    """Initialises all granularities, the same numbers on every mesh, and puts them in their place.

    Args:
        inputs: abstract `Batch.inputs`, normalised, of any batch size.
        shard_above: see `MeshConfig`.
        memory: makes what the objective keeps.

    Raises:
        InputError: the model keeps variables other than parameters and batch statistics.
    """
    init = init_fn(model, model.everything, inputs)

    def create(variables):
        if others := sorted(set(variables) - {"params", "batch_stats"}):
            raise InputError(f"the model keeps the collections {others}; only params and batch_stats are trained and saved")
        params, stats = variables["params"], variables.get("batch_stats", {})
        opt_state = unflatten_dict(optimizer.init(flatten_dict(params, sep="/")), sep="/")
        ema = {}
        if optimizer.ema:
            average = {"params": params, "stats": stats}
            ema = {"average": average, "count": jax.tree.map(lambda _: jnp.zeros((), jnp.int32), average)}
        return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state, ema, memory())

    # Drawn whole, and split by a program of its own: the rounding of what is drawn would otherwise depend on the mesh.
    variables = jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))
    shardings = state_shardings(jax.eval_shape(create, variables), mesh, shard_above)
    return jax.jit(create, out_shardings=shardings)(variables)


def state_shardings(state: TrainState, mesh: Mesh, shard_above: int = 0) -> TrainState:
    """Where every leaf lies: batch statistics and the objective's memory, which each step needs whole, on every device;
    the rest by `state_sharding`."""

    def place(path, x):
        whole = any(getattr(p, "name", getattr(p, "key", "")) in ("stats", "memory") for p in path[:3])
        return replicated(mesh) if whole else state_sharding(x.shape, mesh, shard_above)

    return jax.tree_util.tree_map_with_path(place, state)


def needed_paths(model, op: OperatingPoint, inputs) -> frozenset[str]:
    """Paths of the parameters that an operating point can train, found without computing anything.

    Those are the ones whose gradient depends on anything at all: what is not active has none,
    and what is only read behind a stop-gradient has a constant 0.
    """
    variables = jax.eval_shape(init_fn(model, op, inputs), jax.random.key(0))
    flat = flatten_dict(variables["params"], sep="/")

    def loss(flat, rest, inputs):
        variables = {"params": unflatten_dict(flat, sep="/"), **rest}
        outputs = model.apply(variables, inputs, op, train=False)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs))

    rest = {k: v for k, v in variables.items() if k != "params"}
    return frozenset(path for path, some in zip(sorted(flat), has_gradient(loss, flat, rest, inputs)) if some)


def has_gradient(loss: Callable, *args) -> list[bool]:
    """For each leaf of the first argument, whether the gradient of `loss(*args)` by it depends on anything at all."""
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*args).jaxpr
    depends = {*jaxpr.invars, *jaxpr.constvars}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in depends for v in eqn.invars):
            depends.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in depends for v in jaxpr.outvars]


def grow(state: TrainState, pairs: Iterable[tuple[str, str]]) -> TrainState:
    """Starts modules from the weights of others, as a finer branch from a coarser one.

    Parameters, batch statistics and averages of `target` that have the path and shape of one of `source` take its values;
    what the target has beyond that keeps its own, and so do moments. A residual network whose deeper blocks end in a norm
    of scale 0 therefore computes first what the coarser one did.

    Args:
        pairs: (source, target), prefixes of parameter paths, such as ("branches_coarse", "branches_fine"); see
            `check_growth`.
    """

    fits: dict[str, dict[str, str]] = {}  # params or stats → path that is taken → from where
    for kind, tree in (("params", state.params), ("stats", state.stats)):
        flat = flatten_dict(tree, sep="/")
        inside = [(s, t, path.removeprefix(s + "/")) for s, t in pairs for path in flat if path.startswith(s + "/")]
        fits[kind] = {f"{t}/{rest}": f"{s}/{rest}" for s, t, rest in inside if f"{t}/{rest}" in flat}
        fits[kind] = {onto: of for onto, of in fits[kind].items() if flat[onto].shape == flat[of].shape}

    def grown(tree: Mapping, kind: str) -> dict:
        flat = flatten_dict(tree, sep="/")
        return unflatten_dict(flat | {onto: flat[of] for onto, of in fits[kind].items()}, sep="/")

    ema = {part: {kind: grown(tree, kind) for kind, tree in trees.items()} for part, trees in state.ema.items()}
    return state.replace(params=grown(state.params, "params"), stats=grown(state.stats, "stats"), ema=ema)


def check_growth(params: Mapping, source: str, target: str) -> int:
    """How many parameters of `target` can start from those of `source`; `params` is by path.

    Raises:
        DeclarationError: a prefix that no parameter has, or a pair of which no parameter fits.
    """
    for prefix in (source, target):
        if not any(p.startswith(prefix + "/") for p in params):
            raise DeclarationError(f"growth from '{source}' to '{target}': no parameter's path begins with '{prefix}/'")
    shapes = {p.removeprefix(target + "/"): v.shape for p, v in params.items() if p.startswith(target + "/")}
    relative = {p.removeprefix(source + "/"): v for p, v in params.items() if p.startswith(source + "/")}
    fits = sum(v.size for p, v in relative.items() if shapes.get(p) == v.shape)
    if not fits:
        raise DeclarationError(f"growth from '{source}' to '{target}': no parameter has the path and shape of one of the other")
    return fits


def count_params(state: TrainState, paths: Iterable[str] | None = None) -> int:
    """Number of parameters (of those at `paths`, if given), batch statistics not counted."""
    flat = flatten_dict(state.params, sep="/")
    return sum(flat[path].size for path in (flat if paths is None else paths))
