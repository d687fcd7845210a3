"""Optimisers and schedules, from Optax."""

from __future__ import annotations

import dataclasses

import jax
import optax

from mgjax.config import ConfigError, key


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = key("sgd", "'sgd' (Nesterov momentum) or 'adamw'")
    learning_rate: float = key(0.2, "peak of the schedule; a stage may scale it")
    warmup: float = key(0.1, "share of a stage's steps in which the learning rate rises from 0")
    momentum: float = key(0.9, "of sgd; the first decay rate of adamw")
    weight_decay: float = key(5e-4, "of kernels: L2 added to the gradient in sgd, decoupled in adamw")
    clip: float = key(0.0, "largest global norm of the gradient (0: no clipping)")


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """An optimiser for learning rate 1: the step multiplies its updates by −learning rate.

    The learning rate is passed in, so that the state is the same in every stage.

    Raises:
        ConfigError: an unknown name.
    """
    # Scales, shifts and biases are not decayed.
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.name == "sgd":
        return optax.chain(clip, decay, optax.trace(config.momentum, nesterov=True))
    if config.name == "adamw":
        return optax.chain(clip, optax.scale_by_adam(config.momentum, 0.999), decay)
    raise ConfigError(f"optim.name is 'sgd' or 'adamw', not '{config.name}'")


def make_schedule(peak: float, steps: int, warmup: float, end: float) -> optax.Schedule:
    """Learning rate as a function of the step in a stage: linear warm-up, then cosine.

    Args:
        peak: highest learning rate.
        steps: of the stage.
        warmup: share of the steps that rise from 0.
        end: share of the peak that is reached at the last step.
    """
    rise = min(round(warmup * steps), steps - 1)
    fall = optax.cosine_decay_schedule(peak, max(1, steps - rise), alpha=end)
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, rise), fall], [rise]) if rise else fall
