"""What a user declares: views, granularities, tasks, heads, and what the model is asked to do now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mgjax.errors import InputError

FUSED = "fused"  # a head reads this to see what the fusion made of all active granularities


DENOISERS = ("median", "bilateral", "nlm")
KINDS = ("classification", "multilabel", "regression")


class DeclarationError(InputError):
    """Granularities, tasks and heads do not fit together."""


# ---------------------------------------------------------------------- views


# A view is preprocessing: it belongs to a granularity, knows no chance, and is the same in training
# and evaluation. Augmentation is drawn once per example, before any view, and all views share it.


@dataclasses.dataclass(frozen=True)
class Identity:
    """The input as it is."""


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


@dataclasses.dataclass(frozen=True)
class Region:
    """A window of the image: a local view. All are shares of the image's height and width.

    Example:
        >>> Region.central(0.5)
        Region(top=0.25, left=0.25, height=0.5, width=0.5)
    """

    top: float
    left: float
    height: float
    width: float

    def __post_init__(self):
        for start, side in ((self.top, self.height), (self.left, self.width)):
            if not (start >= 0 and side > 0 and start + side <= 1 + 1e-6):
                raise DeclarationError(f"{self}: the window lies inside the image, whose height and width are 1")

    @classmethod
    def central(cls, share: float) -> Region:
        """The middle of the image, `share` of its height and width."""
        return cls((1 - share) / 2, (1 - share) / 2, share, share)


@dataclasses.dataclass(frozen=True)
class Grey:
    """The image without colour, in as many channels as before."""


@dataclasses.dataclass(frozen=True)
class Denoise:
    """The image without noise, as large as before.

    Images are normalised when a view sees them, so `strength` and `noise` are in units of the
    training images' standard deviation.

    Attributes:
        method: `"median"`, `"bilateral"` or `"nlm"` (non-local means); see `mgjax.ops`.
        size: pixels along a side, odd: of the window, or of the patches of non-local means.
        strength: how unlike colours (bilateral: σ of colour) or patches (nlm: h) may be that are
            averaged. The median has none.
        reach: bilateral: σ of space in pixels; nlm: side of the search window, odd; 0 = a third
            of `size`, or 7.
        noise: nlm: standard deviation of the noise that is expected.

    Example:
        >>> Granularity("coarse", "trunk", "stage1", view=Denoise("median", size=3)).view.size
        3
    """

    method: str
    size: int = 3
    strength: float = 0.5
    reach: float = 0
    noise: float = 0.0

    def __post_init__(self):
        if self.method not in DENOISERS:
            raise DeclarationError(f"{self}: denoises by one of {', '.join(DENOISERS)}")
        if self.size not in (3, 5, 7):
            raise DeclarationError(f"{self}: the size is 3, 5 or 7 pixels")
        if not self.strength > 0 or self.reach < 0 or self.noise < 0:
            raise DeclarationError(f"{self}: strength lies above 0, reach and noise do not lie below")
        if self.method == "nlm" and self.reach and (self.reach < 3 or self.reach % 2 != 1):
            raise DeclarationError(f"{self}: the search window of non-local means is odd, at least 3 pixels")


@dataclasses.dataclass(frozen=True)
class Compose:
    """One view after the other.

    Example:
        >>> Compose((Region.central(0.5), Denoise("median"), Resize(0.5))).views[-1]
        Resize(scale=0.5, detail=None)
    """

    views: tuple[View, ...]

    def __post_init__(self):
        flat = (inner for view in self.views for inner in (view.views if isinstance(view, Compose) else (view,)))
        object.__setattr__(self, "views", tuple(flat))


# Of what is no image, the data make what a view sees, before the batch: `inputs[view.key]`.


@dataclasses.dataclass(frozen=True)
class Characters:
    """A text's characters, in order: int32 [B, length], 0 where there is none, 1 where it was not seen in training.

    Attributes:
        length: of what is read; of longer texts the rest is cut.

    Example:
        >>> Characters(160).key
        'characters_160'
    """

    length: int = 160

    def __post_init__(self):
        _check_length(self, self.length)

    @property
    def key(self) -> str:
        """Of the batch's inputs."""
        return f"characters_{self.length}"


@dataclasses.dataclass(frozen=True)
class Words:
    """A text's words and signs, in order: int32 [B, length], 0 where there is none, 1 where it was not seen in training.

    Attributes:
        length: of what is read; of longer texts the rest is cut.
        least: examples of training in which a word stands, or else it counts as not seen.
    """

    length: int = 40
    least: int = 1

    def __post_init__(self):
        _check_length(self, self.length)
        if self.least < 1:
            raise DeclarationError(f"{self}: a word is seen in 1 example at least")

    @property
    def key(self) -> str:
        return f"words_{self.length}_{self.least}"


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A whole text at once: the bag of its n-grams, hashed to int32 [B, length] from 1 to buckets − 1, 0 where there is none.

    Hashing (Weinberger et al. 2009, arXiv:0902.2206) needs no vocabulary. Texts begin and end with a sign of their own, so an
    n-gram tells whether it stands there.

    Attributes:
        words: shortest and longest n-gram of words; (0, 0): none.
        characters: shortest and longest n-gram of characters within a word, its ends marked; (0, 0): none.
        anchors: each word is paired with the first word of the text, with the first two, up to so many; 0: none. What a text
            asks stands far from what it asks about.
        phrases: so many first phrases are told by their whole, their first and last word and the last one's n-grams of
            characters, and the text by its first 2 to 5 words, each phrase being one. A phrase is a run of words none of which
            is common; its last word is its head in English (Huang, Thint & Qin 2008, aclanthology.org/D08-1097, parse for it).
            0: none.
        common: share of the training texts, and 10 of them at least, in which a word stands to be common.
        weighed: whether each n-gram has a weight, {"ids": int32, "weights": float32 [B, length]}: the logarithm of how few
            training texts have it (inverse document frequency, Spärck Jones 1972, doi:10.1108/eb026526), 0 where none has.
        buckets: into which n-grams are hashed.
        length: n-grams that are kept, of words first; of longer texts the rest is cut.

    Example:
        >>> Sentence((1, 2), buckets=1 << 10).key
        'sentence_12_00_0_0_1024_128'
    """

    words: tuple[int, int] = (1, 3)
    characters: tuple[int, int] = (0, 0)
    anchors: int = 0
    phrases: int = 0
    common: float = 0.005
    weighed: bool = False
    buckets: int = 1 << 14
    length: int = 128

    def __post_init__(self):
        _check_length(self, self.length)
        for low, high in (self.words, self.characters):
            if not (0 < low <= high or low == high == 0):
                raise DeclarationError(f"{self}: n-grams have 1 part at least, and the shortest stands first")
        if self.words == self.characters == (0, 0) and not self.anchors and not self.phrases:
            raise DeclarationError(f"{self}: n-grams of words or characters, anchors or phrases are needed")
        if self.buckets < 2 or self.anchors < 0 or self.phrases < 0 or not 0 < self.common <= 1:
            raise DeclarationError(f"{self}: 2 buckets are needed, no less than 0 anchors and phrases, and 0 < common <= 1")

    @property
    def key(self) -> str:
        spans = "_".join(f"{low}{high}" for low, high in (self.words, self.characters))
        phrases = f"{self.phrases}at{self.common:g}" if self.phrases else "0"
        return f"sentence_{spans}_{self.anchors}_{phrases}_{self.buckets}_{self.length}" + "_weighed" * self.weighed


@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of a table, as they were encoded: {"numbers": float32 [B, N], "categories": int32 [B, M]}.

    Attributes:
        names: of the columns; none: all.
    """

    names: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return "columns" + "".join(f"_{name}" for name in self.names)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Some inputs of the batch, as they are: {name: array}.

    Attributes:
        names: of the inputs.

    Example:
        >>> Fields(("user", "item_genre")).key
        'fields_user_item_genre'
    """

    names: tuple[str, ...]

    def __post_init__(self):
        if not self.names:
            raise DeclarationError("a view of fields names one at least")

    @property
    def key(self) -> str:
        return "fields_" + "_".join(self.names)


def _check_length(view, length: int) -> None:
    if length < 1:
        raise DeclarationError(f"{view}: a length is at least 1")


Encoded = Characters | Words | Sentence | Columns | Fields
View = Identity | Resize | Region | Grey | Denoise | Compose | Encoded


# ---------------------------------------------------------------------- members


# Membership says which training examples a granularity learns from. It is no view: all examples pass
# through the model, and one that is no member counts for nothing in what the granularity learns.


@dataclasses.dataclass(frozen=True)
class Everyone:
    """All examples."""


@dataclasses.dataclass(frozen=True)
class Subtree:
    """Examples whose label at `level` is one of `names`, or lies below one.

    Example:
        >>> Granularity("fish", "trunk", "stage1", members=Subtree("superclass", ("fish",))).members.level
        'superclass'
    """

    level: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Column:
    """Examples of which the column `key` holds one of `values`."""

    key: str
    values: tuple[str | int | float | bool, ...]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Examples of one cluster of k-means over feature vectors.

    Attributes:
        count: clusters in all.
        index: which of them; they are numbered by size, the largest is 0.
        of: path of a .npy with the feature vectors [examples, D] of the training split; empty: of the inputs
            themselves, images reduced to 8×8 pixels.
        seed: of the first centres.
    """

    count: int
    index: int
    of: str = ""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise DeclarationError(f"{self}: clusters are numbered from 0 to {self.count - 1}")


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Examples whose image, as it was stored, has a shorter side of `low` to below `high` pixels."""

    low: int = 0
    high: float = float("inf")

    def __post_init__(self):
        if not 0 <= self.low < self.high:
            raise DeclarationError(f"{self}: 0 <= low < high is needed")


Members = Everyone | Subtree | Column | Cluster | Resolution
WEIGHTINGS = ("none", "class", "loss")


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
        members: which training examples it learns from.
        weighted_by: how much each of them counts: "none" (all alike), "class" (classes alike, at the finest level) or "loss"
            (by what it cost in the last epoch).
    """

    name: str
    branch: str
    tap: str
    view: View = Identity()
    members: Members = Everyone()
    weighted_by: Literal["none", "class", "loss"] = "none"

    def __post_init__(self):
        if self.name == FUSED:
            raise DeclarationError(f"a granularity cannot be called '{FUSED}': that is the fusion's output")
        if self.weighted_by not in WEIGHTINGS:
            raise DeclarationError(
                f"granularity '{self.name}' weighs its examples by '{self.weighted_by}': one of {', '.join(WEIGHTINGS)}"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """A question: which target of a batch is to be answered.

    Attributes:
        name: unique name.
        target: key in `Batch.targets`.
        classes: number of classes, or of labels of which an example has any number; of a regression, of the numbers that
            are predicted.
        level: level of the taxonomy that the classes are, if there is a taxonomy.
        kind: `"classification"`, `"multilabel"` or `"regression"`: the answer's form, which decides loss, metrics and decode.
        center, spread: of a regression's targets: predictions begin there, and errors count in units of the spread.
        bounds: between which a regression's answers lie; None: anywhere.
    """

    name: str
    target: str
    classes: int
    level: str | None = None
    kind: Literal["classification", "multilabel", "regression"] = "classification"
    center: float = 0.0
    spread: float = 1.0
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.spread > 0 or (self.bounds and not self.bounds[0] < self.bounds[1]):
            raise DeclarationError(f"task '{self.name}': a spread above 0 is needed, and bounds in their order")
        if self.kind not in KINDS:
            raise DeclarationError(f"task '{self.name}' is of kind '{self.kind}': one of {', '.join(KINDS)}")


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

    def asks_as(self, other: OperatingPoint) -> bool:
        """Whether it asks the same of the same granularities, at whatever resolution."""
        return (self.active, self.tasks) == (other.active, other.tasks)


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
