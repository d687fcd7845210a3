"""Texts in a hierarchy of classes: `experiments.text_mg` against linear support vector machines and HiClass, on equal splits.

    pip install 'mgjax[bench]'
    python -m experiments.benchmarks.questions --source=trec:DIR [--folds=5] [--seeds=0,1,2] [--json=FILE] [-- KEYS]

The dataset's own test, and each of so many parts of its training texts in turn (0: none), are answered by

* `mgjax`: text_mg with its recipe and whatever keys are given, per seed on the test, with the first seed on the folds;
* `svm`: a linear support vector machine per level on tf-idf of words and pairs of words, scikit-learn's defaults;
* `svm, same n-grams`: the same on the n-grams that text_mg sees, each granularity's tf-idf of length 1;
* `hiclass`: a linear support vector machine per parent node (Miranda, Köhnecke & Renard 2023, JMLR 24(29)), on words and pairs.

KEYS are further ones of text_mg (`--config.KEY=VALUE`). Ours chooses nothing by the validation part; the others learn from it
too. Printed are accuracies at every level: means over seeds and over folds, with standard deviations.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import text_mg
from mgjax import config as cfg
from mgjax.data.text import ngrams
from mgjax.data.text_source import load_texts
from mgjax.granularity import Sentence
from mgjax.train.monitor import hardware


def labelled(data, split: str) -> tuple[list[str], np.ndarray]:
    """Texts, and their names [texts, levels]."""
    source, tree = getattr(data, split), data.taxonomy
    labels = source.take(np.arange(len(source)))
    names = [[tree.names[i][l] for l in labels[level]] for i, level in enumerate(tree.levels)]
    return data.texts[split], np.array(names).T


def theirs(data) -> dict[str, np.ndarray]:
    """Model → accuracy at every level."""
    import scipy.sparse
    from hiclass import LocalClassifierPerParentNode
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    parts = [labelled(data, s) for s in ("train", "validation")]
    texts, names = [t for part, _ in parts for t in part], np.concatenate([n for _, n in parts])
    asked, truth = labelled(data, "test")
    encoder = data.encoder
    bags = [functools.partial(encoder.grams, v) for v in encoder.views if isinstance(v, Sentence)]
    seen = {"svm": [lambda t: ngrams(t, (1, 2), (0, 0))]} | ({"svm, same n-grams": bags} if bags else {})
    found = {}
    for model, analyzers in seen.items():
        weighed = [TfidfVectorizer(analyzer=a, sublinear_tf=True).fit(texts) for a in analyzers]
        x, of = (scipy.sparse.hstack([w.transform(t) for w in weighed]).tocsr() for t in (texts, asked))
        found[model] = np.array([(LinearSVC().fit(x, y).predict(of) == t).mean() for y, t in zip(names.T, truth.T)])
        if model == "svm":
            tree = LocalClassifierPerParentNode(local_classifier=LinearSVC()).fit(x, names)
            found["hiclass"] = (tree.predict(of) == truth).mean(0)
    return found


def ours(given: Mapping, seed: int) -> tuple[np.ndarray, float]:
    """Accuracy at every level, and seconds of training."""
    chosen, _ = text_mg.resolve("cpu", dict(given))
    config = cfg.override(text_mg.Config(), chosen | dict(given) | {"seed": seed})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        facts, _ = text_mg.train(config, pathlib.Path(folder), {"experiment": "text_mg", "config": {}})
    return np.array([v["accuracy"] for v in facts["test"]["levels"].values()]), facts["seconds"]


def compared(given: Mapping, seeds: Sequence[int], folds: int) -> tuple[dict, tuple[str, ...], float]:
    """({"test" or "folds" → {model → accuracies [runs, levels]}}, levels, seconds of training per run of ours)."""
    found: dict[str, dict[str, list]] = {}
    seconds, levels = [], ()
    for fold in range(folds + 1):
        where, split = ("folds", {"data.folds": folds, "data.fold": fold}) if fold else ("test", {})
        chosen, _ = text_mg.resolve("cpu", dict(given))
        config = cfg.override(text_mg.Config(), chosen | dict(given) | split)
        with contextlib.redirect_stdout(io.StringIO()):
            data = load_texts(config.data, list(text_mg.views_of(config).values()))
        levels, rows = data.taxonomy.levels, found.setdefault(where, {})
        for model, accuracies in theirs(data).items():
            rows.setdefault(model, []).append(accuracies)
        for seed in seeds[:1] if fold else seeds:
            accuracies, took = ours(dict(given) | split, seed)
            rows.setdefault("mgjax", []).append(accuracies)
            seconds.append(took)
        print(
            f"{where} {fold or ''}: " + ", ".join(f"{m} {np.round(100 * v[-1], 1).tolist()}" for m, v in rows.items()),
            flush=True,
        )
    return {w: {m: np.array(v) for m, v in rows.items()} for w, rows in found.items()}, levels, float(np.mean(seconds))


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="as data.source of text_mg")
    parser.add_argument("--seeds", default="0,1,2", help="of ours")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("more", nargs="*", help="further keys of text_mg, after --")
    options = parser.parse_args(arguments)
    if options.folds < 0 or options.folds == 1:
        parser.error("two folds or more are needed, or none (0)")
    try:
        import hiclass  # noqa: F401
    except ImportError:
        parser.error("HiClass is needed: pip install 'mgjax[bench]'")
    values = flags.FlagValues()
    cfg.define(text_mg.Config(), values)
    try:
        values(["questions", *options.more])
    except flags.Error as error:
        parser.error(str(error))
    given = cfg.given(text_mg.Config(), values) | {"data.source": options.source}
    print(hardware(), flush=True)
    found, levels, seconds = compared(given, [int(s) for s in options.seeds.split(",")], options.folds)
    figures: dict[str, float] = {"seconds": round(seconds, 2)}
    for where, rows in found.items():
        table = Table(title=f"{options.source}, {where}")
        for column in ("", *levels):
            table.add_column(column, justify="right" if column else "left")
        for model, accuracies in rows.items():
            means, stds = accuracies.mean(0), accuracies.std(0, ddof=1) if len(accuracies) > 1 else [None] * len(levels)
            table.add_row(model, *(f"{m:.2%}" + (f" ± {s:.2%}" if s is not None else "") for m, s in zip(means, stds)))
            name = model.replace(", ", "_").replace(" ", "_")
            figures |= {f"{where}_{name}_{l}": round(float(m), 5) for l, m in zip(levels, means)}
            figures |= {f"{where}_{name}_{l}_std": round(float(s), 5) for l, s in zip(levels, stds) if s is not None}
        Console(width=100, highlight=False).print(table)
    print(f"ours trained {seconds:.0f} s a run")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
