"""Ratings at several granularities: groups of users and items, each user, each item, each pair, and what else was rated.

    python -m experiments.ratings_mg --config.data.source=movielens:DIR --config.data.fold=all
    python -m experiments.ratings_mg --config.data.source=csv:FILE     # user, item, rating; time, user_NAME, item_NAME
    python -m experiments.ratings_mg --workdir=W --predict=user=196,item=242

Presets (`--config.preset`): `history`, all but pairs; `pairs`, a biased matrix factorisation; `ladder`, all; `conv`, separable
convolutions over the products of all fields, in place of the pairs. Who is new to train is known by their groups alone.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import common
from experiments.plans import RunConfig, build_plan, points_of
from experiments.predict import PRESENT, Seen
from experiments.recommend import measured, over_folds
from mgjax.branches import Factors, FieldConv
from mgjax.branches.factors import Field
from mgjax.config import key
from mgjax.data.ratings import NewcomerDropout, RatingsEncoder
from mgjax.data.ratings_source import RatingsConfig, load_ratings
from mgjax.granularity import Fields, Granularity, Head, Task
from mgjax.metrics import Metrics, MultiLabelMetrics, RegressionMetrics
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy

PRESETS = {
    "history": ("group", "user", "item", "history"),
    "pairs": ("pair",),
    "ladder": ("group", "user", "item", "pair", "history"),
    "conv": ("group", "user", "item", "conv", "history"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    width: int = key(128, "of the embeddings", low=1)
    biases: int = key(8, "width of the biases", low=0)
    dropout: float = key(0.6, "of the products of embeddings", low=0, high=0.99)
    newcomers: float = key(0.05, "probability that a user, or an item, is taken for new in training", low=0, high=0.9)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: str = key("history", "what is seen", choices=tuple(PRESETS))
    data: RatingsConfig = RatingsConfig()
    model: ModelConfig = ModelConfig()


RECIPE = {
    "plan.kind": "joint",
    "plan.joint": 15.0,
    "plan.batch_size": 500,
    "plan.eval_batch_size": 1000,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.2,
    "smoothing": 0.0,
}


def views_of(encoder: RatingsEncoder) -> dict[str, tuple[list[Field], list[Field]]]:
    """Granularity → the fields of its two sides, coarse to fine; what lacks them is left out."""
    field = lambda name: Field(name, encoder.sizes[name], name in ("history", "audience"))
    users, items = ([field(f) for f in encoder.groups(s)] for s in ("user", "item"))
    user, item = field("user"), field("item")
    sides = {
        "group": (users, items),
        "user": ([user], items),
        "item": (users, [item]),
        "pair": ([user], [item]),
        "conv": ([user, *users], [item, *items]),
        "history": ([field("history")], [field("audience")]),
    }
    return {name: pair for name, pair in sides.items() if any(pair)}


def build_model(config: Config, encoder: RatingsEncoder, bounds: Sequence, center: float, spread: float, seen: bool):
    known, preset, config = views_of(encoder), config.preset, config.model
    branches, granularities = {}, []
    for name in (n for n in PRESETS[preset] if n in known):
        left, right = known[name]
        if name == "conv":
            branches[name] = FieldConv(left, right, config.width // 4, (config.width // 4,), config.dropout)
        else:
            branches[name] = Factors(left, right, config.width, config.biases, config.dropout)
        view = Fields(tuple(n for f in (*left, *right) for n in f.inputs))
        granularities.append(Granularity(name, name, list(branches[name].feature_info)[-1], view))
    tasks = [Task("rating", "rating", 1, kind="regression", center=center, spread=spread, bounds=tuple(bounds))]
    tasks += [Task("seen", "seen", 1, kind="multilabel")] * seen
    heads = [Head(t.name, {g.name: "grad" for g in granularities}) for t in tasks]
    return MultiGranularityModel(granularities, tasks, heads, branches)


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The recipe as values of keys, and one line that says what was chosen."""
    return RECIPE, f"preset {given.get('preset', 'history')}, fold {given.get('data.fold', '1')}"


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""

    def one(config: Config, workdir: pathlib.Path, meta: dict) -> dict:
        data = load_ratings(config.data)
        model = build_model(config, data.encoder, data.bounds, data.center, data.spread, "seen" in data.targets)
        plan = build_plan(config.plan, model, len(data.train))
        parts = [RegressionMetrics(model.tasks, model.heads, {"rating": data.center})]
        parts += [MultiLabelMetrics(model.tasks, model.heads)] if "seen" in data.targets else []
        facts = common.train_model(
            config, data, model, plan, points_of(model), workdir, meta,
            augment=NewcomerDropout(config.model.newcomers), metrics=Metrics(parts),
        )  # fmt: skip
        return measured(facts, model, data)

    return over_folds(config, workdir, meta, one), []


def see(config: Config, record: Mapping, tree: Taxonomy | None) -> Seen:
    """New pairs, as the trained model sees them."""
    encoder = RatingsEncoder.restored(record["encoder"])
    labels = {"seen": ["seen"]} if "seen" in record["targets"] else {}
    model = build_model(config, encoder, record["bounds"], record["center"], record["spread"], bool(labels))
    wanted = lambda key: key in record["inputs"] or key.startswith(PRESENT)
    return Seen(model, tree, lambda rows: {k: v for k, v in encoder.read(rows).items() if wanted(k)}, labels)


if __name__ == "__main__":
    common.main("ratings_mg", Config(), resolve, train, [RECIPE], see, "")
