"""What ends or corrects a run by itself: losses that are not finite, and validation that no longer improves."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from mgjax.config import ConfigError, key
from mgjax.errors import InputError

MOST = 50  # batches that are kept


class NonFiniteError(InputError):
    """A loss or gradient that is not finite, where that ends the run."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    nonfinite: str = key(
        "stop",
        "where loss or gradient is not finite, nothing is updated, and then: stop and keep the batch; skip it; or roll back to "
        "the newest checkpoint and go on behind it",
        choices=("stop", "skip", "rollback"),
    )
    limit: int = key(10, "batches skipped in a row, or rollbacks in all, after which the run stops", low=1)


@dataclasses.dataclass(frozen=True)
class StopConfig:
    metric: str = key(
        "", "of validation, such as class/accuracy, by which the best is told (empty: accuracy of the last level)"
    )
    patience: int = key(
        0,
        "validations without a better one after which a stage ends, by the metric, or by the finest level that the stage "
        "answers where it has not that one (0: it runs to its end)",
        low=0,
    )
    use: str = key("last", "the checkpoint that is tested at the end", choices=("last", "best"))


def lower_is_better(metric: str) -> bool:
    """Whether a metric, by its name, is an error and not a merit.

    Example:
        >>> lower_is_better("class/ece"), lower_is_better("class/accuracy")
        (True, False)
    """
    name = metric.rpartition("/")[2]
    return any(part in name for part in ("loss", "error", "ece", "distance", "severity", "inconsisten", "rmse", "mae"))


@dataclasses.dataclass
class Best:
    """The best validation so far, and how many there were since; goes into every checkpoint.

    Attributes:
        metric: whose values these are; "" before the first one.
        value: of the best of the run.
        number: of the checkpoint that keeps it.
        in_stage: the best value of this stage's own metric, by which patience goes.
        since: validations since that one.
    """

    metric: str = ""
    value: float = math.nan
    number: int = -1
    in_stage: float = math.nan
    since: int = 0

    def see(self, metric: str, value: float, number: int) -> bool:
        """Takes one more validation of the run; whether it is the best so far."""
        if better := _exceeds(metric, value, self.value):
            self.metric, self.value, self.number = metric, value, number
        return better

    def see_stage(self, metric: str, value: float) -> int:
        """Takes one more validation of the stage; how many there were since the best one."""
        if _exceeds(metric, value, self.in_stage):
            self.in_stage, self.since = value, 0
        else:
            self.since += 1
        return self.since

    def end_stage(self) -> None:
        """Patience begins anew."""
        self.in_stage, self.since = math.nan, 0


def _exceeds(metric: str, value: float, old: float) -> bool:
    sign = -1 if lower_is_better(metric) else 1
    return math.isfinite(value) and (not math.isfinite(old) or sign * value > sign * old)


def check_metric(metric: str, known: Sequence[str], where: str) -> None:
    """Raises ConfigError for a metric that no validation of the plan has."""
    if metric and metric not in known:
        raise ConfigError(f"{where} is '{metric}'; validation has {', '.join(sorted(known))}")


def check_patience(patience: int, validate_every: int, stage: str) -> None:
    """Raises ConfigError for patience with validations that never come."""
    if patience and not validate_every:
        raise ConfigError(
            f"stage '{stage}' has the patience of {patience} validations, but none come inside a stage: set "
            "--config.log.validate_every"
        )


def keep_batch(batch, step: int, workdir: pathlib.Path) -> str:
    """Writes this process's rows of a batch, and the positions of its examples, to `nonfinite/`, whole or not at all.

    Returns:
        Where: a .npz file with the keys `inputs/…`, `targets/…`, `mask` and `index`; or why not, in words. After `MOST`
        files no more are written.
    """
    folder = workdir / "nonfinite"
    several = f"-process{jax.process_index()}" if jax.process_count() > 1 else ""
    arrays = {f"inputs/{k}": v for k, v in batch.inputs.items()} | {f"targets/{k}": v for k, v in batch.targets.items()}
    try:
        folder.mkdir(exist_ok=True)
        kept = len(list(folder.glob("*.npz")))
        if kept >= MOST:
            return f"was not kept, '{folder}' having {kept} already"
        again = f"-{n}" if (n := len(list(folder.glob(f"step-{step}{several}*.npz")))) else ""
        path = folder / f"step-{step}{several}{again}.npz"
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, mask=batch.mask, index=batch.index, **arrays)
        part.replace(path)
    except OSError as error:
        return f"could not be kept ({error.strerror})"
    return f"lies in '{path}'"
