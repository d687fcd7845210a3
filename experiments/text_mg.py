"""Texts at three granularities: characters, words, and the sentence.

    python -m experiments.text_mg --config.data.source=trec:DIR      # questions, 6 → 50 classes
    python -m experiments.text_mg --config.data.source=csv:FILE      # a column 'text', one per level
    python -m experiments.text_mg --workdir=W --predict="Who wrote Hamlet?"

Presets (`--config.preset`): `bags`, bags of n-grams, of characters, of words, of the first phrase, and of words with the first
ones of the text, each weighed by how rare it is, read by one linear classifier per level; `fused`, sequences of characters and
words and one bag of all n-grams, each with classifiers of its own beside those that read the fusion; `characters`, `words`,
`sentence`: one of these alone. Sequences of words are read by separable convolutions, by a transformer or by the mean of their
embeddings (`--config.model.words`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import common
from experiments.plans import RunConfig, build_plan, points_of
from experiments.predict import Seen
from mgjax.branches import TextConv, TextTransformer, TokenCounts, TokenMean
from mgjax.config import key
from mgjax.data.text import TextEncoder, TokenDropout
from mgjax.data.text_source import TextConfig, load_texts
from mgjax.fusion import FUSIONS
from mgjax.granularity import FUSED, Characters, Granularity, Head, Sentence, Task, Words
from mgjax.metrics import ClassificationMetrics, Metrics, MultiLabelMetrics
from mgjax.model import MultiGranularityModel
from mgjax.taxonomy import Taxonomy
from mgjax.train import ParamGroup

PRESETS = {"bags": ("characters", "words", "phrases", "sentence"), "fused": ("characters", "words", "sentence")}
PRESETS |= {name: (name,) for name in ("characters", "words", "sentence")}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    characters: int = key(160, "characters that are read of a text", low=1)
    length: int = key(40, "words that are read of a text", low=1)
    ngrams: tuple[int, ...] = key((1, 3), "shortest and longest n-gram of words in bags", low=1)
    subwords: tuple[int, ...] = key((3, 5), "shortest and longest n-gram of characters in them (0,0: none)", low=0)
    anchors: int = key(2, "first words of a text with which each later one is paired in them (0: none)", low=0)
    phrases: int = key(1, "first phrases, runs of words that are not common, that bags tell of by themselves (0: none)", low=0)
    buckets: int = key(1 << 16, "into which n-grams are hashed", low=2)
    words: str = key("conv", "what reads words", choices=("conv", "transformer", "mean"))
    embedding: int = key(128, "width of characters and words", low=1)
    width: int = key(128, "of what convolutions see, and of the bag of fused", low=1)
    depth: int = key(1, "convolutions of words, or blocks of the transformer", low=1)
    fusion: str = key("concat", "of the granularities", choices=tuple(FUSIONS))
    fusion_width: int = key(256, "of the fused vector", low=1)
    dropout: float = key(0.5, "of the inputs of the heads", low=0, high=0.99)
    token_dropout: float = key(0.1, "probability that a token is hidden in training", low=0, high=0.9)
    granularity_dropout: float = key(0.0, "probability that the fusion lacks a granularity", low=0, high=0.99)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    preset: str = key("bags", "what is seen, and how", choices=tuple(PRESETS))
    data: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()


RECIPE = {"plan.kind": "joint", "plan.joint": 12.0, "plan.batch_size": 64, "plan.eval_batch_size": 100, "decoder": "product"}
ADAM = {"optim.name": "adamw", "optim.learning_rate": 3e-3, "optim.weight_decay": 0.0}
# Of bags; Adam would scale away that rare n-grams are seen rarely.
LINEAR = {"optim.name": "sgd", "optim.learning_rate": 5.0, "optim.weight_decay": 0.0}
LINEAR |= {"model.dropout": 0.0, "model.token_dropout": 0.4}


def views_of(config: Config) -> dict:
    """Granularity → view."""
    preset, config = config.preset, config.model
    words, characters, hashed = tuple(config.ngrams), tuple(config.subwords), {"buckets": config.buckets, "length": 512}
    if preset == "bags":
        bag = lambda words=(0, 0), characters=(0, 0), *more: Sentence(words, characters, *more, weighed=True, **hashed)
        views = {"characters": bag((0, 0), characters)} if characters[1] else {}
        views |= {"words": bag(words)} | ({"phrases": bag((0, 0), (0, 0), 0, config.phrases)} if config.phrases else {})
        return views | ({"sentence": bag((0, 0), (0, 0), config.anchors)} if config.anchors else {})
    views = {"characters": Characters(config.characters), "words": Words(config.length)}
    views["sentence"] = Sentence(words, characters, config.anchors, **hashed)
    return {name: views[name] for name in PRESETS[preset]}


def build_model(config: Config, encoder: TextEncoder, tree: Taxonomy | None, classes: Mapping) -> MultiGranularityModel:
    views, bags, config = views_of(config), config.preset == "bags", config.model
    names, size = list(views), lambda name: encoder.sizes[views[name].key]
    make = {
        "characters": lambda name: TextConv(size(name), config.embedding, (config.width,) * 2, kernel=5),
        "sentence": lambda name: TokenMean(size(name), config.width, how="root"),
        "words": lambda name: {
            "conv": lambda: TextConv(size(name), config.embedding, (config.width,) * config.depth),
            "transformer": lambda: TextTransformer(size(name), config.length, config.embedding, config.depth),
            "mean": lambda: TokenMean(size(name), config.embedding),
        }[config.words](),
    }
    branches = {name: TokenCounts(size(name)) if bags else make[name](name) for name in names}
    granularities = [Granularity(n, n, list(branches[n].feature_info)[-1], views[n]) for n in names]
    tasks = [Task(l, l, tree.size(l), l) for l in tree.levels] if tree else []
    tasks += [Task(c, c, len(labels), kind="multilabel") for c, labels in classes.items()]
    fused = len(names) > 1 and not bags
    if bags:
        heads = [Head(t.name, dict.fromkeys(names, "grad")) for t in tasks]
    else:
        heads = [Head(t.name, {n: "grad"}, f"{t.name}_{n}") for n in names for t in tasks]
        heads += [Head(t.name, {FUSED: "grad"}) for t in tasks if fused]
    fusion = FUSIONS[config.fusion](config.fusion_width) if fused else None
    return MultiGranularityModel(
        granularities, tasks, heads, branches, fusion, config.dropout, granularity_dropout=config.granularity_dropout
    )


def resolve(backend: str, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The recipe as values of keys, and one line that says what was chosen."""
    preset = given.get("preset", "bags")
    return RECIPE | (LINEAR if preset == "bags" else ADAM), f"preset {preset}"


def train(config: Config, workdir: pathlib.Path, meta: dict) -> tuple[dict, list]:
    """From the dataset to the figures of the summary."""
    data = load_texts(config.data, list(views_of(config).values()))
    model = build_model(config, data.encoder, data.taxonomy, data.classes)
    plan = build_plan(config.plan, model, len(data.train))
    parts = [ClassificationMetrics(data.taxonomy, model.tasks, model.heads, config.decoder)] if data.taxonomy else []
    parts += [MultiLabelMetrics(model.tasks, model.heads)] if data.classes else []
    dropout = TokenDropout(config.model.token_dropout)
    # The loss of any number of labels is their mean, so gradient descent needs a rate as many times as high.
    several = [ParamGroup(f"head_{t.name}*", learning_rate=float(t.classes)) for t in model.tasks if t.kind == "multilabel"]
    facts = common.train_model(
        config, data, model, plan, points_of(model), workdir, meta, augment=dropout, metrics=Metrics(parts),
        groups=[*several, ParamGroup("*")] if several and config.preset == "bags" else (),
    )  # fmt: skip
    return facts, common.examples(config, data, model, facts.pop("variables"), dropout, plan[-1].op)


def see(config: Config, record: Mapping, tree: Taxonomy | None) -> Seen:
    """New texts, as the trained model sees them."""
    encoder = TextEncoder(list(views_of(config).values()), record["vocabularies"], record.get("frequencies", {}))
    model = build_model(config, encoder, tree, record["classes"])
    return Seen(model, tree, lambda rows: encoder.encode([row["text"] for row in rows]), record["classes"])


if __name__ == "__main__":
    common.main("text_mg", Config(), resolve, train, [RECIPE, ADAM, LINEAR], see, "text")
