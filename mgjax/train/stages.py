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
        augment: strength of the augmentation, 0 = none.
        learning_rate: factor on the optimiser's peak.
        warmup: share of the steps in which the learning rate rises; None = the optimiser's.
        end: share of the peak at the last step.
    """

    name: str
    op: OperatingPoint
    steps: int
    batch_size: int
    trains: tuple[str, ...] = ("*",)
    augment: float = 1.0
    learning_rate: float = 1.0
    warmup: float | None = None
    end: float = 0.0


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
        check_batch_size(stage.batch_size, devices, f"stage '{stage.name}'", parts)


def check_batch_size(batch_size: int, devices: int, where: str, parts: int = 1) -> None:
    """Raises InputError for a batch that the devices, and the parts on each, do not divide."""
    if batch_size % (devices * parts):
        near = max(1, round(batch_size / (devices * parts))) * devices * parts
        of = f" in {parts} parts each (optim.accumulate)" if parts > 1 else ""
        raise InputError(f"{where}: a batch of {batch_size} cannot be divided among {devices} devices{of}; {near} can")


def trained_paths(stage: Stage, needed: Iterable[str]) -> frozenset[str]:
    """Paths of the parameters that a stage trains: those it needs that match a pattern.

    Raises:
        DeclarationError: a pattern that matches nothing.
    """
    needed = sorted(needed)
    chosen: set[str] = set()
    for pattern in stage.trains:
        matched = fnmatch.filter(needed, pattern)
        if not matched:
            raise DeclarationError(
                f"stage '{stage.name}' trains '{pattern}', which matches no parameter that it uses; "
                f"there are {needed[:3]} and {max(0, len(needed) - 3)} more"
            )
        chosen.update(matched)
    return frozenset(chosen)


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
    plan: list[Stage] = []
    for (name, op), steps in zip(alone, steps_alone, strict=True):
        if steps:
            plan.append(Stage(name, op, steps, batch_size, warmup=0.0 if plan else None, end=hold))
    plan.append(Stage("joint", together, steps_together, batch_size, warmup=0.0 if plan else None))
    return tuple(plan)
