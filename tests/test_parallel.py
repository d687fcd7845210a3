"""Meshes: where the state lies, that it computes the same, and what travels between devices."""

import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from rich.console import Console

from mgjax.branches import VGG, ConvNet, ResNet, SeparableNet, ViT
from mgjax.config import ConfigError
from mgjax.errors import InputError
from mgjax.objective import Objective
from mgjax.train import CheckpointConfig, MeshConfig, OptimConfig, load_variables
from mgjax.train.mesh import make_mesh, scalar_to_device, sharding_table, state_sharding, to_device
from mgjax.train.optim import make_optimizer
from mgjax.train.state import create_state, needed_paths, state_shardings
from mgjax.train.step import make_train_step
from tests import toy
from tests.test_train import AUGMENT, batches, flat

MESHES = {
    "one": lambda: make_mesh(devices=jax.devices()[:1]),
    "data=8": lambda: make_mesh(),
    "data=4, fsdp=2": lambda: make_mesh(MeshConfig(fsdp=2)),
}


def prepared(mesh, model, optim=OptimConfig(), dtype=None, parts=1):
    """(state, step(state, batch), the jitted step) of a model on a mesh, everything sharded that can be."""
    optimizer = make_optimizer(optim)
    inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, next(batches(1)))
    state = create_state(model, optimizer, inputs, 0, mesh)
    if dtype:
        wide = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        places = jax.tree.map(lambda x: x.sharding, state)
        state = jax.jit(lambda s: jax.tree.map(wide, s), out_shardings=places)(state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(
        model, Objective(model.tasks, model.heads), AUGMENT, optimizer, 0,
        mesh=mesh, shardings=shardings, accumulate=parts,
    )  # fmt: skip
    op, paths = model.everything, needed_paths(model, model.everything, inputs)
    rate = scalar_to_device(optim.learning_rate, mesh)
    static = dict(op=op, trains=paths, strength=1.0)
    return state, lambda state, batch: step(state, to_device(batch, mesh), rate, **static), (step, rate, static)


def losses(mesh, model, steps, dtype=None):
    state, step, _ = prepared(mesh, model, dtype=dtype)
    said = []
    for batch in batches(steps):
        state, seen = step(state, batch)
        said.append(float(seen["loss"]))
    return np.array(said), flat(state.params)


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_any_mesh_computes_the_same_in_float64_for_30_steps(mesh):
    with jax.enable_x64(True):
        model = toy.model(dtype=jnp.float64)
        (one, params_one), (many, params_many) = (losses(MESHES[m](), model, 30, jnp.float64) for m in ("one", mesh))
    assert one.dtype == np.float64 and params_one["branches_trunk/stem/conv/kernel"].dtype == np.float64
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-9)
    for path, value in params_one.items():
        np.testing.assert_allclose(params_many[path], value, rtol=0, atol=1e-9, err_msg=path)
    assert len(set(one)) == 30 and one[-5:].mean() < one[:5].mean(), "it trains"


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_any_mesh_computes_the_same_in_float32_for_5_steps(mesh):
    (one, _), (many, _) = (losses(MESHES[m](), toy.model(), 5) for m in ("one", mesh))
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- where things lie


def test_the_rule_takes_the_largest_dimension_that_divides():
    mesh = MESHES["data=4, fsdp=2"]()
    spec = lambda shape, above=0: tuple(state_sharding(shape, mesh, above).spec)
    assert spec((3, 3, 64, 128)) == (None, None, None, "fsdp")
    assert spec((3, 3, 128, 64)) == (None, None, "fsdp")
    assert spec((64, 64)) == (None, "fsdp")
    assert spec((7, 4, 3)) == (None, "fsdp") and spec((3, 5)) == () and spec(()) == () and spec((0, 2)) == (None, "fsdp")
    assert spec((64, 64), above=4097) == () and spec((64, 64), above=4096) == (None, "fsdp")


def test_parameters_moments_and_averages_are_split_alike_and_statistics_are_whole():
    mesh = MESHES["data=4, fsdp=2"]()
    state, step, _ = prepared(mesh, toy.model(), OptimConfig(ema=0.9))
    state, _ = step(state, next(batches(1)))
    kernel = "branches_trunk/stage2_block1/conv2/conv/kernel"
    leaf = lambda tree: jax.tree.leaves(functools.reduce(lambda t, k: t[k], kernel.split("/"), tree))[0].sharding
    places = {"params": leaf(state.params), "ema": leaf(state.ema["average"]["params"]), "moments": leaf(state.opt_state)}
    assert {p.spec for p in places.values()} == {jax.sharding.PartitionSpec(None, None, None, "fsdp")}
    assert all(p.shard_shape((3, 3, 8, 8)) == (3, 3, 8, 4) for p in places.values())
    for stats in (state.stats, state.ema["average"]["stats"]):
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(stats))
    # A step leaves everything where it was.
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x, state_shardings(state, mesh))


def test_the_table_says_where_parameters_lie():
    state, _, _ = prepared(MESHES["data=4, fsdp=2"](), toy.model())
    console = Console(width=120, file=io.StringIO())
    console.print(sharding_table(flatten_dict(state.params, sep="/")))
    said = console.file.getvalue()
    assert re.search(r"stage2_block1/conv2/conv/kernel\s+│ 3×3×8×8\s+│ fsdp on dimension 3\s+│\s+0.0012", said), said


def test_the_table_is_printed_on_request(tmp_path, capsys):
    toy.run(tmp_path, plan=toy.plan((0, 0, 1)), mesh=MeshConfig(fsdp=2, shard_above=0, show=True))
    assert "parameters on the mesh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, says",
    [
        (MeshConfig(fsdp=3), r"data=all × fsdp=3 does not fit 8 devices: --config.mesh.fsdp is one of \[1, 2, 4, 8\]"),
        (MeshConfig(data=3, fsdp=2), "data=3 × fsdp=2 does not fit 8 devices"),
        (MeshConfig(fsdp=16), "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit(config, says, tmp_path):
    with pytest.raises(InputError, match=says):
        toy.run(tmp_path, mesh=config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_batch_that_devices_and_parts_do_not_divide(tmp_path):
    with pytest.raises(InputError, match=r"a batch of 16 cannot be divided among 8 devices in 3 parts each .*; 24 can"):
        toy.run(tmp_path, optim=OptimConfig(accumulate=3))


# ---------------------------------------------------------------------- what travels


def collectives(text):
    """[(kind, shapes of the results)] of a compiled program, scalars left out."""
    found = re.findall(
        r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    shapes = lambda result: [tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", result)]
    return [(kind, of) for result, kind in found if (of := shapes(result))]


def compiled(mesh, model, **options):
    state, _, (step, rate, static) = prepared(mesh, model, **options)
    return step.lower(state, to_device(next(batches(1)), mesh), rate, **static).compile().as_text()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_one_fused_gradient_reduction_two_per_batch_norm_and_no_gather_of_activations(mesh, norm):
    model = toy.model(norm=norm)
    text = compiled(MESHES[mesh](), model)
    inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, next(batches(1)))
    variables = jax.eval_shape(lambda r, x: model.init(r, x, model.everything, train=False), jax.random.key(0), inputs)
    norms = len(flatten_dict(variables.get("batch_stats", {}))) // 2
    # Beside the examples that count in each head's mean, a number a head, which the gradients wait for.
    counts = [(len(model.heads),)]
    reductions = [of for kind, of in collectives(text) if kind == "all-reduce" and of != counts]
    # The last one has the kernel of the first layer, whose gradient comes last.
    last = [of for of in reductions if (3, 3, 3, 4) in of]
    assert len(last) == 1 and len(reductions) <= 1 + 2 * norms, reductions
    # Without statistics, which travel earlier with some of the gradients, it has all of them, and each head's loss.
    count = lambda shapes: sum(int(np.prod(s)) for s in shapes)
    params = count(p.shape for p in jax.tree.leaves(variables["params"]))
    assert norms or count(last[0]) == params + len(model.heads)
    moved = {s for kind, of in collectives(text) if kind != "all-reduce" for s in of}
    assert not {kind for kind, _ in collectives(text)} & {"all-to-all", "collective-permute"}
    params = {tuple(p.shape) for p in jax.tree.leaves(variables["params"])}
    assert moved <= params and (bool(moved) == ("fsdp" in mesh)), "parameters are gathered, and nothing else"


def test_accumulation_gathers_no_activations():
    model = toy.model(norm="group")
    text = compiled(MESHES["data=4, fsdp=2"](), model, parts=2)
    inputs = jax.eval_shape(lambda b: AUGMENT.normalise(b).inputs, next(batches(1)))
    params = jax.eval_shape(lambda r, x: model.init(r, x, model.everything, train=False), jax.random.key(0), inputs)
    known = {tuple(p.shape) for p in jax.tree.leaves(params["params"])}
    assert {s for kind, of in collectives(text) if kind != "all-reduce" for s in of} <= known


# ---------------------------------------------------------------------- checkpoints on another mesh


def test_a_run_continues_on_another_mesh(tmp_path):
    """Begun on data=8, continued as data=4 × fsdp=2 and the other way round: both end near the run of one mesh."""
    plan = lambda steps: toy.plan((0, 0, steps))
    split, whole = dict(mesh=MeshConfig(fsdp=2, shard_above=0)), {}
    results = []
    for first, second in ((split, whole), (whole, split), (whole, whole)):
        workdir = tmp_path / str(len(results))
        with pytest.raises(RuntimeError):  # a crash after step 2, of which a checkpoint is there
            toy.run(workdir, plan=plan(4), feeds=toy.feeds(_crash_at(3)), **first)
        toy.run(workdir, plan=plan(4), checkpoint=CheckpointConfig(every=1), **second)
        results.append(flat(load_variables(workdir)["params"]))
    for other in results[:2]:
        for path, value in results[2].items():
            np.testing.assert_allclose(other[path], value, atol=2e-4, err_msg=path)


def _crash_at(step):
    seen = []

    def at(i):
        seen.append(i)
        if len(seen) > 1 and i == step:  # the first batch of all is read for its shapes
            raise RuntimeError("crash")

    return at


# ---------------------------------------------------------------------- numerics


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With a norm that sees one example at a time, and all labels known."""
    results = []
    for parts in (1, 2):
        state, step, _ = prepared(make_mesh(), toy.model(norm="group"), OptimConfig(learning_rate=0.1), parts=parts)
        for batch in batches(3):
            state, seen = step(state, batch)
        results.append((flat(state.params), float(seen["loss"])))
    for path, value in results[0][0].items():
        np.testing.assert_allclose(results[1][0][path], value, atol=2e-5, err_msg=path)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)


@pytest.mark.parametrize(
    "branch",
    [
        ResNet(blocks=(3,), widths=(8,), stem="cifar"),
        ConvNet(widths=(8,), blocks=4),
        VGG(blocks=(3,), widths=(8,), classifier=False),
        SeparableNet(widths=(8,), blocks=4),
        ViT(features=8, depth=3, heads=2, patch=4, image_size=8),
    ],
    ids=lambda b: type(b).__name__,
)
def test_rematerialisation_changes_no_figure_and_keeps_less(branch):
    """XLA's CPU compiler undoes it, so what is kept is read from what the backward pass is handed."""
    x, tap = jax.random.normal(jax.random.key(1), (64, 8, 8, 3)), list(branch.feature_info)[-1]
    variables = jax.jit(lambda: branch.init(jax.random.key(0), x, taps=(tap,), train=False))()
    kept, grads = [], []
    for remat in (False, True):

        def loss(params, branch=branch.clone(remat=remat)):
            made, _ = branch.apply(variables | {"params": params}, x, taps=(tap,), train=True, mutable=["batch_stats"])
            return jnp.sin(3 * made[tap].vector).sum()  # a sum of squares knows nothing but rounding behind a layer norm

        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], variables["params"])
        kept.append(sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals)))
        grads.append(flat(jax.jit(jax.grad(loss))(variables["params"])))
    assert kept[1] < 0.7 * kept[0], kept
    for path, value in grads[0].items():
        np.testing.assert_allclose(grads[1][path], value, rtol=1e-4, atol=1e-4, err_msg=path)


def test_the_average_is_that_of_the_values_since_a_parameter_began():
    from mgjax.train.optim import Optimizer

    with jax.enable_x64(True):
        optimizer, average = Optimizer(None, ema=0.9), jnp.float64(0)
        values = [3.0, 1.0, 4.0, 1.0, 5.0]
        for i, value in enumerate(values):
            average = optimizer.average(average, i, jnp.float64(value))
        weights = 0.9 ** np.arange(len(values))[::-1]
        assert float(average) == pytest.approx(float(np.average(values, weights=weights)), rel=1e-6)


def test_averages_are_evaluated_and_kept_and_frozen_ones_stay(tmp_path):
    state, step, _ = prepared(make_mesh(), toy.model(), OptimConfig(ema=0.5, learning_rate=0.05))
    seen = []
    for batch in batches(3):
        state, _ = step(state, batch)
        seen.append(flat(state.params))
    kernel = "branches_trunk/stem/conv/kernel"
    expected = np.average([s[kernel] for s in seen], axis=0, weights=[0.25, 0.5, 1.0])
    np.testing.assert_allclose(flat(state.variables["params"])[kernel], expected, rtol=1e-5)
    summary = toy.run(tmp_path, plan=toy.plan((3, 0, 3)), optim=OptimConfig(ema=0.5, learning_rate=0.05))
    kept, returned = flat(load_variables(tmp_path)["params"]), flat(summary["variables"]["params"])
    assert all((kept[path] == returned[path]).all() for path in kept)


def test_adaptive_clipping_bounds_each_unit():
    optimizer = make_optimizer(OptimConfig(adaptive_clip=0.1, weight_decay=0.0, momentum=0.0))
    params, grads = {"kernel": jnp.ones((4, 2))}, {"kernel": jnp.stack([jnp.full(4, 100.0), jnp.full(4, 0.01)], 1)}
    update, _ = optimizer.update(grads, optimizer.init(params), params)
    norms = jnp.linalg.norm(update["kernel"], axis=0)
    np.testing.assert_allclose(norms, [0.1 * 2.0, 0.02], rtol=1e-5)


def test_bfloat16_computes_with_parameters_statistics_and_loss_in_float32():
    state, step, _ = prepared(make_mesh(), toy.model(dtype=jnp.bfloat16))
    state, seen = step(state, next(batches(1)))
    assert {x.dtype for x in jax.tree.leaves((state.params, state.stats))} == {jnp.dtype(jnp.float32)}
    assert seen["loss"].dtype == jnp.float32 and np.isfinite(float(seen["loss"]))


def test_a_bad_optimiser_name():
    with pytest.raises(ConfigError):
        make_optimizer(OptimConfig(name="lion"))
