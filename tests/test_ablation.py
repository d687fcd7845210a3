"""Presets × seeds within a budget: order, budget, resumption, failures, signals, jobs, and what the table says."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from scipy import stats

from experiments import ablation, paired
from mgjax.config import key
from mgjax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A run that does what FAKE_TOLD/told.json says of its folder: `sleep` until it is asked to stop or there is a file `go`, `exit`
# with a status, `seconds` that it claims to have taken, figures. It notes what happens in FAKE_TOLD/events.
FAKE = """
import json, os, pathlib, signal, sys, time

given = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir, room = pathlib.Path(given.pop("workdir")), pathlib.Path(os.environ["FAKE_TOLD"])
told = json.loads((room / "told.json").read_text())
told = told.get("*", {}) | told.get(workdir.name, {})
config = {"preset": "flat", "seed": 0, "size": "auto", "rate": 0.1, "data.limit": 0, "data.dir": ""}
config |= {k.removeprefix("config."): type(config[k.removeprefix("config.")])(v) for k, v in given.items()}


def note(what):
    with (room / "events").open("a") as events:
        events.write(f"{what} {workdir.name}\\n")


def stop(number, frame):
    note(f"signal {number}")
    (workdir / "checkpoints" / "7").mkdir(parents=True)
    raise SystemExit(128 + number)


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
(workdir / "config.json").write_text(json.dumps({"experiment": "fake", "config": config}))
note("start")
print("cores", sorted(os.sched_getaffinity(0)), "settings", sorted(given.items()))
end = time.monotonic() + 120
while told.get("sleep") and not (room / "go").exists() and not (workdir / "checkpoints" / "7").exists():
    if time.monotonic() > end:
        raise SystemExit("nobody asked this run to stop")
    time.sleep(0.02)
if told.get("exit"):
    print("line one\\nwhat went wrong")
    raise SystemExit(told["exit"])
if told.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
accuracy = told.get("accuracy", 0.5 + 0.01 * config["seed"])
levels = {"coarse": {"accuracy": accuracy + 0.2}, "fine": {"accuracy": accuracy}}
test = {"examples": 1000, "levels": levels, "full_path_accuracy": accuracy, "mistake_severity": 2 - accuracy}
summary = {"experiment": "fake", "dataset": "synthetic", "seed": config["seed"], "hardware": "1 × cpu", "params": 1000}
summary |= {"train_flops": 1e12, "seconds": told.get("seconds", 60.0), "test": test}
if not told.get("silent"):
    (workdir / "summary.json").write_text(json.dumps(summary))
note("end")
"""


@dataclasses.dataclass(frozen=True)
class Data:
    limit: int = key(0, "examples", low=0)
    dir: str = key("", "folder")


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = key("flat", "what", choices=("flat", "joint", "staged"))
    seed: int = key(0, "seed", low=0)
    size: str = key("auto", "size")
    rate: float = key(0.1, "a setting", low=0)
    data: Data = Data()


class Room:
    """A workdir, what the fake runs are told, and what they noted."""

    def __init__(self, folder):
        self.folder, self.workdir = folder, folder / "W"

    def tell(self, **told):
        (self.folder / "told.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in told.items()}))

    def events(self, kind="start"):
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [l.rpartition(" ")[2] for l in lines if l.startswith(kind)]

    def call(self, *arguments, presets="flat,joint", seeds="0,1", budget=100):
        """Exit status of a call; 0 where it simply ends."""
        given = ["fake", f"--workdir={self.workdir}", f"--presets={presets}", f"--seeds={seeds}", f"--budget={budget}"]
        try:
            ablation.main([*given, *map(str, arguments)])
        except SystemExit as stop:
            return stop.code
        return 0

    def until(self, *starts):
        """Waits for runs to have begun."""
        deadline = time.monotonic() + 60
        while not set(starts) <= set(self.events()):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def room(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    module = types.ModuleType("experiments.fake")
    module.Config, module.resolve = Config, lambda backend, given: ({}, "")
    monkeypatch.setitem(sys.modules, "experiments.fake", module)
    real = ablation.command
    monkeypatch.setattr(ablation, "command", lambda *a: [sys.executable, str(tmp_path / "fake.py"), *real(*a)[3:]])
    monkeypatch.setenv("FAKE_TOLD", str(tmp_path))
    result = Room(tmp_path)
    result.tell()
    return result


# ---------------------------------------------------------------------- statistics


def test_a_paired_test_is_scipys_and_the_closed_form():
    ours, base = {0: 0.52, 1: 0.53, 2: 0.56, 9: 0.1}, {2: 0.52, 1: 0.52, 0: 0.50, 5: 0.9}
    found = paired.paired(ours, base)
    d = np.array([0.02, 0.01, 0.04])
    assert (found.n, found.why) == (3, "")
    np.testing.assert_allclose([found.mean, found.std], [d.mean(), d.std(ddof=1)])
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    # Two degrees of freedom: P(|T| > t) = 1 − t / √(2 + t²).
    np.testing.assert_allclose([found.t, found.p], [t, 1 - t / math.sqrt(2 + t**2)])
    test = stats.ttest_rel([0.52, 0.53, 0.56], [0.50, 0.52, 0.52])
    assert (found.t, found.p) == (test.statistic, test.pvalue)
    assert paired.paired(base, ours).mean == -found.mean and paired.paired(base, ours).p == found.p


@pytest.mark.parametrize(
    "ours, base, n, mean, std, why",
    [
        ({0: 0.5}, {1: 0.5}, 0, None, None, "no common seed"),
        ({0: 0.5, 1: 0.7}, {0: 0.4}, 1, 0.1, None, "one common seed"),
        ({0: 0.81, 1: 0.61, 2: 0.41}, {0: 0.80, 1: 0.60, 2: 0.40}, 3, 0.01, 0, "no spread"),
        ({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}, 2, 0, 0, "no spread"),
    ],
)
def test_what_cannot_be_tested_says_why(ours, base, n, mean, std, why):
    found = paired.paired(ours, base)
    assert (found.n, found.p, found.t, found.why) == (n, None, None, why)
    assert found.mean is None if mean is None else found.mean == pytest.approx(mean)
    assert found.std is None if std is None else found.std == pytest.approx(0, abs=1e-12)


def test_holm_is_monotone_capped_and_never_below_the_raw():
    # By hand: 4 · 0.005; 3 · 0.01; 2 · 0.03; 1 · 0.04, raised to what stands before it.
    np.testing.assert_allclose(paired.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0] and paired.holm([0.2]) == [0.2] and paired.holm([]) == []
    p = np.random.default_rng(0).uniform(size=20).tolist()
    adjusted = paired.holm(p)
    assert all(a >= b for a, b in zip(adjusted, p)) and [adjusted[i] for i in np.argsort(p)] == sorted(adjusted)


# ---------------------------------------------------------------------- runs


def test_seed_by_seed_with_the_settings_that_were_given(room, capsys):
    assert room.call("--set", "rate=0.5", "config.data.limit=8", presets="flat,joint,staged") == 0
    assert room.events() == [f"{p}-seed{s}" for s in (0, 1) for p in ("flat", "joint", "staged")]
    log = (room.workdir / "joint-seed1.log").read_text()
    for said in ("('config.rate', '0.5')", "('config.data.limit', '8')", "('config.seed', '1')", "('config.preset', 'joint')"):
        assert said in log
    out = capsys.readouterr().out
    assert "fake on synthetic: 1,000 test examples" in out and "6 of 6 runs are finished; 6:00 of the budget of 1:40:00" in out


def test_what_is_done_is_neither_run_nor_paid_again(room, capsys):
    assert room.call(seeds="0", budget=4) == 0
    capsys.readouterr()
    # Two minutes are used; two more runs of a minute fit.
    assert room.call(seeds="0,1", budget=4) == 0
    assert room.events() == ["flat-seed0", "joint-seed0", "flat-seed1", "joint-seed1"]
    assert "4 of 4 runs are finished; 4:00 of the budget of 4:00 is used" in capsys.readouterr().out
    assert room.call(seeds="0,1", budget=1) == 0 and len(room.events()) == 4
    record = json.loads((room.workdir / "ablation.json").read_text())
    assert record["seeds"] == [0, 1] and record["variants"] == {"flat": {"preset": "flat"}, "joint": {"preset": "joint"}}


def test_what_does_not_fit_the_budget_is_left_out_and_said(room, capsys):
    # Of joint it is known after the first seed that it takes five minutes; flat takes one.
    room.tell(joint_seed0={"seconds": 300}, joint_seed1={"seconds": 300})
    out = room.folder / "figures.json"
    assert room.call(f"--json={out}", seeds="0,1,2", budget=8.5) == 0
    assert room.events() == ["flat-seed0", "joint-seed0", "flat-seed1", "flat-seed2"]
    said = json.loads(out.read_text())
    assert said["left_out"] == {
        "joint, seed 1": "expected 5:00, left 1:30",
        "joint, seed 2": "expected 5:00, left 0:30",
    }
    assert said["budget"] == {"minutes": 8.5, "used": pytest.approx(8, abs=0.01), "jobs": 1}
    assert "left out for the budget: joint, seed 1 (expected 5:00, left 1:30)" in capsys.readouterr().out
    # With nothing left nothing begins, even what takes no time.
    assert room.call(f"--json={out}", presets="flat,joint,staged", seeds="0", budget=6) == 0
    assert json.loads(out.read_text())["left_out"] == {"staged, seed 0": "the budget is used up"}
    # More minutes: it goes on where it was.
    assert room.call(seeds="0,1,2", budget=100) == 0 and room.events()[4:] == ["joint-seed1", "joint-seed2"]


def test_a_preset_that_is_not_known_is_expected_to_take_as_long_as_the_others(room):
    room.tell(**{"*": {"seconds": 120}, "joint_seed0": {"seconds": 240}})
    room.call(seeds="0", budget=100)
    assert room.call("--dry_run", presets="flat,joint,staged", seeds="0", budget=8.9) == 0
    trials = [
        ablation.Trial(ablation.Variant(p, {}, {}, {}), 0, room.workdir / f"{p}-seed0") for p in ("flat", "joint", "staged")
    ]
    assert ablation.expected(trials[2], trials) == pytest.approx(180, abs=2)
    assert ablation.expected(trials[2], trials[2:]) is None
    # Of an interrupted run, what it has behind it need not be done again; without a checkpoint it must.
    trials[2].folder.mkdir()
    (trials[2].folder / "wall.json").write_text('{"seconds": 100, "cores": 1}')
    assert ablation.expected(trials[2], trials) == pytest.approx(180, abs=2)
    (trials[2].folder / "checkpoints" / "40").mkdir(parents=True)
    assert ablation.expected(trials[2], trials) == pytest.approx(80, abs=2)
    assert ablation.budget_left(1000, trials, trials[2:]) == pytest.approx(1000 - 120 - 240 - 100 - 80, abs=2)


def test_a_run_that_fails_stops_no_other(room, capsys):
    room.tell(flat_seed0={"exit": 3}, joint_seed0={"silent": True}, flat_seed1={"kill": True})
    out = room.folder / "figures.json"
    assert room.call(f"--json={out}") == 1
    assert len(room.events()) == 4
    said = capsys.readouterr().out
    assert "flat, seed 0: failed (exit status 3), the end of" in said and "    what went wrong\n" in said
    assert "no run of the baseline flat is finished" in said
    failed = json.loads(out.read_text())["failed"]
    whys = {k: v.partition(";")[0] for k, v in failed.items()}
    assert whys == {
        "flat, seed 0": "exit status 3",
        "joint, seed 0": "no summary.json",
        "flat, seed 1": "ended by SIGKILL",
    }
    # The same command tries them again, and shows no line of the first attempt.
    room.tell(flat_seed0={"exit": 4})
    assert room.call() == 1
    said = capsys.readouterr().out
    assert room.events()[4:] == ["flat-seed0", "joint-seed0", "flat-seed1"]
    assert "3 of 4 runs are finished" in said and said.count("what went wrong") == 1
    room.tell()
    assert room.call() == 0 and room.events()[7:] == ["flat-seed0"]


def test_without_any_result_there_is_no_table(room, capsys):
    room.tell(**{"*": {"exit": 1}})
    out, plot = room.folder / "figures.json", room.folder / "plot.svg"
    assert room.call(f"--json={out}", f"--plot={plot}", seeds="0") == 1
    said = json.loads(out.read_text())
    assert said["groups"] == [] and len(said["failed"]) == 2 and not plot.exists()
    assert "0 of 2 runs are finished" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_same_command_continues(room, capsys, number):
    room.tell(flat_seed0={"seconds": 1}, joint_seed0={"sleep": True})

    def ask():
        room.until("joint-seed0")
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(number)
    assert room.call(seeds="0,1") == 128 + number
    asking.join()
    assert signal.getsignal(number) is before
    assert room.events() == ["flat-seed0", "joint-seed0"] and room.events(f"signal {number:d}") == ["joint-seed0"]
    out = capsys.readouterr().out
    assert "stopped; the same command continues" in out and "failed" not in out
    assert (room.workdir / "joint-seed0" / "wall.json").exists()
    assert room.call(seeds="0,1") == 0
    assert room.events()[2:] == ["joint-seed0", "flat-seed1", "joint-seed1"]
    assert "joint, seed 0: continues" in capsys.readouterr().out


def test_who_began_it_under_nohup_may_leave(room):
    room.tell(flat_seed0={"sleep": True})

    def leave():
        room.until("flat-seed0")
        os.kill(os.getpid(), signal.SIGHUP)
        (room.folder / "go").touch()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    leaving = threading.Thread(target=leave)
    leaving.start()
    try:
        assert room.call(presets="flat", seeds="0,1") == 0
    finally:
        leaving.join()
        signal.signal(signal.SIGHUP, before)
    assert room.events() == ["flat-seed0", "flat-seed1"] and not room.events("signal")


def test_an_error_of_our_own_leaves_no_run_behind(room, monkeypatch):
    room.tell(**{"*": {"sleep": True}})
    begun, real = [], ablation.Running.__init__

    def start(self, *rest):
        real(self, *rest)
        begun.append(self)
        room.until("flat-seed0")

    def full(self):
        raise OSError("disk full")

    monkeypatch.setattr(ablation.Running, "__init__", start)
    monkeypatch.setattr(ablation.Running, "note", full)
    with pytest.raises(OSError, match="disk full"):
        room.call(seeds="0")
    assert [c.process.returncode for c in begun] == [143]


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import pytest
import test_ablation as t
from experiments import ablation
module = t.types.ModuleType("experiments.fake")
module.Config, module.resolve = t.Config, lambda backend, given: ({{}}, "")
sys.modules["experiments.fake"] = module
real = ablation.command
ablation.command = lambda *a: [sys.executable, {fake!r}, *real(*a)[3:]]
ablation.main(sys.argv[1:])
"""


def test_ctrl_c_in_a_terminal_and_a_killed_ablation(room):
    """Ctrl-C reaches the whole group of processes, and runs all the same only once; SIGKILL leaves a run, which holds the
    workdir until it ends."""
    room.tell(**{"*": {"sleep": True}})
    driver = DRIVER.format(tests=str(ROOT / "tests"), fake=str(room.folder / "fake.py"))
    line = [sys.executable, "-c", driver, "fake", f"--workdir={room.workdir}", "--presets=flat", "--seeds=0", "--budget=9"]
    start = lambda: subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    first = start()
    try:
        room.until("flat-seed0")
        os.killpg(first.pid, signal.SIGINT)
        out = first.communicate(timeout=60)[0]
    finally:
        first.kill()
    assert first.returncode == 130 and "stopped" in out
    assert room.events("signal 2") == ["flat-seed0"]
    (room.workdir / "flat-seed0" / "checkpoints" / "7").rmdir()
    (room.folder / "events").unlink()
    second = start()
    try:
        room.until("flat-seed0")
    finally:
        second.kill()
        second.communicate()
    with pytest.raises(InputError, match="in use by another call, or by a run of one that was killed"):
        ablation.ablate(ablation.parse(line[3:]))
    (room.folder / "go").touch()
    deadline = time.monotonic() + 60
    while not room.events("end"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_jobs_go_side_by_side_each_on_its_own_cores(room):
    room.tell(flat_seed0={"sleep": True}, joint_seed0={"sleep": True})
    mine = sorted(os.sched_getaffinity(0))

    def release():
        room.until("flat-seed0", "joint-seed0")  # both are in flight, or this never comes
        (room.folder / "go").touch()

    releasing = threading.Thread(target=release)
    releasing.start()
    assert room.call("--jobs=2") == 0
    releasing.join()
    assert sorted(os.sched_getaffinity(0)) == mine
    half = len(mine) // 2
    cores = [(room.workdir / f"{p}-seed0.log").read_text() for p in ("flat", "joint")]
    assert [f"cores {part} " in log for part, log in zip((mine[:half], mine[half : 2 * half]), cores)] == [True, True]
    assert set(room.events()) == {f"{p}-seed{s}" for p in ("flat", "joint") for s in (0, 1)}
    assert json.loads((room.workdir / "flat-seed0" / "wall.json").read_text())["cores"] == half


def test_dry_runs_show_commands_and_touch_nothing(room, capsys):
    assert room.call("--dry_run", "--set", "rate=0.5") == 0
    out = capsys.readouterr().out
    assert not room.workdir.exists() and room.events() == []
    assert "joint, seed 1: begins, expected time unknown" in out and "--config.preset=joint --config.rate=0.5" in out
    room.call("--set", "rate=0.5", seeds="0")
    capsys.readouterr()
    room.call("--dry_run", "--set", "rate=0.5", seeds="0,1", budget=3)
    out = capsys.readouterr().out
    for said in ("flat, seed 0: finished, 1:00", "flat, seed 1: begins, expected time 1:00", "joint, seed 1: left out"):
        assert said in out, said


# ---------------------------------------------------------------------- the table


def test_the_table_and_the_json_say_the_same_as_scipy(room, capsys):
    accuracy = {"flat": (0.50, 0.52, 0.52), "joint": (0.52, 0.53, 0.56), "staged": (0.56, 0.57, 0.585)}
    room.tell(**{f"{p}_seed{s}": {"accuracy": a} for p, row in accuracy.items() for s, a in enumerate(row)})
    out = room.folder / "figures.json"
    assert room.call(f"--json={out}", presets="staged,flat,joint", seeds="0,1,2") == 0
    said = json.loads(out.read_text())
    assert said["baseline"] == "flat" and said["levels"] == ["coarse", "fine"] and said["hardware"] == ["1 × cpu"]
    assert [g["name"] for g in said["groups"]] == ["staged", "flat", "joint"] and said["groups"][1]["differences"] == {}
    groups = {g["name"]: g for g in said["groups"]}
    for p, row in accuracy.items():
        assert groups[p]["mean"]["fine/accuracy"] == pytest.approx(np.mean(row))
        assert groups[p]["std"]["fine/accuracy"] == pytest.approx(np.std(row, ddof=1))
        assert [r["figures"]["fine/accuracy"] for r in groups[p]["runs"]] == list(row)
    p = {n: stats.ttest_rel(accuracy[n], accuracy["flat"]).pvalue for n in ("joint", "staged")}
    for n in p:
        found = groups[n]["differences"]["fine/accuracy"]
        d = np.subtract(accuracy[n], accuracy["flat"])
        np.testing.assert_allclose([found["mean"], found["std"], found["p"]], [d.mean(), d.std(ddof=1), p[n]])
        # The severity is 2 − accuracy: the same test with the sign turned.
        assert groups[n]["differences"]["mistake_severity"]["mean"] == pytest.approx(-d.mean())
        assert groups[n]["differences"]["mistake_severity"]["p"] == pytest.approx(p[n])
    assert p["staged"] < p["joint"]
    holm = {"staged": 2 * p["staged"], "joint": max(p["joint"], 2 * p["staged"])}
    for n in p:
        assert groups[n]["differences"]["fine/accuracy"]["p_holm"] == pytest.approx(holm[n])
    shown = capsys.readouterr().out
    assert "53.67 ± 2.08%" in shown and "+2.33 ± 1.53 " in shown and f"p {p['joint']:.3f}" in shown
    assert "-0.023 ± 0.015" in shown and f"{holm['staged']:.3f}" in shown and "nan" not in shown.lower()
    # t(0.975; 2) = 4.303; over √3.
    assert "with 3 seeds a t-test has little power: p < 0.05 takes a mean difference above 2.48 of its" in shown
    assert "that p of fine, adjusted by Holm over 2 tests" in shown
    rows = [l for l in shown.splitlines() if l.startswith((" staged", " flat", " joint"))]
    assert len(rows) == 3 and len({len(r) for r in rows}) == 1


def test_tests_that_are_not_possible_are_words(room, capsys):
    room.tell(joint_seed0={"accuracy": 0.51}, joint_seed1={"accuracy": 0.52}, staged_seed1={"exit": 1})
    out = room.folder / "figures.json"
    assert room.call(f"--json={out}", presets="flat,joint,staged") == 1
    groups = {g["name"]: g for g in json.loads(out.read_text())["groups"]}
    assert groups["joint"]["differences"]["fine/accuracy"]["why"] == "no spread"
    assert groups["staged"]["differences"]["fine/accuracy"] == {
        "n": 1, "mean": 0.0, "std": None, "t": None, "p": None, "why": "one common seed", "p_holm": None
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "no spread" in shown and "one common seed: a test needs two" in shown and "nan" not in shown.lower()
    assert groups["staged"]["std"] is None and "Holm over" not in shown


def test_another_baseline(room):
    out = room.folder / "figures.json"
    assert room.call("--baseline=joint", f"--json={out}", seeds="0") == 0
    said = json.loads(out.read_text())
    assert said["baseline"] == "joint" and [bool(g["differences"]) for g in said["groups"]] == [True, False]
    assert room.call(f"--json={out}", presets="joint,staged", seeds="0") == 0
    assert json.loads(out.read_text())["baseline"] == "joint"  # the first, where there is no flat


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_plot_shows_every_row_and_is_the_same_every_time(room, suffix, start):
    room.tell(joint_seed0={"accuracy": 0.52}, joint_seed1={"accuracy": 0.55})
    drawn = []
    for name in ("a", "b"):
        plot = room.folder / f"{name}.{suffix}"
        assert room.call(f"--plot={plot}", presets="flat,joint,staged") == 0
        drawn.append(plot.read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(start)
    if suffix == "svg":
        text = drawn[0].decode()
        for said in ("flat (baseline)", "joint", "staged", "coarse", "fine", "training FLOPs", "1.00 T"):
            assert f">{said}</text>" in text, said


# ---------------------------------------------------------------------- variants


def test_variants_are_presets_with_settings_of_their_own(room, capsys):
    table = room.folder / "variants.json"
    table.write_text(json.dumps({"slow start": {"preset": "joint", "rate": 0.01}, "all": {"preset": "flat", "data.dir": "x"}}))
    out = room.folder / "figures.json"
    given = [f"--variants={table}", "--set", "rate=0.3", f"--json={out}"]
    assert room.call(*given, presets="flat,slow start", seeds="0") == 0
    assert room.events() == ["flat-seed0", "slow_start-seed0"]
    configs = [json.loads((room.workdir / n / "config.json").read_text())["config"] for n in room.events()]
    assert [(c["preset"], c["rate"]) for c in configs] == [("flat", 0.3), ("joint", 0.01)]
    assert json.loads(out.read_text())["variants"]["slow start"] == {"preset": "joint", "rate": 0.01}
    assert "slow start" in capsys.readouterr().out
    # Without --presets, all of the file.
    assert room.call(*given, presets="", seeds="0") == 0 and room.events()[2:] == ["all-seed0"]
    # A file may name presets as they are.
    table.write_text(json.dumps({"flat": {"preset": "flat"}, "slow start": {"preset": "joint", "rate": 0.01}}))
    assert room.call(*given, presets="", seeds="0") == 0 and len(room.events()) == 3
    table.write_text(json.dumps({"slow start": {"preset": "joint", "rate": 0.02}}))
    assert room.call(*given, presets="flat,slow start", seeds="0") == 2
    assert "slow start: rate was 0.01, is 0.02" in capsys.readouterr().err


def test_variants_of_different_test_sets_are_refused_before_anything_runs(room, capsys):
    table = room.folder / "variants.json"
    table.write_text(json.dumps({"few": {"preset": "flat", "data.limit": 8}}))
    assert room.call(f"--variants={table}", presets="flat,few") == 2
    assert "different test sets cannot be compared" in capsys.readouterr().err and room.events() == []


@pytest.mark.parametrize(
    "content, presets, says",
    [
        ("[1]", "flat", "is no table of variants"),
        ("{", "flat", "is not readable JSON"),
        ('{"flat": {"preset": "flat", "rate": 1}}', "flat", "cannot have the name 'flat'"),
        ('{"a,b": {"preset": "flat"}}', "flat", "cannot have the name 'a,b'"),
        ('{"x": {"rate": 1}}', "x", "variant 'x' needs a \"preset\", one of flat, joint, staged"),
        ('{"x": {"preset": "flat", "seed": 1}}', "x", "and no seed"),
        ('{"x": {"preset": "flat", "rte": 1}}', "x", "unknown key --config.rte; the nearest is --config.rate"),
        ('{"x": {"preset": "flat", "rate": "high"}}', "x", "flag --config.rate=high"),
        ('{"x": {"preset": "flat", "rate": -1}}', "x", "rate is -1.0; it is at least 0"),
        ('{"a b": {"preset": "flat"}, "a/b": {"preset": "joint"}}', "", "'a b' and 'a/b' would share the folder a_b"),
        ('{"half": {"preset": "flat"}}', "hlf", "'hlf' is no preset of fake; the nearest is half (there are flat, joint,"),
    ],
)
def test_variants_that_make_no_sense(room, capsys, content, presets, says):
    (room.folder / "variants.json").write_text(content)
    assert room.call(f"--variants={room.folder / 'variants.json'}", presets=presets) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and room.events() == []


# ---------------------------------------------------------------------- workdirs and bad input


def test_a_workdir_of_other_settings_is_refused_by_name(room, capsys):
    assert room.call("--set", "rate=0.5", "data.dir=a", presets="flat", seeds="0") == 0
    assert room.call("--set", "rate=0.25", "data.dir=a", presets="joint", seeds="0") == 2
    assert "holds another ablation (rate was 0.5, is 0.25)" in capsys.readouterr().err
    assert room.call(presets="flat", seeds="0") == 2
    assert "rate was 0.5, is None" in capsys.readouterr().err
    # The folder of the data changes no result; 0.50 is 0.5.
    assert room.call("--set", "rate=0.50", "data.dir=b", presets="joint", seeds="3") == 0
    assert room.events() == ["flat-seed0", "joint-seed3"]
    record = json.loads((room.workdir / "ablation.json").read_text())
    assert record["seeds"] == [0, 3] and set(record["variants"]) == {"flat", "joint"}


def test_a_finished_run_of_other_settings_is_refused_before_anything_runs(room, capsys):
    assert room.call(seeds="0") == 0
    path = room.workdir / "joint-seed0" / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"rate": 0.7}}))
    assert room.call(seeds="1,0") == 2 and len(room.events()) == 2
    assert "joint-seed0' holds another run (config.rate was 0.7, is 0.1)" in capsys.readouterr().err
    path.unlink()
    assert room.call(seeds="0") == 2
    assert "has a summary and no config.json" in capsys.readouterr().err


def test_the_workdir_of_a_single_run_is_refused(room, capsys):
    room.workdir.mkdir()
    (room.workdir / "config.json").write_text("{}")
    assert room.call() == 2 and "is the workdir of a single run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "no experiment is named"),
        (["fke", "--presets=flat", "--budget=1"], "there is no experiment 'fke'; the nearest is "),
        (["compare", "--presets=flat", "--budget=1"], "there is no experiment 'compare'"),
        (["a.b", "--presets=flat", "--budget=1"], "there is no experiment 'a.b'"),
        (["fake", "--presets=flt", "--budget=1"], "'flt' is no preset of fake; the nearest is flat"),
        (["fake", "--presets=flat,flat", "--budget=1"], "--presets names 'flat' twice"),
        (["fake", "--budget=1"], "nothing to compare: --presets=A,B of flat, joint, staged"),
        (["fake", "--presets=flat"], "no budget: --budget=MINUTES"),
        (["fake", "--presets=flat", "--budget=0"], "--budget=0: a budget is a number of minutes above 0"),
        (["fake", "--presets=flat", "--budget=-5"], "--budget=-5: a budget"),
        (["fake", "--presets=flat", "--budget=nan"], "--budget=nan: a budget"),
        (["fake", "--presets=flat", "--budget=long"], "--budget=long: a budget"),
        (["fake", "--presets=flat", "--budget=1", "--seeds="], "no seeds: --seeds=0,1,2"),
        (["fake", "--presets=flat", "--budget=1", "--seeds=1,2,1"], "--seeds names 1 twice"),
        (["fake", "--presets=flat", "--budget=1", "--seeds=a"], "--seeds=a: seeds are whole numbers"),
        (["fake", "--presets=flat", "--budget=1", "--seeds=-1"], "seed is -1; it is at least 0"),
        (
            ["fake", "--presets=flat,joint", "--budget=1", "--baseline=jont"],
            "'jont' is not among the presets; the nearest is joint",
        ),
        (["fake", "--presets=flat", "--budget=1", "--set", "rate"], "--set rate: settings are given as KEY=VALUE"),
        (["fake", "--presets=flat", "--budget=1", "--set", "rte=1"], "unknown key --config.rte; the nearest is --config.rate"),
        (["fake", "--presets=flat", "--budget=1", "--set", "rate=x"], "flag --config.rate=x"),
        (["fake", "--presets=flat", "--budget=1", "--set", "seed=1"], "--set seed: --presets and --seeds say it"),
        (["fake", "--presets=flat", "--budget=1", "--jobs=0"], "--jobs=0: at least 1"),
        (["fake", "--presets=flat", "--budget=1", "--jobs=9999"], "--jobs=9999 is more than the"),
        (["fake", "--presets=flat", "--budget=1", "--plot=plot.bmp"], "not as 'plot.bmp'"),
        (["fake", "--presets=flat", "--budget=1", "--json=absent/x.json"], "'absent/x.json' cannot be written"),
        (["fake", "--presets=flat", "--budget=1", "--workdir=file"], "'file' is not a folder"),
        (["fake", "--presets=flat", "--budget=1", "--workdir=/proc/x"], "workdir '/proc/x' cannot be written to"),
        (["fake", "--presets=flat", "--budget=1", "--variants=absent.json"], "'absent.json' is not readable JSON"),
        (["fake", "--preset=flat", "--budget=1"], "unrecognized arguments: --preset=flat"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(room, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(room.folder)
    (room.folder / "file").touch()
    with pytest.raises(SystemExit) as stop:
        ablation.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert room.events() == [] and not (room.folder / "runs").exists()


# ---------------------------------------------------------------------- a real experiment


def test_a_real_experiment_as_a_command(tmp_path, capsys):
    small = "model.widths=4,8,8 model.blocks=1,1,1 data.limit=96 plan.batch_size=16 plan.eval_batch_size=48 plan.max_steps=1"
    arguments = ["imagenet_mg", "--presets=flat,linear", "--seeds=0", "--budget=30", f"--workdir={tmp_path / 'W'}"]
    arguments += [f"--json={tmp_path / 'figures.json'}", "--set", *small.split(), "model.match="]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    line = [sys.executable, "-m", "experiments.ablation", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "figures.json").read_text())
    assert [g["name"] for g in said["groups"]] == ["flat", "linear"] and said["examples"] == 96
    summary = json.loads((tmp_path / "W" / "linear-seed0" / "summary.json").read_text())
    assert said["groups"][1]["mean"]["texture/accuracy"] == summary["test"]["levels"]["texture"]["accuracy"]
    assert said["wall"]["linear-seed0"] > summary["seconds"], "start and test count too"
    assert "one common seed" in done.stdout and "baseline" in done.stdout

    # What the run has recorded is what the experiment would do now, so nothing is begun.
    ablation.main([*arguments[:-1], "model.match=", "--dry_run"])
    out = capsys.readouterr().out
    assert out.count(": finished, ") == 2
    with pytest.raises(InputError, match=r"plan.max_steps was 1, is 2"):
        ablation.ablate(ablation.parse([*arguments, "plan.max_steps=2", "--dry_run"]))
