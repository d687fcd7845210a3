"""The step, the stages and the loop."""

import dataclasses
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mgjax import OperatingPoint
from mgjax.config import ConfigError
from mgjax.data import Augment, train_batches
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, CheckpointError, Interrupted, LogConfig, OptimConfig, Stage, load_variables
from mgjax.train import loop as loop_module
from mgjax.train.mesh import make_mesh, to_device
from mgjax.train.optim import make_optimizer, make_schedule
from mgjax.train.stages import anneal, coarse_to_fine, schedule_of, trained_paths
from mgjax.train.state import create_state, needed_paths
from mgjax.train.step import make_train_step
from tests import toy

AUGMENT = Augment((90.0,) * 3, (60.0,) * 3, padding=1)


def batches(steps, batch_size=16):
    return train_batches(toy.source(), toy.TREE, batch_size=batch_size, seed=0, examples_seen=0, steps=steps)


def prepare(optim=OptimConfig(), devices=None, model=None):
    model = model or toy.model()
    mesh, optimizer = make_mesh(devices=devices), make_optimizer(optim)
    inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, next(batches(1)))
    state = create_state(model, optimizer, inputs, 0, mesh)
    step = make_train_step(model, Objective(model.tasks, model.heads), AUGMENT, optimizer, seed=0, mesh=mesh)
    paths = {op: needed_paths(model, op, inputs) for op in (toy.COARSE, toy.FINE, model.everything)}
    return model, mesh, state, step, paths


def flat(tree):
    """Copied, since the step donates its state."""
    return {"/".join(map(str, k)): np.array(v) for k, v in flatten_dict(tree).items()}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_a_stage_does_not_train_stays_to_the_bit(name):
    model, mesh, state, step, paths = prepare(OptimConfig(name, learning_rate=0.05))
    everything, both = model.everything, paths[model.everything]
    for batch in batches(2):  # momentum is there, and would move what is frozen
        state, _ = step(state, to_device(batch, mesh), 0.05, op=everything, trains=both, strength=1.0)
    before = [flat(state.params), flat(state.stats), jax.tree.map(np.array, state.opt_state)]
    frozen = frozenset(p for p in both if not p.startswith("branches_trunk/stage2"))
    for batch in batches(2):
        state, _ = step(state, to_device(batch, mesh), 0.05, op=everything, trains=both - frozen, strength=1.0)
    params, stats = flat(state.params), flat(state.stats)
    for path in params:
        assert (params[path] == before[0][path]).all() == (path in frozen), path
    for path in stats:
        assert (stats[path] == before[1][path]).all() == (not path.startswith("branches_trunk/stage2")), path
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(before[2])
    # Moments and step counts too: what did not train kept them, and what did moved them.
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(before[2])):
        assert (np.asarray(new) == old).all() == ("stage2" not in jax.tree_util.keystr(path)), path


def test_statistics_of_a_norm_without_parameters_go_by_the_block_around_it():
    from mgjax.train.step import _keep_stats

    params = {"trunk": {"a": {"conv": {"kernel": 0}}, "b": {"conv": {"kernel": 0}}}}
    old, new = ({"trunk": {k: {"norm": {"mean": v}} for k in "ab"}} for v in (0, 1))
    kept = _keep_stats(new, old, params, frozenset({"trunk/a/conv/kernel"}))
    assert kept == {"trunk": {"a": {"norm": {"mean": 1}}, "b": {"norm": {"mean": 0}}}}


def test_the_progress_bar_keeps_its_numbers_on_a_narrow_terminal(tmp_path):
    import io

    from rich.console import Console

    from mgjax.train.monitor import Monitor

    monitor = Monitor(tmp_path, 0)
    monitor.console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monitor.start("joint", 742, 0)
    monitor.progress("joint", 371, 742, "loss 1.234  form 31.2%  part 12.5%  texture 6.2%", 1042.0, 125.0)
    monitor.close()
    shown = monitor.console.file.getvalue()
    assert "joint" in shown and "371/742" in shown and "2:05 left" in shown and "loss 1.234" in shown


def test_an_inactive_granularity_is_not_touched():
    _, mesh, state, step, paths = prepare()
    before = flat(state.params) | flat(state.stats)
    for batch in batches(2):
        state, seen = step(state, to_device(batch, mesh), 0.05, op=toy.COARSE, trains=paths[toy.COARSE], strength=1.0)
    after = flat(state.params) | flat(state.stats)
    changed = {p for p in after if (after[p] != before[p]).any()}
    assert changed and not any("stage2" in p or "sub" in p or p.endswith("fine/kernel") for p in changed)
    assert {"loss", "loss/super", "accuracy/super", "grad_norm", "finite"} == set(seen)


def test_one_compilation_per_operating_point():
    model, mesh, state, step, paths = prepare()
    for op in (toy.COARSE, model.everything, toy.COARSE, model.everything):
        for batch in batches(2):
            rate = np.float32(0.05 * np.random.default_rng(0).random())
            state, _ = step(state, to_device(batch, mesh), rate, op=op, trains=paths[op], strength=1.0)
    assert step._cache_size() == 2


def test_a_sharded_step_gathers_no_batch():
    """Parameters are replicated and the batch is sharded: only gradients and statistics travel."""
    model, mesh, state, step, paths = prepare()
    batch = to_device(next(batches(1)), mesh)
    op = model.everything
    text = step.lower(state, batch, 0.1, op=op, trains=paths[op], strength=1.0).compile().as_text()
    assert "all-reduce" in text
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-(?:gather|to-all)\(", text)
    assert not [g for g in gathered if g.count(",") >= 2], gathered


def test_what_is_read_behind_a_stop_gradient_alone_does_not_train():
    from tests.test_model import INPUTS, branches

    model = branches()
    coarse = needed_paths(model, toy.COARSE, jax.eval_shape(lambda: INPUTS))
    assert any(p.startswith("branches_low/") for p in coarse) and "head_super/dense/fused/kernel" in coarse
    assert not any(p.startswith(("fusion/", "branches_high/", "head_sub/")) for p in coarse)
    everything = needed_paths(model, model.everything, jax.eval_shape(lambda: INPUTS))
    assert any(p.startswith("fusion/") for p in everything)


def test_the_state_is_donated_and_replicated():
    _, mesh, state, step, paths = prepare()
    batch = to_device(next(batches(1)), mesh)
    assert batch.inputs["image"].sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
    assert len(batch.inputs["image"].devices()) == 8
    new, _ = step(state, batch, 0.1, op=toy.FINE, trains=paths[toy.FINE], strength=1.0)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(new))


def test_eight_devices_compute_what_one_does():
    losses = []
    for devices in (jax.devices()[:1], jax.devices()):
        model, mesh, state, step, paths = prepare(devices=devices)
        op, of_run = model.everything, []
        for batch in batches(3):
            state, seen = step(state, to_device(batch, mesh), 0.02, op=op, trains=paths[op], strength=1.0)
            of_run.append(float(seen["loss"]))
        losses.append(of_run)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_a_masked_row_changes_no_gradient():
    model = toy.model(norm="group")  # batch statistics see all rows
    _, mesh, state, step, paths = prepare(model=model)
    batch = next(batches(1))
    half = batch.replace(mask=np.arange(16) < 8)
    spoiled = half.replace(targets={k: np.where(np.arange(16) < 8, v, (v + 1) % 2) for k, v in half.targets.items()})
    results = []
    for one in (half, spoiled):
        _, _, state, step, paths = prepare(model=model)
        new, _ = step(state, to_device(one, mesh), 0.1, op=toy.FINE, trains=paths[toy.FINE], strength=0.0)
        results.append(flat(new.params))
    for path, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][path])


# ---------------------------------------------------------------------- optimiser and schedule


@pytest.mark.parametrize(
    "config, theirs",
    [
        (OptimConfig(weight_decay=0.0), optax.sgd(0.3, 0.9, nesterov=True)),
        (OptimConfig("adamw", weight_decay=0.1), optax.adamw(0.3, 0.9, weight_decay=0.1)),
        (
            OptimConfig(weight_decay=0.0, clip=0.5),
            optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3, 0.9, nesterov=True)),
        ),
    ],
)
def test_optimisers_are_those_of_optax(config, theirs):
    params = {"a/kernel": jnp.ones((2, 2)), "b/kernel": jnp.full((2, 3), 2.0)}
    ours = make_optimizer(config)
    a, b, p, q = ours.init(params), theirs.init(params), params, params
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
        u, a = ours.update(grads, a, p)
        p = {k: p[k] - 0.3 * u[k] for k in p}
        v, b = theirs.update(grads, b, q)
        q = optax.apply_updates(q, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), p, q)


def test_sgd_adds_l2_to_the_gradient_of_kernels_alone():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    ours = make_optimizer(OptimConfig(weight_decay=0.1, momentum=0.0))
    u, _ = ours.update(jax.tree.map(jnp.zeros_like, params), ours.init(params), params)
    np.testing.assert_allclose(u["kernel"], 0.3, rtol=1e-6)
    np.testing.assert_array_equal(u["bias"], 0.0)


def test_what_begins_late_begins_afresh():
    """A parameter that was frozen for long takes the same first step as one that starts."""
    ours, grads = make_optimizer(OptimConfig("adamw", weight_decay=0.0)), {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    state = ours.init(grads)
    for _ in range(5):
        _, state = ours.update({"a": grads["a"]}, state, grads)
    late, _ = ours.update({"b": grads["b"]}, state, grads)
    first, _ = ours.update({"b": grads["b"]}, ours.init(grads), grads)
    np.testing.assert_array_equal(late["b"], first["b"])
    with pytest.raises(ConfigError, match="'sgd' or 'adamw', not 'adam'"):
        make_optimizer(OptimConfig("adam"))


def test_schedules_rise_hold_and_fall():
    rates = np.array([make_schedule(0.4, 20, 0.2, 0.0)(i) for i in range(20)])
    assert rates.argmax() == 4 and rates.max() == pytest.approx(0.4)
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[4:]) < 0).all() and 0 < rates[0] < 0.1
    held = np.array([make_schedule(0.4, 20, 0.0, 1.0)(i) for i in range(20)])
    np.testing.assert_allclose(held, 0.4)
    assert np.isfinite([make_schedule(0.4, 1, 0.5, 0.0)(0)]).all()
    straight = np.array([make_schedule(0.4, 20, 0.2, 0.1, shape="linear")(i) for i in range(20)])
    np.testing.assert_allclose(np.diff(straight[4:]), -0.9 * 0.4 / 16, rtol=1e-4)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_an_annealed_plan_has_the_learning_rate_of_one_stage(shape):
    """Cut anywhere, whatever the stages said of their own; the warm-up is a share of the first."""
    op = OperatingPoint(("g",), ("t",))
    plan = anneal([Stage("a", op, 7, 8, end=1.0), Stage("b", op, 4, 8, warmup=0.5), Stage("c", op, 9, 8)])
    optim = OptimConfig(learning_rate=0.4, warmup=0.0, schedule=shape)
    optimizer = make_optimizer(optim)
    rates = np.concatenate([optimizer.rates(*schedule_of(stage, optim)) for stage in plan])
    whole = optimizer.rates(*schedule_of(Stage("all", op, 20, 8), optim))
    np.testing.assert_allclose(rates, whole, rtol=1e-5)
    rising = [schedule_of(s, dataclasses.replace(optim, warmup=0.5)) for s in plan]
    assert optimizer.rates(*rising[0])[0] < whole[0] and optimizer.rates(*rising[1])[0] == pytest.approx(whole[7], rel=1e-5)


# ---------------------------------------------------------------------- plans


def test_coarse_to_fine_leaves_out_empty_stages():
    plan = toy.plan((0, 3, 4))
    assert [s.name for s in plan] == ["sub", "joint"]
    assert plan[0].warmup is None and plan[1].warmup == 0.0 and plan[0].end == 1.0 and plan[1].end == 0.0


@pytest.mark.parametrize(
    "plan, says",
    [
        ((), "at least one stage"),
        ((Stage("a", toy.FINE, 1, 8), Stage("a", toy.FINE, 1, 8)), "two stages"),
        ((Stage("a", toy.FINE, 0, 8),), "'a' has 0 steps"),
        ((Stage("a", toy.FINE, 1, 12),), "stage 'a': a batch of 12 cannot be divided among 8 devices; 16 can"),
        ((Stage("a", toy.FINE, 1, 8, trains=("branches_x/*",)),), r"trains 'branches_x/\*', which matches no parameter"),
        ((Stage("a", toy.COARSE, 1, 8, trains=("head_sub/*",)),), "matches no parameter that it uses"),
        ((Stage("a", OperatingPoint(("x",), ("sub",)), 1, 8),), "granularity"),
    ],
)
def test_plans_that_cannot_run(plan, says, tmp_path):
    with pytest.raises(InputError, match=says):
        toy.run(tmp_path, plan=plan)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_evaluation_batch_that_the_devices_do_not_divide(tmp_path):
    with pytest.raises(InputError, match="evaluation: a batch of 20 cannot be divided among 8"):
        toy.run(tmp_path, feeds=toy.feeds(batch_size=20))


def test_patterns_choose_parameters():
    needed = {"branches_trunk/stem/k", "branches_trunk/stage1/k", "head_super/k"}
    assert trained_paths(Stage("s", toy.FINE, 1, 8, trains=("head_*", "*/stem/*")), needed) == {
        "head_super/k",
        "branches_trunk/stem/k",
    }


# ---------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run; its summary and workdir."""
    workdir = tmp_path_factory.mktemp("whole")
    return toy.run(workdir), workdir


def final_state(workdir):
    """Parameters, statistics and moments of the newest checkpoint, as flat numpy arrays."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), position=ocp.args.JsonRestore())
        with __import__("warnings").catch_warnings():
            __import__("warnings").simplefilter("ignore")  # restores without a template on purpose
            found = manager.restore(manager.latest_step(), args=args)
    leaves = jax.tree_util.tree_leaves_with_path(found.state)
    return {jax.tree_util.keystr(p): np.asarray(v) for p, v in leaves}, found.position


def test_a_run_reports_what_it_did(finished):
    summary, workdir = finished
    assert summary["steps"] == 10 and [s["name"] for s in summary["stages"]] == ["super", "sub", "joint"]
    assert summary["train_flops"] == sum(s["flops"] for s in summary["stages"]) > 0
    per_step = {s["name"]: s["flops"] / s["steps"] for s in summary["stages"]}
    assert per_step["super"] < per_step["sub"] < per_step["joint"]
    assert set(summary["stages"][0]["val"]["levels"]) == {"super"}
    assert set(summary["test"]["levels"]) == {"super", "sub"} and summary["test"]["examples"] == 50
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert sum("val/super/accuracy" in r or "val/sub/accuracy" in r for r in records) == 3
    assert list((workdir / "tensorboard").glob("events*"))


def test_it_learns(tmp_path):
    summary = toy.run(tmp_path, plan=toy.plan((10, 10, 40)))
    assert summary["test"]["levels"]["sub"]["accuracy"] > 0.9


class Asked(Exception):
    pass


@pytest.mark.parametrize("stage, at", [(0, 0), (0, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_run_that_was_stopped_continues_to_the_same_bits(finished, tmp_path, stage, at, how):
    """Stopped in each stage, at its first, a middle and its last step; by signal and by a crash."""
    expected, whole = finished
    began = []

    def stop(i):
        began.append(i)
        if sum(b == 0 for b in began) == stage + 2 and i == at:  # the first start of all reads shapes
            if how == "crash":
                raise Asked
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises((Interrupted, Asked)) as stopped:
        toy.run(tmp_path, feeds=toy.feeds(stop))
    if how == "signal":
        assert stopped.value.code == 128 + signal.SIGTERM
    summary = toy.run(tmp_path)
    got, want = final_state(tmp_path), final_state(whole)
    assert got[0].keys() == want[0].keys()
    for path, value in want[0].items():
        np.testing.assert_array_equal(got[0][path], value, err_msg=path)
    assert got[1]["step"] == want[1]["step"] and got[1]["examples_seen"] == want[1]["examples_seen"]
    assert summary["test"] == expected["test"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(1, 11))  # none lost, none twice


def test_a_signal_during_evaluation_is_heard(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    given = toy.feeds()

    def evaluated():
        for i, batch in enumerate(given.validation()):
            if i == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with pytest.raises(Interrupted):
        toy.run(tmp_path, feeds=loop_module.Feeds(given.train, evaluated, given.test, given.eval_batch_size))
    assert toy.run(tmp_path)["steps"] == 10
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stage_that_was_validated_twice_is_saved_with_its_report(tmp_path):
    """Asked to stop in a stage's validation, then killed soon after: the finished stage is not lost."""
    given = toy.feeds()

    def evaluated():
        for batch in given.validation():
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted):
        toy.run(tmp_path, feeds=loop_module.Feeds(given.train, evaluated, given.test, given.eval_batch_size))

    def crash(i):
        if began.append(i) or began.count(0) == 2:
            raise Asked

    began = []
    with pytest.raises(Asked):
        toy.run(tmp_path, feeds=toy.feeds(crash))
    assert final_state(tmp_path)[1]["stage"] == 1


def test_metrics_are_fetched_one_step_late_and_once_a_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop_module, "fetch", lambda tree: calls.append(1) or jax.device_get(tree))
    toy.run(tmp_path, plan=toy.plan((0, 0, 5)))
    assert len(calls) == 5 + 3  # five steps, validation, test, and at the end the variables


def test_validation_inside_a_stage(tmp_path):
    toy.run(tmp_path, plan=toy.plan((0, 0, 5)), log=LogConfig(every=1, validate_every=2))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val/sub/accuracy" in r] == [2, 4, 5]


# ---------------------------------------------------------------------- checkpoints that do not fit


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"meta": {"experiment": "toy", "taxonomy": "other", "config": {"a": 1}}}, "taxonomy is 'other' now"),
        (
            {"meta": {"experiment": "toy", "taxonomy": toy.TREE.fingerprint, "config": {"a": 2}}},
            "config.a is 2 now and was 1",
        ),
        ({"optim": OptimConfig("adamw")}, "opt_state/.* is (missing|not part of the model)"),
        ({"model": toy.model(norm="group")}, "is not part of the model"),
    ],
)
def test_checkpoints_of_another_run_are_refused_by_name(finished, changes, says):
    _, workdir = finished
    with pytest.raises(CheckpointError, match=says):
        toy.run(workdir, **changes)


def test_a_trained_model_is_loaded_without_its_optimiser(finished, tmp_path):
    """Its answers give the accuracy that the run reported."""
    summary, workdir = finished
    variables, model = load_variables(workdir), toy.model()
    held_out = toy.source(50, seed=1).take(np.arange(50))
    inputs = {"image": jnp.asarray((held_out["image"] - 90.0) / 60.0, jnp.float32)}
    outputs = model.apply(variables, inputs, model.everything, train=False)
    for level in ("super", "sub"):
        right = np.mean(np.asarray(outputs.logits[level]).argmax(-1) == held_out[level])
        assert right == pytest.approx(summary["test"]["levels"][level]["raw_accuracy"])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_variables(tmp_path)


def test_free_keys_may_change(finished):
    _, workdir = finished
    meta = {"experiment": "toy", "taxonomy": toy.TREE.fingerprint, "config": {"a": 1, "free": 2}}
    assert toy.run(workdir, meta=meta)["steps"] == 10


def test_only_the_newest_checkpoints_are_kept(finished):
    kept = sorted(int(p.name) for p in (finished[1] / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [8, 10, 13]  # the end of stage 1, step 8 in stage 2, and its end


def test_a_refused_save_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", lambda *a, **k: False)
    with pytest.raises(CheckpointError, match="was not saved"):
        toy.run(tmp_path, checkpoint=CheckpointConfig(every=1))


def test_coarse_to_fine_needs_one_number_per_stage():
    with pytest.raises(DeclarationError, match="1 stages alone, but steps_alone has 2 numbers"):
        coarse_to_fine([("a", toy.FINE)], toy.FINE, steps_alone=(1, 2), steps_together=1, batch_size=8)
    with pytest.raises(DeclarationError):
        trained_paths(Stage("s", toy.FINE, 1, 8, trains=("nothing",)), {"a"})
