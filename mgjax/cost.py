"""What an answer costs: parameters, FLOPs and measured latency of an operating point."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mgjax.flops import count_flops
from mgjax.granularity import OperatingPoint


class Cost(NamedTuple):
    """What a model costs at one operating point.

    Attributes:
        params: parameters that are read.
        flops: of the forward pass, per example (one multiply-add is two).
        latency_ms: rows of a batch, as text → median milliseconds from call to answer, here.
    """

    params: int
    flops: int
    latency_ms: dict[str, float]


def forward_cost(model, variables: Mapping, inputs: Mapping, op: OperatingPoint, rows: Sequence[int] = (1, 64)) -> Cost:
    """Counts and measures a forward pass in evaluation.

    Args:
        model: with `init` and `apply`, as MultiGranularityModel.
        variables: of the trained model; whatever `op` does not read costs nothing.
        inputs: modality → one normalised example [1, ...].
        op: what is asked for.
        rows: sizes of the batches that are timed.

    Example:
        >>> import jax.numpy as jnp
        >>> from mgjax import Granularity, Head, MultiGranularityModel, Task
        >>> from mgjax.branches import MLP
        >>> model = MultiGranularityModel(
        ...     [Granularity("pixels", "mlp", "input")], [Task("class", "class", 10)], [Head("class", {"pixels": "grad"})],
        ...     {"mlp": MLP(12, ())})
        >>> image = {"image": jnp.ones((1, 2, 2, 3))}
        >>> variables = model.init(jax.random.key(0), image, model.everything, train=False)
        >>> forward_cost(model, variables, image, model.everything, rows=(1,)).params
        130
    """
    used = jax.eval_shape(lambda key, x: model.init(key, x, op, train=False), jax.random.key(0), dict(inputs))
    variables = jax.device_put(_part(variables, used))
    apply = jax.jit(lambda variables, inputs: model.apply(variables, inputs, op, train=False).logits)
    latency = {}
    for n in rows:
        batch = jax.device_put({k: np.repeat(np.asarray(v)[:1], n, 0) for k, v in inputs.items()})
        run = apply.lower(variables, batch).compile()
        jax.block_until_ready(run(variables, batch))
        latency[str(n)] = round(statistics.median(_times(lambda run=run, batch=batch: run(variables, batch))), 4)
    return Cost(
        params=sum(p.size for p in jax.tree.leaves(used["params"])),
        flops=count_flops(lambda v, x: model.apply(v, x, op, train=False).logits, variables, dict(inputs)).total,
        latency_ms=latency,
    )


def _times(call, budget: float = 0.5, least: int = 5, most: int = 50) -> list[float]:
    """Milliseconds of repeated calls, for about `budget` seconds."""
    taken: list[float] = []
    while len(taken) < least or (len(taken) < most and sum(taken) < 1000 * budget):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def _part(tree: Mapping, like: Mapping) -> dict:
    """Of nested dicts, what `like` has too."""
    return {k: _part(tree[k], v) if isinstance(v, Mapping) else tree[k] for k, v in like.items()}
