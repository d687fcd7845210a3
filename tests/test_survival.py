"""What a run survives: losses that are not finite, damaged checkpoints, a full disk, a damaged cache; and what it stops for."""

import dataclasses
import gc
import gzip
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax import Granularity, Head, MultiGranularityModel
from mgjax.branches import ResNet
from mgjax.config import ConfigError
from mgjax.errors import InputError
from mgjax.fusion import ConcatFusion
from mgjax.train import (
    CheckpointConfig,
    CheckpointError,
    GuardConfig,
    Interrupted,
    LogConfig,
    NonFiniteError,
    OptimConfig,
    ProfileConfig,
    StopConfig,
    load_variables,
)
from mgjax.train import loop as loop_module
from mgjax.train.checkpoint import load_state
from mgjax.train.guards import Best, lower_is_better
from mgjax.train.mesh import make_mesh
from mgjax.train.meter import Compilations, peak_flops, use_compilation_cache
from mgjax.train.monitor import Monitor
from tests import toy

ROOT = pathlib.Path(__file__).resolve().parent.parent
JOINT = toy.plan((0, 0, 6))


def leaves(workdir, which="checkpoints"):
    state = load_state(workdir, which)
    return {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(state)}


def same(a, b):
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(b[path], value, err_msg=path)


def steps_logged(workdir):
    return [r["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if "loss" in (r := json.loads(line))]


class Crash(Exception):
    pass


def feeds(poison=(), crash_at=None, on_validation=lambda: None):
    """Of the toy: with NaN labels' equivalent (an infinite pixel cannot be, so the label's row is huge) at some steps."""
    given, first = toy.feeds(), [True]

    def train(stage, seen, steps):
        probing, first[0] = first[0], False
        for i, batch in enumerate(given.train(stage, seen, steps)):
            at = seen // stage.batch_size + i
            if not probing and at == crash_at:
                raise Crash
            if at in poison:
                batch = batch.replace(inputs={"image": np.full_like(batch.inputs["image"], 255)}, index=batch.index + 1000)
            yield batch

    def validation():
        on_validation()
        return given.validation()

    return loop_module.Feeds(train, validation, given.test, given.eval_batch_size)


@pytest.fixture
def poisoned(monkeypatch):
    """An objective whose loss is NaN where all pixels are white."""
    from mgjax.data import Augment
    from mgjax.objective import Objective

    @dataclasses.dataclass(frozen=True)
    class Poisoned(Augment):
        def __call__(self, batch, rng, strength=1.0):
            white = (batch.inputs["image"] == 255).all()
            out = super().__call__(batch, rng, strength)
            return out.replace(inputs={"image": jnp.where(white, jnp.nan, out.inputs["image"])})

    m = toy.model()
    return dict(augment=Poisoned((90.0,) * 3, (60.0,) * 3, padding=1), objective=Objective(m.tasks, m.heads))


# ---------------------------------------------------------------------- losses that are not finite


def test_stop_keeps_the_batch_and_the_state_before_it(tmp_path, poisoned):
    given = dict(plan=JOINT, checkpoint=CheckpointConfig(every=2), **poisoned)
    with pytest.raises(
        NonFiniteError, match=r"step 4, stage 'joint': the loss is nan, .* lies in '.*step-4.npz'.*guard.nonfinite"
    ):
        toy.run(tmp_path, feeds=feeds({3}), **given)
    kept = np.load(tmp_path / "nonfinite" / "step-4.npz")
    assert (kept["inputs/image"] == 255).all() and kept["index"].shape == (16,) and (kept["index"] >= 1000).all()
    assert set(kept.files) == {"inputs/image", "targets/super", "targets/sub", "mask", "index"}
    assert not list((tmp_path / "nonfinite").glob("*.part"))
    state = leaves(tmp_path)
    assert all(np.isfinite(v).all() for v in state.values()) and state["['step']"] == 2
    # The policy may change when the run is continued.
    summary = toy.run(tmp_path, feeds=feeds({3}), guard=GuardConfig("skip"), **given)
    assert summary["steps"] == 6 and summary["skipped"] == 1


def test_skip_changes_nothing_but_the_step_count(tmp_path, poisoned):
    from tests.test_parallel import prepared
    from tests.test_train import batches, flat

    state, step, _ = prepared(make_mesh(devices=jax.devices()[:1]), toy.model(), OptimConfig(ema=0.9))
    first, second = batches(2)
    state, seen = step(state, first)
    before = jax.tree.map(np.array, state)
    bad = second.replace(inputs={"image": np.full(second.inputs["image"].shape, np.nan, np.float32)})
    state, seen = step(state, bad)
    assert not np.isfinite(float(seen["loss"])) and float(seen["finite"]) == 0
    assert int(state.step) == 2
    for new, old in zip(jax.tree.leaves(state.replace(step=0)), jax.tree.leaves(before.replace(step=0))):
        np.testing.assert_array_equal(new, old)
    assert flat(state.params)
    summary = toy.run(tmp_path, plan=JOINT, feeds=feeds({1, 2}), guard=GuardConfig("skip"), **poisoned)
    assert summary["skipped"] == 2 and summary["steps"] == 6
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("finite") == 0] == [2, 3]
    assert [r["loss"] for r in records if r.get("finite") == 0] == [None, None], "JSON has no NaN"


def test_too_many_skipped_in_a_row_stop_the_run(tmp_path, poisoned):
    with pytest.raises(NonFiniteError, match="3 batches in a row not finite"):
        toy.run(tmp_path, plan=JOINT, feeds=feeds({1, 2, 3}), guard=GuardConfig("skip", limit=2), **poisoned)


@pytest.mark.parametrize("bad, restored", [({3}, 2), ({0}, 0)])
def test_rollback_goes_on_behind_the_batch(tmp_path, poisoned, bad, restored, capsys):
    given = dict(plan=JOINT, checkpoint=CheckpointConfig(every=2), guard=GuardConfig("rollback"), **poisoned)
    summary = toy.run(tmp_path / "a", feeds=feeds(bad), **given)
    assert summary["rollbacks"] == 1 and summary["steps"] == 6
    assert f"Rolled back to step {restored}" in capsys.readouterr().out.replace("\n", " ")
    assert steps_logged(tmp_path / "a") == [1, 2, 3, 4, 5, 6], "none is missing, none stands twice"
    # The same, killed after the rollback and continued: the same bits.
    with pytest.raises(Crash):
        toy.run(tmp_path / "b", feeds=feeds(bad, crash_at=5), **given)
    again = toy.run(tmp_path / "b", feeds=feeds(bad), **given)
    same(leaves(tmp_path / "a"), leaves(tmp_path / "b"))
    assert again["rollbacks"] == 1


def test_a_rollback_under_a_progress_bar(tmp_path, poisoned, monkeypatch):
    import io

    from rich.console import Console

    monkeypatch.setattr(
        "mgjax.train.monitor.Console", lambda **given: Console(file=io.StringIO(), force_terminal=True, width=100, **given)
    )
    before = sys.stdout
    summary = toy.run(tmp_path, plan=JOINT, feeds=feeds({3}), guard=GuardConfig("rollback"), **poisoned)
    assert summary["rollbacks"] == 1 and sys.stdout is before


def test_rollbacks_have_a_limit(tmp_path, poisoned):
    with pytest.raises(NonFiniteError, match="after 1 rollbacks"):
        toy.run(tmp_path, plan=JOINT, feeds=feeds({1, 4}), guard=GuardConfig("rollback", limit=1), **poisoned)


# ---------------------------------------------------------------------- early stopping and the best checkpoint


def test_a_stage_ends_early_and_the_next_one_begins(tmp_path):
    """With a learning rate of 0, and no statistics that move, nothing improves after the first validation."""
    given = dict(
        model=toy.model(norm="group"),
        optim=OptimConfig(learning_rate=0.0),
        stop=StopConfig("sub/raw_accuracy", patience=2),
        log=LogConfig(every=1, validate_every=2),
    )
    plan = toy.plan((0, 20, 20))
    summary = toy.run(tmp_path, plan=plan, **given)
    assert [s["steps"] for s in summary["stages"]] == [6, 6] and summary["steps"] == 12
    assert summary["train_flops"] == sum(s["flops"] for s in summary["stages"])
    assert summary["best"]["metric"] == "sub/raw_accuracy"
    # Killed anywhere, it remembers how long it has waited.
    for crash_at in (3, 7, 9):
        workdir = tmp_path / str(crash_at)
        with pytest.raises(Crash):
            toy.run(workdir, plan=plan, feeds=feeds(crash_at=crash_at), **given)
        again = toy.run(workdir, plan=plan, **given)
        assert [s["steps"] for s in again["stages"]] == [6, 6]
        same(leaves(tmp_path), leaves(workdir))


def test_the_second_signal_stops_at_once(capfd):
    from mgjax.train.signals import StopSignals

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may have its own
    with StopSignals() as signals:
        assert not signals.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert "once more stops at once" in capfd.readouterr().err


def test_a_signal_in_a_validation_repeats_that_validation(tmp_path):
    given = dict(plan=JOINT, log=LogConfig(every=1, validate_every=2), checkpoint=CheckpointConfig(every=100))
    whole = toy.run(tmp_path / "whole", **given)
    asked = []

    def ask():
        if not asked.append(1) and len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        toy.run(tmp_path / "cut", feeds=feeds(on_validation=ask), **given)
    again = toy.run(tmp_path / "cut", **given)
    assert again["best"] == whole["best"] and again["test"] == whole["test"]
    same(leaves(tmp_path / "whole"), leaves(tmp_path / "cut"))
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val/sub/accuracy" in r] == [2, 4, 6]


def test_the_best_checkpoint_is_kept_and_tested_if_asked(tmp_path):
    """The learning rate is so high that the model gets worse after a while."""
    given = dict(plan=toy.plan((0, 0, 24)), optim=OptimConfig(learning_rate=0.3), log=LogConfig(every=1, validate_every=2))
    summary = toy.run(tmp_path, stop=StopConfig(use="best"), **given)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = {r["step"]: r["val/sub/accuracy"] for r in records if "val/sub/accuracy" in r}
    best = summary["best"]
    assert best["value"] == max(seen.values()) and seen[min(best["number"], 24)] == best["value"]
    # The toy's test split is its validation split.
    assert summary["tested"] == "best" and summary["test"]["levels"]["sub"]["accuracy"] == pytest.approx(best["value"])
    kept, returned = load_variables(tmp_path, "best"), summary["variables"]
    for a, b in zip(jax.tree.leaves(kept["params"]), jax.tree.leaves(returned["params"])):
        np.testing.assert_array_equal(a, b)
    # The one before it is kept until a checkpoint names this one.
    assert max(int(p.name) for p in (tmp_path / "best").iterdir() if p.name.isdigit()) == best["number"]
    for name in ("5", "9"):  # killed anywhere, the best is the same, to the bit
        with pytest.raises(Crash):
            toy.run(tmp_path / name, feeds=feeds(crash_at=int(name)), stop=StopConfig(use="best"), **given)
        again = toy.run(tmp_path / name, stop=StopConfig(use="best"), **given)
        assert again["best"] == best and again["test"] == summary["test"]
        same(leaves(tmp_path, "best"), leaves(tmp_path / name, "best"))


def test_best_knows_errors_from_merits():
    best = Best()
    assert best.see("x/accuracy", 0.5, 1) and not best.see("x/accuracy", 0.5, 2)
    assert not best.see("x/accuracy", float("nan"), 3) and best.see("x/accuracy", 0.6, 4) and best.number == 4
    assert [best.see_stage("y/accuracy", v) for v in (0.5, 0.5, float("nan"), 0.6)] == [0, 1, 2, 0]
    best.end_stage()
    assert best.see_stage("z/rmse", 9.0) == 0 and best.see_stage("z/rmse", 8.0) == 0, "patience is that of a stage"
    assert best.value == 0.6
    worse = Best()
    assert worse.see("tree_distance", 2.0, 1) and worse.see("tree_distance", 1.0, 2) and not worse.see("tree_distance", 3.0, 3)
    assert lower_is_better("val/rmse") and not lower_is_better("class/f1")


def test_a_metric_that_no_validation_has(tmp_path):
    with pytest.raises(ConfigError, match=r"stop.metric is 'sub/acuracy'; validation has .*sub/accuracy"):
        toy.run(tmp_path, stop=StopConfig("sub/acuracy"))


# ---------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that crashed in its last step, with checkpoints of steps 2 and 4; and the same run left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    given = dict(plan=JOINT, checkpoint=CheckpointConfig(every=2, keep=3))
    toy.run(folder / "whole", **given)
    with pytest.raises(Crash):
        toy.run(folder / "cut", feeds=feeds(crash_at=5), **given)
    assert sorted(p.name for p in (folder / "cut" / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "4"]
    return folder, given


def files_of(checkpoint):
    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())


@pytest.fixture
def collected():
    """What a test leaves to the garbage collector is collected with it, and not in a test that comes later."""
    yield
    gc.collect()


def careless(test):
    """Marks a test after which the garbage collector complains of what half a file breaks off inside of Orbax."""
    kinds = ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning")
    quiet = pytest.mark.filterwarnings(*(f"ignore::pytest.{kind}" for kind in kinds))
    return pytest.mark.usefixtures("collected")(quiet(test))


@careless
@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_a_damaged_file_of_the_newest_checkpoint_falls_back_to_the_one_before(stopped, tmp_path, how, caplog):
    """Any of its files: what is restored is either whole or the checkpoint before, never something else."""
    from mgjax.train.checkpoint import Checkpoints
    from tests.test_parallel import prepared

    folder, _ = stopped
    meta = {"experiment": "toy", "taxonomy": toy.TREE.fingerprint, "config": {"a": 1, "free": 1}}
    template, _, _ = prepared(make_mesh(), toy.model())
    newest = folder / "cut" / "checkpoints" / "4"
    fallen = []
    for name in files_of(newest):
        workdir = tmp_path / name.replace("/", "_")
        shutil.copytree(folder / "cut" / "checkpoints", workdir / "checkpoints")
        file = workdir / "checkpoints" / "4" / name
        if how == "deleted":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
        checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(), meta)
        with caplog.at_level(logging.WARNING):
            state, position = checkpoints.restore(template)
        checkpoints.close()
        assert position["step"] in (2, 4)
        expected = load_state(folder / "cut") if position["step"] == 4 else None
        if expected:
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected["params"])):
                np.testing.assert_array_equal(a, b)
        else:
            fallen.append(name)
            assert (workdir / "damaged" / "checkpoints-4").is_dir(), "nothing is lost"
            assert "checkpoint 4 in" in caplog.text and "is damaged" in caplog.text
            assert int(state.step) == 2
        caplog.clear()
    assert any("state" in n for n in fallen) and any("position" in n for n in fallen) and any("meta" in n for n in fallen)


@careless
def test_a_run_with_a_damaged_checkpoint_ends_in_the_same_bits(stopped, tmp_path):
    folder, given = stopped
    shutil.copytree(folder / "cut", tmp_path / "W")
    for file in (tmp_path / "W" / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    toy.run(tmp_path / "W", **given)
    same(leaves(folder / "whole"), leaves(tmp_path / "W"))


@careless
def test_checkpoints_of_which_none_can_be_read_do_not_start_afresh(stopped, tmp_path):
    folder, given = stopped
    shutil.copytree(folder / "cut", tmp_path / "W")
    for file in (tmp_path / "W" / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint that can be read: all were damaged, and lie in '.*damaged'"
    ):
        toy.run(tmp_path / "W", **given)
    assert sorted(p.name for p in (tmp_path / "W" / "damaged").iterdir()) == ["checkpoints-2", "checkpoints-4"]


def test_what_is_left_of_a_save_that_was_killed_is_ignored(stopped, tmp_path):
    folder, given = stopped
    shutil.copytree(folder / "cut", tmp_path / "W")
    half = tmp_path / "W" / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "W" / "checkpoints" / "4", half)
    (half / "state" / "_METADATA").unlink()
    toy.run(tmp_path / "W", **given)
    same(leaves(folder / "whole"), leaves(tmp_path / "W"))


def test_a_clock_that_went_backwards(stopped, tmp_path, monkeypatch):
    folder, given = stopped
    shutil.copytree(folder / "cut", tmp_path / "W")
    now = time.time()
    monkeypatch.setattr("mgjax.train.checkpoint.time.time", lambda: now - 7200)
    with pytest.raises(CheckpointError, match=r"the clock went backwards: checkpoint 4 .* s after.*checkpoint.clock_skew="):
        toy.run(tmp_path / "W", **given)
    assert not (tmp_path / "W" / "damaged").exists()
    given = given | {"checkpoint": dataclasses.replace(given["checkpoint"], clock_skew=8000.0)}
    toy.run(tmp_path / "W", **given)


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@careless
# Orbax leaves the coroutines of a failed save unawaited; they are collected here, and not in a test that comes later.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(small_disk, tmp_path):
    given = dict(plan=toy.plan((0, 0, 40)), checkpoint=CheckpointConfig(every=2, keep=50))
    with pytest.raises(InputError, match=r"could not be written|cannot be written") as stopped:
        toy.run(small_disk / "W", **given)
    assert "checkpoint" in str(stopped.value) and "whole" in str(stopped.value)
    del stopped
    gc.collect()
    saved = sorted(int(p.name) for p in (small_disk / "W" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved and saved[-1] < 40
    shutil.copytree(small_disk / "W", tmp_path / "W", ignore=shutil.ignore_patterns("*orbax-checkpoint-tmp*"))
    toy.run(tmp_path / "W", **given)
    toy.run(tmp_path / "whole", **given)
    same(leaves(tmp_path / "whole"), leaves(tmp_path / "W"))


# ---------------------------------------------------------------------- compiled programs, profiles, what is shown


CACHED = """
import sys, pathlib, jax
from mgjax.train.meter import use_compilation_cache
use_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: (x * 2).sum())(jax.numpy.arange(4.0))))
"""


def test_a_truncated_entry_of_the_compilation_cache_kills_no_run(tmp_path):
    def run():
        command = [sys.executable, "-c", CACHED, str(tmp_path / "cache")]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)

    first = run()
    entries = list((tmp_path / "cache").glob("*-cache"))
    assert first.returncode == 0 and first.stdout.strip() == "12.0" and entries, first.stderr
    for share in (0.0, 0.5, 0.99):
        for entry in entries:
            os.truncate(entry, int(entry.stat().st_size * share) if share else 0)
        again = run()
        assert again.returncode == 0 and again.stdout.strip() == "12.0", again.stderr
        entries = list((tmp_path / "cache").glob("*-cache"))


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir == before, "JAX_COMPILATION_CACHE_DIR is respected"
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache("auto")
        assert pathlib.Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "mgjax"
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="compile_cache"):
            use_compilation_cache(str(tmp_path / "file"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_profile_has_the_marks_of_the_steps_and_the_names_of_the_model(tmp_path):
    branch = ResNet(blocks=(1,), widths=(4,), stem="cifar")
    model = MultiGranularityModel(
        [Granularity("low", "low", "stage1"), Granularity("high", "high", "stage1")],
        toy.model().tasks,
        [Head("super", {"low": "grad"}), Head("sub", {"fused": "grad"})],
        {"low": branch, "high": branch.clone()},
        ConcatFusion(8),
    )
    summary = toy.run(
        tmp_path, model=model, plan=(toy.Stage("joint", model.everything, 8, 16),), profile=ProfileConfig(start=3, steps=3)
    )
    assert summary["steps"] == 8
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marks = {str(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})}
    assert marks == {"4", "5", "6"}
    (xplane,) = (tmp_path / "profile").rglob("*.xplane.pb")
    said = xplane.read_bytes()
    for scope in (b"branch_low", b"branch_high", b"fusion", b"head_super", b"head_sub", b"augment", b"objective", b"optimizer"):
        assert scope in said, scope


def test_what_a_run_says_of_itself(tmp_path):
    summary = toy.run(tmp_path)
    assert summary["compile"]["train_programs"] == len({s.op for s in toy.plan()}) == 3
    assert summary["compile"]["programs"] >= 3 and summary["compile"]["seconds"] >= 0
    assert summary["memory"]["bytes"] > 0 and "analysis" in summary["memory"]["by"]
    assert 0 <= summary["data_wait"] <= 1 and summary["mfu"] is None
    assert summary["mesh"] == {"data": 8, "fsdp": 1} and summary["processes"] == 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= r["data_wait"] <= 1 for r in records if "loss" in r)


def test_time_spent_waiting_for_input_is_seen(tmp_path):
    """A slow feed shows; how much, nobody asserts but that it is most of the time."""
    given = toy.feeds()

    def slowly(stage, seen, steps):
        for batch in given.train(stage, seen, steps):
            time.sleep(0.4)
            yield batch

    slow = loop_module.Feeds(slowly, given.validation, given.test, given.eval_batch_size)
    assert toy.run(tmp_path, plan=JOINT, feeds=slow)["data_wait"] > 0.5


def test_peaks_are_known_by_the_kind_of_device():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") is None


def test_utilisation_is_counted_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("mgjax.train.meter.peak_flops", lambda: 1e10)
    summary = toy.run(tmp_path, plan=JOINT, log=LogConfig(every=1))
    assert 0 < summary["mfu"] < 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= r["mfu"] < 1 for r in records if "loss" in r)


def test_compilations_are_counted():
    seen = Compilations()
    jax.jit(lambda x: x * 3 + 1.25)(jnp.ones(7))
    assert seen.figures()["programs"] >= 1


def test_flops_of_a_step_by_hand():
    """One dense layer, squared loss: forward 2·B·I·O, gradient of the kernel as much, of the input as much."""
    from mgjax.flops import count_flops

    x, w1, w2 = jnp.ones((8, 5)), jnp.ones((5, 7)), jnp.ones((7, 3))
    loss = lambda w1, w2: ((x @ w1 @ w2) ** 2).sum()
    by_hand = 2 * 8 * 5 * 7 * 2 + 2 * 8 * 7 * 3 * 3  # the first layer's input needs no gradient
    assert count_flops(jax.grad(loss, (0, 1)), w1, w2).matmul == by_hand


def test_weights_and_biases_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    assert "wandb" not in sys.modules
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install wandb"):
        Monitor(tmp_path, 0, wandb="project")

    class Fake:
        logged, arguments, finished = [], {}, 0

        def init(self, **arguments):
            self.arguments.update(arguments)
            return self

        def log(self, scalars, step):
            self.logged.append((step, scalars))

        def finish(self):
            Fake.finished += 1

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    monitor = Monitor(tmp_path, 0, wandb="project", meta={"config": {"a": 1}})
    monitor.write(1, {"loss": 0.5, "stage": "joint"})
    monitor.close()
    assert Fake.logged == [(1, {"loss": 0.5})] and Fake.arguments["project"] == "project" and Fake.finished == 1
    assert Fake.arguments["resume"] == "allow" and Fake.arguments["id"] == (tmp_path / "wandb-id").read_text()
    assert Fake.arguments["config"] == {"config": {"a": 1}}
