"""Runs side by side: what each costs, and what it gets right.

    python -m experiments.compare runs/a runs/b … [--plot=FILE.svg] [--json=FILE]

Each argument is the workdir of a finished run, or a summary.json. Runs that differ in their seed alone become one row, mean ±
standard deviation, above those of the single runs. The best of each column is marked with *.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import plots
from experiments.common import FREE
from mgjax.errors import InputError
from mgjax.train.monitor import clock, write_json

IGNORED = {"seed", *(k.removeprefix("config.") for k in FREE)}
DASH = "–"
NAME_WIDTH = (20, 36)  # of the first column, at least and at most


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure that is compared: its key, what stands above it, how (mean, std or None) is shown, which end is good, and
    whether it stands in the cell of the column before, on a line of its own."""

    key: str
    title: str
    show: Callable[[float, float | None], str]
    higher: bool = False
    beneath: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: where it lies, its seed, its config (None if unknown), its figures, and all of its summary."""

    path: pathlib.Path
    seed: int | None
    config: Mapping[str, Any] | None
    figures: Mapping[str, float]
    summary: Mapping[str, Any]

    @property
    def short(self) -> str:
        return self.path.stem if self.path.suffix == ".json" else self.path.resolve().name


def read(path: pathlib.Path) -> Run:
    """Reads one run.

    Raises:
        InputError: nothing there, a run that is not finished, or a file that is no summary.
    """
    if path.is_dir():
        source = path / "summary.json"
        if not source.exists():
            begun = (path / "config.json").exists()
            hint = "is the run finished? the same command continues it" if begun else "it is not the workdir of a run"
            raise InputError(f"'{path}' has no summary.json: {hint}")
    elif path.exists():
        source = path
    else:
        raise InputError(f"'{path}' does not exist: name the workdir of a finished run, or its summary.json")
    summary = _load(source)
    test = summary.get("test") if isinstance(summary, dict) else None
    told = isinstance(test, dict) and "examples" in test
    if not told or not any(isinstance(test.get(k), dict) for k in ("levels", "tasks")):
        raise InputError(f"'{source}' is no summary of a run: it has no test figures, neither of levels nor of other tasks")
    config = summary.get("config")
    record = source.with_name("config.json")
    if config is None and record.exists():
        config = _load(record).get("config")
    if source.name == "summary.json":
        path = source.parent
    return Run(path, summary.get("seed"), config, figures(summary), summary)


def figures(summary: Mapping) -> dict[str, float]:
    """The figures of a summary that can be compared, flat: costs, `LEVEL/accuracy`, `LEVEL/raw_accuracy` and so on of the test,
    `LEVEL/validation`, the accuracy on validation at the end, and `TASK/METRIC` of the test."""
    test = summary["test"]
    found = {k: summary.get(k) for k in ("params", "train_flops", "seconds")}
    for level, v in test.get("levels", {}).items():
        found |= {f"{level}/{k}": v.get(k) for k in ("accuracy", "raw_accuracy")}
    stages = summary.get("stages") or [{}]
    validation = (stages[-1].get("val") or {}).get("levels", {})
    found |= {f"{level}/validation": v.get("accuracy") for level, v in validation.items()}
    tasks = test.get("tasks", {}).items()
    found |= {f"{task}/{k}": v for task, own in tasks for k, v in own.items() if not k.endswith("_std")}
    found |= {k: test.get(k) for k in ("full_path_accuracy", "mistake_severity", "tree_distance")}
    return {k: v for k, v in found.items() if isinstance(v, (int, float))}


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises InputError, saying which, if the runs were tested on different examples, or one is named twice."""
    places = [r.path.resolve() for r in runs]
    for place, run in zip(places, runs):
        if places.count(place) > 1:
            raise InputError(f"'{run.path}' is named twice")
    sets = {}
    for run in runs:
        sets.setdefault(_test_set(run), run)
    if len(sets) > 1:
        told = "; ".join(f"{run.path}: {name}" for name, run in sets.items())
        raise InputError(f"figures of different test sets cannot be compared ({told})")


def group(runs: Sequence[Run]) -> list[dict]:
    """Groups of runs that differ in their seed alone, in the order of their first runs.

    Each has "name", "runs", "n", and "mean" and "std" (of the sample, None for a single run) by figure. A run whose config is
    not known stands alone.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in (run.config or {}).items() if k not in IGNORED}
        same = {"experiment": run.summary.get("experiment")} | settings
        key = json.dumps(same, sort_keys=True) if run.config else str(run.path.resolve())
        found.setdefault(key, []).append(run)
    result = []
    for name, members in zip(_names(list(found.values())), found.values()):
        values = {k: [r.figures[k] for r in members if k in r.figures] for k in members[0].figures}
        values = {k: v for k, v in values.items() if len(v) == len(members)}
        spread = {k: statistics.stdev(v) for k, v in values.items()} if len(members) > 1 else None
        mean = {k: statistics.fmean(v) for k, v in values.items()}
        result.append({"name": name, "runs": members, "n": len(members), "mean": mean, "std": spread})
    return result


def columns(groups: Sequence[Mapping], levels: Sequence[str], tasks: Mapping[str, Sequence[str]] | None = None) -> list[Column]:
    """Those columns for which some group has a figure.

    Args:
        tasks: task → names of its metrics, beside the levels.
    """
    share = lambda v, s: f"{v:.2%}" if s is None else f"{100 * v:.2f} ± {100 * s:.2f}%"
    plain = lambda v, s: f"{v:.3f}" if s is None else f"{v:.3f} ± {s:.3f}"
    cost = lambda how: lambda v, s: how(v) if not s else f"{how(v)} ± {how(s)}"
    wanted = [
        Column("params", "parameters", cost(lambda v: f"{v:,.0f}")),
        Column("train_flops", "training FLOPs", cost(lambda v: f"{v:.3g}")),
        Column("seconds", "time", cost(clock)),
    ]
    for level in levels:
        wanted += [
            Column(f"{level}/accuracy", level, share, higher=True),
            Column(f"{level}/raw_accuracy", "raw", share, higher=True, beneath=True),
            Column(f"{level}/validation", "validation", share, higher=True, beneath=True),
        ]
    for task, metrics in (tasks or {}).items():
        for i, metric in enumerate(metrics):
            exact = lambda v, s: f"{v:.4f}" if s is None else f"{v:.4f} ± {s:.4f}"
            title, error = metric if i else f"{task} {metric}", metric.startswith(("rmse", "mae"))
            wanted.append(Column(f"{task}/{metric}", title, exact, higher=not error, beneath=i > 0))
    wanted += [
        Column("full_path_accuracy", "full path", share, higher=True),
        Column("mistake_severity", "severity", plain),
        Column("tree_distance", "distance", plain),
    ]
    return [c for c in wanted if any(c.key in g["mean"] for g in groups)]


def best(groups: Sequence[Mapping], column: Column) -> set[int]:
    """The groups that are best in a column; none, where there is nothing to choose."""
    # Equal is what is shown as equal: floats of one figure differ in their last bit.
    shown = {i: float(f"{g['mean'][column.key]:.6g}") for i, g in enumerate(groups) if column.key in g["mean"]}
    if len(shown) < 2:
        return set()
    top = (max if column.higher else min)(shown.values())
    winners = {i for i, v in shown.items() if v == top}
    return winners if len(winners) < len(shown) else set()


def notes(runs: Sequence[Run], groups: Sequence[Mapping]) -> list[str]:
    """What a reader must know before believing the table."""
    said = []
    if any(g["n"] > 1 for g in groups):
        said.append("± is the standard deviation of the sample, over seeds")
    for g in groups:
        seeds = [r.seed for r in g["runs"]]
        twice = sorted({s for s in seeds if s is not None and seeds.count(s) > 1})
        if twice:
            said.append(f"{g['name']}: seed {', '.join(map(str, twice))} more than once, so ± understates the spread")
    unknown = [str(r.path) for r in runs if not r.config]
    if unknown:
        said.append(f"config not recorded, so never grouped: {', '.join(unknown)}")
    machines = sorted({str(r.summary["hardware"]) for r in runs if r.summary.get("hardware")})
    if len(machines) > 1:
        said.append(f"times are of different hardware: {' | '.join(machines)}")
    levels = {own for r in runs if (own := tuple(levels_of([r])))}
    if len(levels) > 1:
        said.append(
            "levels differ, so full path, severity and distance are not of the same path: "
            + " | ".join(", ".join(names) for names in sorted(levels))
        )
    return said


def levels_of(runs: Sequence[Run]) -> list[str]:
    """All levels, coarse to fine: who is right at a finer level is right at the coarser ones, decoded answers being paths."""
    accuracy: dict[str, float] = {}
    for run in runs:
        for level in run.summary["test"].get("levels", {}):
            accuracy.setdefault(level, run.figures.get(f"{level}/accuracy", 0.0))
    return sorted(accuracy, key=lambda l: -accuracy[l])


def tasks_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """All tasks beside the levels, with the names of their metrics."""
    found: dict[str, dict] = {}
    for run in runs:
        for task, own in run.summary["test"].get("tasks", {}).items():
            found.setdefault(task, {}).update(dict.fromkeys(k for k in own if not k.endswith("_std")))
    return {task: list(names) for task, names in found.items()}


def show(runs: Sequence[Run], groups: Sequence[Mapping], shown: Sequence[Column]) -> None:
    """Prints the table and the notes."""
    winners = {c.key: best(groups, c) for c in shown}

    def cells(mean: Mapping, std: Mapping | None, place: int | None) -> list[str]:
        result = []
        for c in shown:
            text = c.show(mean[c.key], std and std[c.key]) if c.key in mean else DASH
            text = f"[bold]{text}*[/bold]" if place in winners[c.key] else text
            if c.beneath:
                result[-1] += f"\n{c.title} {text}"
            else:
                result.append(text)
        return result

    title = f"{runs[0].summary.get('dataset')}: {runs[0].summary['test']['examples']:,} test examples"
    table = Table(title=_plain(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=NAME_WIDTH[0], max_width=NAME_WIDTH[1])
    for c in shown:
        if not c.beneath:
            table.add_column(_plain(c.title), justify="right", no_wrap=True)
    longest = 0
    for i, g in enumerate(groups):
        several = g["n"] > 1
        name = f"{g['name']} ({g['n']} runs)" if several else f"{g['name']} · {_run_name(g['runs'][0])}"
        rows = [(name, cells(g["mean"], g["std"], i), None)]
        rows += [(f"  {_run_name(run)}", cells(run.figures, None, None), "dim") for run in g["runs"] if several]
        for name, texts, style in rows:
            table.add_row(_plain(name), *texts, style=style)
            longest = max(longest, len(name))
        table.add_section()
    console = Console(highlight=False, emoji=False)
    whole = console.measure(table, options=console.options.update(width=1000)).maximum
    # Figures are never cut, and a file has room; on a terminal, names fold first.
    folded = whole - max(0, min(longest, NAME_WIDTH[1]) - NAME_WIDTH[0])
    console = Console(highlight=False, emoji=False, width=max(console.width, folded) if console.is_terminal else whole)
    console.print(table)
    for note in ["* best of its column", *notes(runs, groups)] if any(winners.values()) else notes(runs, groups):
        console.print(note, markup=False, soft_wrap=True)


def record(runs: Sequence[Run], groups: Sequence[Mapping], shown: Sequence[Column]) -> dict:
    """What the table says, ready for JSON."""
    return {
        "dataset": runs[0].summary.get("dataset"),
        "examples": runs[0].summary["test"]["examples"],
        "groups": [
            {k: g[k] for k in ("name", "n", "mean", "std")}
            | {"runs": [{"path": str(r.path), "seed": r.seed, "figures": dict(r.figures)} for r in g["runs"]]}
            for g in groups
        ],
        "best": {c.key: [groups[i]["name"] for i in sorted(best(groups, c))] for c in shown},
        "notes": notes(runs, groups),
    }


def compare(paths: Sequence[pathlib.Path], plot: pathlib.Path | None = None, out: pathlib.Path | None = None) -> dict:
    """Compares runs: prints the table, writes plot and JSON where asked, and returns what the JSON holds.

    Raises:
        InputError: a run that cannot be read, runs that cannot be compared, a file that cannot be written.
    """
    runs = [read(p) for p in paths]
    check_comparable(runs)
    levels = levels_of(runs)
    if plot and not levels:
        raise InputError("--plot draws accuracies of levels, and these runs have none: leave it out")
    groups = group(runs)
    shown = columns(groups, levels, tasks_of(runs))
    show(runs, groups, shown)
    said = record(runs, groups, shown)
    if plot:
        plots.save(plots.trade_off(groups, levels, {"params": "parameters", "train_flops": "training FLOPs"}), plot)
        print(f"plot: {plot}")
    if out:
        try:
            write_json(out, said)
        except OSError as error:
            raise InputError(f"'{out}' cannot be written: {error}") from None
        print(f"json: {out}")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", type=pathlib.Path, metavar="RUN", help="workdir of a finished run, or a summary.json"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="accuracy against costs, as .svg, .png or .pdf")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    parser.error = lambda message: _fatal(message)
    options = parser.parse_args(arguments)
    if not options.runs:
        _fatal("no run is named: python -m experiments.compare WORKDIR WORKDIR …")
    try:
        compare(options.runs, options.plot, options.json)
    except InputError as error:
        _fatal(str(error))


def _fatal(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _load(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is not readable JSON: {error}") from None


def _test_set(run: Run) -> str:
    """What a run was tested on, in words."""
    examples, dataset = run.summary["test"]["examples"], run.summary.get("dataset")
    config = run.config or {}
    usual = {"data.limit": 0, "data.seed": 0, "data.test": 0.2, "data.folds": 0, "data.fold": 1, "data.cold": 0.0}
    if str(dataset).startswith("tfds:"):  # its test split is what was published
        usual = {"data.limit": 0}
    chosen = ", ".join(f"{k}={config[k]}" for k, v in usual.items() if str(config.get(k, v)) != str(v))
    return f"{dataset}, {examples:,} examples" + (f", {chosen}" if chosen else "")


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Preset, and those keys in which groups of one preset differ; a path, where the config is not known."""
    preset = lambda run: (run.summary.get("experiment"), run.config.get("preset"))
    several = len({g[0].summary.get("experiment") for g in groups}) > 1
    names = []
    for first, *_ in groups:
        if not first.config:
            names.append(str(first.path))
            continue
        alike = [g[0].config for g in groups if g[0].config and preset(g[0]) == preset(first)]
        differing = [k for k, v in first.config.items() if k not in IGNORED and any(c.get(k, v) != v for c in alike)]
        experiment, form = preset(first)
        start = [str(w) for w in ((experiment, form) if several or not form else (form,)) if w]
        told = [f"{k}={_value(first.config[k])}" for k in differing]
        names.append(" ".join([*start, *told[:3], *(["…"] if len(told) > 3 else [])]))
    return [f"{n} #{names[:i].count(n) + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _run_name(run: Run) -> str:
    return run.short if run.seed is None else f"{run.short}, seed {run.seed}"


def _plain(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
