"""Kills a run with SIGKILL, again and again, and compares what it ends with to a run that was left alone.

    python -m experiments.benchmarks.kill_resume --kills=100
    python -m experiments.benchmarks.kill_resume --experiment=ratings_mg --devices=2 -- --config.data.source=movielens:DIR

One run after the other is begun in a fresh workdir, with a fresh compilation cache, and killed at times that
are uniform over the life of the process, import and compilation included; the same command is repeated, and
killed again, until it once comes to its end before its kill does. Then its whole training state (parameters,
averages, moments, statistics, step counts) and its test figures are compared with those of the uninterrupted run,
which is computed in the same invocation. Runs are small, but whole: a stage per granularity and a joint one, accumulated
gradients, averaged parameters, dropout, validation inside stages with a memory of the best, checkpoints every other step,
test, report.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from mgjax.train.checkpoint import load_state
from mgjax.train.monitor import hardware

NETWORK = {"model.widths": "8,16,16", "model.blocks": "1,1,1", "model.dropout": "0.1"}
SIZES = {
    "imagenet_mg": NETWORK,
    "text_mg": {"model.buckets": "1024", "model.dropout": "0.1"},
    "ratings_mg": {"model.width": "8", "data.negatives": "1", "preset": "ladder"},
}
SETTINGS = {
    "data.limit": "192",
    "plan.kind": "coarse_to_fine",
    "plan.batch_size": "32",
    "plan.eval_batch_size": "96",
    "plan.alone": "2,2,2",
    "plan.joint": "3",
    "optim.accumulate": "2",
    "optim.ema": "0.9",
    "checkpoint.every": "2",
    "log.every": "1",
    "log.validate_every": "4",
    "stop.patience": "50",
}
# What the run has said when it is killed → where that was.
PHASES = (
    (r"^report: ", "after the report"),
    (r"stage joint: validation", "test and report"),
    (r"^stage \w+: validation", "training, later stages"),
    (r"^stage ", "training, first stage"),
    (r"^workdir: ", "data, start and compilation"),
    (r"", "import"),
)


def start(workdir: pathlib.Path, cache: pathlib.Path, log: pathlib.Path, of: argparse.Namespace) -> subprocess.Popen:
    """Begins or continues the run; a process group of its own, so that a kill hits its workers too."""
    keys = [f"--config.{k}={v}" for k, v in (SETTINGS | SIZES[of.experiment]).items()]
    command = [sys.executable, "-m", f"experiments.{of.experiment}", *keys, *of.more]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    with log.open("w") as said:
        return subprocess.Popen(
            [*command, f"--workdir={workdir}", f"--config.compile_cache={cache}"],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={of.devices}"},
            cwd=pathlib.Path(__file__).parents[2],
            start_new_session=True,
        )


def alone(folder: pathlib.Path, name: str, cache: pathlib.Path, of: argparse.Namespace) -> tuple[pathlib.Path, float]:
    """A run that nobody disturbs: its workdir, and the seconds of its life."""
    began = time.monotonic()
    log = folder / f"{name}.log"
    if start(folder / name, cache, log, of).wait():
        raise SystemExit(f"the uninterrupted run failed:\n{log.read_text()}")
    return folder / name, time.monotonic() - began


def result(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything that two equal runs share: all leaves of the newest and of the best state, and the figures."""
    import jax

    state = {
        f"{kept}{jax.tree_util.keystr(path)}": np.asarray(value)
        for kept in ("checkpoints", "best")
        for path, value in jax.tree_util.tree_leaves_with_path(load_state(workdir, kept))
    }
    summary = json.loads((workdir / "summary.json").read_text())
    figures = {k: summary[k] for k in ("test", "best", "steps")} | {s["name"]: s["val"] for s in summary["stages"]}
    figures |= {f"point {p['name']}": [p["accuracy"], p.get("figures")] for p in summary["points"]}
    return state | {k: np.array(json.dumps(v, sort_keys=True)) for k, v in figures.items()}


def identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of what differs in a single bit."""
    return [k for k in sorted(set(a) | set(b)) if k not in a or k not in b or a[k].tobytes() != b[k].tobytes()]


def steps_of(workdir: pathlib.Path) -> int:
    """The last step that the run has recorded; a record that was cut short does not count."""
    steps = [0]
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError):
            pass
    return max(steps)


def continued_at(log: pathlib.Path) -> int | None:
    """The step at which a start went on; 0 for one from the beginning, None for one that did not come so far."""
    said = log.read_text(errors="replace")
    if found := re.search(r"continuing at step (\d+)", said):
        return int(found[1])
    return 0 if re.search(r"^stage ", said, re.MULTILINE) else None


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--experiment", choices=tuple(SIZES), default="imagenet_mg")
    parser.add_argument("--devices", type=int, default=1, help="virtual ones of the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--cache", type=pathlib.Path, help="keeps compiled programs (default: each run compiles its own)")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("more", nargs="*", help="further keys of the run, after --")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error("--kills is at least 1")
    rng, began = np.random.default_rng(options.seed), time.monotonic()
    print(f"{hardware()}; seed {options.seed}; {options.experiment} on {options.devices} devices", flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        whole, cold = alone(folder, "whole", options.cache or folder / "cache", options)
        again, warm = alone(folder, "again", options.cache or folder / "cache", options)
        expected = result(whole)
        if differs := identical(expected, result(again)):
            raise SystemExit(f"two uninterrupted runs differ in {differs[:5]}")
        print(f"uninterrupted: {cold:.1f} s, {warm:.1f} s with compiled programs; {len(expected)} values agree", flush=True)
        shutil.rmtree(again)

        killed, phases, lost, runs, bad = 0, collections.Counter(), [], [], []
        while killed < options.kills or runs[-1]["open"]:
            if not runs or not runs[-1]["open"]:
                runs.append({"open": True, "kills": 0, "workdir": folder / f"run{len(runs)}", "steps": 0})
            run = runs[-1]
            log = folder / "log"
            process = start(run["workdir"], options.cache or folder / f"cache{len(runs)}", log, options)
            life = warm if steps_of(run["workdir"]) else cold  # only what was compiled to the end is kept
            try:
                process.wait(rng.uniform(0, life) if killed < options.kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed, run["kills"] = killed + 1, run["kills"] + 1
                said = log.read_text(errors="replace")
                phases[next(phase for pattern, phase in PHASES if re.search(pattern, said, re.MULTILINE))] += 1
            # What the kill before this start has cost: the steps that had been recorded and are computed again.
            if run["steps"] and (at := continued_at(log)) is not None:
                lost.append(max(0, run["steps"] - at))
                run["steps"] = 0
            run["steps"] = max(run["steps"], steps_of(run["workdir"]))
            if process.returncode != -signal.SIGKILL:
                run["open"] = False
                differs = identical(expected, result(run["workdir"])) if process.returncode == 0 else ["its end: it failed"]
                if differs:
                    bad.append(run)
                    print(
                        f"run {len(runs)}, {run['kills']} kills: differs in {differs[:5]}\n{log.read_text()[-3000:]}",
                        flush=True,
                    )
                elif not bad:
                    shutil.rmtree(run["workdir"])
                shutil.rmtree(folder / f"cache{len(runs)}", ignore_errors=True)
                minutes = (time.monotonic() - began) / 60
                print(f"{killed} kills, {len(runs)} runs, {len(bad)} differ, {minutes:.1f} min", flush=True)
        good = sum(run["kills"] for run in runs if run not in bad)
        figures = {
            "kills": killed,
            "kills_survived": good,
            "runs": len(runs),
            "runs_bit_identical": len(runs) - len(bad),
            "lost_steps_mean": round(float(np.mean(lost)), 3) if lost else 0.0,
            "lost_steps_max": max(lost, default=0),
            "minutes": round((time.monotonic() - began) / 60, 2),
            "uninterrupted_seconds": round(cold, 2),
            "uninterrupted_seconds_compiled": round(warm, 2),
        } | {f"killed_in_{phase.replace(', ', '_').replace(' ', '_')}": n for phase, n in sorted(phases.items())}
    print(f"killed: {', '.join(f'{n} in {phase}' for phase, n in phases.most_common())}")
    print(f"steps lost by a kill: {figures['lost_steps_mean']} on average, {figures['lost_steps_max']} at most")
    print(
        f"{good} of {killed} kills survived: the parameters of {figures['runs_bit_identical']} of {len(runs)} runs are "
        f"bit-identical to the uninterrupted run's; {figures['minutes']} min"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    done = main()
    sys.exit(done["kills_survived"] != done["kills"])
