"""The objective: named losses of all heads, each example weighed, balanced against each other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.balancing import BALANCERS, Balancer, balancer
from mgjax.config import key
from mgjax.contracts import Array, Batch, Outputs
from mgjax.decode import lift
from mgjax.granularity import FUSED, DeclarationError, Granularity, Head, Task
from mgjax.losses import classification_loss, distillation, multilabel_loss, soft_targets, squared_error, weighted_mean
from mgjax.taxonomy import Taxonomy

LEAST, MOST = 0.1, 10.0  # weights of examples by their loss


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    balance: str = key("equal", "how the losses of the heads are weighed against each other", choices=tuple(BALANCERS))
    every: int = key(0, "steps between two looks at the gradients, where balancing needs them (0: as the method has it)", low=0)
    weights: tuple[float, ...] = key((1.0,), "of the tasks' losses, coarse to fine; the last is repeated", low=0)
    follow: bool = key(False, "label smoothing follows the taxonomy: more of it goes to near classes")
    beta: float = key(0.0, "soft labels by tree distance, q ∝ exp(−beta · distance), instead of smoothing (0: none)", low=0)
    distill: float = key(0.0, "weight of what each head learns from what the heads on the fusion say (0: nothing)", low=0)
    temperature: float = key(4.0, "of that", low=0.01)


class Losses(NamedTuple):
    """What a batch costs.

    Attributes:
        values: float32 [heads]; the mean loss of each, times its task's weight; 0 where it is not known.
        known: bool [heads]; False where the head did not answer, or knows no label of the batch.
        seen: named scalars for the log.
        memory: the objective's state, after what was seen of the examples.
    """

    values: Array
    known: Array
    seen: dict[str, Array]
    memory: dict


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss = Σ_heads balance[head] · weight[task] / (heads of that task) · loss(head)

    Methods of balancing that look at gradients weigh what reaches the features; the loss that is told is then without them.

    Labels may be known at any level: where a head's own is missing, a finer one is lifted, or else the finest coarser one
    counts by its marginal probability. An example counts in a head's loss as much as in the granularity that learns
    from it, or in the one where it counts most, if there are several.

    Attributes:
        tasks, heads: the declarations of the model.
        weights: (task, weight) pairs; 1 where a task is not named.
        smoothing: label smoothing of classification.
        taxonomy: of the tasks' levels; None where there is none.
        follow, beta: as in `losses.soft_targets`.
        balance: weighs the heads against each other, see `mgjax.balancing`.
        distill, temperature: weight of what heads learn from the ones that read `"fused"`, of the same task or of a finer
            level (`losses.distillation`).
        granularities: those whose examples are weighed by their loss are looked up here.
        examples: of an epoch; needed where examples are weighed by their loss.

    Raises:
        DeclarationError: a weight for an unknown task, or no weight above 0; soft labels or distillation that nothing
            can give.

    Example:
        >>> objective = Objective([Task("class", "class", 4)], [Head("class", {"fine": "grad"})])
        >>> batch = Batch({}, {"class": jnp.array([1, -1])}, jnp.array([True, True]), jnp.arange(2))
        >>> loss, seen = objective(Outputs({"class": jnp.zeros((2, 4))}), batch)
        >>> round(float(loss), 4), sorted(seen)
        (1.3863, ['accuracy/class', 'loss', 'loss/class'])
    """

    tasks: Sequence[Task]
    heads: Sequence[Head]
    weights: tuple[tuple[str, float], ...] = ()
    smoothing: float = 0.0
    taxonomy: Taxonomy | None = None
    follow: bool = False
    beta: float = 0.0
    balance: Balancer = Balancer()
    distill: float = 0.0
    temperature: float = 4.0
    granularities: Sequence[Granularity] = ()
    examples: int = 0

    def __post_init__(self):
        self.check_weights(self.weights, "the objective")
        if (self.follow or self.beta) and self.taxonomy is None:
            raise DeclarationError("soft labels that follow a taxonomy need one")
        if self.follow and (self.beta or not self.smoothing):
            raise DeclarationError("smoothing that follows the taxonomy needs smoothing above 0, and no beta")
        if self.distill and not any(self._teachers(head) for head in self.heads):
            raise DeclarationError(
                f"distillation needs a head that reads '{FUSED}' with a gradient, of a task of another head or of a level "
                "below it, as preset 'branches' has"
            )
        if self._remembered and not self.examples:
            raise DeclarationError(f"granularities {self._remembered} weigh examples by their loss: say how many there are")

    @classmethod
    def from_config(
        cls,
        config: ObjectiveConfig,
        model,
        *,
        taxonomy: Taxonomy | None = None,
        smoothing: float = 0.0,
        examples: int = 0,
    ) -> Objective:
        """The objective of a config, for a MultiGranularityModel and so many training examples."""
        tasks = list(model.tasks)
        weights = {t.name: config.weights[min(i, len(config.weights) - 1)] for i, t in enumerate(tasks)}
        options = {"every": config.every} if config.every else {}
        return cls(
            tasks,
            model.heads,
            tuple(weights.items()),
            smoothing if not config.beta else 0.0,
            taxonomy,
            config.follow,
            config.beta,
            balancer(config.balance, **options),
            config.distill,
            config.temperature,
            model.granularities,
            examples,
        )

    def check_weights(self, weights: Sequence[tuple[str, float]], where: str) -> None:
        """Raises DeclarationError for weights of tasks that are not there, below 0, or all 0."""
        known = [t.name for t in self.tasks]
        if unknown := [n for n, _ in weights if n not in known]:
            raise DeclarationError(f"loss weights of {where} name {unknown}; there are tasks {known}")
        if wrong := [n for n, w in weights if not w >= 0]:
            raise DeclarationError(f"loss weights of {where} lie below 0: {wrong}")
        if all(dict(weights).get(n, 1.0) <= 0 for n in known):
            raise DeclarationError(f"no loss weight of {where} is above 0: {dict(weights)}")

    def learned(self, tasks: Sequence[str], weights: Sequence[tuple[str, float]], where: str) -> tuple[str, ...]:
        """Those of `tasks` whose loss counts, with `weights` on top of the objective's own.

        Raises:
            DeclarationError: as `check_weights`, or none of them counts.
        """
        self.check_weights(weights, where)
        share = lambda task: dict(self.weights).get(task, 1.0) * dict(weights).get(task, 1.0)
        known = {t.name for t in self.tasks}  # what is not, the model names
        if not (found := tuple(t for t in tasks if t not in known or share(t) > 0)):
            raise DeclarationError(f"no loss weight of {where} is above 0 among its tasks {sorted(tasks)}")
        return found

    def meet(self, shared: Sequence[Sequence[str]]) -> bool:
        """Whether two heads or more teach one feature, `shared` being the granularities whose features are the same."""
        group = {name: i for i, names in enumerate(shared) for name in names}
        taught = [{group.get(s) for s in self._learning(h)} for h in self.heads]
        return any(a & b for a, b in itertools.combinations(taught, 2))

    def members(self, batch: Batch) -> dict[str, Array]:
        """granularity → bool [B]: whether it learns from a row, from its own example or from what was mixed into it."""
        found = {name: counts > 0 for name, counts in batch.weights.items()}
        if batch.share is None:
            return found
        return {name: own | ((batch.partner_weights[name] > 0) & (batch.share < 1)) for name, own in found.items()}

    @property
    def seam(self) -> bool:
        """Whether `weigh` needs the gradients at the shared features."""
        return self.balance.seam

    def init(self) -> dict:
        """The state that the objective keeps over a run; empty where it keeps none."""
        memory: dict = {}
        if type(self.balance) is not Balancer:
            memory["balance"] = self.balance.init(len(self.heads))
            memory["weights"] = jnp.ones(len(self.heads), jnp.float32)
            memory["known"] = jnp.zeros(len(self.heads), bool)
        if self._remembered:
            ones, unseen = jnp.ones(self.examples, jnp.float32), jnp.full(self.examples, jnp.nan, jnp.float32)
            memory["examples"] = {g: {"weight": ones, "loss": unseen} for g in self._remembered}
        return memory

    def __call__(self, outputs: Outputs, batch: Batch):
        """Returns the float32 loss with all heads alike and, for the log, named scalars: every head's loss and accuracy.

        Where the batch was mixed, the loss is of both labels, the accuracy of a row's own.
        """
        values, _, seen, _ = self.losses(outputs, batch, self.init())
        return values.sum(), {"loss": values.sum(), **seen}

    def losses(self, outputs: Outputs, batch: Batch, memory: Mapping, weights: tuple[tuple[str, float], ...] = ()) -> Losses:
        """The losses of all heads.

        Args:
            memory: from `init`, or as it was left by the last call.
            weights: (task, factor) pairs on top of the objective's own.
        """
        tasks, factors = {t.name: t for t in self.tasks}, dict(weights)
        answered = [h for h in self.heads if h.name in outputs.logits]
        every = jnp.ones(batch.mask.shape, jnp.float32)
        counts = {h: self._counts(h, every, batch.weights, batch.index, memory) for h in answered}
        each, of_granularity = [], {}
        for head in answered:
            (loss, weight), own = self._per_example(tasks[head.task], outputs.logits[head.name], batch)
            of_sides = [counts[head]]
            if batch.partner:  # what is mixed in counts as much as where it is itself
                of_sides.append(self._counts(head, every, batch.partner_weights, batch.partner_index, memory))
            each.append((loss, weight * jnp.stack(of_sides)))
            for source in self._learning(head):
                if source in self._remembered:
                    of_granularity.setdefault(source, []).append((loss[0], own))
        # The means of all heads at once: on several devices they are one reduction.
        loss, weight = (jnp.stack(parts) for parts in zip(*each))
        means, some = weighted_mean(loss, weight, (1, 2)), weight.sum((1, 2)) > 0

        values, known, seen = [], [], {}
        for head in self.heads:
            if head not in answered:
                values.append(jnp.float32(0))
                known.append(jnp.bool_(False))
                continue
            task, logits, row = tasks[head.task], outputs.logits[head.name], answered.index(head)
            mean, learns = means[row], some[row]
            if self.distill and (teachers := [t for t in self._teachers(head) if t in answered]):
                taught, counted = self._teach(teachers, task, outputs), batch.mask * counts[head]
                mean += self.distill * weighted_mean(distillation(logits, taught, self.temperature), counted)
                learns |= counted.sum() > 0
            share = dict(self.weights).get(task.name, 1.0) * factors.get(task.name, 1.0)
            values.append(share / sum(h.task == task.name for h in answered) * mean)
            known.append(learns & (share > 0))
            seen[f"loss/{head.name}"] = mean
            if task.kind == "classification":
                labels = batch.targets[task.target]
                right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
                seen[f"accuracy/{head.name}"] = weighted_mean(right, batch.mask & (labels >= 0))
        memory = dict(memory)
        if of_granularity:
            memory["examples"] = memory["examples"] | {
                g: self._remember(g, memory["examples"][g], parts, batch) for g, parts in of_granularity.items()
            }
        return Losses(jnp.stack(values), jnp.stack(known), seen, memory)

    def weigh(self, memory: Mapping, values: Array, known: Array, gram: Array | None, rng: Array) -> tuple[Array, dict]:
        """Weights of the heads, float32 [heads], and the state afterwards.

        Args:
            memory: as in `losses`.
            values, known: of `Losses`.
            gram: inner products of the losses' gradients at the seam, [heads, heads], where `seam` is True.
            rng: for what is drawn at random.
        """
        if "balance" not in memory:
            return jnp.ones(len(self.heads), values.dtype), dict(memory)
        weights, state = self.balance(memory["balance"], values, known, gram, rng)
        return weights, dict(memory) | {"balance": state, "weights": weights.astype(jnp.float32), "known": known}

    def end_epoch(self, memory: Mapping) -> dict:
        """The state after an epoch: the only place where weights of examples change."""
        memory = dict(memory)
        if "balance" in memory:
            memory["balance"] = self.balance.end_epoch(memory["balance"])
        if "examples" in memory:
            memory["examples"] = {g: _weigh_examples(m) for g, m in memory["examples"].items()}
        return memory

    @property
    def _remembered(self) -> list[str]:
        """Granularities that weigh examples by their loss."""
        return [g.name for g in self.granularities if g.weighted_by == "loss"]

    def _counts(self, head: Head, every: Array, weights: Mapping, index: Array, memory: Mapping) -> Array:
        """float32 [B]: how much each example counts in a head's loss; `every` is a row of ones."""
        parts = []
        for source in self._learning(head) or head.sources:
            counts = weights.get(source, every)
            if source in memory.get("examples", {}):
                counts = counts * memory["examples"][source]["weight"][jnp.maximum(index, 0)]
            parts.append(counts)
        return functools.reduce(jnp.maximum, parts)

    def _learning(self, head: Head) -> list[str]:
        """The granularities that learn from a head: of the fusion, all."""
        found = [s for s, how in head.reads if how == "grad"]
        return [g.name for g in self.granularities] if FUSED in found and self.granularities else found

    def _per_example(self, task: Task, logits: Array, batch: Batch):
        """((loss, weight), known): losses [2 or 1, B] of the labels of each row, its own first, with their weights; and
        whether its own is known."""
        sides = [(batch.targets, jnp.ones(batch.mask.shape, jnp.float32))]
        if batch.partner:
            sides = [(batch.targets, batch.share), (batch.partner, 1 - batch.share)]
        losses, weights = [], []
        for targets, part in sides:
            if task.kind == "regression":
                loss, known = squared_error(logits / task.spread, targets[task.target] / task.spread)
            elif task.kind == "multilabel":
                loss, known = multilabel_loss(logits, targets[task.target])
            else:
                loss, known = classification_loss(
                    logits, self._labels(task, targets), self._targets(task), taxonomy=self._tree(task), level=task.level
                )
            losses.append(loss)
            weights.append(part * (known & batch.mask))
        return (jnp.stack(losses), jnp.stack(weights)), weights[0] > 0

    def _tree(self, task: Task) -> Taxonomy | None:
        return self.taxonomy if self.taxonomy is not None and task.level in self.taxonomy.levels else None

    def _labels(self, task: Task, targets: Mapping):
        """Labels of one task: by level, where they are of a taxonomy."""
        if self._tree(task) is None:
            return targets[task.target]
        found = {l: targets[l] for l in self.taxonomy.levels if l in targets}
        return found | {t.level: targets[t.target] for t in self.tasks if t.level in self.taxonomy.levels}

    def _targets(self, task: Task) -> float | np.ndarray:
        """Label smoothing, or the table that makes more of a label."""
        tree = self._tree(task)
        if tree is None or not (self.follow or self.beta):
            return self.smoothing
        return soft_targets(tree, task.level, smoothing=self.smoothing, follow=self.follow, beta=self.beta or None)

    def _teachers(self, head: Head) -> list[Head]:
        """The heads on the fusion from which a head learns: of its task, or else of the nearest finer level."""
        tasks = {t.name: t for t in self.tasks}
        fused = [h for h in self.heads if (FUSED, "grad") in h.reads]
        if head in fused or tasks[head.task].kind != "classification":
            return []
        if same := [h for h in fused if h.task == head.task]:
            return same
        tree, own = self._tree(tasks[head.task]), tasks[head.task].level
        finer = [h for h in fused if tree and tasks[h.task].level in tree.levels[tree.index(own) + 1 :]]
        return sorted(finer, key=lambda h: tree.index(tasks[h.task].level))[:1]

    def _teach(self, teachers: Sequence[Head], task: Task, outputs: Outputs) -> Array:
        """Log probabilities [B, classes] of what the teachers say of a task."""
        said = jnp.stack([jax.nn.log_softmax(outputs.logits[h.name]) for h in teachers])
        said = jax.nn.logsumexp(said, 0) - jnp.log(len(teachers))
        theirs = next(t for t in self.tasks if t.name == teachers[0].task)
        return said if theirs.name == task.name else lift(said, theirs.level, task.level, self.taxonomy)

    def _remember(self, granularity: str, memory: Mapping, parts: Sequence, batch: Batch) -> dict:
        """A granularity's table of losses, with what was seen of this batch: the mean over its heads."""
        known = jnp.stack([k for _, k in parts])
        if granularity in batch.weights:  # what it does not learn from stays as bad as it began
            known &= (batch.weights[granularity] > 0)[None]
        each = jnp.sum(jnp.stack([v for v, _ in parts]) * known, 0) / jnp.maximum(known.sum(0), 1)
        rows = jnp.where(batch.mask & known.any(0) & (batch.index >= 0), batch.index, self.examples)
        return dict(memory) | {"loss": memory["loss"].at[rows].set(each.astype(jnp.float32), mode="drop")}


def _weigh_examples(memory: Mapping) -> dict:
    """Weights in proportion to the losses, of mean 1; what was never seen counts as the mean does."""
    loss = memory["loss"]
    mean = jnp.nanmean(loss)
    share = jnp.where(jnp.isfinite(loss), loss / jnp.maximum(mean, 1e-12), 1.0)
    weight = jnp.clip(share, LEAST, MOST)
    weight = jnp.where(jnp.isfinite(mean) & (mean > 0), weight / weight.mean(), 1.0)
    return dict(memory) | {"weight": weight.astype(jnp.float32)}
