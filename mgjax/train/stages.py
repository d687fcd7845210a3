"""Stages: what trains, on what, for how long. A plan is a tuple of them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence

from mgjax.errors import InputError
from mgjax.granularity import DeclarationError, OperatingPoint


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a training plan.

    Attributes:
        name: unique in the plan.
        op: what the model is asked to do; only parameters that this needs can train.
        steps: how long.
        batch_size: rows of the global batch.
        trains: glob patterns of parameter paths, such as `branches_trunk/*`; all others, their
            moments and their batch statistics stay as they are, to the bit.
        freezes: patterns of those that stay, of what would train by `trains=("*",)`.
        augment: strength of the augmentation, 0 = none.
        pieces: along each side, into which inputs are cut and put together at random (1: they stay whole).
        learning_rate: factor on the optimiser's peak.
        warmup: share of the steps in which the learning rate rises; None = the optimiser's.
        end: share of the peak at which the fall of the learning rate ends.
        span: the part of that fall which the stage runs through; see `anneal`.
        weights: (task, factor) pairs on the loss weights.
        grows: (source, target) prefixes of parameter paths: when the stage begins, the target's parameters take the
            values of the source's, wherever path and shape are the same (`state.grow`).
        patience: validations (`log.validate_every`) without a better one after which the stage ends early; None = that of
            `StopConfig`.
        metric: of validation, by which; empty = that of `StopConfig` where the stage has it, or else the stage's own
            finest answer.
    """

    name: str
    op: OperatingPoint
    steps: int
    batch_size: int
    trains: tuple[str, ...] = ("*",)
    freezes: tuple[str, ...] = ()
    augment: float = 1.0
    pieces: int = 1
    learning_rate: float = 1.0
    warmup: float | None = None
    end: float = 0.0
    span: tuple[float, float] = (0.0, 1.0)
    weights: tuple[tuple[str, float], ...] = ()
    grows: tuple[tuple[str, str], ...] = ()
    patience: int | None = None
    metric: str = ""

    def __post_init__(self):
        for patterns in ("trains", "freezes"):
            if isinstance(getattr(self, patterns), str):
                object.__setattr__(self, patterns, (getattr(self, patterns),))


def check_plan(plan: Sequence[Stage], devices: int = 1, parts: int = 1) -> None:
    """Raises InputError for a plan that cannot run: no stage, two of one name, no step, a batch
    that the devices, or the parts in which each of them accumulates gradients, do not divide."""
    if not plan:
        raise DeclarationError("a plan needs at least one stage")
    names = [s.name for s in plan]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise DeclarationError(f"two stages are called {repeated}")
    for stage in plan:
        if stage.steps < 1 or stage.batch_size < 1:
            raise DeclarationError(f"stage '{stage.name}' has {stage.steps} steps of {stage.batch_size} examples")
        if not stage.learning_rate >= 0 or not 0 <= stage.span[0] < stage.span[1] <= 1:
            raise DeclarationError(
                f"stage '{stage.name}': a learning rate of 0 or more is needed, not {stage.learning_rate}, and a span within 0 "
                f"and 1, not {stage.span}"
            )
        if stage.pieces < 1:
            raise DeclarationError(f"stage '{stage.name}' cuts inputs into {stage.pieces} pieces a side: 1 leaves them whole")
        if both := sorted((set(stage.trains) & set(stage.freezes)) - {"*"}):
            raise DeclarationError(f"stage '{stage.name}' freezes what it also trains: {both}")
        check_batch_size(stage.batch_size, devices, f"stage '{stage.name}'", parts)


def schedule_of(stage: Stage, optim) -> tuple[float, int, float, float, tuple[float, float], str]:
    """Peak, steps, warm-up, end, span and shape of a stage's learning rate, as `make_schedule` takes them."""
    warmup = optim.warmup if stage.warmup is None else stage.warmup
    return optim.learning_rate * stage.learning_rate, stage.steps, warmup, stage.end, stage.span, optim.schedule


def anneal(plan: Sequence[Stage]) -> tuple[Stage, ...]:
    """The same stages under one fall of the learning rate: it rises in the first and falls step by step through all of them.

    A stage that runs at the peak learns little more after a while; where the early stages are the cheap ones, a fall that
    begins in them leaves less to the dear last one.

    Example:
        >>> everything = OperatingPoint(("coarse", "fine"), ("superclass", "class"))
        >>> plan = anneal(progressive_resolution(everything, (0.5,), steps=(300, 100), batch_size=256))
        >>> [(stage.name, stage.span, stage.end) for stage in plan]
        [('resolution_0.5', (0.0, 0.75), 0.0), ('joint', (0.75, 1.0), 0.0)]
    """
    total, done, made = sum(stage.steps for stage in plan), 0, []
    for i, stage in enumerate(plan):
        span = done / total, (done + stage.steps) / total
        made.append(dataclasses.replace(stage, span=span, end=0.0, warmup=0.0 if i else stage.warmup))
        done += stage.steps
    return tuple(made)


def check_batch_size(batch_size: int, devices: int, where: str, parts: int = 1) -> None:
    """Raises InputError for a batch that the devices, and the parts on each, do not divide."""
    if batch_size % (devices * parts):
        near = max(1, round(batch_size / (devices * parts))) * devices * parts
        of = f" in {parts} parts each (optim.accumulate)" if parts > 1 else ""
        raise InputError(f"{where}: a batch of {batch_size} cannot be divided among {devices} devices{of}; {near} can")


def trained_paths(stage: Stage, needed: Iterable[str]) -> frozenset[str]:
    """Paths of the parameters that a stage trains: those it needs that match a pattern.

    Raises:
        DeclarationError: a pattern that matches nothing, a parameter that is both trained and frozen, or nothing to train.
    """
    needed = sorted(needed)

    def matched(patterns: Sequence[str], does: str) -> set[str]:
        chosen: set[str] = set()
        for pattern in patterns:
            found = fnmatch.filter(needed, pattern)
            if not found:
                raise DeclarationError(
                    f"stage '{stage.name}' {does} '{pattern}', which matches no parameter that it uses; "
                    f"there are {needed[:3]} and {max(0, len(needed) - 3)} more"
                )
            chosen.update(found)
        return chosen

    frozen, chosen = matched(stage.freezes, "freezes"), matched(stage.trains, "trains")
    # "*" is whatever is not frozen; any other pattern means what it says.
    named = matched([p for p in stage.trains if p != "*"], "trains")
    if both := sorted(named & frozen):
        raise DeclarationError(f"stage '{stage.name}' freezes what it also trains: '{both[0]}' and {len(both) - 1} more")
    if not chosen - frozen:
        raise DeclarationError(f"stage '{stage.name}' trains nothing: it freezes all {len(frozen)} parameters that it uses")
    return frozenset(chosen - frozen)


def coarse_to_fine(
    alone: Sequence[tuple[str, OperatingPoint]],
    together: OperatingPoint,
    *,
    steps_alone: Sequence[int],
    steps_together: int,
    batch_size: int,
    hold: float = 1.0,
) -> tuple[Stage, ...]:
    """One granularity after the other, coarse to fine, then all jointly.

    The learning rate rises once, stays up while single granularities train, and falls in the
    joint stage, so that staging does not restart it.

    Args:
        alone: (name, operating point) of the single stages, coarse to fine.
        together: of the joint stage.
        steps_alone: of each single stage; 0 leaves it out.
        steps_together: of the joint stage.
        batch_size: of every stage.
        hold: share of the peak at which a single stage ends.

    Example:
        >>> coarse = OperatingPoint(("coarse",), ("superclass",), resolution=0.5)
        >>> everything = OperatingPoint(("coarse", "fine"), ("superclass", "class"))
        >>> plan = coarse_to_fine(
        ...     [("coarse", coarse)], everything, steps_alone=[100], steps_together=400, batch_size=256)
        >>> [(stage.name, stage.steps) for stage in plan]
        [('coarse', 100), ('joint', 400)]
    """
    if len(alone) != len(steps_alone):
        raise DeclarationError(f"{len(alone)} stages alone, but steps_alone has {len(steps_alone)} numbers")
    plan: list[Stage] = []
    for (name, op), steps in zip(alone, steps_alone):
        if steps:
            plan.append(Stage(name, op, steps, batch_size, warmup=0.0 if plan else None, end=hold))
    plan.append(Stage("joint", together, steps_together, batch_size, warmup=0.0 if plan else None))
    return tuple(plan)


def joint_only(together: OperatingPoint, *, steps: int, batch_size: int) -> tuple[Stage, ...]:
    """All granularities from the first step to the last."""
    return (Stage("joint", together, steps, batch_size),)


def backbone_first(
    backbone: OperatingPoint, together: OperatingPoint, *, steps_backbone: int, steps_together: int, batch_size: int
) -> tuple[Stage, ...]:
    """What the others build upon, then all jointly; the learning rate runs as in `coarse_to_fine`.

    Args:
        backbone: the granularity, with its task, that trains the part which all share: most often the finest.

    Example:
        >>> fine = OperatingPoint(("fine",), ("class",))
        >>> everything = OperatingPoint(("coarse", "fine"), ("superclass", "class"))
        >>> plan = backbone_first(fine, everything, steps_backbone=300, steps_together=100, batch_size=256)
        >>> [(stage.name, stage.op.active) for stage in plan]
        [('backbone', ('fine',)), ('joint', ('coarse', 'fine'))]
    """
    alone = [("backbone", backbone)]
    return coarse_to_fine(alone, together, steps_alone=[steps_backbone], steps_together=steps_together, batch_size=batch_size)


def progressive_resolution(
    together: OperatingPoint, resolutions: Sequence[float], *, steps: Sequence[int], batch_size: int
) -> tuple[Stage, ...]:
    """All granularities in every stage, which see their inputs ever larger, at last in full (Howard 2018, DAWNBench).

    Each step of the early stages costs about the square of its resolution. The learning rate rises once, holds while inputs are
    reduced, and falls in the last stage.

    Args:
        resolutions: factors on every view's height and width, of the stages before the last.
        steps: of each of those, then of the last one.

    Example:
        >>> everything = OperatingPoint(("coarse", "fine"), ("superclass", "class"))
        >>> plan = progressive_resolution(everything, (0.5, 0.75), steps=(300, 200, 200), batch_size=256)
        >>> [(stage.name, stage.op.resolution) for stage in plan]
        [('resolution_0.5', 0.5), ('resolution_0.75', 0.75), ('joint', 1.0)]
    """
    alone = [(f"resolution_{r:g}", dataclasses.replace(together, resolution=r)) for r in resolutions]
    return coarse_to_fine(alone, together, steps_alone=steps[:-1], steps_together=steps[-1], batch_size=batch_size)


def progressive_jigsaw(
    alone: Sequence[tuple[str, OperatingPoint]],
    together: OperatingPoint,
    *,
    pieces: Sequence[int],
    steps_alone: Sequence[int],
    steps_together: int,
    batch_size: int,
) -> tuple[Stage, ...]:
    """Coarse to fine, where the shallower a granularity, the smaller the pieces of the input that it sees in order
    (Du et al. 2020, arXiv:2003.03838).

    A stage's inputs are cut into `pieces` × `pieces` patches, which are put together at random, so that a shallow
    granularity learns details of one patch and not of the whole; the joint stage sees inputs whole. Du et al. take these steps
    in turn for every batch; here each is a stage.

    Args:
        alone, together, steps_alone, steps_together, batch_size: as in `coarse_to_fine`.
        pieces: along each side, one number per single stage, such as (8, 4, 2).

    Example:
        >>> shallow, deep = OperatingPoint(("shallow",), ("class",)), OperatingPoint(("deep",), ("class",))
        >>> everything = OperatingPoint(("shallow", "deep"), ("class",))
        >>> plan = progressive_jigsaw([("shallow", shallow), ("deep", deep)], everything,
        ...     pieces=(4, 2), steps_alone=(100, 100), steps_together=200, batch_size=64)
        >>> [stage.pieces for stage in plan]
        [4, 2, 1]
    """
    plan = coarse_to_fine(alone, together, steps_alone=steps_alone, steps_together=steps_together, batch_size=batch_size)
    of_name = {name: n for (name, _), n in zip(alone, pieces, strict=True)}
    return tuple(dataclasses.replace(stage, pieces=of_name.get(stage.name, 1)) for stage in plan)


def growth(
    alone: Sequence[tuple[str, OperatingPoint]],
    together: OperatingPoint,
    *,
    grows: Sequence[tuple[str, str]],
    steps_alone: Sequence[int],
    steps_together: int,
    batch_size: int,
) -> tuple[Stage, ...]:
    """Coarse to fine, where each finer branch starts from the weights of the coarser one.

    Args:
        alone, together, steps_alone, steps_together, batch_size: as in `coarse_to_fine`.
        grows: for each single stage after the first its (source, target), prefixes of parameter paths as in `state.grow`.

    Example:
        >>> coarse, fine = OperatingPoint(("coarse",), ("superclass",)), OperatingPoint(("fine",), ("class",))
        >>> everything = OperatingPoint(("coarse", "fine"), ("superclass", "class"))
        >>> plan = growth([("coarse", coarse), ("fine", fine)], everything,
        ...     grows=[("branches_low", "branches_high")], steps_alone=(100, 100), steps_together=200, batch_size=64)
        >>> plan[1].grows
        (('branches_low', 'branches_high'),)
    """
    if not all(steps_alone):
        raise DeclarationError(f"growth goes from stage to stage: each needs a step or more, not {tuple(steps_alone)}")
    plan = coarse_to_fine(alone, together, steps_alone=steps_alone, steps_together=steps_together, batch_size=batch_size)
    of_name = {name: (pair,) for (name, _), pair in zip(alone[1:], grows, strict=True)}
    return tuple(dataclasses.replace(stage, grows=of_name.get(stage.name, ())) for stage in plan)
