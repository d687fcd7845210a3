"""Optimisers, parameter groups, penalties, schedules and weight averages, on Optax."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mgjax.config import ConfigError, key, leaves
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = key("sgd", "sgd has Nesterov momentum", choices=("sgd", "adamw"))
    learning_rate: float = key(0.2, "peak of the schedule; a stage may scale it", low=0)
    warmup: float = key(0.1, "share of a stage's steps in which the learning rate rises from 0", low=0, high=1)
    schedule: str = key("cosine", "how the learning rate falls after the warm-up", choices=("cosine", "linear"))
    momentum: float = key(0.9, "of sgd; the first decay rate of adamw", low=0, high=1)
    weight_decay: float = key(5e-4, "of kernels, as `decay` says", low=0)
    decay: str = key(
        "auto",
        "how weight_decay acts: coupled is L2 added to the gradient, decoupled is as in AdamW, auto is coupled in sgd, "
        "decoupled in adamw",
        choices=("auto", "coupled", "decoupled"),
    )
    l1: float = key(0.0, "L1 penalty of kernels, by soft thresholds that leave true zeros", low=0)
    group_lasso: float = key(0.0, "penalty of the norm of each output unit of a kernel, which leaves whole units at 0", low=0)
    clip: float = key(0.0, "largest global norm of the gradient (0: no clipping)", low=0)
    adaptive_clip: float = key(0.0, "largest norm of a unit's gradient as a share of the unit's own (0: no clipping)", low=0)
    accumulate: int = key(1, "parts of a batch that are computed one after the other, for one update", low=1)
    ema: float = key(0.0, "decay of the average of parameters that is evaluated and kept (0: no average)", low=0, high=0.999999)


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """How some of the parameters are optimised; what is not given is the config's.

    A parameter belongs to the first group of which a pattern matches its path, and one that no group matches is an error:
    let the last be `ParamGroup("*")`.

    Attributes:
        pattern: glob, or several, of parameter paths, such as `branches_trunk/*` or `head_*`; `*` crosses "/".
        learning_rate: factor on the stage's learning rate.
        schedule: progress t / steps in the stage, 0 <= progress < 1 → factor, instead of the stage's own schedule:
            rate = peak · learning_rate · schedule(progress).
        optimizer: "sgd" or "adamw"; empty: the config's.
        momentum, weight_decay, decay, l1, group_lasso, adaptive_clip: as in OptimConfig; None: the config's.
        clip: largest norm of the gradient over those of the group that move; 0: none. None: they count in the common
            norm, which the config's clip bounds.

    Raises:
        DeclarationError: no pattern, or a value out of its bounds.

    Example:
        >>> config = OptimConfig(weight_decay=1e-4)
        >>> groups = ParamGroup("head_*", learning_rate=10.0, l1=1e-5), ParamGroup("*")
        >>> optimizer = make_optimizer(config, groups, paths=["head_class/kernel", "branches_trunk/kernel"])
        >>> optimizer.rates(0.1, steps=1, warmup=0.0, end=0.0)
        array([[1. , 0.1]], dtype=float32)
        >>> [(group.l1, group.weight_decay) for group in optimizer.groups]
        [(1e-05, 0.0001), (0.0, 0.0001)]
    """

    pattern: str | tuple[str, ...]
    learning_rate: float = 1.0
    schedule: Callable[[float], float] | None = None
    optimizer: str = ""
    momentum: float | None = None
    weight_decay: float | None = None
    decay: str | None = None
    l1: float | None = None
    group_lasso: float | None = None
    clip: float | None = None
    adaptive_clip: float | None = None

    def __post_init__(self):
        if not (self.patterns and all(self.patterns)):
            raise DeclarationError('a parameter group needs a pattern of parameter paths, such as "head_*"; "*" is all')
        if not 0 <= self.learning_rate < math.inf:
            raise DeclarationError(f"{self.title}: learning_rate is {self.learning_rate}; it is a factor, at least 0")
        known = leaves(OptimConfig)
        for name in ("optimizer", *_SHARED):
            value = getattr(self, name)
            if value is not None and value != "":
                try:
                    known["name" if name == "optimizer" else name].check(name, value)
                except ConfigError as error:
                    raise DeclarationError(f"{self.title}: {str(error).removeprefix('--config.')}") from None

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.pattern,) if isinstance(self.pattern, str) else self.pattern

    @property
    def title(self) -> str:
        """What error messages call it."""
        return f"parameter group {', '.join(map(repr, self.patterns))}"

    def matches(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)


# What a group takes from the config where it does not say it.
_SHARED = ("momentum", "weight_decay", "decay", "l1", "group_lasso", "clip", "adaptive_clip")


def resolve_groups(groups: Sequence[ParamGroup], paths: Iterable[str]) -> dict[str, int]:
    """Which group each parameter belongs to: the first that matches.

    Args:
        paths: of all parameters of the model.

    Returns:
        path → index of its group.

    Raises:
        DeclarationError: a pattern that matches nothing; a parameter that no group matches; a group, other than a
            last "*", of which the groups before it take everything.

    Example:
        >>> resolve_groups([ParamGroup("head_*"), ParamGroup("*")], ["head_class/bias", "fusion/bias"])
        {'head_class/bias': 0, 'fusion/bias': 1}
    """
    paths = list(paths)
    some = f"there are {sorted(paths)[:3]} and {max(0, len(paths) - 3)} more"
    for group in groups:
        for pattern in group.patterns:
            if not fnmatch.filter(paths, pattern):
                raise DeclarationError(f"{group.title}: '{pattern}' matches no parameter of the model; {some}")
    chosen = {path: _first(groups, path) for path in paths}
    for i, group in enumerate(groups):
        if i not in chosen.values() and group.patterns != ("*",):
            raise DeclarationError(f"{group.title}: groups before it take all that it matches; put it before them")
    return chosen


def _first(groups: Sequence[ParamGroup], path: str) -> int:
    for i, group in enumerate(groups):
        if group.matches(path):
            return i
    raise DeclarationError(
        f"parameter '{path}' belongs to no parameter group; add a pattern for it, or ParamGroup(\"*\") as the last group "
        "for all that is left"
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One Optax transformation per parameter, for learning rate 1, and the proximal operators of penalties.

    Parameters and states are flat dicts by path. Only what is handed in with a gradient moves;
    the state of everything else, step counts of bias corrections included, stays to the bit, so
    a parameter that begins late begins afresh, and the state's structure never changes.

    One step with gradient g and learning rate η is

        u = transformation(g),  p ← prox(p − η · u)

    prox is the proximal operator of η · (l1 · ‖p‖₁ + group_lasso · √n · Σ_j ‖p_j‖₂), p_j the n weights into output unit j
    (the last axis): `soft_threshold`, then `group_soft_threshold`, in this order exact for the sum (Friedman, Hastie &
    Tibshirani 2010, arXiv:1001.0736). Zeros are true zeros. Penalties concern kernels (ndim > 1) alone, as weight decay
    does; with coupled weight decay, L1 is the elastic net (Zou & Hastie 2005, doi:10.1111/j.1467-9868.2005.00503.x).

    Coupled decay goes through momentum and Adam's scales, as the loss does. What is decoupled or proximal goes around
    them. Since sgd with momentum μ makes 1 / (1 − μ) of a gradient in the long run, thresholds are so much larger with it,
    and what is minimised is loss + l1 · ‖p‖₁ + … with and without momentum. Decoupled decay is η · weight_decay · p, as it
    was published; with adamw, penalties are weighed against gradients of size 1, as its decay is.

    Attributes:
        groups: of parameters, with nothing left to the config except clip; see `make_optimizer`.
        clip: largest global norm of the gradient over all that move, those of groups with a clip of their own left
            out; 0 = no clipping.
        ema: decay of the average of what moves; 0 = none.
    """

    groups: tuple[ParamGroup, ...]
    clip: float = 0.0
    ema: float = 0.0

    def init(self, params: Mapping[str, jax.Array]) -> dict:
        """path → state.

        Raises:
            DeclarationError: a parameter of no group.
        """
        each = [_transformation(group) for group in self.groups]
        return {path: each[_first(self.groups, path)].init(p) for path, p in params.items()}

    def update(self, grads: Mapping, state: Mapping, params: Mapping) -> tuple[dict, dict]:
        """Returns (path → update, path → state), updates for the paths of `grads` alone."""
        each, of = [_transformation(group) for group in self.groups], {path: _first(self.groups, path) for path in grads}
        grads = dict(grads)
        norms = [(self.clip, [p for p in grads if self.groups[of[p]].clip is None])]
        norms += [(group.clip, [p for p in grads if of[p] == i]) for i, group in enumerate(self.groups)]
        for largest, paths in norms:
            if largest and paths:
                clipped, _ = optax.clip_by_global_norm(largest).update({p: grads[p] for p in paths}, optax.EmptyState())
                grads |= clipped
        moved = {path: each[of[path]].update(g, state[path], params[path]) for path, g in grads.items()}
        return {path: u for path, (u, _) in moved.items()}, dict(state) | {path: s for path, (_, s) in moved.items()}

    def apply(self, params: Mapping, updates: Mapping, rates) -> dict:
        """p ← prox(p − rate · u) for the paths of `updates`; other parameters stay as they are.

        Args:
            params: path → parameter.
            updates: path → update, of `update`.
            rates: learning rate. A scalar is that of the stage, on which the groups' factors still act; floating
                [groups], a row of `rates`, holds the final one of each group.

        Raises:
            InputError: another shape of rates; a scalar where a group has a schedule of its own.
        """
        if (shape := jnp.shape(rates)) == ():
            if own := [group.title for group in self.groups if group.schedule]:
                raise InputError(f"{own[0]} has a schedule of its own, so one learning rate cannot do; take a row of rates()")
            each = [rates if g.learning_rate == 1 else rates * g.learning_rate for g in self.groups]
        elif shape == (len(self.groups),):
            each = [rates[i] for i in range(len(self.groups))]
        else:
            raise InputError(f"learning rates of shape {shape}; it is () or ({len(self.groups)},), one per parameter group")
        moved = {}
        for path, u in updates.items():
            i = _first(self.groups, path)
            moved[path] = _proximal(params[path] - each[i] * u, each[i], self.groups[i]).astype(params[path].dtype)
        return dict(params) | moved

    def rates(
        self, peak: float, steps: int, warmup: float, end: float, span: tuple[float, float] = (0.0, 1.0), shape: str = "cosine"
    ) -> np.ndarray:
        """Final learning rates of a stage, float32 [steps, groups]; the arguments are those of `make_schedule`.

        Raises:
            DeclarationError: a schedule gives something that is not a finite number of at least 0.
        """
        stage = np.asarray(jax.vmap(make_schedule(peak, steps, warmup, end, span, shape))(np.arange(steps)), np.float32)
        columns = []
        for group in self.groups:
            if group.schedule is None:
                columns.append(stage * np.float32(group.learning_rate))
                continue
            factors = np.array([float(group.schedule(t / steps)) for t in range(steps)])
            if bad := [t for t in range(steps) if not 0 <= factors[t] < math.inf]:
                raise DeclarationError(
                    f"{group.title}: its schedule is {factors[bad[0]]} at progress {bad[0] / steps:.3g}; "
                    "it is a factor, finite and at least 0"
                )
            columns.append((peak * group.learning_rate * factors).astype(np.float32))
        return np.stack(columns, 1)

    def penalties(self, params: Mapping) -> dict[str, tuple[jax.Array, dict]]:
        """What is added to the loss, for a report alone: no step uses it.

        * `l2`, coupled, and `weight_decay`, decoupled: ½ · weight_decay · ‖p‖², with gradient weight_decay · p.
        * `l1`: l1 · ‖p‖₁, with subgradient l1 · sign(p).
        * `group_lasso`: group_lasso · √n · Σ_j ‖p_j‖₂, with subgradient group_lasso · √n · p_j / ‖p_j‖₂.

        Subgradients are 0 where p or p_j is 0.

        Args:
            params: path → parameter.

        Returns:
            name → (float32 scalar, path → (sub)gradient, of the kernels that it concerns); only penalties in force.

        Example:
            >>> optimizer = make_optimizer(OptimConfig(weight_decay=0.0, l1=0.5))
            >>> value, gradient = optimizer.penalties({"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.ones(2)})["l1"]
            >>> float(value), gradient["kernel"].tolist()
            (2.0, [[0.5, -0.5]])
        """
        found: dict[str, tuple] = {}
        for path, p in params.items():
            group = self.groups[_first(self.groups, path)]
            for name, strength, penalty in (
                ("l2" if group.decay == "coupled" else "weight_decay", group.weight_decay, _half_square),
                ("l1", group.l1, _absolute),
                ("group_lasso", group.group_lasso, _unit_norm_sum),
            ):
                if strength and p.ndim > 1:
                    value, gradient = penalty(p)
                    total, gradients = found.get(name, (jnp.float32(0), {}))
                    found[name] = total + strength * value, gradients | {path: strength * gradient}
        return found

    def average(self, old, count, new):
        """The exponential average after one more value, without the bias of a start at zero.

        m_n = m_{n−1} + w · (x_n − m_{n−1}),  w = (1 − β) / (1 − βⁿ)

        Args:
            old, count: the average of `count` values so far.
            new: the value.

        Example:
            >>> float(make_optimizer(OptimConfig(ema=0.99)).average(5.0, 0, 3.0))  # the first value is the average
            3.0
        """
        weight = (1 - self.ema) / -jnp.expm1((count + 1) * math.log(self.ema))
        return old + weight.astype(jnp.result_type(new)) * (new - old)


def make_optimizer(config: OptimConfig, groups: Sequence[ParamGroup] = (), paths: Iterable[str] | None = None) -> Optimizer:
    """An optimiser of the config, or of parameter groups that say in what they differ from it.

    Its updates are for learning rate 1; `Optimizer.apply` takes the step. Adaptive clipping is that of Brock et al. 2021
    (arXiv:2102.06171), before everything else; decoupled decay that of Loshchilov & Hutter 2017 (arXiv:1711.05101).

    Args:
        groups: none is one group of all parameters.
        paths: of all parameters of the model; with them it is checked that the groups fit, see `resolve_groups`.

    Raises:
        ConfigError: a value that the config does not have.
        DeclarationError: groups that do not fit the paths.
    """
    if config.name not in ("sgd", "adamw"):
        raise ConfigError(f"optim.name is 'sgd' or 'adamw', not '{config.name}'")
    for name, leaf in leaves(config).items():
        leaf.check(f"optim.{name}", getattr(config, name))
    if groups and paths is not None:
        resolve_groups(groups, paths)
    return Optimizer(tuple(_resolved(group, config) for group in groups or (ParamGroup("*"),)), config.clip, config.ema)


def _resolved(group: ParamGroup, config: OptimConfig) -> ParamGroup:
    """The group with nothing left to the config, except a clip that all share."""
    given = {name: getattr(config, name) for name in _SHARED if name != "clip" and getattr(group, name) is None}
    group = dataclasses.replace(group, optimizer=group.optimizer or config.name, **given)
    if group.decay == "auto":
        group = dataclasses.replace(group, decay="coupled" if group.optimizer == "sgd" else "decoupled")
    return group


def _transformation(group: ParamGroup) -> optax.GradientTransformation:
    """Of one parameter; it sees nothing of the others."""
    clip = optax.adaptive_grad_clip(group.adaptive_clip) if group.adaptive_clip else optax.identity()
    # Scales, shifts and biases are not decayed.
    decay = optax.add_decayed_weights(group.weight_decay, mask=lambda p: p.ndim > 1)
    sgd = group.optimizer == "sgd"
    moments = optax.trace(group.momentum, nesterov=True) if sgd else optax.scale_by_adam(group.momentum, 0.999)
    return optax.chain(clip, *((decay, moments) if group.decay == "coupled" else (moments, decay)))


def soft_threshold(x, threshold):
    """The proximal operator of threshold · ‖x‖₁ (Parikh & Boyd 2014, doi:10.1561/2400000003, section 6.5.2).

    y = sign(x) · max(|x| − threshold, 0), the minimiser of ½ · ‖y − x‖² + threshold · ‖y‖₁

    Args:
        x: floating, any shape.
        threshold: scalar, at least 0; 0 is the identity to the bit.

    Returns:
        Of the shape of x, exactly 0 where |x| <= threshold.

    Example:
        >>> soft_threshold(jnp.array([3.0, 0.5, -2.0]), 1.0).tolist()
        [2.0, 0.0, -1.0]
    """
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def group_soft_threshold(kernel, threshold):
    """The proximal operator of threshold · √n · Σ_j ‖w_j‖₂, w_j the n weights into output unit j.

    w_j ← max(0, 1 − threshold · √n / ‖w_j‖₂) · w_j

    This is block soft-thresholding (Parikh & Boyd 2014, doi:10.1561/2400000003, section 6.5.4), with the weight √n by
    which the group lasso makes groups of all sizes alike (Yuan & Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x).

    Args:
        kernel: floating [..., units].
        threshold: scalar, at least 0; 0 is the identity to the bit.

    Returns:
        Of the shape of kernel; units whose norm is at most threshold · √n are exactly 0.

    Example:
        >>> kernel = jnp.array([[3.0, 0.3], [4.0, 0.4]])  # norms 5 and 0.5
        >>> group_soft_threshold(kernel, 2.5 / math.sqrt(2)).tolist()
        [[1.5, 0.0], [2.0, 0.0]]
    """
    norm, least = _unit_norms(kernel), threshold * _root_size(kernel)
    # A norm that is not a number stays one.
    share = jnp.where((norm <= least) & (least > 0), 0.0, 1 - least / jnp.where(norm == 0, 1.0, norm))
    return share.astype(kernel.dtype) * kernel


def _proximal(p, rate, group: ParamGroup):
    """A parameter after the proximal operators of its group's penalties, for a step of `rate`."""
    if p.ndim < 2 or not (group.l1 or group.group_lasso):
        return p
    if group.optimizer == "sgd" and group.momentum:
        rate = rate / max(1 - group.momentum, 1e-6)
    if group.l1:
        p = soft_threshold(p, rate * group.l1)
    if group.group_lasso:
        p = group_soft_threshold(p, rate * group.group_lasso)
    return p


def _unit_norms(kernel):
    """Norms of the weights into each output unit, in float32 at least, [1, ..., 1, units]."""
    x = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(x.ndim - 1)), keepdims=True))


def _root_size(kernel) -> float:
    """√n of the n weights into one output unit."""
    return math.sqrt(math.prod(kernel.shape[:-1]))


def _half_square(p):
    return 0.5 * jnp.sum(p.astype(jnp.float32) ** 2), p


def _absolute(p):
    return jnp.sum(jnp.abs(p).astype(jnp.float32)), jnp.sign(p)


def _unit_norm_sum(p):
    norms = _unit_norms(p)
    direction = (p / jnp.where(norms == 0, 1.0, norms)).astype(p.dtype)
    return _root_size(p) * jnp.sum(norms).astype(jnp.float32), _root_size(p) * direction


def make_schedule(
    peak: float, steps: int, warmup: float, end: float, span: tuple[float, float] = (0.0, 1.0), shape: str = "cosine"
) -> optax.Schedule:
    """Learning rate as a function of the step in a stage: linear warm-up, then the fall.

    Args:
        peak: highest learning rate.
        steps: of the stage.
        warmup: share of the steps that rise from 0.
        end: share of the peak at which the fall ends.
        span: the part of the fall that the stage runs through.
        shape: of the fall, "cosine" or "linear".
    """
    rise = min(round(warmup * steps), steps - 1)
    begin, over = span[0], span[1] - span[0]
    if shape == "linear":
        curve = optax.linear_schedule(peak, peak * end, 1)
    else:
        curve = optax.cosine_decay_schedule(peak, 1, alpha=end)
    fall = lambda step: curve(begin + over * step / max(1, steps - rise))
    first = float(fall(0))
    return optax.join_schedules([optax.linear_schedule(first / (rise + 1), first, rise), fall], [rise]) if rise else fall
