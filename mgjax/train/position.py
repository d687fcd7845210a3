"""Where a run is: all that a checkpoint holds beside the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mgjax.train.guards import Best


@dataclasses.dataclass
class Position:
    """Where a run is; goes into every checkpoint.

    Attributes:
        step: steps done over all stages.
        stage, step_in_stage: index of the stage, and steps done in it.
        examples_seen: position in the data.
        ended: the stage has ended before its last step.
        epoch: whole passes over the data of which the objective has been told.
        grown: the stage has begun, and what grows in it has grown.
        validated: step of the last validation inside a stage.
        best: of the validations.
        skipped, skipped_in_row, rollbacks: batches whose loss was not finite, and what was done.
        seconds, stage_seconds: spent so far, over all starts.
        stages: reports of the finished stages.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    examples_seen: int = 0
    ended: bool = False
    epoch: int = 0
    grown: bool = False
    validated: int = 0
    best: Best = dataclasses.field(default_factory=Best)
    skipped: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    stages: list = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, saved: Mapping) -> Position:
        """From what `dataclasses.asdict` made."""
        return cls(**{**saved, "best": Best(**saved.get("best", {}))})

    @property
    def number(self) -> int:
        """Of a checkpoint here: the end of a stage is a place of its own, behind its last step, and so is the place to
        which a run was rolled back."""
        return self.step + self.stage + self.rollbacks
