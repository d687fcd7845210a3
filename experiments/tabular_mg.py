"""Rows of a table at several granularities, each a group of columns, or the same columns through a linear and a deep branch.

    python -m experiments.tabular_mg                                                       # wine, which scikit-learn brings
    python -m experiments.tabular_mg --config.data.source=csv:FILE --config.data.levels=family,species
    python -m experiments.tabular_mg --config.data.source=parquet:FILE --config.data.targets=price

    python -m experiments.tabular_mg --workdir=W --predict=alcohol=13.2,ash=2.4

Presets (`--config.preset`): `linear`, a linear or logistic regression; `deep`, a multi-layer perceptron; `both`, their fusion;
`groups`, a perceptron per group of columns (`--config.model.groups=NAME=A+B,…`) and their fusion.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import common
from experiments.plans import RunConfig, build_plan, points_of
from experiments.predict import Seen
from mgjax.branches import TableNet
from mgjax.config import ConfigError, key
from mgjax.data.columns import ColumnEncoder, ColumnsConfig, load_columns
from mgjax.data.pipeline import Plain
from mgjax.fusion import FUSIONS
from mgjax.granularity import FUSED, Columns, Granularity, Head, Task
from mgjax.metrics import ClassificationMetrics, Metrics, RegressionMetrics
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy

PRESETS = ("linear", "deep", "both", "groups")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    groups: tuple[str, ...] = key((), "granularities of preset groups, coarse to fine: NAME=COLUMN+COLUMN, …")
    widths: tuple[int, ...] = key((64, 64), "units per layer of a perceptron", low=1)
    embedding: int = key(0, "width of a category's embedding (0: one-hot)", low=0)
    fusion: str = key("concat", "of the granularities", choices=tuple(FUSIONS))
    fusion_width: int = key(64, "of the fused vector", low=1)
    dropout: float = key(0.0, "of the inputs of the heads", low=0, high=0.99)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: str = key("both", "what is seen, and how", choices=PRESETS)
    data: ColumnsConfig = ColumnsConfig()
    model: ModelConfig = ModelConfig()


RECIPE = {
    "plan.kind": "joint",
    "plan.joint": 100.0,
    "plan.batch_size": 32,
    "plan.eval_batch_size": 100,
    "optim.name": "adamw",
    "optim.learning_rate": 3e-3,
    "optim.weight_decay": 0.01,
    "smoothing": 0.0,
}
BUNDLED = {"sklearn:diabetes": {"data.targets": ("target",)}}


def views_of(config: Config) -> dict[str, Columns]:
    """Granularity → the columns that it sees."""
    if config.preset != "groups":
        return {name: Columns() for name in (("linear", "deep") if config.preset == "both" else (config.preset,))}
    views = {}
    for item in config.model.groups:
        name, _, columns = item.partition("=")
        if not name or not columns or name in views:
            raise ConfigError(f"model.groups: '{item}' is no NAME=COLUMN+COLUMN of its own")
        views[name] = Columns(tuple(columns.split("+")))
    if not views:
        raise ConfigError("preset groups needs groups of columns: --config.model.groups=NAME=COLUMN+COLUMN,…")
    return views


def build_model(config: Config, encoder: ColumnEncoder, tree: Taxonomy | None, centers: Mapping, spreads: Mapping):
    branches, granularities = {}, []
    for name, view in views_of(config).items():
        widths = () if name == "linear" and config.preset != "groups" else config.model.widths
        branches[name] = TableNet(*encoder.sizes(view), config.model.embedding if widths else 0, widths)
        granularities.append(Granularity(name, name, list(branches[name].feature_info)[-1], view))
    tasks = [Task(l, l, tree.size(l), l) for l in tree.levels] if tree else []
    tasks += [Task(t, t, 1, kind="regression", center=centers[t], spread=spreads[t]) for t in centers]
    source = FUSED if len(branches) > 1 else next(iter(branches))
    fusion = FUSIONS[config.model.fusion](config.model.fusion_width) if source == FUSED else None
    return MultiGranularityModel(
        granularities, tasks, [Head(t.name, {source: "grad"}) for t in tasks], branches, fusion, config.model.dropout
    )


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The recipe as values of keys, and one line that says what was chosen."""
    source = given.get("data.source", "sklearn:wine")
    bundled = BUNDLED.get(source, {"data.levels": ("class",)} if source.startswith("sklearn:") else {})
    return RECIPE | bundled, f"preset {given.get('preset', 'both')} on {source}"


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""
    data = load_columns(config.data, list(dict.fromkeys(views_of(config).values())))
    model = build_model(config, data.encoder, data.taxonomy, data.centers, data.spreads)
    parts = [ClassificationMetrics(data.taxonomy, model.tasks, model.heads, config.decoder)] if data.taxonomy else []
    parts += [RegressionMetrics(model.tasks, model.heads, data.centers)] if data.targets else []
    plan = build_plan(config.plan, model, len(data.train))
    facts = common.train_model(
        config, data, model, plan, points_of(model), workdir, meta, augment=Plain(), metrics=Metrics(parts)
    )  # fmt: skip
    facts.pop("variables")
    return facts, []


def see(config: Config, record: Mapping, tree: Taxonomy | None) -> Seen:
    """New rows, as the trained model sees them."""
    encoder = ColumnEncoder(record["numbers"], record["categories"], record["left_out"])
    model = build_model(config, encoder, tree, record["centers"], record["spreads"])

    def encode(rows: Sequence[Mapping]) -> dict:
        table = {c: [row.get(c) for row in rows] for c in (*encoder.numbers, *encoder.categories)}
        encoded = {v: encoder.encode(table, v) for v in dict.fromkeys(views_of(config).values())}
        return {f"{v.key}/{kind}": a for v, made in encoded.items() for kind, a in made.items()}

    return Seen(model, tree, encode)


if __name__ == "__main__":
    common.main("tabular_mg", Config(), resolve, train, [RECIPE, {"data.levels": (), "data.targets": ()}], see, "")
