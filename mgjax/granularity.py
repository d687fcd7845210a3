"""What a user declares: views, granularities, tasks, heads, and what the model is asked to do now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mgjax.errors import InputError

FUSED = "fused"  # a head reads this to see what the fusion made of all active granularities


class DeclarationError(InputError):
    """Granularities, tasks and heads do not fit together."""


# ---------------------------------------------------------------------- views


@dataclasses.dataclass(frozen=True)
class Identity:
    """The input as it is."""

    scale: float = dataclasses.field(default=1.0, init=False)
    detail: None = dataclasses.field(default=None, init=False)


@dataclasses.dataclass(frozen=True)
class Resize:
    """The image at `scale` times its height and width, antialiased (0.25 = quarter resolution).

    With a `detail` below the scale the image is first reduced to that and then brought up again:
    what is lost stays lost, but a branch sees as many pixels as without it, so that one network
    can be compared with and without the detail.
    """

    scale: float
    detail: float | None = None

    def __post_init__(self):
        detail = self.scale if self.detail is None else self.detail
        if not 0 < detail <= self.scale <= 1:
            raise DeclarationError(f"{self}: 0 < detail <= scale <= 1 is needed")


View = Identity | Resize


# ---------------------------------------------------------------------- declarations


@dataclasses.dataclass(frozen=True)
class Granularity:
    """One level of detail: what is seen, through which branch, read at which tap.

    Granularities that name the same view and branch share one pass through that branch.

    Attributes:
        name: unique name; `"fused"` is taken.
        branch: key of the branch in the model.
        tap: which of the branch's `feature_info` is read.
        view: how the input is seen.
    """

    name: str
    branch: str
    tap: str
    view: View = Identity()

    def __post_init__(self):
        if self.name == FUSED:
            raise DeclarationError(f"a granularity cannot be called '{FUSED}': that is the fusion's output")


@dataclasses.dataclass(frozen=True)
class Task:
    """A question: which target of a batch is to be answered.

    Attributes:
        name: unique name.
        target: key in `Batch.targets`.
        classes: number of classes.
        level: level of the taxonomy that the classes are, if there is a taxonomy.
        kind: `"classification"`; the answer's form, which decides loss, metrics and decode.
    """

    name: str
    target: str
    classes: int
    level: str | None = None
    kind: Literal["classification"] = "classification"


@dataclasses.dataclass(frozen=True)
class Head:
    """One classifier: which task it answers, and which features it reads.

    Several heads may answer one task (their probabilities are averaged), and several heads may
    read one feature. `"stop"` reads a feature without sending a gradient back into it: Chang et
    al. (2021, arXiv:2011.09040) let a coarse classifier read finer features in this way.

    Attributes:
        task: name of the task.
        reads: granularity or `"fused"` → `"grad"` or `"stop"`.
        name: unique name; by default the task's.

    Example:
        >>> Head("superclass", {"coarse": "grad", "fine": "stop"}).sources
        ('coarse', 'fine')
    """

    task: str
    reads: tuple[tuple[str, str], ...] | Mapping[str, str]
    name: str = ""

    def __post_init__(self):
        reads = tuple(sorted(dict(self.reads).items()))
        if not reads:
            raise DeclarationError(f"the head of task '{self.task}' reads nothing")
        for source, how in reads:
            if how not in ("grad", "stop"):
                raise DeclarationError(f"head '{self.name or self.task}' reads '{source}' by '{how}': 'grad' or 'stop'")
        object.__setattr__(self, "reads", reads)
        object.__setattr__(self, "name", self.name or self.task)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of what the head reads."""
        return tuple(source for source, _ in self.reads)


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What the model is asked to do now. Static and hashable: one compilation each.

    What it does not ask for is not traced, so it costs nothing.

    Attributes:
        active: granularities that are computed.
        tasks: tasks that are answered.
        resolution: factor on every image view's height and width, in (0, 1].
    """

    active: tuple[str, ...]
    tasks: tuple[str, ...]
    resolution: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "active", tuple(sorted(set(self.active))))
        object.__setattr__(self, "tasks", tuple(sorted(set(self.tasks))))
        if not self.active or not self.tasks:
            raise DeclarationError(f"{self}: at least one granularity and one task must be asked for")
        if not 0 < self.resolution <= 1:
            raise DeclarationError(f"{self}: resolution lies in (0, 1]")


def check_declarations(
    granularities: Sequence[Granularity], tasks: Sequence[Task], heads: Sequence[Head], branches: Iterable[str]
) -> None:
    """Raises DeclarationError, naming the first name that is used twice or not declared."""
    for kind, names in (
        ("granularity", [g.name for g in granularities]),
        ("task", [t.name for t in tasks]),
        ("head", [h.name for h in heads]),
    ):
        if not names:
            raise DeclarationError(f"a model needs at least one {kind}")
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise DeclarationError(f"two declarations of {kind} {repeated}")
    branches = set(branches)
    for g in granularities:
        if g.branch not in branches:
            raise DeclarationError(f"granularity '{g.name}' names branch '{g.branch}'; there are {sorted(branches)}")
    if unused := branches - {g.branch for g in granularities}:
        raise DeclarationError(f"no granularity names branch {sorted(unused)}")
    sources = {g.name for g in granularities} | {FUSED}
    for h in heads:
        if h.task not in {t.name for t in tasks}:
            raise DeclarationError(f"head '{h.name}' answers task '{h.task}', which is not declared")
        if unknown := set(h.sources) - sources:
            raise DeclarationError(f"head '{h.name}' reads {sorted(unknown)}; there are {sorted(sources)}")
    if unanswered := {t.name for t in tasks} - {h.task for h in heads}:
        raise DeclarationError(f"no head answers task {sorted(unanswered)}")
