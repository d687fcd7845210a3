"""What is measured of a recommender beside the metrics of its tasks: folds, newcomers, baselines, and rankings of all items."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mgjax.data.ratings_source import RatingsDataset, folds_of
from mgjax.ranking import ranking_figures
from mgjax.train import distributed
from mgjax.train.monitor import write_json

K = 10  # items that are looked at of a ranking
RANKED = 1000  # users at most for whom all items are ranked, drawn at random where there are more
RELEVANT = 4.0  # the lowest rating of an item that ought to be found
ROWS = 2048  # pairs of a batch


def measured(facts: dict, model, data: RatingsDataset) -> dict:
    """The facts of a trained model with what is asked of a recommender, and without its variables.

    To `test.tasks.rating` come `rmse_warm`, `rmse_new_user` and `rmse_new_item`, by whether train knows the user and the item,
    and to every task `ndcg@10` and `recall@10`: for each user of the test, or a thousand of them, all items that train and
    validation do not show as rated are ranked; those that the test shows with a rating of 4 or more ought to be found.
    `test.baselines` has the same figures of the mean of train, of the biases of users and items, and of how often items
    were rated.
    """
    variables = facts.pop("variables", None)
    if variables is None or not distributed.is_main():
        return facts
    apply = jax.jit(lambda v, x, present: model.apply(v, x, model.everything, present=present, train=False).logits)

    def say(users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
        """Task → what is predicted, or its logit."""
        said = []
        for start in range(0, len(users), ROWS):
            at = [np.resize(a[start : start + ROWS], ROWS) for a in (users, items)]  # the last batch is as large as all
            made = data.encoder.encode(*at)
            present = {g: made[f"present/{g}"] for g in data.present}
            said.append(
                {n: v[:, 0] for n, v in jax.device_get(apply(variables, {k: made[k] for k in data.inputs}, present)).items()}
            )
        return {h.task: np.concatenate([part[h.name] for part in said])[: len(users)] for h in model.heads}

    test, biases = data.test, data.biases
    rated = np.isfinite(test.targets["rating"])
    users, items, truth = test.users[rated], test.items[rated], test.targets["rating"][rated].astype(np.float64)
    clip = lambda r: np.clip(r, *data.bounds)
    answers = {
        "model": say(users, items)["rating"],
        "mean": np.full(len(truth), biases.mean),
        "biases": clip(biases(users, items)),
    }
    figures = {who: _errors(said, truth, users, items, data) for who, said in answers.items()}
    tasks = {name: dict(own) for name, own in facts["test"]["tasks"].items()}
    tasks["rating"] |= {k: v for k, v in figures.pop("model").items() if k not in ("rmse", "mae")}
    rankings = _rankings(say, users, items, truth, data)
    for task, own in rankings.items():
        if task in tasks:
            tasks[task] |= own
    figures |= {"popularity": rankings["popularity"]}
    return facts | {"test": facts["test"] | {"tasks": tasks, "baselines": figures}}


def _errors(said, truth, users, items, data: RatingsDataset) -> dict[str, float]:
    """Root of the mean squared error, and mean absolute error, of all ratings, and by who is known."""
    new_user, new_item = (~data.encoder.sides[s].known[at] for s, at in (("user", users), ("item", items)))
    rmse = lambda rows: float(np.sqrt(np.mean((said[rows] - truth[rows]) ** 2)))
    parts = {"warm": ~new_user & ~new_item, "new_user": new_user & ~new_item, "new_item": new_item & ~new_user}
    own = {f"rmse_{name}": rmse(rows) for name, rows in parts.items() if rows.any()}
    return {"rmse": rmse(np.ones(len(truth), bool)), "mae": float(np.mean(np.abs(said - truth)))} | own


def _rankings(say: Callable, users, items, truth, data: RatingsDataset) -> dict[str, dict[str, float]]:
    """Task → figures of its ranking; none where nobody has anything to be found."""
    count = len(data.encoder.sides["item"].names)
    who = np.unique(users[truth >= RELEVANT])
    who = np.sort(np.random.default_rng(0).permutation(who)[:RANKED])
    relevant, candidates = np.zeros((len(who), count), bool), np.ones((len(who), count), bool)
    row = np.full(len(data.encoder.sides["user"].names), -1)
    row[who] = np.arange(len(who))
    for known in (data.train, data.validation):
        keep = np.isfinite(known.targets["rating"]) & (row[known.users] >= 0)
        candidates[row[known.users[keep]], known.items[keep]] = False
    keep = (truth >= RELEVANT) & (row[users] >= 0)
    relevant[row[users[keep]], items[keep]] = True
    if not relevant.any():
        return {"popularity": {}}
    scores = say(np.repeat(who, count), np.tile(np.arange(count), len(who)))
    scores = {task: s.reshape(len(who), count).astype(np.float64) for task, s in scores.items()}
    kept = np.isfinite(data.train.targets["rating"])
    popular = np.bincount(data.train.items[kept], minlength=count).astype(np.float64)
    scores["popularity"] = np.broadcast_to(popular, (len(who), count))
    figures = {task: ranking_figures(s, relevant, candidates, K) for task, s in scores.items()}
    return {task: {k: v for k, v in own.items() if k != "users"} for task, own in figures.items()}


def over_folds(config: Any, workdir: pathlib.Path, meta: dict, one: Callable) -> dict:
    """The facts of one fold, or of all, whose test figures are means over the folds.

    With `data.fold=all` every fold has a workdir of its own, `WORKDIR/fold1` and so on, as a run of that fold alone has;
    folds that are finished are not trained again.

    Args:
        one: (config, workdir, meta) → facts.
    """
    configs = folds_of(config.data)
    if config.data.fold != "all":
        return one(config, workdir, meta)
    parts = []
    for of in configs:
        folder = workdir / f"fold{of.fold}"
        own = meta | {"config": meta["config"] | {"data.fold": of.fold}}
        record = folder / "facts.json"
        if not distributed.from_main(record.exists()):
            if distributed.is_main():
                folder.mkdir(exist_ok=True)
                write_json(folder / "config.json", own)
            distributed.agreed("")  # all wait for the folder
            facts = one(dataclasses.replace(config, data=of), folder, own)
            if distributed.is_main():
                write_json(record, facts)
                print(f"fold {of.fold}: " + ", ".join(f"{k} {v:.4f}" for k, v in facts["test"]["tasks"]["rating"].items()))
        else:
            facts = json.loads(record.read_text())
        parts.append(facts)
    tests = [facts["test"] for facts in parts]
    tables = {kind: _mean([t.get(kind, {}) for t in tests]) for kind in ("tasks", "baselines")}
    tables["tasks"]["rating"]["rmse_std"] = float(np.std([t["tasks"]["rating"]["rmse"] for t in tests], ddof=1))
    total = {k: sum(f[k] for f in parts) for k in ("train_flops", "steps", "seconds")}
    test = {"examples": sum(t["examples"] for t in tests), **tables, "folds": [t["tasks"] for t in tests]}
    return {"params": parts[0]["params"], **total, "test": test, "points": parts[0]["points"], "tested": parts[0]["tested"]}


def _mean(tables: Sequence[Mapping]) -> dict:
    """name → figure → its mean over the tables that have it."""
    names = dict.fromkeys(name for table in tables for name in table)
    rows = {name: [table[name] for table in tables if name in table] for name in names}
    return {
        name: {k: float(np.mean([r[k] for r in own if k in r])) for k in dict.fromkeys(k for r in own for k in r)}
        for name, own in rows.items()
    }
