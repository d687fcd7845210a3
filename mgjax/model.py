"""The composition: views → branches → projections → fusion → heads, in two methods with one seam."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgjax.contracts import Features, Outputs
from mgjax.granularity import (
    FUSED,
    DeclarationError,
    Granularity,
    Head,
    OperatingPoint,
    Task,
    check_declarations,
)
from mgjax.heads import head_of
from mgjax.views import apply_view


class MultiGranularityModel(nn.Module):
    """A model that sees its input at several granularities and answers tasks at any of them.

    One code path serves several branches with their own views, one trunk tapped at several
    depths, and several submodels whose answers are averaged: only the declarations differ.

    Attributes:
        granularities, tasks, heads: the declarations.
        branches: name → branch.
        fusion: makes `"fused"` of the features of all active granularities.
        dropout: of the heads.
        projections: granularity → module that makes its features of what its branch saw; without one they are that.
        granularity_dropout: probability that a granularity is absent for an example, in training, for what reads several of
            them: the fusion, and heads with several sources. At least one of all that are active stays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from mgjax.branches import ResNet
        >>> model = MultiGranularityModel(
        ...     granularities=[Granularity("coarse", "trunk", "stage1"), Granularity("fine", "trunk", "stage2")],
        ...     tasks=[Task("superclass", "superclass", 20), Task("class", "class", 100)],
        ...     heads=[Head("superclass", {"coarse": "grad", "fine": "stop"}), Head("class", {"fine": "grad"})],
        ...     branches={"trunk": ResNet(blocks=(1, 1), widths=(8, 16), stem="cifar")},
        ... )
        >>> inputs = {"image": jnp.ones((2, 8, 8, 3))}
        >>> outputs, _ = model.init_with_output(jax.random.key(0), inputs, model.everything, train=False)
        >>> {name: logits.shape for name, logits in sorted(outputs.logits.items())}
        {'class': (2, 100), 'superclass': (2, 20)}
    """

    granularities: Sequence[Granularity]
    tasks: Sequence[Task]
    heads: Sequence[Head]
    branches: Mapping[str, nn.Module]
    fusion: nn.Module | None = None
    dropout: float = 0.0
    projections: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    granularity_dropout: float = 0.0

    def setup(self):
        check_declarations(self.granularities, self.tasks, self.heads, self.branches)
        for g in self.granularities:
            taps = self.branches[g.branch].feature_info
            if g.tap not in taps:
                raise DeclarationError(f"granularity '{g.name}' reads tap '{g.tap}'; '{g.branch}' has {list(taps)}")
        if unknown := set(self.projections) - {g.name for g in self.granularities}:
            raise DeclarationError(f"projections of {sorted(unknown)}, which are no granularities")
        if self.granularity_dropout and not any(FUSED in h.sources or len(h.sources) > 1 for h in self.heads):
            raise DeclarationError("granularity dropout is for what reads several granularities; here no head does")
        if self.fusion is None and (wants := [h.name for h in self.heads if FUSED in h.sources]):
            raise DeclarationError(f"heads {wants} read '{FUSED}', but the model has no fusion")
        task = {t.name: t for t in self.tasks}
        self.head = {h.name: head_of(task[h.task], self.dropout) for h in self.heads}

    @property
    def everything(self) -> OperatingPoint:
        """All granularities, all tasks, full resolution."""
        return OperatingPoint(tuple(g.name for g in self.granularities), tuple(t.name for t in self.tasks))

    def shared(self, op: OperatingPoint) -> list[list[str]]:
        """Groups of active granularities whose features are one and the same: of one tap of one pass, as they are."""
        groups: dict = {}
        for g in (g for g in self.granularities if g.name in op.active):
            of = g.name if g.name in self.projections else (g.branch, g.view, g.tap)
            groups.setdefault(of, []).append(g.name)
        return list(groups.values())

    def __call__(self, inputs: Mapping, op: OperatingPoint, *, present: Mapping | None = None, train: bool) -> Outputs:
        """`features`, then `answer`."""
        return self.answer(self.features(inputs, op, train=train), op, present=present, train=train)

    def features(self, inputs: Mapping, op: OperatingPoint, *, train: bool) -> dict[str, Features]:
        """Runs the branches of the active granularities, each only down to its deepest active tap, and their projections.

        Args:
            inputs: `Batch.inputs`, with normalised floating images [B, H, W, C].
            op: what is asked for.

        Returns:
            granularity → Features.

        Raises:
            DeclarationError: an unknown granularity.
        """
        self._check(op)
        passes: dict = {}  # granularities with one branch and one view share one pass
        for g in self.granularities:
            if g.name in op.active:
                passes.setdefault((g.branch, g.view), []).append(g)
        result = {}
        for (branch, view), readers in passes.items():
            with jax.named_scope(f"branch_{branch}"):
                taps = tuple(sorted({g.tap for g in readers}))
                at_tap = self.branches[branch](apply_view(inputs, view, op.resolution), taps=taps, train=train)
            for g in readers:
                result[g.name] = at_tap[g.tap]
                if g.name in self.projections:
                    with jax.named_scope(f"projection_{g.name}"):
                        result[g.name] = self.projections[g.name](at_tap[g.tap], train=train)
        return result

    def answer(
        self, features: Mapping[str, Features], op: OperatingPoint, *, present: Mapping | None = None, train: bool = False
    ) -> Outputs:
        """Fuses the features and asks the heads of the active tasks.

        A head reads those of its sources that are active, and is skipped where none is.

        Args:
            features: what `features` returned, or a part of it.
            present: granularity → bool [B]; False where an example lacks that granularity.

        Raises:
            DeclarationError: an unknown task, or one that no head can answer from what is active.
        """
        self._check(op)
        features = dict(features)
        several = self._dropped(features, present) if self.granularity_dropout and train else present
        heads = [h for h in self.heads if h.task in op.tasks]
        if any(FUSED in h.sources for h in heads):
            with jax.named_scope("fusion"):
                features[FUSED] = self.fusion(dict(features), several, train=train)
        logits = {}
        for head in heads:
            reads = {
                source: features[source] if how == "grad" else jax.lax.stop_gradient(features[source])
                for source, how in head.reads
                if source in features
            }
            if reads:
                with jax.named_scope(f"head_{head.name}"):
                    logits[head.name] = self.head[head.name](reads, several if len(reads) > 1 else present, train=train)
        if unanswered := set(op.tasks) - {h.task for h in heads if h.name in logits}:
            raise DeclarationError(f"no head can answer {sorted(unanswered)} from the active {list(op.active)}")
        return Outputs(logits)

    def _dropped(self, features: Mapping[str, Features], present: Mapping | None) -> dict:
        """What is present once each granularity was dropped by chance; where all would be, all that is there stays."""
        names = sorted(features)
        rows = features[names[0]].vector.shape[0]
        there = jnp.stack([(present or {}).get(n, jnp.ones(rows, bool)) for n in names], 1)
        kept = there & jax.random.bernoulli(self.make_rng("dropout"), 1 - self.granularity_dropout, there.shape)
        kept = jnp.where(kept.any(1, keepdims=True), kept, there)
        return dict(present or {}) | {n: kept[:, i] for i, n in enumerate(names)}

    def _check(self, op: OperatingPoint) -> None:
        known = {g.name for g in self.granularities}, {t.name for t in self.tasks}
        for kind, asked, names in (("granularity", op.active, known[0]), ("task", op.tasks, known[1])):
            if unknown := set(asked) - names:
                raise DeclarationError(f"the operating point asks for {kind} {sorted(unknown)}; there are {sorted(names)}")
