"""What all experiments share: workdir, config record, training, summary, table, report."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Table

import mgjax
from experiments import predict, report
from mgjax import config as cfg
from mgjax import train
from mgjax.config import override, to_dict
from mgjax.cost import forward_cost
from mgjax.data import Crop, Dataset, Subset, eval_batches, membership, train_batches
from mgjax.decode import decode, task_log_probs
from mgjax.errors import InputError
from mgjax.objective import Objective
from mgjax.taxonomy import write_taxonomy
from mgjax.train import Feeds, ParamGroup, Stage, distributed
from mgjax.train.meter import use_compilation_cache
from mgjax.train.monitor import accelerator_hint, clock, hardware, write_json

flags.DEFINE_string("workdir", None, "folder of the run; the same one continues it (default: a fresh one under runs/)")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes train one model")
flags.DEFINE_integer("num_processes", None, "how many processes there are (SLURM, Open MPI and TPU pods say it themselves)")
flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the other processes", lower_bound=1)
flags.DEFINE_multi_string("predict", [], "examples that the trained model of --workdir answers; see experiments/predict.py")
flags.DEFINE_string("predict_from", "", ".csv or .jsonl with such examples, a row each")
flags.DEFINE_string("output", "", ".csv or .jsonl to which the answers are written (empty: they are shown)")
for _name in ("workdir", "predict", "predict_from", "output", "coordinator", "num_processes", "process_id", "join_timeout"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[_name])  # so that --help lists it

# Keys that may change when a run is continued: they do not change its result.
FREE = tuple(f"config.{k}" for k in ("data.dir", "data.cache_gb", "data.workers", "model.remat", "compile_cache", *train.FREE))
EXAMPLES = 12  # that the report shows
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(name: str, base: Any, given: dict[str, Any], resolve: Callable, train_and_test: Callable) -> dict | None:
    """Runs one experiment in its workdir, from config to table.

    Args:
        name: of the experiment.
        base: config with defaults.
        given: keys of the command line.
        resolve: (name of the backend, given) → (values of preset and recipe, what to say).
        train_and_test: (config, workdir, meta) → (facts for the summary, examples for the report).

    Returns:
        The summary that was written to `summary.json`.

    Raises:
        InputError: an unusable workdir, or one that holds another run.
    """
    quiet = not flags.FLAGS["verbosity"].present
    if quiet:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save
    distributed.start(*(flags.FLAGS[f].value for f in ("coordinator", "num_processes", "process_id", "join_timeout")))
    main = distributed.is_main()
    say = functools.partial(print, flush=True) if main else lambda *said: None
    if hint := accelerator_hint():
        say(hint)
    if quiet and not main:
        logging.set_verbosity(logging.ERROR)  # what the first process warns of, all would
    chosen, said = resolve(jax.default_backend(), given)
    config = override(base, chosen | given)
    use_compilation_cache(config.compile_cache)
    fresh = not flags.FLAGS.workdir
    if fresh and jax.process_count() > 1:
        raise InputError("several processes need one folder that all of them see: --workdir=DIR")
    workdir = _fresh(name) if fresh else pathlib.Path(flags.FLAGS.workdir)
    say(f"{name}: {said}\nworkdir: {workdir}")
    meta = {"experiment": name, "config": json.loads(json.dumps(to_dict(config)))}
    summary_path, record_path = workdir / "summary.json", workdir / "config.json"
    try:
        if main:
            _claim(workdir, record_path, meta)
        error = ""
    except InputError as found:
        error = str(found)
    distributed.agreed(error)
    if not record_path.exists():
        error = f"process {jax.process_index()} does not see the workdir '{workdir}' of process 0: name one that all see"
    distributed.agreed(error)
    again = distributed.from_main(summary_path.exists())
    if again:
        say("this run is complete; its summary is shown again")
        summary, examples = json.loads(summary_path.read_text()), []
    else:
        try:
            facts, examples = train_and_test(config, workdir, meta)
        except KeyboardInterrupt:
            say(f"stopped; the same command with --workdir={workdir} continues")
            raise SystemExit(130) from None
        except Exception as error:
            distributed.leave_alone(error)
            if not isinstance(error, InputError):
                raise
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
        if main:
            write_json(summary_path, summary)
    if not main:
        return summary
    report_path = workdir / "report.html"
    if examples or not report_path.exists():
        if again:
            print("its report was not written; it is made now, without examples")
        try:
            report.write(workdir, summary, examples)
        except InputError as error:  # a library for plots that is not there costs no result
            print(f"no report: {error}")
    show(summary)
    print(f"summary: {summary_path}")
    if report_path.exists():
        print(f"report: {report_path}")
    return summary


def _claim(workdir: pathlib.Path, record: pathlib.Path, meta: dict) -> None:
    """Makes the workdir and its record, or finds that they are of this run.

    Raises:
        InputError: it cannot be written to, or holds another run.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir '{workdir}' cannot be written to: {error}") from None
    begun = (workdir / "summary.json").exists() or any(p.name.isdigit() for p in workdir.glob("checkpoints/*"))
    if begun and record.exists():
        check_same(json.loads(record.read_text()), meta, workdir)
    else:
        write_json(record, meta)


def train_model(
    config: Any,
    data: Dataset,
    model,
    plan: Sequence[Stage],
    points: Mapping,
    workdir: pathlib.Path,
    meta: dict,
    *,
    augment: Callable,
    metrics: Any,
    crop: Callable[[Stage], Crop | None] = lambda stage: None,
    groups: Sequence[ParamGroup] = (),
) -> dict:
    """Trains a model on a dataset by plan, tests it, and measures what it costs.

    Args:
        config: a TrainConfig that has seed, smoothing and plan.eval_batch_size too.
        points: name → operating point whose cost and test figures are reported.
        meta: of the run, for its checkpoints.
        augment, metrics, groups: as in `mgjax.train.fit`.
        crop: what is cut from the images of a stage where they are decoded.

    Returns:
        Facts for the summary, and `variables`, the trained ones, in the first process.
    """
    if distributed.is_main():
        print(data.describe(), flush=True)
    process = dict(process=jax.process_index(), processes=jax.process_count(), workers=config.data.workers)
    reads = dict(inputs=data.inputs, targets=data.targets, present=data.present)
    counts = {g.name: membership(g, data.train, data.taxonomy) for g in model.granularities}
    counts = {name: table for name, table in counts.items() if table is not None}
    if counts:  # a file of clusters may change between two starts
        digest = hashlib.sha256(b"".join(name.encode() + table.tobytes() for name, table in sorted(counts.items())))
        meta = meta | {"members": digest.hexdigest()[:16]}
    evaluated = lambda split: eval_batches(split, data.taxonomy, batch_size=config.plan.eval_batch_size, **reads, **process)
    feeds = Feeds(
        train=lambda stage, seen, steps: train_batches(
            data.train,
            data.taxonomy,
            batch_size=stage.batch_size,
            seed=config.seed,
            examples_seen=seen,
            steps=steps,
            crop=crop(stage),
            weights=counts,
            **reads,
            **process,
        ),
        validation=lambda: evaluated(data.validation),
        test=lambda: evaluated(data.test),
        eval_batch_size=config.plan.eval_batch_size,
        examples=len(data.train),
    )
    objective = Objective.from_config(
        config.objective, model, taxonomy=data.taxonomy, smoothing=config.smoothing, examples=len(data.train)
    )
    if objective.seam and distributed.is_main() and not objective.meet(model.shared(model.everything)):
        print(
            f"objective.balance={config.objective.balance}: no two heads teach one feature, so it evens out norms and sees no "
            "conflict"
        )
    if distributed.is_main():  # what a prediction needs to know
        write_json(workdir / "dataset.json", data.record())
        if data.taxonomy:
            write_taxonomy(data.taxonomy, workdir / "taxonomy.json")
    facts = train.fit(
        model=model,
        objective=objective,
        metrics=metrics,
        augment=augment,
        plan=plan,
        feeds=feeds,
        seed=config.seed,
        workdir=workdir,
        meta=meta | ({"taxonomy": data.taxonomy.fingerprint} if data.taxonomy else {}),
        free=FREE,
        points=points,
        config=config,
        groups=groups,
    )
    if distributed.is_main():
        one = augment.normalise(next(eval_batches(data.test, data.taxonomy, batch_size=1, **reads)))
        facts["points"] = [
            {
                "name": name,
                "granularities": list(points[name].active),
                "tasks": list(points[name].tasks),
                **forward_cost(model, facts["variables"], one.inputs, points[name])._asdict(),
                "accuracy": {level: v["accuracy"] for level, v in figures.get("levels", {}).items()},
                **({"figures": figures["tasks"]} if "tasks" in figures else {}),
            }
            for name, figures in facts["points"].items()
        ]
    return facts


def examples(config: Any, data: Dataset, model, variables: Any, augment: Callable, op) -> list[report.Example]:
    """What the trained model says of some examples of the test split, in the first process; none without a taxonomy.

    Args:
        config: a RunConfig.
        augment, op: as in training, and of its last stage.
    """
    if not distributed.is_main() or not data.taxonomy:
        return []
    tree, reads = data.taxonomy, dict(inputs=data.inputs, targets=data.targets, present=data.present)
    chosen = np.random.default_rng(0).permutation(len(data.test))[:EXAMPLES]
    batch = next(eval_batches(Subset(data.test, chosen, data.test.name), tree, batch_size=len(chosen), **reads))
    batch = batch.replace(index=chosen)
    say = jax.jit(lambda v, x, p: model.apply(v, x, op, present=p, train=False))
    outputs = say(variables, augment.normalise(batch).inputs, batch.present)
    said = task_log_probs(outputs, model.heads, model.tasks)
    raw = {t.level: said[t.name] for t in model.tasks if t.kind == "classification" and t.name in said}
    path = jax.device_get(decode(raw, tree, config.decoder))
    # Coarse to fine; JAX has sorted the levels by name.
    names = {l: own for l, own in zip(tree.levels, tree.names) if l in path.labels}
    return [
        report.Example(
            shown=shown,
            index=int(batch.index[i]),
            truth={l: own[batch.targets[l][i]] if batch.targets[l][i] >= 0 else None for l, own in names.items()},
            answer={l: own[path.labels[l][i]] for l, own in names.items()},
            probability={l: float(np.exp(path.log_probs[l][i, path.labels[l][i]])) for l in names},
        )
        for i, shown in enumerate(data.show(batch))
        if batch.mask[i]
    ]


def main(
    name: str, base: Any, resolve: Callable, train_and_test: Callable, recipes: Iterable[Mapping], see: Callable, column: str
) -> None:
    """The command line of an experiment; see `run`, and `predict.answer`.

    Args:
        recipes: values of keys that presets, sizes and datasets may set; `--help` marks the keys.
        see, column: as in `predict.answer`.
    """
    notes = {dotted: "; preset, size and dataset may set another default" for recipe in recipes for dotted in recipe}

    def train_or_predict(given: dict[str, Any]) -> None:
        asked = flags.FLAGS.predict, flags.FLAGS.predict_from, flags.FLAGS.output
        if not any(asked):
            run(name, base, given, resolve, train_and_test)
            return
        if not flags.FLAGS.workdir:
            raise InputError("which model is to predict? --workdir=DIR of a finished run")
        if given:
            raise InputError(f"a trained model keeps its config: leave out --config.{next(iter(given))}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # what is said are the answers
        predict.answer(base, see, column, pathlib.Path(flags.FLAGS.workdir), *asked, name=name)

    cfg.run(train_or_predict, base, notes, operands="predict")


def check_same(old: dict, new: dict, workdir: pathlib.Path) -> None:
    """Raises InputError, naming the keys, if a workdir's record is of another run."""
    flat = lambda d: {"experiment": d["experiment"]} | {f"config.{k}": v for k, v in d["config"].items()}
    old, new = flat(old), flat(new)
    changed = [k for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k) and k not in FREE]
    if changed:
        shown = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in changed[:5])
        raise InputError(f"workdir '{workdir}' holds another run ({shown}): choose another --workdir")


def show(summary: dict) -> None:
    """Prints the tables of test results: of levels, and of other tasks."""
    test = summary["test"]
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100)
    title = f"{summary['experiment']} on {summary['dataset']}: {test['examples']:,} test examples"
    if "levels" in test:
        table = Table(title=title)
        for column in ("level", "accuracy", "raw", "top-5", "precision", "recall", "F1", "ECE"):
            table.add_column(column, justify="left" if column == "level" else "right")
        for level, v in test["levels"].items():
            shares = (v.get(k) for k in ("accuracy", "raw_accuracy", "top5", "precision", "recall", "f1"))
            # A level that no head answers has no raw figures.
            table.add_row(level, *("–" if s is None else f"{s:.2%}" for s in shares), f"{v['ece']:.4f}")
        console.print(table)
        named = {m: m.replace("_", "-") + (" (the answer)" if m == test.get("decoder") else "") for m in test["decoders"]}
        decoders = ", ".join(
            f"{named[m]} {v['full_path_accuracy']:.2%} ({'/'.join(f'{a:.2%}' for a in v['accuracy'].values())})"
            for m, v in test["decoders"].items()
        )
        console.print(
            f"full path {test['full_path_accuracy']:.2%} · inconsistent: raw {test['raw_inconsistency']:.2%}, "
            f"decoded {test['inconsistency']:.2%} · tree distance {test['tree_distance']:.3f} · "
            f"mistake severity {test['mistake_severity']:.3f}"
        )
        console.print(f"decoders, full path (by level): {decoders}")
    if "tasks" in test:
        table = Table(title=title)
        columns = test["tasks"] | {f"({name})": v for name, v in test.get("baselines", {}).items()}
        for column in ("", *columns):
            table.add_column(column, justify="right" if column else "left")
        for metric in dict.fromkeys(k for v in columns.values() for k in v):
            table.add_row(metric, *(f"{v[metric]:.4f}" if metric in v else "–" for v in columns.values()))
        console.print(table)
    console.print(
        f"{summary['params']:,} parameters · {summary['train_flops']:.3g} training FLOPs · "
        f"{summary['steps']:,} steps · {clock(summary['seconds'])} of training"
    )


def _fresh(name: str) -> pathlib.Path:
    return pathlib.Path("runs") / name / datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
