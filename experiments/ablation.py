"""Presets × seeds of one experiment within a budget of compute: one table, tested against a baseline.

    python -m experiments.ablation cifar_mg --presets=flat,joint,staged --seeds=0,1,2 --budget=90 --workdir=runs/ablation
        --set data.dir=DIR --plot=ablation.svg --json=ablation.json

Each run is `python -m experiments.NAME --config.preset=P --config.seed=S --workdir=WORKDIR/P-seedS`, with what `--set` gives
as `--config.KEY=VALUE`; what it says goes to `WORKDIR/P-seedS.log`. `--dry_run` shows all commands and starts none.

**Variants.** What is compared may be a preset with settings of its own. They have names in a JSON file, `--variants=FILE`:

    {"half the labels": {"preset": "joint", "data.labelled": 0.5}, "wide": {"preset": "joint", "model.widths": [48, 96, 192]}}

`--presets` may name them among the presets, and may be left out: then they are what is compared. Settings of a variant come
after those of `--set`.

**Budget.** `--budget` is in minutes of wall clock, summed over the runs of the table: of whole processes, start and test
included, as `WORKDIR/P-seedS/wall.json` counts them over all calls; for a run that was made elsewhere, what its summary says of
its training. So a second call does not pay again for what is done, and a folder that is deleted is forgotten, time
included. Runs are begun seed by seed, so that whatever the budget allows is comparable. A run is left out, and named, where the
mean time of the finished runs of its preset (else of all) is more than what is left; as long as none is finished, runs begin
unseen. A run that has begun is not cut short. With `--jobs=N` runs go on side by side, each on an equal part of the cores; what
those in flight are expected to take is set aside.

**Again.** The same command continues: finished runs are taken as they are, after their records were compared with what the
experiment would do now; others go on at their last checkpoint; failed ones are tried again. More seeds, presets and minutes
may be added later; other settings are refused. Ctrl-C or SIGTERM is passed on to the runs, which save, and are waited for.

**The table** has a row per preset, mean ± standard deviation of the sample over its seeds, and beneath each figure the mean
difference from the baseline (`--baseline`) over common seeds, its standard deviation, and the two-sided p of a paired t-test.
Where several are compared with the baseline, the last column holds the p of the finest level after Holm (1979).

Exit status: 0; 1 if a run failed; 2 for bad input; 130 or 143 if stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import importlib
import json
import math
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from scipy import stats

from experiments import compare, plots
from experiments.common import FREE, check_same
from experiments.paired import adjusted_tests, groups_of, machines, show
from mgjax import config as cfg
from mgjax.errors import InputError
from mgjax.train.monitor import clock, write_json

TEST_SET = ("data.source", "data.limit", "data.seed", "data.test")  # what decides on which examples a run is tested
TAIL = 12  # lines of the log of a run that failed
BEAT = 5.0  # seconds between two notes of the time that a run has taken


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compared: a name, all settings as texts of the command line, and as values, and those values of its own."""

    name: str
    settings: Mapping[str, str]
    given: Mapping[str, Any]
    own: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a variant, a seed, and its workdir."""

    variant: Variant
    seed: int
    folder: pathlib.Path

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def log(self) -> pathlib.Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(p.name.isdigit() for p in self.folder.glob("checkpoints/*"))


@dataclasses.dataclass
class Outcome:
    """What became of the trials that were not finished before: why, by trial; the number of the signal that ended all, or 0."""

    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    signal: int = 0


# ---------------------------------------------------------------------- what is asked for


def load(name: str):
    """The module of an experiment.

    Raises:
        InputError: there is none of that name, with the nearest.
    """
    files = pathlib.Path(__file__).parent.glob("*.py")
    known = sorted(p.stem for p in files if re.search(r"^    common\.main\(", p.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        module = importlib.import_module(f"experiments.{name}") if name.isidentifier() else None
    except ModuleNotFoundError as error:
        if error.name != f"experiments.{name}":
            raise
        module = None
    if not hasattr(module, "Config") or not hasattr(module, "resolve"):
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise InputError(f"there is no experiment '{name}'; the nearest is {near} (there are {', '.join(known)})")
    return module


def values_of(module, settings: Mapping[str, str]) -> dict[str, Any]:
    """The values that texts of the command line stand for. Raises InputError for an unknown key or a text of another type."""
    base, parsed = module.Config(), flags.FlagValues()
    cfg.define(base, parsed)
    for key in settings:
        if key not in cfg.leaves(base):
            raise InputError(cfg.unknown_key(key, cfg.leaves(base)))
    try:
        parsed(["ablation", *(f"--config.{k}={v}" for k, v in settings.items())])
    except flags.Error as error:
        raise InputError(str(error)) from None
    return cfg.given(base, parsed)


def record_of(name: str, module, given: Mapping[str, Any], size: str | None = None) -> dict:
    """What a run of these values writes to its config.json, where its size was chosen as `size`.

    Raises:
        InputError: values that the experiment does not take.
    """
    backend = "gpu" if size == "gpu" else "cpu"  # of which a run knows, and this process must not occupy one to ask
    config = cfg.override(module.Config(), module.resolve(backend, dict(given))[0] | dict(given))
    return {"experiment": name, "config": json.loads(json.dumps(cfg.to_dict(config)))}


def variants_of(
    name: str, module, presets: Sequence[str], common: Mapping[str, str], file: pathlib.Path | None = None
) -> list[Variant]:
    """What is compared, in the order of `presets`, else of the file.

    Args:
        name, module: of the experiment.
        presets: names of presets, and of variants of the file; empty for all of the file.
        common: settings of all.
        file: JSON, name → {"preset": …, KEY: VALUE, …}.

    Raises:
        InputError: an unknown or repeated name, a key that is not free to set, a file that does not say what it should.
    """
    known = cfg.leaves(module.Config)["preset"].choices
    own = _json(file) if file else {}
    if not isinstance(own, dict) or not all(isinstance(v, dict) for v in own.values()):
        raise InputError(f'\'{file}\' is no table of variants: {{"NAME": {{"preset": "PRESET", "KEY": VALUE}}}}')
    if taken := [v for v in own if (v in known and own[v] != {"preset": v}) or not v.strip() or "," in v]:
        raise InputError(
            f"'{file}': a variant cannot have the name '{taken[0]}': no preset's with other settings, no comma, not empty"
        )
    if misplaced := {"preset", "seed"} & set(common):
        raise InputError(f"--set {min(misplaced)}: --presets and --seeds say it")
    names = list(presets) or list(own)
    if not names:
        raise InputError(f"nothing to compare: --presets=A,B of {', '.join(known)}, or --variants=FILE.json")
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"--presets names '{twice[0]}' twice")
    result, folders = [], {}
    for variant in names:
        if variant not in known and variant not in own:
            there = [*known, *own]
            near = difflib.get_close_matches(variant, there, 1, 0.0)[0]
            raise InputError(f"'{variant}' is no preset of {name}; the nearest is {near} (there are {', '.join(there)})")
        settings = {k: _text(v) for k, v in own.get(variant, {"preset": variant}).items()}
        if settings.get("preset") not in known or "seed" in settings:
            raise InputError(f"'{file}': variant '{variant}' needs a \"preset\", one of {', '.join(known)}, and no seed")
        every = {"preset": settings["preset"]} | common | settings
        result.append(Variant(variant, every, values_of(module, every), values_of(module, settings)))
        if (other := folders.setdefault(_folder(variant), variant)) != variant:
            raise InputError(f"'{other}' and '{variant}' would share the folder {_folder(variant)}: rename one")
    return result


def claim(workdir: pathlib.Path, name: str, module, common: Mapping, variants: Sequence[Variant], seeds: Sequence[int]) -> dict:
    """The record of the ablation, joined with the one that the workdir has.

    Raises:
        InputError: the workdir is of something else, or was filled with other settings.
    """
    path, free = workdir / "ablation.json", {k.removeprefix("config.") for k in FREE}
    own = {v.name: v.own for v in variants}
    record = {"experiment": name, "settings": values_of(module, common), "variants": own, "seeds": list(seeds)}
    record = json.loads(json.dumps(record))
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"'{workdir}' is not a folder: choose another --workdir")
    if not path.exists():
        if (workdir / "config.json").exists():
            raise InputError(f"'{workdir}' is the workdir of a single run: choose another --workdir")
        return record
    old = _json(path)
    flat = lambda r, names: (
        {"experiment": r["experiment"]}
        | {
            f"{where}{k}": v
            for where, values in [("", r["settings"]), *((f"{n}: ", r["variants"][n]) for n in names)]
            for k, v in values.items()
            if k not in free
        }
    )
    both = [n for n in record["variants"] if n in old["variants"]]
    was, now = flat(old, both), flat(record, both)
    changed = [k for k in [*was, *(k for k in now if k not in was)] if was.get(k) != now.get(k)]
    if changed:
        shown = "; ".join(f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in changed[:5])
        raise InputError(f"workdir '{workdir}' holds another ablation ({shown}): choose another --workdir")
    return record | {"variants": old["variants"] | record["variants"], "seeds": sorted({*old["seeds"], *seeds})}


def check(name: str, module, trials: Sequence[Trial]) -> None:
    """Raises InputError, before anything is started, for values that the experiment does not take, for finished runs of other
    settings than those asked for, and for variants that would be tested on different examples."""
    tested: dict[str, Trial] = {}
    for trial in trials:
        given = {**trial.variant.given, "seed": trial.seed}
        config = record_of(name, module, given)["config"]
        tested.setdefault(json.dumps([config.get(k) for k in TEST_SET]), trial)
        if trial.finished:
            path = trial.folder / "config.json"
            if not path.exists():
                raise InputError(f"'{trial.folder}' has a summary and no config.json, so its settings are not known: move it")
            old = _json(path)
            check_same(old, record_of(name, module, given, old["config"].get("size")), trial.folder)
            compare.read(trial.folder)
    if len(tested) > 1:
        told = "; ".join(f"{trial.variant.name}: {what}" for what, trial in tested.items())
        raise InputError(f"figures of different test sets cannot be compared ({', '.join(TEST_SET)} are {told})")


# ---------------------------------------------------------------------- runs


def command(name: str, trial: Trial) -> list[str]:
    """What starts, and continues, a run."""
    keys = [f"--config.{k}={v}" for k, v in {**trial.variant.settings, "seed": trial.seed}.items()]
    return [sys.executable, "-m", f"experiments.{name}", *keys, f"--workdir={trial.folder}"]


def used(trial: Trial) -> float:
    """Seconds that a run has taken so far, over all calls."""
    wall, summary = trial.folder / "wall.json", trial.folder / "summary.json"
    seconds = [_json(wall)["seconds"]] if wall.exists() else []
    if summary.exists():
        seconds.append(_json(summary).get("seconds") or 0.0)
    return max(seconds, default=0.0)


def expected(trial: Trial, trials: Sequence[Trial]) -> float | None:
    """Seconds that a run will still take: the mean of the finished ones of its variant, else of all, without what it has
    behind it; None as long as nothing is known."""
    finished = [t for t in trials if t.finished]
    alike = [t for t in finished if t.variant is trial.variant] or finished
    if not alike:
        return None
    return max(statistics.fmean(map(used, alike)) - (used(trial) if trial.begun else 0.0), 0.0)


def budget_left(budget: float, trials: Sequence[Trial], going: Sequence[Trial]) -> float:
    """Seconds of the budget that are neither used nor expected to be by the runs in flight."""
    return budget - sum(map(used, trials)) - sum(expected(t, trials) or 0.0 for t in going)


class Running:
    """A run in flight: a process in a session of its own, so that Ctrl-C in a terminal reaches it once, through us.

    Args:
        trial: the run.
        line: its command.
        cores: on which it computes; None for all.
        lock: descriptor that it holds as long as it lives.
    """

    def __init__(self, trial: Trial, line: Sequence[str], cores: Sequence[int] | None, lock: int):
        self.trial, self.told, self.began, self.noted = trial, 0, time.monotonic(), 0.0
        trial.folder.mkdir(parents=True, exist_ok=True)
        self.before, self.cores = used(trial), cores
        with trial.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(line)}\n")
            log.flush()
            self.start = log.tell()
            before = _affinity()
            try:
                if cores is not None and before:  # inherited by all its threads, of which the first begin at once
                    os.sched_setaffinity(0, cores)
                self.process = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            finally:
                if cores is not None and before:
                    os.sched_setaffinity(0, before)

    def note(self) -> None:
        """Writes what the run has taken."""
        self.noted = time.monotonic()
        cores = len(_affinity() if self.cores is None else self.cores) or os.cpu_count()
        wall = {"seconds": round(self.before + self.noted - self.began, 2), "cores": cores}
        write_json(self.trial.folder / "wall.json", wall)

    def tell(self, signals: Sequence[int]) -> None:
        """Passes on the signals that it has not had yet."""
        for number in signals[self.told :]:
            self.process.send_signal(number)
        self.told = len(signals)

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def complaint(self) -> str | None:
        """Why it has no result, of a process that has ended; None if it has."""
        code = self.process.returncode
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"exit status {code}" if code else None if self.trial.finished else "no summary.json"

    def tail(self) -> str:
        """The last lines of its log, since it was started."""
        with self.trial.log.open("rb") as log:
            log.seek(self.start)
            lines = [l for l in log.read().decode(errors="replace").splitlines() if l.strip()]
        return "\n".join(f"    {line}" for line in lines[-TAIL:])


def run_all(name: str, trials: Sequence[Trial], budget: float, jobs: int, lock: int) -> Outcome:
    """Runs what is not finished, in the order of the trials, as long as the budget lasts.

    Args:
        budget: seconds.
        jobs: how many at a time.
        lock: descriptor that runs hold as long as they live.
    """
    outcome, running, signals = Outcome(), [], []
    waiting = [t for t in trials if not t.finished]
    slots: list[Sequence[int] | None] = [None] if jobs == 1 else parts(sorted(_affinity() or range(os.cpu_count() or 1)), jobs)
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else it was begun under nohup
        heard.append(signal.SIGHUP)
    before = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in heard}
    say = lambda said: print(said, flush=True)
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                trial = waiting.pop(0)
                for child in running:
                    child.note()
                left = budget_left(budget, trials, [c.trial for c in running])
                takes = expected(trial, trials)
                if reason := unfit(takes, left):
                    outcome.left_out[str(trial)] = reason
                    say(f"{trial}: left out, {reason}")
                    continue
                free = next(s for s in slots if not any(c.cores is s for c in running))
                running.append(Running(trial, command(name, trial), free, lock))
                said = "unknown" if takes is None else clock(takes)
                say(f"{trial}: {'continues' if trial.begun else 'begins'}, expected time {said}; log: {trial.log}")
            time.sleep(0.05)
            for child in list(running):
                if len(signals) > child.told:
                    child.tell([signal.SIGTERM if n == signal.SIGHUP else n for n in signals])
                if child.process.poll() is None:
                    if time.monotonic() - child.noted > BEAT:
                        child.note()
                    continue
                child.note()
                running.remove(child)
                wrong = child.complaint()
                if wrong is None:
                    say(f"{child.trial}: finished, {_headline(child.trial)}; {clock(used(child.trial))}")
                elif not signals:
                    outcome.failed[str(child.trial)] = f"{wrong}; log: {child.trial.log}"
                    say(f"{child.trial}: failed ({wrong}), the end of {child.trial.log}:\n{child.tail()}")
    finally:
        for child in running:
            child.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome.signal = signals[0] if signals else 0
    return outcome


def unfit(takes: float | None, left: float) -> str:
    """Why a run that takes so long has no place in what is left of the budget; empty if it has."""
    if left <= 0:
        return "the budget is used up"
    return f"expected {clock(takes)}, left {clock(left)}" if takes is not None and takes > left else ""


def parts(cores: Sequence[int], jobs: int) -> list[Sequence[int]]:
    """Equal parts of the cores, one per job; what is left over is not used.

    Raises:
        InputError: more jobs than cores.

    Example:
        >>> parts([0, 1, 2, 3, 4], 2)
        [[0, 1], [2, 3]]
    """
    size = len(cores) // jobs
    if not size:
        raise InputError(f"--jobs={jobs} is more than the {len(cores)} cores that there are")
    return [cores[i * size : (i + 1) * size] for i in range(jobs)]


def plan(name: str, trials: Sequence[Trial], budget: float) -> None:
    """Says what a call would do."""
    going: list[Trial] = []
    for trial in trials:
        takes = expected(trial, trials)
        if trial.finished:
            state = f"finished, {clock(used(trial))}"
        elif reason := unfit(takes, budget_left(budget, trials, going)):
            state = f"left out, {reason}"
        else:
            going.append(trial)
            said = "unknown" if takes is None else clock(takes)
            state = f"{'continues' if trial.begun else 'begins'}, expected time {said}"
        print(f"{trial}: {state}\n    {shlex.join(command(name, trial))}")


# ---------------------------------------------------------------------- figures


def notes(
    trials: Sequence[Trial], groups: Sequence[Mapping], levels: Sequence[str], baseline: str, budget: float, outcome: Outcome
) -> list[str]:
    """What a reader must know before believing the table."""
    runs = [r for g in groups for r in g["runs"]]
    said = compare.notes(runs, groups)
    compared = [g for g in groups if g["differences"]]
    if compared:
        said.append(
            f"beneath: mean difference from {baseline} over common seeds ± its standard deviation, of accuracy in percentage "
            "points; two-sided p of a paired t-test"
        )
        if several := adjusted_tests(groups, levels):
            said.append(f"last column: that p of {levels[-1]}, adjusted by Holm over {several} tests")
        most = max(d["n"] for g in compared for d in g["differences"].values())
        if most > 1:
            least = stats.t.ppf(0.975, most - 1) / math.sqrt(most)
            power = f"with {most} seeds a t-test has little power" if most < 6 else f"with {most} seeds"
            said.append(f"{power}: p < 0.05 takes a mean difference above {least:.2f} of its standard deviations")
        whys = sorted({d["why"] for g in compared for d in g["differences"].values() if d["why"]})
        if whys:
            reasons = {
                "no spread": "no spread: all differences are alike",
                "one common seed": "one common seed: a test needs two",
                "no common seed": "no common seed: nothing to compare",
            }
            said.append("no p where there is " + "; ".join(reasons[w] for w in whys))
    elif groups and not any(g["name"] == baseline for g in groups):
        said.append(f"no run of the baseline {baseline} is finished, so there are no differences")
    of = machines(groups)
    said += [f"hardware: {of[0]}"] if len(of) == 1 else []  # several are told of above
    walls = [t.folder / "wall.json" for t in trials if t.finished]
    cores = sorted({_json(w)["cores"] for w in walls if w.exists()})
    if len(cores) > 1:
        said.append(f"times are of runs on {' and '.join(map(str, cores))} cores")
    finished = sum(t.finished for t in trials)
    spent = clock(sum(map(used, trials)))
    said.append(f"{finished} of {len(trials)} runs are finished; {spent} of the budget of {clock(budget)} is used")
    said.append("the column of times is training and validation; the budget counts whole processes")
    said += [f"left out for the budget: {trial} ({why})" for trial, why in outcome.left_out.items()]
    said += [f"failed: {trial} ({why})" for trial, why in outcome.failed.items()]
    return said


def _headline(trial: Trial) -> str:
    run = compare.read(trial.folder)
    return ", ".join(
        f"{l} {run.figures[f'{l}/accuracy']:.2%}" for l in compare.levels_of([run]) if f"{l}/accuracy" in run.figures
    )


# ---------------------------------------------------------------------- command line


def ablate(options: argparse.Namespace) -> tuple[dict | None, Outcome]:
    """Runs, compares, prints, draws; see the head of this file.

    Args:
        options: of `parser`.

    Returns:
        (what the JSON holds, or None where nothing was to be run or all was stopped; what became of the runs)

    Raises:
        InputError: bad input, an unusable workdir, a file that cannot be written.
    """
    name, workdir, budget = options.experiment, options.workdir, 60 * options.budget
    module = load(name)
    common = dict(_pair(s) for s in options.set)
    variants = variants_of(name, module, options.presets, common, options.variants)
    names = [v.name for v in variants]
    baseline = options.baseline or ("flat" if "flat" in names else names[0])
    if baseline not in names:
        near = difflib.get_close_matches(baseline, names, 1, 0.0)[0]
        raise InputError(
            f"the baseline '{baseline}' is not among the presets; the nearest is {near} (there are {', '.join(names)})"
        )
    if options.jobs > 1:
        parts(range(len(_affinity()) or os.cpu_count() or 1), options.jobs)
    trials = [Trial(v, s, workdir / f"{_folder(v.name)}-seed{s}") for s in options.seeds for v in variants]
    record = claim(workdir, name, module, common, variants, options.seeds)
    check(name, module, trials)
    if options.plot:
        plots.require()
    if options.dry_run:
        plan(name, trials, budget)
        return None, Outcome()
    with _alone(workdir) as lock:
        write_json(workdir / "ablation.json", record)
        outcome = run_all(name, trials, budget, options.jobs, lock)
    if outcome.signal:
        return None, outcome
    finished: dict[str, list[compare.Run]] = {}
    for trial in sorted((t for t in trials if t.finished), key=lambda t: names.index(t.variant.name)):
        finished.setdefault(trial.variant.name, []).append(compare.read(trial.folder))
    groups, levels = groups_of(finished, baseline)
    said = notes(trials, groups, levels, baseline, budget, outcome)
    first = groups[0]["runs"][0].summary if groups else {}
    examples = first["test"]["examples"] if groups else None
    title = f"{name} on {first.get('dataset')}: {examples or 0:,} test examples"
    show(title, groups, levels, baseline, said)
    result = {
        "experiment": name,
        "dataset": first.get("dataset"),
        "examples": examples,
        "command": options.command,
        "date": datetime.date.today().isoformat(),
        "hardware": machines(groups),
        "variants": {v.name: json.loads(json.dumps(v.given)) for v in variants},
        "seeds": list(options.seeds),
        "baseline": baseline,
        "levels": levels,
        "budget": {"minutes": options.budget, "used": round(sum(map(used, trials)) / 60, 3), "jobs": options.jobs},
        "groups": [
            {k: g[k] for k in ("name", "n", "mean", "std", "differences")}
            | {"runs": [{"path": str(r.path), "seed": r.seed, "figures": dict(r.figures)} for r in g["runs"]]}
            for g in groups
        ],
        "wall": {t.folder.name: round(used(t), 2) for t in trials if used(t)},
        "left_out": outcome.left_out,
        "failed": outcome.failed,
        "notes": said,
    }
    if options.plot and groups:
        plots.save(plots.ablation(groups, levels, baseline), options.plot)
        print(f"plot: {options.plot}")
    if options.json:
        try:
            write_json(options.json, result)
        except OSError as error:
            raise InputError(f"'{options.json}' cannot be written: {error}") from None
        print(f"json: {options.json}")
    return result, outcome


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError for what does not stand to reason."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", nargs="?", help="module of experiments/, as cifar_mg")
    parser.add_argument("--presets", default="", metavar="A,B", help="presets, and names of --variants (default: all of those)")
    parser.add_argument(
        "--variants", type=pathlib.Path, metavar="FILE", help="JSON: presets with settings of their own, by name"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds of each (default: 0,1,2)")
    parser.add_argument("--budget", metavar="MINUTES", help="wall clock over all runs of the table (required)")
    parser.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="folder of all runs (default: runs/ablation-NAME)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of all runs: --config.KEY=VALUE"
    )
    parser.add_argument("--baseline", metavar="A", help="with what others are compared (default: flat, else the first)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on its part of the cores")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw them, as .svg, .png or .pdf")
    parser.add_argument("--dry_run", action="store_true", help="show what would be run, and run nothing")
    parser.error = lambda message: _fatal(message)
    options = parser.parse_args(arguments)
    told = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "experiments.ablation", *told])
    if not options.experiment:
        raise InputError("no experiment is named: python -m experiments.ablation NAME --presets=A,B --budget=MINUTES")
    options.presets = [p.strip() for p in options.presets.split(",") if p.strip()]
    try:
        options.seeds = [int(s) for s in options.seeds.split(",") if s.strip()]
    except ValueError:
        raise InputError(f"--seeds={options.seeds}: seeds are whole numbers with commas between them, as 0,1,2") from None
    if not options.seeds:
        raise InputError("no seeds: --seeds=0,1,2")
    if twice := [s for s in options.seeds if options.seeds.count(s) > 1]:
        raise InputError(f"--seeds names {twice[0]} twice")
    if options.budget is None:
        raise InputError("no budget: --budget=MINUTES of wall clock, over all runs")
    try:
        minutes = float(options.budget)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise InputError(f"--budget={options.budget}: a budget is a number of minutes above 0")
    options.budget = minutes
    if options.jobs < 1:
        raise InputError(f"--jobs={options.jobs}: at least 1 at a time")
    for file in (options.json, options.plot):  # not after hours
        if file and not file.parent.is_dir():
            raise InputError(f"'{file}' cannot be written: there is no folder '{file.parent}'")
    if options.plot and options.plot.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise InputError(f"a plot is written as .svg, .png or .pdf, not as '{options.plot.name}'")
    options.workdir = options.workdir or pathlib.Path("runs") / f"ablation-{options.experiment}"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        _, outcome = ablate(parse(arguments))
    except InputError as error:
        _fatal(str(error))
    if outcome.signal:
        print("stopped; the same command continues")
        raise SystemExit(128 + outcome.signal)
    if outcome.failed:
        raise SystemExit(1)


def _fatal(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[int]:
    """The workdir, made if it is not there, for this process and its runs alone; a run that outlives us holds it on."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise InputError(f"workdir '{workdir}' cannot be written to: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"workdir '{workdir}' is in use by another call, or by a run of one that was killed") from None
        yield file.fileno()


def _affinity() -> set[int]:
    """The cores of this process; empty where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _folder(variant: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", variant)


def _pair(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise InputError(f"--set {setting}: settings are given as KEY=VALUE")
    return key.removeprefix("--").removeprefix("config."), value


def _text(value: Any) -> str:
    """A value of JSON as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is not readable JSON: {error}") from None


if __name__ == "__main__":
    main()
