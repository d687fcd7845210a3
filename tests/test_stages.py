"""Plans, what freezes, what grows, what ends early; the step's two halves; what the objective keeps over a run."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mgjax import Batch, Granularity, Head, MultiGranularityModel, OperatingPoint, Outputs, Resize, Task
from mgjax.balancing import Balancer, balancer
from mgjax.branches import ResNet
from mgjax.config import ConfigError
from mgjax.data import Augment, train_batches
from mgjax.errors import InputError
from mgjax.flops import count_flops
from mgjax.fusion import ConcatFusion, PyramidFusion
from mgjax.granularity import DeclarationError
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, Interrupted, LogConfig, OptimConfig, Stage, StopConfig
from mgjax.train.mesh import make_mesh, to_device
from mgjax.train.optim import make_optimizer
from mgjax.train.stages import (
    backbone_first,
    coarse_to_fine,
    growth,
    joint_only,
    progressive_jigsaw,
    progressive_resolution,
    trained_paths,
)
from mgjax.train.state import TrainState, create_state, grow, needed_paths
from mgjax.train.step import make_contributions, make_train_step
from tests import toy
from tests.test_train import final_state

AUGMENT = Augment((90.0,) * 3, (60.0,) * 3, padding=1)
PLAIN = OptimConfig(momentum=0.0, weight_decay=0.0)


def flat(tree):
    return {k: np.array(v) for k, v in flatten_dict(tree, sep="/").items()}


def shared(norm="none"):
    """Two heads on one feature: where gradients meet."""
    return MultiGranularityModel(
        [Granularity("all", "trunk", "stage2")],
        [Task("super", "super", 2, "super"), Task("sub", "sub", 4, "sub")],
        [Head("super", {"all": "grad"}), Head("sub", {"all": "grad"})],
        {"trunk": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar", norm=norm)},
    )


def branches():
    """A branch per granularity, the finer one a stage deeper."""
    return MultiGranularityModel(
        [Granularity("coarse", "low", "stage1", Resize(0.5)), Granularity("fine", "high", "stage2")],
        [Task("super", "super", 2, "super"), Task("sub", "sub", 4, "sub")],
        [Head("super", {"coarse": "grad", "fused": "stop"}), Head("sub", {"fused": "grad"})],
        {
            "low": ResNet(blocks=(1,), widths=(4,), stem="cifar"),
            "high": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar"),
        },
        ConcatFusion(6),
    )


@dataclasses.dataclass(frozen=True)
class Given(Balancer):
    """Fixed weights at the seam, which keeps the Gram matrix that it was shown."""

    seam = True
    weights: tuple = (3.0, 0.5)

    def init(self, count):
        return {"gram": jnp.zeros((count, count), jnp.float32)}

    def __call__(self, state, losses, known, gram, rng):
        return jnp.asarray(self.weights, jnp.float32), {"gram": gram}


def prepare(model, objective=None, optim=PLAIN):
    objective = objective or Objective(model.tasks, model.heads)
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(optim)
    batch = next(train_batches(toy.source(), toy.TREE, batch_size=16, seed=0, examples_seen=0, steps=1))
    inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, batch)
    state = create_state(model, optimizer, inputs, 0, mesh, memory=objective.init)
    step = make_train_step(model, objective, AUGMENT, optimizer, seed=0, mesh=mesh, accumulate=optim.accumulate)
    return objective, mesh, optimizer, state, step, to_device(batch, mesh), needed_paths(model, model.everything, inputs)


# ---------------------------------------------------------------------- the seam


def test_weights_at_the_seam_scale_what_reaches_the_trunk_and_leave_the_heads_alone():
    model = shared()
    objective = Objective(model.tasks, model.heads, balance=Given())
    _, _, _, state, step, batch, paths = prepare(model, objective)
    before = flat(state.params)
    seen = AUGMENT.normalise(batch)

    def loss(params, i):
        outputs = model.apply({"params": unflatten_dict(params, sep="/")}, seen.inputs, model.everything, train=True)
        return objective.losses(outputs, seen, {}).values[i]

    by_head = [jax.jit(jax.grad(loss), static_argnums=1)(before, i) for i in range(2)]
    # The augmentation is off, so that the step sees what is differentiated here.
    state, _ = step(state, batch, 0.1, op=model.everything, trains=paths, strength=0.0)
    after = flat(state.params)
    for path, old in before.items():
        weights = (1.0, 1.0) if path.startswith("head_") else (3.0, 0.5)
        expected = old - 0.1 * sum(w * np.asarray(g[path]) for w, g in zip(weights, by_head))
        np.testing.assert_allclose(after[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)

    def reached(features, i):
        outputs = model.apply(
            {"params": unflatten_dict(before, sep="/")}, features, model.everything, train=True, method="answer"
        )
        return objective.losses(outputs, seen, {}).values[i]

    params = {"params": unflatten_dict(before, sep="/")}
    features = model.apply(params, seen.inputs, model.everything, train=True, method="features")
    vectors = [jax.grad(reached)(features, i)["all"].vector.ravel() for i in range(2)]
    gram = [[float(a @ b) for b in vectors] for a in vectors]
    np.testing.assert_allclose(state.memory["balance"]["gram"], gram, rtol=1e-4)


def test_between_two_looks_the_last_weights_hold():
    model = shared()
    objective = Objective(model.tasks, model.heads, balance=dataclasses.replace(balancer("mgda"), every=3))
    _, _, _, state, step, batch, paths = prepare(model, objective)
    weights = []
    for _ in range(7):
        state, _ = step(state, batch, 0.5, op=model.everything, trains=paths, strength=1.0)
        weights.append(np.asarray(state.memory["weights"]))
    same = [(a == b).all() for a, b in itertools.pairwise(weights)]
    assert same == [True, True, False, True, True, False]


@pytest.mark.parametrize("balance", [balancer("uncertainty"), Given()])
def test_accumulated_parts_make_the_step_of_the_whole_batch(balance):
    """Where no norm sees the batch, and weights are the same whatever the batch (uncertainty begins with 1)."""
    model, results = shared(), []
    for parts in (1, 2):
        objective = Objective(model.tasks, model.heads, balance=balance)
        *_, state, step, batch, paths = prepare(model, objective, dataclasses.replace(PLAIN, accumulate=parts))
        before = flat(state.params)
        state, seen = step(state, batch, 0.1, op=model.everything, trains=paths, strength=0.0)
        results.append({p: v - before[p] for p, v in flat(state.params).items()})
        assert np.isfinite(seen["loss"]) and "weight/sub" in seen
    for path in results[0]:
        scale = np.abs(results[0][path]).max()
        np.testing.assert_allclose(results[1][path], results[0][path], atol=1e-4 * scale + 1e-8, err_msg=path)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm"])
def test_losses_are_weighed_once_a_step_however_many_parts_it_has(name):
    """By those of the first part: what the method remembers moves once."""
    model, memories = shared(), []
    for parts in (1, 2):
        objective = Objective(model.tasks, model.heads, balance=balancer(name))
        *_, state, step, batch, paths = prepare(model, objective, dataclasses.replace(PLAIN, accumulate=parts))
        given = jax.device_get(batch)
        first = jax.tree.map(lambda x: x[::2], given)  # the first of two parts is every other row
        rows = given if parts == 2 else jax.tree.map(lambda x: np.concatenate([x, x]), first)
        state, _ = step(state, rows, 0.1, op=model.everything, trains=paths, strength=0.0)
        memories.append(state.memory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *memories)


def test_a_feature_that_is_read_as_map_and_as_mean_has_no_one_gradient(tmp_path):
    model = branches().clone(fusion=PyramidFusion(6))
    objective = Objective(model.tasks, model.heads, balance=balancer("pcgrad"))
    with pytest.raises(DeclarationError, match="'coarse' is read in two forms, a map and its mean"):
        toy.run(tmp_path, model=model, objective=objective)


def test_two_heads_meet_where_they_teach_one_feature():
    meets = lambda m: Objective(m.tasks, m.heads, granularities=m.granularities).meet(m.shared(m.everything))
    assert meets(shared()) and meets(branches()) and not meets(toy.model())


def test_contributions_add_up():
    model = shared()
    optim = OptimConfig(momentum=0.0, weight_decay=0.1)
    objective, mesh, optimizer, state, step, batch, paths = prepare(model, optim=optim)
    asked = dict(op=model.everything, trains=paths, strength=0.0)
    said = make_contributions(model, objective, AUGMENT, optimizer, 0, mesh=mesh)(state, batch, **asked)
    said = {k: float(v) for k, v in said.items()}
    kernels = [v for p, v in flat(state.params).items() if v.ndim > 1]
    norm = np.sqrt(sum((v**2).sum() for v in kernels))
    assert said["part/gradient/penalty_l2"] == pytest.approx(0.1 * norm, rel=1e-4)
    assert said["part/loss/penalty_l2"] == pytest.approx(0.05 * norm**2, rel=1e-4)
    _, seen = step(state, batch, 0.1, **asked)
    assert said["part/loss/super"] + said["part/loss/sub"] == pytest.approx(float(seen["loss"]), rel=1e-5)
    # The triangle inequality, both ways; all of the trunk's gradient passes through its one granularity.
    a, b = said["part/gradient/super"], said["part/gradient/sub"]
    assert abs(a - b) <= float(seen["grad_norm"]) <= a + b
    assert 0 < said["part/gradient/granularity_all"] <= float(seen["grad_norm"]) * (1 + 1e-5)


def test_contributions_are_those_of_the_step_between_two_looks_too():
    model = shared()
    objective = Objective(model.tasks, model.heads, balance=dataclasses.replace(balancer("mgda"), every=3))
    _, mesh, optimizer, state, step, batch, paths = prepare(model, objective)
    asked = dict(op=model.everything, trains=paths, strength=0.0)
    contributions = make_contributions(model, objective, AUGMENT, optimizer, 0, mesh=mesh)
    for _ in range(4):
        said = contributions(state, batch, **asked)
        state, seen = step(state, batch, 0.5, **asked)
        for name in ("super", "sub"):
            assert float(said[f"part/loss/{name}"]) == pytest.approx(
                float(seen[f"weight/{name}"] * seen[f"loss/{name}"]), rel=1e-5
            )


def test_an_example_that_is_no_member_teaches_its_granularity_nothing():
    model = branches()
    members = np.arange(16) < 5
    results = []
    for spoil in (False, True):
        _, mesh, _, state, step, batch, paths = prepare(model.clone(branches={
            k: b.clone(norm="none") for k, b in model.branches.items()}))  # fmt: skip
        image = np.array(batch.inputs["image"])
        if spoil:  # what the coarse branch sees of others than its members
            image[5:] = 255 - image[5:]
        weights = {"coarse": members.astype(np.float32), "fine": np.float32(~members)}
        given = to_device(jax.device_get(batch).replace(inputs={"image": image}, weights=weights), mesh)
        low = frozenset(p for p in paths if p.startswith(("branches_low/", "head_super/dense/coarse")))
        state, _ = step(state, given, 0.1, op=model.everything, trains=low, strength=0.0)
        results.append({p: v for p, v in flat(state.params).items() if p in low})
    for path, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][path], err_msg=path)


# ---------------------------------------------------------------------- plans

FULL = toy.model().everything
ALONE = [("super", toy.COARSE), ("sub", toy.FINE)]
LENGTHS = dict(steps_alone=(2, 2), steps_together=2, batch_size=16)
PLANS = {
    "coarse_to_fine": coarse_to_fine(ALONE, FULL, **LENGTHS),
    "joint": joint_only(FULL, steps=2, batch_size=16),
    "backbone_first": backbone_first(toy.FINE, FULL, steps_backbone=2, steps_together=2, batch_size=16),
    "progressive_resolution": progressive_resolution(FULL, (0.5, 0.75), steps=(2, 2, 2), batch_size=16),
    "progressive_jigsaw": progressive_jigsaw(ALONE, FULL, pieces=(4, 2), **LENGTHS),
    "growth": growth(ALONE, FULL, grows=[("branches_low", "branches_high")], **LENGTHS),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_trains(name, tmp_path):
    plan = PLANS[name]
    model = branches() if name == "growth" else toy.model()
    summary = toy.run(tmp_path, model=model, plan=plan, log=LogConfig(every=1, contributions=2))
    assert [s["steps"] for s in summary["stages"]] == [2] * len(plan)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    parts = [r for r in records if any(k.startswith("part/") for k in r)]
    assert [r["step"] for r in parts] == list(range(1, 2 * len(plan), 2)) and "part/gradient/penalty_l2" in parts[0]
    assert summary["compile"]["train_programs"] == len({(s.op, s.pieces) for s in plan})


def test_lower_resolution_and_inactive_granularities_cost_less():
    model = toy.model()
    inputs = {"image": jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)}
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, FULL, train=False), inputs)
    cost = lambda op: count_flops(lambda v, x: model.apply(v, x, op, train=False), variables, inputs).matmul
    stages = PLANS["progressive_resolution"]
    assert cost(stages[0].op) < 0.3 * cost(FULL) and cost(stages[1].op) < 0.65 * cost(FULL)
    assert cost(toy.COARSE) < cost(toy.FINE) < cost(FULL)


def test_frozen_parameters_and_statistics_stay_to_the_bit_through_a_stage(tmp_path):
    frozen = "branches_trunk/stage1_block1/*"
    plan = (
        Stage("first", FULL, 2, 16),
        Stage("frozen", FULL, 3, 16, freezes=(frozen,)),
        Stage("all", FULL, 1, 16),
    )
    states = []
    for stages in (plan[:1], plan[:2], plan):
        workdir = tmp_path / str(len(stages))
        toy.run(workdir, plan=stages, optim=OptimConfig("adamw", learning_rate=0.01))
        states.append(final_state(workdir)[0])
    inside = [k for k in states[0] if "stage1_block1" in k]
    assert any("'stats'" in k for k in inside) and any("'mu'" in k for k in inside) and any("'count'" in k for k in inside)
    for key, value in states[0].items():
        same = (states[1][key] == value).all()
        assert same if "stage1_block1" in key else not same or "super" in key or value.size < 9, key
    # Moments live on: the stage after goes on counting where the parameter stood.
    counts = [k for k in inside if "'count'" in k]
    assert all(states[2][k] == states[1][k] + 1 for k in counts)


@pytest.mark.parametrize(
    "stage, says",
    [
        (Stage("s", FULL, 1, 16, freezes=("*",)), "'s' trains nothing: it freezes all"),
        (Stage("s", FULL, 1, 16, trains=("head_*",), freezes=("head_sub/*",)), "freezes what it also trains: 'head_sub/"),
        (Stage("s", FULL, 1, 16, trains=("head_*",), freezes=("head_*",)), "freezes what it also trains"),
        (Stage("s", FULL, 1, 16, freezes=("branches_x/*",)), r"freezes 'branches_x/\*', which matches no parameter"),
        (Stage("s", OperatingPoint(("x",), ("sub",)), 1, 16), r"asks for granularity \['x'\]"),
        (Stage("s", FULL, 1, 16, pieces=0), "0 pieces"),
        (Stage("s", FULL, 1, 16, learning_rate=-1.0), "a learning rate of 0 or more is needed, not -1.0"),
        (Stage("s", FULL, 1, 16, span=(0.5, 2.0)), r"a span within 0 and 1, not \(0.5, 2.0\)"),
        (Stage("s", FULL, 1, 16, pieces=3), "cannot be cut into 3 pieces"),
        (Stage("s", FULL, 1, 16, weights=(("sub", 0.0), ("super", 0.0))), "no loss weight of stage 's' is above 0"),
        (Stage("s", FULL, 1, 16, weights=(("x", 1.0),)), r"stage 's' name \['x'\]"),
        (Stage("s", toy.COARSE, 1, 16, weights=(("super", 0.0),)), r"stage 's' is above 0 among its tasks \['super'\]"),
        (Stage("s", FULL, 1, 16, patience=2), "patience of 2 validations, but none come.*log.validate_every"),
        (Stage("s", FULL, 1, 16, metric="x/accuracy"), "metric of stage 's' is 'x/accuracy'; validation has"),
        (Stage("s", FULL, 1, 16, grows=(("branches_trunk", "branches_y"),)), "no parameter's path begins with 'branches_y/'"),
        (Stage("s", FULL, 1, 16, grows=(("head_sub", "branches_trunk"),)), "path and shape of one of the other"),
    ],
)
def test_stages_that_cannot_run(stage, says, tmp_path):
    with pytest.raises(InputError, match=says):
        toy.run(tmp_path, plan=(stage,))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_patterns_that_freeze():
    needed = {"a/k", "b/k", "c/k"}
    assert trained_paths(Stage("s", FULL, 1, 8, freezes=("b/*",)), needed) == {"a/k", "c/k"}
    assert trained_paths(Stage("s", FULL, 1, 8, trains="b/*"), needed) == {"b/k"}  # one pattern alone
    assert trained_paths(Stage("s", FULL, 1, 8, trains=("a/*",), freezes=("b/*",)), needed) == {"a/k"}


def test_a_finer_branch_starts_from_the_coarser_one():
    model = branches()
    _, _, _, state, *_ = prepare(model, optim=OptimConfig(ema=0.9))
    state = state.replace(params=jax.tree.map(lambda x: x + 0.5, state.params))
    grown, before = grow(state, [("branches_low", "branches_high")]), flat(state.params)
    after = flat(grown.params)
    taken = 0
    for path, value in after.items():
        source = path.replace("branches_high/", "branches_low/")
        fits = path.startswith("branches_high/") and source in before and before[source].shape == value.shape
        np.testing.assert_array_equal(value, before[source] if fits else before[path], err_msg=path)
        taken += fits
    assert 0 < taken < sum(p.startswith("branches_high/") for p in after), "the second stage keeps its own"
    # What does not fit keeps the count of its own average.
    shapes = {"high": (4, 8), "low": (4, 4)}
    odd = {b: {"k": jnp.zeros(s)} for b, s in shapes.items()}
    small = TrainState(
        0, odd, {}, {}, {"average": {"params": odd}, "count": {"params": {b: {"k": i} for i, b in enumerate(odd)}}}
    )
    assert grow(small, [("low", "high")]).ema["count"]["params"] == small.ema["count"]["params"]
    np.testing.assert_array_equal(
        flat(grown.ema["average"]["params"])["branches_high/stem/conv/kernel"],
        flat(state.ema["average"]["params"])["branches_low/stem/conv/kernel"],
    )
    jax.tree.map(np.testing.assert_array_equal, grown.opt_state, state.opt_state)


def test_a_stage_ends_early_by_its_own_task(tmp_path):
    """The coarse stage does not answer the run's metric, and ends by the accuracy that it has."""
    still = OptimConfig(learning_rate=0.0, weight_decay=0.0)
    plan = (Stage("super", toy.COARSE, 30, 16, patience=2), Stage("joint", FULL, 6, 16))
    wrong = (dataclasses.replace(plan[0], metric="sub/accuracy"), plan[1])
    with pytest.raises(DeclarationError, match="'super' does not answer its metric 'sub/accuracy'"):
        toy.run(tmp_path / "a", plan=wrong, log=LogConfig(validate_every=2))
    summary = toy.run(tmp_path, plan=plan, optim=still, log=LogConfig(validate_every=2))
    # The first validation is the best; two more are not better (batch statistics may move the accuracy by chance).
    assert 4 <= summary["stages"][0]["steps"] < 30 and summary["stages"][1]["steps"] == 6
    with pytest.raises(ConfigError, match="validation has"):
        toy.run(tmp_path / "b", plan=plan, stop=StopConfig(metric="none"))


def test_weights_of_a_stage_switch_a_task_off(tmp_path):
    """What only that task trains stays as it is, weight decay or not."""
    states = []
    for steps in (1, 3):
        plan = (Stage("first", FULL, 1, 16), Stage("off", FULL, steps, 16, weights=(("super", 0.0), ("sub", 2.0))))
        toy.run(tmp_path / str(steps), plan=plan, log=LogConfig(every=1))
        states.append(final_state(tmp_path / str(steps))[0])
    records = [json.loads(line) for line in (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if "loss" in r][-1]
    assert last["loss"] == pytest.approx(2 * last["loss/sub"])
    heads = [k for k in states[0] if "head_s" in k and "kernel" in k and "fine" in k and "params" in k]
    assert {("head_super" in k, bool((states[0][k] == states[1][k]).all())) for k in heads} == {(True, True), (False, False)}


# ---------------------------------------------------------------------- what the objective keeps


def balanced_run(workdir, **changes):
    """Balanced by gradients and by loss of examples, grown in the second stage; epochs end within stages."""
    m = branches()
    m = m.clone(granularities=[dataclasses.replace(g, weighted_by="loss") for g in m.granularities], granularity_dropout=0.2)
    objective = Objective(
        m.tasks, m.heads, taxonomy=toy.TREE, smoothing=0.1, follow=True, balance=balancer(changes.pop("method", "gradnorm")),
        distill=0.5, granularities=m.granularities, examples=100,
    )  # fmt: skip
    feeds = dataclasses.replace(changes.pop("feeds", toy.feeds()), examples=100)
    plan = growth(
        ALONE, m.everything, grows=[("branches_low", "branches_high")], steps_alone=(3, 5), steps_together=6, batch_size=16
    )
    return toy.run(workdir, model=m, objective=objective, plan=plan, feeds=feeds, **changes)


class Asked(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return balanced_run(workdir), final_state(workdir), workdir


@pytest.mark.parametrize("stage, at, how", [(0, 1, "signal"), (1, 0, "crash"), (1, 4, "signal"), (2, 2, "crash")])
def test_a_balanced_run_interrupted_in_every_stage_continues_to_the_same_bits(uninterrupted, tmp_path, stage, at, how):
    expected, want, _ = uninterrupted
    began = []

    def stop(i):
        began.append(i)
        if sum(b == 0 for b in began) == stage + 2 and i == at:
            if how == "crash":
                raise Asked
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises((Interrupted, Asked)):
        balanced_run(tmp_path, feeds=toy.feeds(stop))
    summary, got = balanced_run(tmp_path), final_state(tmp_path)
    assert summary["test"] == expected["test"] and got[0].keys() == want[0].keys()
    for path, value in want[0].items():
        np.testing.assert_array_equal(got[0][path], value, err_msg=path)
    assert any("memory" in path and "weight" in path for path in want[0])


def test_weights_of_examples_change_at_the_end_of_an_epoch_alone(tmp_path):
    """100 examples in batches of 16: the first epoch ends within the 7th step."""
    seen = {}
    for steps in (4, 6, 7, 8):
        m = toy.model()
        m = m.clone(granularities=[dataclasses.replace(g, weighted_by="loss") for g in m.granularities])
        objective = Objective(m.tasks, m.heads, granularities=m.granularities, examples=100)
        feeds = dataclasses.replace(toy.feeds(), examples=100)
        plan = (Stage("joint", m.everything, steps, 16, warmup=0.0, end=1.0),)  # alike, however long
        toy.run(
            tmp_path / str(steps), model=m, objective=objective, plan=plan, feeds=feeds, checkpoint=CheckpointConfig(every=99)
        )
        state = final_state(tmp_path / str(steps))[0]
        (key,) = [k for k in state if "memory" in k and "'fine'" in k and "'weight'" in k]
        seen[steps] = state[key], state[key.replace("'weight'", "'loss'")]
    assert (seen[4][0] == 1).all() and (seen[7][0] == 1).all()
    assert np.isfinite(seen[4][1]).sum() == 64 and np.isfinite(seen[7][1]).all()
    weight, loss = seen[8][0], seen[7][1]
    expected = np.clip(loss / loss.mean(), 0.1, 10)
    np.testing.assert_allclose(weight, expected / expected.mean(), rtol=1e-4)


def test_the_objectives_memory_survives_a_skipped_batch():
    model = shared()
    objective = Objective(model.tasks, model.heads, balance=balancer("gradnorm"))
    *_, state, step, batch, paths = prepare(model, objective)
    state, _ = step(state, batch, 0.1, op=model.everything, trains=paths, strength=0.0)
    before = jax.tree.map(np.array, state.memory)
    params = jax.tree.map(lambda x: x * jnp.nan, state.params)
    state, seen = step(state.replace(params=params), batch, 0.1, op=model.everything, trains=paths, strength=0.0)
    assert seen["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.memory, before)


def test_a_step_with_plain_balance_computes_what_optax_does():
    """Against one gradient of the summed losses, through the model as a whole."""
    model = toy.model(norm="group")
    objective, _, _, state, step, batch, paths = prepare(model, optim=OptimConfig(weight_decay=0.0))
    params, opt = flat(state.params), optax.sgd(0.1, 0.9, nesterov=True)
    opt_state = opt.init(params)
    seen = AUGMENT.normalise(batch)

    def loss(params):
        variables = {"params": unflatten_dict(params, sep="/")}
        return objective(model.apply(variables, seen.inputs, model.everything, train=True), seen)[0]

    for _ in range(2):
        updates, opt_state = opt.update(jax.jit(jax.grad(loss))(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        state, _ = step(state, batch, 0.1, op=model.everything, trains=paths, strength=0.0)
    for path, value in flat(state.params).items():
        np.testing.assert_allclose(value, params[path], rtol=1e-4, atol=1e-6, err_msg=path)


def one_of_each(**changes):
    """A batch of four rows, and an objective of one head on granularity `g`."""
    labels = {"t": jnp.array([0, 1, 0, 1])}
    batch = Batch({}, labels, jnp.ones(4, bool), jnp.arange(4), weights={"g": jnp.array([1.0, 0.0, 1.0, 1.0])})
    grain = Granularity("g", "b", "stage1", weighted_by=changes.pop("weighted_by", "none"))
    return Objective([Task("t", "t", 2)], [Head("t", {"g": "grad"})], granularities=[grain], examples=4), batch.replace(
        **changes
    )


def test_what_is_mixed_in_counts_as_much_as_the_example_that_it_is():
    objective, batch = one_of_each(share=jnp.full(4, 0.5))
    swap = jnp.array([1, 0, 3, 2])
    batch = batch.replace(
        partner={"t": batch.targets["t"][swap]}, partner_weights={"g": batch.weights["g"][swap]}, partner_index=swap
    )
    logits = jax.random.normal(jax.random.key(0), (4, 2))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    # Row 0 is a member, and so is what is mixed into row 1; both hold label 0.
    known = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 0)]
    loss, _ = objective(Outputs({"t": logits}), batch)
    np.testing.assert_allclose(loss, -np.mean([log_p[row, label] for row, label in known]), rtol=1e-5)
    assert objective.members(batch)["g"].tolist() == [True] * 4
    assert objective.members(batch.replace(share=None))["g"].tolist() == [True, False, True, True]


def test_losses_of_others_than_members_weigh_nothing():
    objective, batch = one_of_each(weighted_by="loss")
    logits = jnp.array([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 3.0]])  # row 1, no member, costs most
    memory = objective.losses(Outputs({"t": logits}), batch, objective.init()).memory
    loss = np.array(memory["examples"]["g"]["loss"])
    assert np.isnan(loss[1]) and np.isfinite(loss[[0, 2, 3]]).all()
    weight = np.array(objective.end_epoch(memory)["examples"]["g"]["weight"])
    share = np.where(np.isnan(loss), 1, np.clip(loss / np.nanmean(loss), 0.1, 10))
    np.testing.assert_allclose(weight, share / share.mean(), rtol=1e-5)
    assert weight[0] > weight[2] > weight[3]


def test_bad_objectives():
    m = toy.model()
    with pytest.raises(DeclarationError, match="needs smoothing above 0, and no beta"):
        Objective(m.tasks, m.heads, taxonomy=toy.TREE, follow=True)
    with pytest.raises(DeclarationError, match="granularity dropout is for what reads several"):
        shared().clone(granularity_dropout=0.5).init(
            jax.random.key(0), {"image": jnp.ones((1, 8, 8, 3))}, shared().everything, train=False
        )
    with pytest.raises(DeclarationError, match=r"each needs a step or more, not \(3, 0\)"):
        growth(ALONE, FULL, grows=[("a", "b")], steps_alone=(3, 0), steps_together=1, batch_size=16)
    with pytest.raises(DeclarationError, match="distillation needs a head that reads 'fused'"):
        Objective(m.tasks, m.heads, distill=1.0)
    with pytest.raises(DeclarationError, match="follow a taxonomy need one"):
        Objective(m.tasks, m.heads, beta=5.0)
    by_loss = [dataclasses.replace(g, weighted_by="loss") for g in m.granularities]
    with pytest.raises(DeclarationError, match=r"\['coarse', 'fine'\] weigh examples by their loss: say how many"):
        Objective(m.tasks, m.heads, granularities=by_loss)
    with pytest.raises(DeclarationError, match="lie below 0"):
        Objective(m.tasks, m.heads, (("sub", -1.0),))
