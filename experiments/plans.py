"""Plans of stages from a config, for a model of any modality, and what every experiment's config has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mgjax.branches import MLP
from mgjax.config import ConfigError, key
from mgjax.decode import METHODS
from mgjax.granularity import FUSED, Encoded, OperatingPoint
from mgjax.model import MultiGranularityModel
from mgjax.objective import ObjectiveConfig
from mgjax.train import Stage, TrainConfig
from mgjax.train.stages import anneal, coarse_to_fine, growth, joint_only, progressive_jigsaw

PLANS = ("coarse_to_fine", "joint", "backbone_first", "progressive_resolution", "progressive_jigsaw", "growth")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    kind: str = key("coarse_to_fine", "what the stages are; see mgjax.train.stages", choices=PLANS)
    batch_size: int = key(256, "examples per step, over all devices", low=1)
    eval_batch_size: int = key(480, "examples per evaluation step, over all devices", low=1)
    alone: tuple[float, ...] = key((2.0,), "epochs of each stage before the last, coarse to fine; the last is repeated", low=0)
    resolution: tuple[float, ...] = key((1.0,), "resolution in those stages; the last is repeated", low=0.01, high=1)
    pieces: tuple[int, ...] = key(
        (8, 4, 2), "of progressive_jigsaw in those stages, along each side; the last is repeated", low=1
    )
    strength: tuple[float, ...] = key(
        (1.0,), "of the augmentation in those stages; the last is repeated, and the last stage has 1", low=0, high=1
    )
    anneal: bool = key(False, "the learning rate falls through all stages; else it stays up in those before the last")
    joint: float = key(6.0, "epochs of the last stage, in which all granularities train together", low=0)
    max_steps: int = key(0, "end each stage after so many steps, for a quick look (0: no limit)", low=0)


@dataclasses.dataclass(frozen=True)
class RunConfig(TrainConfig):
    """What every experiment can be told."""

    preset: str = key("auto", "how granularities are composed")
    seed: int = key(0, "of initialisation, order and augmentation")
    smoothing: float = key(0.1, "label smoothing", low=0, high=0.99)
    decoder: str = key("combined", "of the answer: how it is made of what the heads of all levels say", choices=METHODS)
    objective: ObjectiveConfig = ObjectiveConfig()
    plan: PlanConfig = PlanConfig()
    compile_cache: str = key(
        "auto", "folder that keeps compiled programs (auto: JAX_COMPILATION_CACHE_DIR or the user's cache; empty: none)"
    )


def build_plan(config: PlanConfig, model: MultiGranularityModel, examples: int, alike: int = 1) -> tuple[Stage, ...]:
    """The stages of a plan of `config.kind`: by default one per granularity, coarse to fine, then all of them jointly.

    Where there is one granularity, or every head has a branch of its own and nothing is fused, there
    is nothing to stage: all train side by side, for as many epochs as the single stages of `alike`
    granularities have.

    Args:
        examples: in an epoch.
        alike: granularities of the staged model that a baseline is compared with.

    Raises:
        ConfigError: no epochs or resolution; a lower resolution for a branch of fixed input size; growth where
            granularities share a branch.
    """

    def steps(epochs: float) -> int:
        count = max(1, round(epochs * examples / config.batch_size)) if epochs > 0 else 0
        return min(count, config.max_steps) if config.max_steps else count

    alone = [(g.name, single(model, g.name)) for g in model.granularities]
    early = False  # one stage instead of several
    match config.kind:
        case "joint":
            return joint_only(model.everything, steps=max(1, steps(config.joint)), batch_size=config.batch_size)
        case "progressive_resolution":
            alone = [(f"resolution_{r:g}", model.everything) for r in config.resolution]
        case "backbone_first":
            alone = [("backbone", alone[-1][1])]
        case "coarse_to_fine" | "progressive_jigsaw":
            if early := not model.fusion and (len(alone) == 1 or len(model.branches) == len(model.heads)):
                alone = [("early", model.everything)]
    resolution = [_at(config.resolution, i) for i in range(len(alone))]
    epochs = [_at(config.alone, i) for i in range(len(alone))]
    if early:
        epochs = [sum(_at(config.alone, i) for i in range(alike))]
    if any(r != 1 for r in resolution):
        check_resizable(model)
    alone = [(name, dataclasses.replace(op, resolution=r)) for (name, op), r in zip(alone, resolution)]
    lengths = dict(
        steps_alone=[steps(e) for e in epochs], steps_together=max(1, steps(config.joint)), batch_size=config.batch_size
    )
    strength = {name: _at(config.strength, i) for i, (name, _) in enumerate(alone)}
    plan = _kind_of_plan(config, model, alone, lengths)
    plan = tuple(dataclasses.replace(stage, augment=strength.get(stage.name, stage.augment)) for stage in plan)
    return anneal(plan) if config.anneal else plan


def _kind_of_plan(config: PlanConfig, model: MultiGranularityModel, alone: Sequence, lengths: Mapping) -> tuple[Stage, ...]:
    match config.kind:
        case "progressive_jigsaw":
            pieces = [_at(config.pieces, i) for i in range(len(alone))]
            return progressive_jigsaw(alone, model.everything, pieces=pieces, **lengths)
        case "growth":
            of = [g.branch for g in model.granularities]
            if len(of) < 2 or len(set(of)) < len(of):
                raise ConfigError(
                    "plan.kind=growth needs a branch per granularity, two or more, as preset branches of imagenet_mg has"
                )
            grows = [(f"branches_{a}", f"branches_{b}") for a, b in itertools.pairwise(of)]
            return growth(alone, model.everything, grows=grows, **lengths)
    # Whatever trains before all granularities do: one of them, the backbone, or all at a lower resolution.
    return coarse_to_fine(alone, model.everything, **lengths)


def single(model: MultiGranularityModel, granularity: str) -> OperatingPoint:
    """One granularity, and the tasks of the heads that learn from it, or else from the fusion."""
    for source in (granularity, FUSED):
        if tasks := {h.task for h in model.heads if (source, "grad") in h.reads}:
            break
    return OperatingPoint((granularity,), tuple(tasks))


def points_of(model: MultiGranularityModel) -> dict[str, OperatingPoint]:
    """Each granularity alone, then all together, at full resolution."""
    alone = {g.name: single(model, g.name) for g in model.granularities} if len(model.granularities) > 1 else {}
    return alone | {"all": model.everything}


def check_resizable(model: MultiGranularityModel) -> None:
    """Raises ConfigError for a model that cannot see its inputs at another resolution."""
    if any(isinstance(b, MLP) for b in model.branches.values()):
        raise ConfigError("an MLP sees inputs of one size alone: set --config.plan.resolution=1")
    if any(isinstance(g.view, Encoded) for g in model.granularities):
        raise ConfigError("what is no image has one resolution: set --config.plan.resolution=1")


def _at(values: tuple, i: int) -> Any:
    if not values:
        raise ConfigError("plan.alone, plan.resolution, plan.strength and plan.pieces need at least one number each")
    return values[min(i, len(values) - 1)]
