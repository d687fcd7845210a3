"""Tables at several granularities against scikit-learn: cross-validated accuracy on the sets that it brings.

    python -m experiments.benchmarks.tables [--sets=wine,breast_cancer,digits] [--folds=5] [--json=FILE]

`experiments.tabular_mg` with its own recipe, as a linear member, as a perceptron, and as both fused, against logistic
regression, a random forest and histogram gradient boosting with scikit-learn's defaults. All learn from the same training rows
of each fold, standardised by them alone; the fold's validation part, which ours reports and chooses nothing by, is kept from
all. Printed are means over the folds with their standard deviation, and how long ours trained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import tempfile

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from experiments import tabular_mg
from mgjax import config as cfg
from mgjax.data.columns import load_columns
from mgjax.granularity import Columns
from mgjax.train.monitor import hardware

SETS = ("wine", "breast_cancer", "digits")
OURS = ("linear", "deep", "both")
SEED = 0


def theirs() -> dict:
    """Name → a classifier of scikit-learn."""
    return {
        "logistic regression": LogisticRegression(max_iter=10_000),
        "random forest": RandomForestClassifier(random_state=SEED),
        "gradient boosting": HistGradientBoostingClassifier(random_state=SEED),
    }


def accuracies(name: str, folds: int, more: dict) -> dict[str, list[float]]:
    """Model → accuracy on each fold; `seconds`, what ours trained for."""
    found: dict[str, list[float]] = {}
    for fold in range(1, folds + 1):
        given = {"data.source": f"sklearn:{name}", "data.folds": folds, "data.fold": fold} | more
        chosen, _ = tabular_mg.resolve("cpu", given)
        for preset in OURS:
            config = cfg.override(tabular_mg.Config(), chosen | given | {"preset": preset, "seed": SEED})
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                facts, _ = tabular_mg.train(config, pathlib.Path(folder), {"experiment": "tabular_mg", "config": {}})
            found.setdefault(f"mgjax {preset}", []).append(facts["test"]["levels"]["class"]["accuracy"])
            found.setdefault("seconds", []).append(facts["seconds"])
        with contextlib.redirect_stdout(io.StringIO()):
            data = load_columns(config.data, [Columns()])
        train, test = (s.take(np.arange(len(s))) for s in (data.train, data.test))
        for model, classifier in theirs().items():
            classifier.fit(train["columns/numbers"], train["class"])
            found.setdefault(model, []).append(float((classifier.predict(test["columns/numbers"]) == test["class"]).mean()))
    return found


def main(arguments: list[str] | None = None, **more) -> dict:
    """Prints the table; `more`: keys of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.folds < 2 or set(options.sets.split(",")) - set(SETS):
        parser.error(f"two folds or more are needed, and sets among {', '.join(SETS)}")
    print(f"{hardware()}; seed {SEED}; {options.folds} folds", flush=True)
    table, figures = Table(), {}
    for column in ("", *options.sets.split(",")):
        table.add_column(column, justify="right" if column else "left")
    each = {name: accuracies(name, options.folds, more) for name in options.sets.split(",")}
    for model in (m for m in next(iter(each.values())) if m != "seconds"):
        cells = []
        for name, found in each.items():
            mean, std = float(np.mean(found[model])), float(np.std(found[model], ddof=1))
            key = f"{name}_{model.replace(' ', '_')}"
            figures |= {key: round(mean, 5), f"{key}_std": round(std, 5)}
            cells.append(f"{mean:.2%} ± {std:.2%}")
        table.add_row(model, *cells)
    figures |= {f"{name}_seconds": round(float(np.mean(found["seconds"])), 2) for name, found in each.items()}
    Console(width=100, highlight=False).print(table)
    print("seconds of training of ours: " + ", ".join(f"{n} {figures[f'{n}_seconds']}" for n in each))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
