"""The objective: named losses of all heads, weighted, to one scalar."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from mgjax.contracts import Batch, Outputs
from mgjax.granularity import DeclarationError, Head, Task
from mgjax.losses import LOSSES, masked_mean


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss = Σ_heads weight[task] / (heads of that task) · loss(head)

    Attributes:
        tasks, heads: the declarations of the model.
        weights: (task, weight) pairs; 1 where a task is not named.
        smoothing: label smoothing of classification.

    Raises:
        DeclarationError: a weight for an unknown task, or no weight above 0.

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

    def __post_init__(self):
        known = [t.name for t in self.tasks]
        if unknown := [n for n, _ in self.weights if n not in known]:
            raise DeclarationError(f"loss weights name {unknown}; there are tasks {known}")
        if all(dict(self.weights).get(n, 1.0) <= 0 for n in known):
            raise DeclarationError(f"no loss weight is above 0: {dict(self.weights)}")

    def __call__(self, outputs: Outputs, batch: Batch):
        """Returns the float32 loss and, for the log, named scalars: every head's loss and accuracy.

        Where the batch was mixed, the loss is of both labels, the accuracy of a row's own.
        """
        tasks = {t.name: t for t in self.tasks}
        answered = [h for h in self.heads if h.name in outputs.logits]
        total, seen = jnp.float32(0), {}
        for head in answered:
            task, logits = tasks[head.task], outputs.logits[head.name]
            labels = batch.targets[task.target]
            mixed = {"partner": batch.partner[task.target], "share": batch.share} if batch.partner else {}
            loss = LOSSES[task.kind](logits, labels, batch.mask, smoothing=self.smoothing, **mixed)
            share = dict(self.weights).get(task.name, 1.0) / sum(h.task == task.name for h in answered)
            total += share * loss
            seen[f"loss/{head.name}"] = loss
            right = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
            seen[f"accuracy/{head.name}"] = masked_mean(right, batch.mask & (labels >= 0))
        return total, {"loss": total, **seen}
