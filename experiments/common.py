"""What all experiments share: workdir, config record, summary, table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

import mgjax
from mgjax.config import override, to_dict
from mgjax.errors import InputError
from mgjax.train.monitor import accelerator_hint, clock, hardware, write_json

flags.DEFINE_string("workdir", None, "folder of the run; the same one continues it (default: a fresh one under runs/)")
flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["workdir"])  # so that --help lists it

# Keys that may change when a run is continued: they do not change its result.
FREE = tuple(
    f"config.{k}"
    for k in ("data.dir", "data.cache_gb", "checkpoint.every", "checkpoint.keep", "log.every", "log.validate_every")
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(name: str, base: Any, given: dict[str, Any], resolve: Callable, train: Callable) -> dict | None:
    """Runs one experiment in its workdir, from config to table.

    Args:
        name: of the experiment.
        base: config with defaults.
        given: keys of the command line.
        resolve: (name of the backend, given) → (values of preset and recipe, what to say).
        train: (config, workdir, meta) → (facts for the summary).

    Returns:
        The summary that was written to `summary.json`.

    Raises:
        InputError: an unusable workdir, or one that holds another run.
    """
    if hint := accelerator_hint():
        print(hint, flush=True)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save
    chosen, said = resolve(jax.default_backend(), given)
    config = override(base, chosen | given)
    fresh = not flags.FLAGS.workdir
    workdir = _fresh(name) if fresh else pathlib.Path(flags.FLAGS.workdir)
    print(f"{name}: {said}\nworkdir: {workdir}", flush=True)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir '{workdir}' cannot be written to: {error}") from None

    meta = {"experiment": name, "config": json.loads(json.dumps(to_dict(config)))}
    summary_path, record_path = workdir / "summary.json", workdir / "config.json"
    begun = summary_path.exists() or any(p.name.isdigit() for p in workdir.glob("checkpoints/*"))
    if begun and record_path.exists():
        check_same(json.loads(record_path.read_text()), meta, workdir)
    else:
        write_json(record_path, meta)
    if summary_path.exists():
        print("this run is complete; its summary is shown again")
        summary = json.loads(summary_path.read_text())
    else:
        try:
            facts = train(config, workdir, meta)
        except KeyboardInterrupt:
            print("stopped before training began", flush=True)
            raise SystemExit(130) from None
        except InputError:
            if fresh and {p.name for p in workdir.iterdir()} == {record_path.name}:  # nothing was begun
                shutil.rmtree(workdir)
            raise
        summary = {
            "experiment": name,
            "dataset": config.data.source,
            "seed": config.seed,
            "command": shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "config": meta["config"],
            "versions": {"mgjax": mgjax.__version__, "python": sys.version.split()[0]}
            | {p: importlib.metadata.version(p) for p in PACKAGES},
            **facts,
        }
        write_json(summary_path, summary)
    show(summary)
    print(f"summary: {summary_path}")
    return summary


def check_same(old: dict, new: dict, workdir: pathlib.Path) -> None:
    """Raises InputError, naming the keys, if a workdir's record is of another run."""
    flat = lambda d: {"experiment": d["experiment"]} | {f"config.{k}": v for k, v in d["config"].items()}
    old, new = flat(old), flat(new)
    changed = [k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k) and k not in FREE]
    if changed:
        shown = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in changed[:5])
        raise InputError(f"workdir '{workdir}' holds another run ({shown}): choose another --workdir")


def show(summary: dict) -> None:
    """Prints the table of test results."""
    test = summary["test"]
    table = Table(title=f"{summary['experiment']} on {summary['dataset']}: {test['examples']:,} test images")
    for column in ("level", "accuracy", "raw", "top-5", "precision", "recall", "F1", "ECE"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for level, v in test["levels"].items():
        shares = (v[k] for k in ("accuracy", "raw_accuracy", "top5", "precision", "recall", "f1"))
        table.add_row(level, *(f"{s:.2%}" for s in shares), f"{v['ece']:.4f}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    decoders = ", ".join(
        f"{m.replace('_', '-')} {v['full_path_accuracy']:.2%} ({'/'.join(f'{a:.2%}' for a in v['accuracy'].values())})"
        for m, v in test["decoders"].items()
    )
    console.print(
        f"full path {test['full_path_accuracy']:.2%} · inconsistent: raw {test['raw_inconsistency']:.2%}, "
        f"decoded {test['inconsistency']:.2%} · tree distance {test['tree_distance']:.3f} · "
        f"mistake severity {test['mistake_severity']:.3f}"
    )
    console.print(f"decoders, full path (by level): {decoders}")
    console.print(
        f"{summary['params']:,} parameters · {summary['train_flops']:.3g} training FLOPs · "
        f"{summary['steps']:,} steps · {clock(summary['seconds'])} of training"
    )


def _fresh(name: str) -> pathlib.Path:
    return pathlib.Path("runs") / name / datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
