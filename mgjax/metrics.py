"""Metrics of classification over a taxonomy and of regression, as sums that add up over batches and hosts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.contracts import Batch, Outputs
from mgjax.decode import METHODS, Method, decode, task_log_probs
from mgjax.granularity import DeclarationError, Head, Task
from mgjax.taxonomy import Taxonomy

BINS = 15  # of the calibration error, as Guo et al. 2017
CONFUSION = 60  # a larger confusion matrix is not kept
_RANKS = 400  # bins of probabilities, from which an average precision is made
RESOLVED = 1e-4  # of a mean square: below that, float32 sums do not tell a variance


@dataclasses.dataclass(frozen=True)
class ClassificationMetrics:
    """Per level, for the raw answer and for the decoded one: accuracy (top-1), top-5, macro
    precision, recall and F1, expected calibration error (Guo et al. 2017, arXiv:1706.04599; 15
    equal bins); over whole paths: full-path accuracy, raw and decoded inconsistency, mean tree
    distance, mistake severity (mean LCA height of the mistakes, Bertinetto et al. 2020,
    arXiv:1912.09393). Macro averages run over the classes that occur in labels or answers, as
    scikit-learn's do. A level that no head answers, but a finer one does, has the decoded
    figures alone.

    `update` runs inside jit and returns sums; sums of several batches are added; `compute`
    turns them into figures.

    Attributes:
        taxonomy: relates the levels of the tasks.
        tasks, heads: the declarations of the model.
        decoder: of the answer, a method of `decode`; all of them are reported.

    Example:
        >>> tree = Taxonomy.from_names({"class": ["a", "b", "c"]})
        >>> metrics = ClassificationMetrics(tree, [Task("class", "class", 3, "class")], [Head("class", {"g": "grad"})])
        >>> batch = Batch({}, {"class": jnp.array([0, 1])}, jnp.array([True, True]), jnp.arange(2))
        >>> outputs = Outputs({"class": jnp.array([[9.0, 0, 0], [9.0, 0, 0]])})
        >>> metrics.compute(metrics.update(outputs, batch))["levels"]["class"]["accuracy"]
        0.5
    """

    taxonomy: Taxonomy
    tasks: Sequence[Task]
    heads: Sequence[Head]
    decoder: Method = "combined"

    def __post_init__(self):
        # Tasks of other kinds are for other metrics.
        tasks = [t for t in self.tasks if t.kind == "classification"]
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "heads", [h for h in self.heads if h.task in {t.name for t in tasks}])

    def update(self, outputs: Outputs, batch: Batch) -> dict:
        """Sums of one batch, as a pytree of float32 arrays."""
        log_probs = task_log_probs(outputs, self.heads, self.tasks)
        raw = {t.level: log_probs[t.name] for t in self.tasks if t.name in log_probs}
        truth = batch.targets | {t.level: batch.targets[t.target] for t in self.tasks}
        paths = {method: decode(raw, self.taxonomy, method) for method in METHODS}
        path = paths[self.decoder]
        levels = [l for l in self.taxonomy.levels if l in path.labels and l in truth]

        sums = {"levels": {}}
        for level in levels:
            known = batch.mask & (truth[level] >= 0)
            said = {"decoded": (path.log_probs[level], path.labels[level])}
            if level in raw:
                said["raw"] = raw[level], jnp.argmax(raw[level], -1)
            sums["levels"][level] = {how: _level_sums(*answer, truth[level], known) for how, answer in said.items()}
        if (shown := self._shown(levels)) is not None:
            known = (batch.mask & (truth[shown] >= 0)).astype(jnp.float32)
            empty = jnp.zeros((self.taxonomy.size(shown),) * 2, jnp.float32)
            sums["confusion"] = empty.at[jnp.maximum(truth[shown], 0), path.labels[shown]].add(known)

        # Where several heads answer one task, each is reported by itself too.
        several = [h for h in self.heads if sum(h.task == o.task for o in self.heads) > 1 and h.name in outputs.logits]
        sums["heads"] = {}
        for head in several:
            task = next(t for t in self.tasks if t.name == head.task)
            said, labels = jax.nn.log_softmax(outputs.logits[head.name]), batch.targets[task.target]
            known = batch.mask & (labels >= 0)
            sums["heads"][head.name] = _level_sums(said, jnp.argmax(said, -1), labels, known)

        count = lambda flags: jnp.sum((flags & batch.mask).astype(jnp.float32))
        finest = levels[-1]
        known = batch.mask & jnp.stack([truth[l] >= 0 for l in levels]).all(0)
        sums["examples"] = count(batch.mask)
        sums["known_paths"] = count(known)
        sums["raw_inconsistent"] = count(self._inconsistent({l: jnp.argmax(said, -1) for l, said in raw.items()}))
        sums["inconsistent"] = count(self._inconsistent(path.labels))
        sums["right_path"], sums["right"] = {}, {}
        for method, answer in paths.items():
            right = {l: answer.labels[l] == truth[l] for l in levels}
            sums["right_path"][method] = count(known & jnp.stack(list(right.values())).all(0))
            sums["right"][method] = {l: count(right[l] & (truth[l] >= 0)) for l in levels}

        tree = self.taxonomy.upto(finest)
        label, answer = jnp.maximum(truth[finest], 0), path.labels[finest]
        distance, height = _tree_errors(tree, answer, label)
        mistake = known & (answer != label)
        sums["distance"] = jnp.sum(jnp.where(known, distance, 0.0))
        sums["severity"] = jnp.sum(jnp.where(mistake, height, 0.0))
        sums["mistakes"] = count(mistake)
        return sums

    def compute(self, sums: Mapping, full: bool = False) -> dict:
        """Figures of added-up sums, as plain floats ready for JSON.

        Args:
            full: adds each level's reliability (confidence, accuracy and count per bin) and the
                confusion matrix (rows are true) of the coarsest level that can be confused.

        Raises:
            ValueError: there was no example.
            AssertionError: a decoded path was inconsistent, which decoding rules out.
        """
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(sums))
        n = float(sums["examples"])
        if not n:
            raise ValueError("no example was evaluated: the split is empty, or every example was masked")
        assert sums["inconsistent"] == 0, "decoding gave a path that is not in the taxonomy"
        share = lambda a, b: float(a / b) if b else 0.0
        levels = {}
        for level in (l for l in self.taxonomy.levels if l in sums["levels"]):  # jax sorts keys
            said = sums["levels"][level]
            raw = {f"raw_{k}": v for k, v in _level_figures(said["raw"]).items()} if "raw" in said else {}
            levels[level] = _level_figures(said["decoded"]) | raw
            if full:
                levels[level]["reliability"] = _reliability(said["decoded"])
        confusion = {}
        if full and "confusion" in sums:
            level = self._shown(list(levels))
            names = self.taxonomy.names[self.taxonomy.index(level)]
            counts = sums["confusion"].astype(int).tolist()
            confusion = {"confusion": {"level": level, "labels": list(names), "counts": counts}}
        return {
            "examples": int(n),
            "levels": levels,
            **({"heads": {h: _level_figures(s) for h, s in sums["heads"].items()}} if sums["heads"] else {}),
            "full_path_accuracy": share(sums["right_path"][self.decoder], sums["known_paths"]),
            "inconsistency": share(sums["inconsistent"], n),
            "raw_inconsistency": share(sums["raw_inconsistent"], n),
            "tree_distance": share(sums["distance"], sums["known_paths"]),
            "mistake_severity": share(sums["severity"], sums["mistakes"]),
            "decoder": self.decoder,
            "decoders": {
                method: {
                    "full_path_accuracy": share(sums["right_path"][method], sums["known_paths"]),
                    "accuracy": {l: share(sums["right"][method][l], sums["levels"][l]["decoded"]["count"]) for l in levels},
                }
                for method in METHODS
            },
            **confusion,
        }

    def scalars(self, figures: Mapping) -> dict[str, float]:
        """The figures of `compute` as flat scalars for a log, with slashes in their names."""
        levels = {
            f"{level}/{k}": v for level, said in figures["levels"].items() for k, v in said.items() if isinstance(v, float)
        }
        return levels | {k: v for k, v in figures.items() if isinstance(v, float)}

    def answered(self, figures: Mapping) -> bool:
        """Whether figures of several metrics hold some of these."""
        return "levels" in figures

    def own(self, figures: Mapping) -> str:
        """The name among `scalars` by which a stage is judged that answers these: the accuracy of its finest level."""
        return f"{list(figures['levels'])[-1]}/accuracy"

    @property
    def main(self) -> str:
        """The name among `scalars` by which models are compared: the accuracy of the finest level."""
        levels = [t.level for t in self.tasks]
        return f"{max(levels, key=self.taxonomy.index)}/accuracy"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all `scalars` of a model that answers every task."""
        none = lambda x: np.zeros(x.shape)
        log_probs = {h.name: np.zeros((1, t.classes), np.float32) for h in self.heads for t in self.tasks if t.name == h.task}
        targets = {t.target: np.zeros(1, np.int32) for t in self.tasks}
        batch = Batch({}, targets, np.ones(1, bool), np.zeros(1, np.int32))
        sums = jax.tree.map(none, jax.eval_shape(self.update, Outputs(log_probs), batch))
        return tuple(self.scalars(self.compute(sums | {"examples": np.ones(())})))

    def headline(self, figures: Mapping) -> str:
        """The figures of `compute` in a few words."""
        return "  ".join(f"{level} {v['accuracy']:.1%}" for level, v in figures["levels"].items())

    def progress(self, scalars: Mapping[str, float]) -> str:
        """The scalars of a training step in a few words: loss, and accuracy per level."""
        start = "accuracy/"
        shown = (f"{k.removeprefix(start)} {v:.1%}" for k, v in scalars.items() if k.startswith(start))
        return "  ".join([f"loss {scalars['loss']:.3f}", *shown])

    def _shown(self, levels: Sequence[str]) -> str | None:
        """The coarsest level with a confusion matrix that is neither trivial nor too large."""
        return next((l for l in levels if 1 < self.taxonomy.size(l) <= CONFUSION), None)

    def _inconsistent(self, labels: Mapping) -> jax.Array:
        """bool [B]: some label's ancestor is not the label given for that coarser level."""
        levels = [l for l in self.taxonomy.levels if l in labels]
        result = jnp.zeros(labels[levels[0]].shape, bool)
        for coarse, fine in itertools.pairwise(levels):
            result |= jnp.asarray(self.taxonomy.ancestors(fine, coarse))[labels[fine]] != labels[coarse]
        return result


class _TaskMetrics:
    """What metrics by task share: how their figures, `tasks` → task → name, are called and shown."""

    tasks: Sequence[Task]
    KINDS: ClassVar[tuple[str, ...]]  # names of a task's figures
    BEST: ClassVar[str]  # the one by which models are compared

    def scalars(self, figures: Mapping) -> dict[str, float]:
        return {f"{task}/{k}": v for task, said in self._own(figures).items() for k, v in said.items()}

    def answered(self, figures: Mapping) -> bool:
        return bool(self._own(figures))

    def own(self, figures: Mapping) -> str:
        return f"{list(self._own(figures))[-1]}/{self.BEST}"

    @property
    def main(self) -> str:
        return f"{self.tasks[-1].name}/{self.BEST}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{t.name}/{k}" for t in self.tasks for k in self.KINDS)

    def progress(self, scalars: Mapping[str, float]) -> str:
        return f"loss {scalars['loss']:.3f}"

    def _own(self, figures: Mapping) -> dict:
        return {t.name: figures["tasks"][t.name] for t in self.tasks if t.name in figures.get("tasks", {})}


@dataclasses.dataclass(frozen=True)
class RegressionMetrics(_TaskMetrics):
    """Per task: root of the mean squared error, mean absolute error, and R² = 1 − SSE / SST about the mean of the targets that
    were evaluated, of each number about its own. Where several heads answer one task, their predictions are averaged. All
    known numbers count alike; what is not finite, as NaN, is unknown.

    What cannot be told is NaN: all figures where no target is known, and R² where the targets do not vary, or so little
    beside their distance from `centers` that sums in float32 do not show it.

    The methods are those of `ClassificationMetrics`; models are compared by the last task's `rmse`.

    Attributes:
        tasks, heads: the declarations of the model; tasks of other kinds are passed over.
        centers: task → about where its targets lie, a number or one for each that is predicted (0 where a task is not named),
            such as the mean over the training examples. Only the precision of R² depends on it, and only where the mean is
            many standard deviations away from 0.

    Raises:
        DeclarationError: a center of a task that is not there; in `update`, targets of another size than the predictions.

    Example:
        >>> metrics = RegressionMetrics([Task("age", "age", 1, kind="regression")], [Head("age", {"g": "grad"})])
        >>> batch = Batch({}, {"age": jnp.array([1.0, 3.0])}, jnp.array([True, True]), jnp.arange(2))
        >>> metrics.compute(metrics.update(Outputs({"age": jnp.array([[1.0], [2.0]])}), batch))["tasks"]["age"]["mae"]
        0.5
    """

    KINDS = ("rmse", "mae", "r2")
    BEST = "rmse"

    tasks: Sequence[Task]
    heads: Sequence[Head]
    centers: Mapping[str, float | Sequence[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        tasks = [t for t in self.tasks if t.kind == "regression"]
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "heads", [h for h in self.heads if h.task in {t.name for t in tasks}])
        if unknown := sorted(set(self.centers) - {t.name for t in tasks}):
            raise DeclarationError(f"centers are given for {unknown}; there are regressions {[t.name for t in tasks]}")

    def update(self, outputs: Outputs, batch: Batch) -> dict:
        sums = {"examples": jnp.sum(batch.mask.astype(jnp.float32)), "tasks": {}}
        for task in self.tasks:
            said = [outputs.logits[h.name] for h in self.heads if h.task == task.name and h.name in outputs.logits]
            if not said:
                continue
            said = jnp.mean(jnp.stack(said).astype(jnp.float32), 0)
            truth = batch.targets[task.target]
            truth = (truth[:, None] if truth.ndim == 1 else truth).astype(jnp.float32)
            if truth.shape != said.shape:
                raise DeclarationError(
                    f"task '{task.name}' predicts {said.shape[1:]} numbers, target '{task.target}' holds {truth.shape[1:]}"
                )
            known = jnp.isfinite(truth) & batch.mask[:, None]
            center = jnp.broadcast_to(jnp.asarray(self.centers.get(task.name, 0.0), jnp.float32), truth.shape[1:])
            error, truth = (jnp.where(known, x, 0.0) for x in (said - truth, truth - center[None]))
            sums["tasks"][task.name] = {
                "count": jnp.sum(known.astype(jnp.float32), 0),
                "squared": jnp.sum(error**2, 0),
                "absolute": jnp.sum(jnp.abs(error), 0),
                "truth": jnp.sum(truth, 0),
                "truth_squared": jnp.sum(truth**2, 0),
            }
        return sums

    def compute(self, sums: Mapping, full: bool = False) -> dict:
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(sums))
        if not sums["examples"]:
            raise ValueError("no example was evaluated: the split is empty, or every example was masked")
        tasks = {}
        for name in (t.name for t in self.tasks if t.name in sums["tasks"]):
            of_task = sums["tasks"][name]
            total = {k: float(v.sum()) for k, v in of_task.items()}
            n = total["count"] or np.nan
            spread = total["truth_squared"] - float(np.sum(of_task["truth"] ** 2 / np.maximum(of_task["count"], 1)))
            resolved = spread > RESOLVED * total["truth_squared"]
            tasks[name] = {
                "rmse": float(np.sqrt(total["squared"] / n)),
                "mae": total["absolute"] / n,
                "r2": 1 - total["squared"] / spread if resolved else np.nan,
            }
        return {"examples": int(sums["examples"]), "tasks": tasks}

    def headline(self, figures: Mapping) -> str:
        return "  ".join(f"{task} rmse {v['rmse']:.4g}" for task, v in self._own(figures).items())


@dataclasses.dataclass(frozen=True)
class MultiLabelMetrics(_TaskMetrics):
    """Per task, of which an example has any number of labels: F1 over all answers (`f1_micro`) and as the mean over the labels
    that occur (`f1_macro`), an answer being a probability of ½ or more; share of the examples with all labels right (`exact`);
    mean over the labels of the average precision (`map`), from a histogram of the probabilities with 400 bins, in which
    those of one bin count as equal.

    The methods are those of `ClassificationMetrics`; models are compared by the last task's `map`.

    Attributes:
        tasks, heads: the declarations of the model; tasks of other kinds are passed over.

    Example:
        >>> metrics = MultiLabelMetrics([Task("tags", "tags", 2, kind="multilabel")], [Head("tags", {"g": "grad"})])
        >>> batch = Batch({}, {"tags": jnp.array([[1.0, 0.0], [1.0, 1.0]])}, jnp.array([True, True]), jnp.arange(2))
        >>> figures = metrics.compute(metrics.update(Outputs({"tags": jnp.array([[3.0, -3.0], [3.0, -3.0]])}), batch))
        >>> {name: round(value, 3) for name, value in figures["tasks"]["tags"].items()}
        {'f1_micro': 0.8, 'f1_macro': 0.5, 'exact': 0.5, 'map': 0.75}
    """

    KINDS = ("f1_micro", "f1_macro", "exact", "map")
    BEST = "map"

    tasks: Sequence[Task]
    heads: Sequence[Head]

    def __post_init__(self):
        tasks = [t for t in self.tasks if t.kind == "multilabel"]
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "heads", [h for h in self.heads if h.task in {t.name for t in tasks}])

    def update(self, outputs: Outputs, batch: Batch) -> dict:
        sums = {"examples": jnp.sum(batch.mask.astype(jnp.float32)), "tasks": {}}
        for task in self.tasks:
            said = [
                jax.nn.sigmoid(outputs.logits[h.name]) for h in self.heads if h.task == task.name and h.name in outputs.logits
            ]
            if not said:
                continue
            said, truth = jnp.mean(jnp.stack(said), 0), batch.targets[task.target]
            known = (jnp.isfinite(truth) & batch.mask[:, None]).astype(jnp.float32)
            true, answer = known * (truth >= 0.5), known * (said >= 0.5)
            bins = jnp.clip((said * _RANKS).astype(jnp.int32), 0, _RANKS - 1)
            label = jnp.broadcast_to(jnp.arange(task.classes)[None], bins.shape)
            count = lambda weight, at=(label, bins), c=task.classes: jnp.zeros((c, _RANKS), jnp.float32).at[at].add(weight)
            all_known = known.all(-1)
            sums["tasks"][task.name] = {
                "right": jnp.sum(true * answer, 0),
                "answered": jnp.sum(answer, 0),
                "labelled": jnp.sum(true, 0),
                "exact": jnp.sum(all_known & (true == answer).all(-1)),
                "count": jnp.sum(all_known),
                "true": count(true),
                "false": count(known - true),
            }
        return jax.tree.map(lambda x: x.astype(jnp.float32), sums)

    def compute(self, sums: Mapping, full: bool = False) -> dict:
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(sums))
        if not sums["examples"]:
            raise ValueError("no example was evaluated: the split is empty, or every example was masked")
        tasks = {}
        for name, s in ((t.name, sums["tasks"][t.name]) for t in self.tasks if t.name in sums["tasks"]):
            either = s["answered"] + s["labelled"]
            # From the highest probability down: precision at each, weighed by what is found there.
            true, false = np.cumsum(s["true"][:, ::-1], 1), np.cumsum(s["false"][:, ::-1], 1)
            precision = true / np.maximum(true + false, 1)
            occurs = s["labelled"] > 0
            found = (precision * s["true"][:, ::-1]).sum(1) / np.maximum(s["labelled"], 1)
            tasks[name] = {
                "f1_micro": float(2 * s["right"].sum() / either.sum()) if either.any() else 0.0,
                "f1_macro": float((2 * s["right"] / np.maximum(either, 1))[either > 0].mean()) if either.any() else 0.0,
                "exact": float(s["exact"] / s["count"]) if s["count"] else 0.0,
                "map": float(found[occurs].mean()) if occurs.any() else 0.0,
            }
        return {"examples": int(sums["examples"]), "tasks": tasks}

    def headline(self, figures: Mapping) -> str:
        return "  ".join(f"{task} mAP {v['map']:.1%}" for task, v in self._own(figures).items())


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Several metrics as one, such as those of levels and of regressions: `scalars` and figures side by side.

    A part of which no head answered has no figures; figures of tasks stand together. The methods are those of the parts.

    Attributes:
        parts: of different kinds; the first one says by what models are compared.

    Raises:
        DeclarationError: no part, or two of one kind.

    Example:
        >>> tree = Taxonomy.from_names({"class": ["a", "b", "c"]})
        >>> tasks = [Task("class", "class", 3, "class"), Task("age", "age", 1, kind="regression")]
        >>> heads = [Head("class", {"g": "grad"}), Head("age", {"g": "grad"})]
        >>> metrics = Metrics([ClassificationMetrics(tree, tasks, heads), RegressionMetrics(tasks, heads)])
        >>> metrics.main, metrics.names[-3:]
        ('class/accuracy', ('age/rmse', 'age/mae', 'age/r2'))
    """

    parts: Sequence

    def __post_init__(self):
        kinds = [type(p).__name__ for p in self.parts]
        if not kinds or len(set(kinds)) < len(kinds):
            raise DeclarationError(f"metrics are joined of parts of different kinds, one at least, not of {kinds}")

    def update(self, outputs: Outputs, batch: Batch) -> dict:
        answered = [p for p in self.parts if any(h.name in outputs.logits for h in p.heads)]
        return {type(p).__name__: p.update(outputs, batch) for p in answered}

    def compute(self, sums: Mapping, full: bool = False) -> dict:
        result: dict = {}
        for part in self.parts:
            if (own := sums.get(type(part).__name__)) is not None:
                figures = part.compute(own, full)
                tasks = result.get("tasks", {}) | figures.get("tasks", {})
                result |= figures | ({"tasks": tasks} if tasks else {})
        return result

    def _answered(self, figures: Mapping) -> list:
        return [p for p in self.parts if p.answered(figures)]

    def scalars(self, figures: Mapping) -> dict[str, float]:
        return {k: v for p in self._answered(figures) for k, v in p.scalars(figures).items()}

    def own(self, figures: Mapping) -> str:
        return self._answered(figures)[0].own(figures)

    @property
    def main(self) -> str:
        return self.parts[0].main

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for p in self.parts for name in p.names)

    def headline(self, figures: Mapping) -> str:
        return "  ".join(p.headline(figures) for p in self._answered(figures))

    def progress(self, scalars: Mapping[str, float]) -> str:
        return self.parts[0].progress(scalars)


def _level_sums(log_probs, answer, truth, known) -> dict:
    classes = log_probs.shape[-1]
    weight = known.astype(jnp.float32)
    right = weight * (answer == truth)
    label = jnp.maximum(truth, 0)
    own = jnp.take_along_axis(log_probs, label[:, None], 1)
    earlier = jnp.arange(classes)[None] < label[:, None]  # of equals, the first counts as higher
    rank = jnp.sum((log_probs > own) | ((log_probs == own) & earlier), -1)
    rank = jnp.where(jnp.isfinite(own[:, 0]), rank, classes)  # NaN is no answer
    confidence = jnp.exp(jnp.take_along_axis(log_probs, answer[:, None], 1)[:, 0])
    bins = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    per_class = lambda values, at: jnp.zeros(classes, jnp.float32).at[at].add(values)
    per_bin = lambda values: jnp.zeros(BINS, jnp.float32).at[bins].add(values)
    return {
        "count": weight.sum(),
        "top5": jnp.sum(weight * (rank < min(5, classes))),
        "right": per_class(right, label),
        "answered": per_class(weight, answer),
        "labelled": per_class(weight, label),
        "bin_count": per_bin(weight),
        "bin_confidence": per_bin(weight * confidence),
        "bin_right": per_bin(right),
    }


def _level_figures(sums: Mapping) -> dict[str, float]:
    right, answered, labelled, n = sums["right"], sums["answered"], sums["labelled"], float(sums["count"])
    occurs = (answered + labelled) > 0
    macro = lambda a, b: float(np.mean((a / np.maximum(b, 1))[occurs])) if occurs.any() else 0.0
    n = n or 1.0
    return {
        "accuracy": float(right.sum() / n),
        "top5": float(sums["top5"] / n),
        "precision": macro(right, answered),
        "recall": macro(right, labelled),
        "f1": macro(2 * right, answered + labelled),
        "ece": float(np.abs(sums["bin_right"] - sums["bin_confidence"]).sum() / n),
    }


def _reliability(sums: Mapping) -> dict[str, list]:
    count = np.maximum(sums["bin_count"], 1)
    return {
        "confidence": (sums["bin_confidence"] / count).tolist(),
        "accuracy": (sums["bin_right"] / count).tolist(),
        "count": sums["bin_count"].astype(int).tolist(),
    }


def _tree_errors(tree: Taxonomy, a, b):
    """float32 [B], [B]: edges between leaves a and b, and the height of their LCA."""
    paths, depth = jnp.asarray(tree.paths), jnp.asarray(tree.leaf_depth)
    shared = jnp.cumprod((paths[a] == paths[b]).astype(jnp.int32), -1).sum(-1)
    lca_depth = jnp.minimum(shared, jnp.minimum(depth[a], depth[b]))
    distance = depth[a] + depth[b] - 2 * lca_depth
    heights = np.stack([h[tree.paths[:, i]] for i, h in enumerate(tree.heights)], 1)
    heights = jnp.asarray(np.c_[np.full(len(heights), tree.root_height), heights])
    height = jnp.take_along_axis(heights[b], lca_depth[:, None], 1)[:, 0]
    return distance.astype(jnp.float32), height.astype(jnp.float32)
