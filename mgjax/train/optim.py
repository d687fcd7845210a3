"""Optimisers, schedules and weight averages, from Optax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from mgjax.config import ConfigError, key


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = key("sgd", "sgd has Nesterov momentum", choices=("sgd", "adamw"))
    learning_rate: float = key(0.2, "peak of the schedule; a stage may scale it", low=0)
    warmup: float = key(0.1, "share of a stage's steps in which the learning rate rises from 0", low=0, high=1)
    momentum: float = key(0.9, "of sgd; the first decay rate of adamw", low=0, high=1)
    weight_decay: float = key(5e-4, "of kernels: L2 added to the gradient in sgd, decoupled in adamw", low=0)
    clip: float = key(0.0, "largest global norm of the gradient (0: no clipping)", low=0)
    adaptive_clip: float = key(0.0, "largest norm of a unit's gradient as a share of the unit's own (0: no clipping)", low=0)
    accumulate: int = key(1, "parts of a batch that are computed one after the other, for one update", low=1)
    ema: float = key(0.0, "decay of the average of parameters that is evaluated and kept (0: no average)", low=0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One Optax transformation per parameter, for learning rate 1.

    Parameters and states are flat dicts by path. Only what is handed in with a gradient moves;
    the state of everything else, step counts of bias corrections included, stays to the bit, so
    a parameter that begins late begins afresh, and the state's structure never changes.

    Attributes:
        each: the transformation of one parameter; it sees nothing of the others.
        clip: largest global norm of the gradient over all that move; 0 = no clipping.
        ema: decay of the average of what moves; 0 = none.
    """

    each: optax.GradientTransformation
    clip: float = 0.0
    ema: float = 0.0

    def init(self, params: Mapping[str, jax.Array]) -> dict:
        """path → state."""
        return {path: self.each.init(p) for path, p in params.items()}

    def update(self, grads: Mapping, state: Mapping, params: Mapping) -> tuple[dict, dict]:
        """Returns (path → update, path → state), updates for the paths of `grads` alone."""
        if self.clip:
            grads, _ = optax.clip_by_global_norm(self.clip).update(dict(grads), optax.EmptyState())
        moved = {path: self.each.update(g, state[path], params[path]) for path, g in grads.items()}
        return {path: u for path, (u, _) in moved.items()}, dict(state) | {path: s for path, (_, s) in moved.items()}

    def average(self, old, count, new):
        """The exponential average after one more value, without the bias of a start at zero.

        m_n = m_{n−1} + w · (x_n − m_{n−1}),  w = (1 − β) / (1 − βⁿ)

        Args:
            old, count: the average of `count` values so far.
            new: the value.

        Example:
            >>> float(Optimizer(optax.identity(), ema=0.99).average(5.0, 0, 3.0))  # the first value is the average
            3.0
        """
        weight = (1 - self.ema) / -jnp.expm1((count + 1) * math.log(self.ema))
        return old + weight.astype(jnp.result_type(new)) * (new - old)


def make_optimizer(config: OptimConfig) -> Optimizer:
    """An optimiser for learning rate 1: the step multiplies its updates by −learning rate.

    Adaptive clipping is that of Brock et al. 2021 (arXiv:2102.06171), before everything else.

    Raises:
        ConfigError: an unknown name.
    """
    clip = optax.adaptive_grad_clip(config.adaptive_clip) if config.adaptive_clip else optax.identity()
    # Scales, shifts and biases are not decayed.
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda p: p.ndim > 1)
    if config.name == "sgd":
        each = optax.chain(clip, decay, optax.trace(config.momentum, nesterov=True))
    elif config.name == "adamw":
        each = optax.chain(clip, optax.scale_by_adam(config.momentum, 0.999), decay)
    else:
        raise ConfigError(f"optim.name is 'sgd' or 'adamw', not '{config.name}'")
    return Optimizer(each, config.clip, config.ema)


def make_schedule(peak: float, steps: int, warmup: float, end: float) -> optax.Schedule:
    """Learning rate as a function of the step in a stage: linear warm-up, then cosine.

    Args:
        peak: highest learning rate.
        steps: of the stage.
        warmup: share of the steps that rise from 0.
        end: share of the peak towards which the last step falls.
    """
    rise = min(round(warmup * steps), steps - 1)
    fall = optax.cosine_decay_schedule(peak, max(1, steps - rise), alpha=end)
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, rise), fall], [rise]) if rise else fall
