"""Reading collectives off a program, the prediction made of them, and the benchmark of a training step."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from experiments.benchmarks import scaling, train_step
from experiments.benchmarks.scaling import GATHERS, GRADIENTS, SCALARS, STATISTICS, Array, Collective
from experiments.vision import build_model
from mgjax.train.mesh import MeshConfig, make_mesh

LEVELS = {"super": 2, "class": 6}
# A trunk of two basic blocks, one of whose kernels is large enough to be split.
SMALL = {
    "model__branch": "resnet",
    "model__stem": "cifar",
    "model__widths": (8, 16),
    "model__blocks": (1, 1),
    "data__image_size": 18,
    "augment__size": 16,
    "mesh__shard_above": 512,
}


# What XLA prints for a CPU (named groups) and for a GPU (listed and iota groups, asynchronous forms).
SNIPPETS = {
    """%all-reduce.4 = (f32[64]{0}, bf16[3,3,8,64]{3,2,1,0}, /*index=2*/s32[]) all-reduce(%a, %b, %c), channel_id=2,
 replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, to_apply=%add""": Collective(
        "all-reduce", (Array("f32", (64,)), Array("bf16", (3, 3, 8, 64)), Array("s32", ())), 8
    ),
    "  ROOT %r = f32[] all-reduce(f32[] %x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add": Collective(
        "all-reduce", (Array("f32", ()),), 4
    ),
    "%s = (f32[16]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[2,4]<=[8], to_apply=%add": Collective(
        "all-reduce", (Array("f32", (16,)), Array("f32", (4,))), 4
    ),
    "%g = f32[2048,150]{1,0} all-gather(%p), replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], "
    "device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}": Collective("all-gather", (Array("f32", (2048, 150)),), 4),
    "%g = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}": Collective(
        "all-gather", (Array("f32", (64, 4)),), 8
    ),
    "%g = ((f32[8], bf16[2]), (f32[64], bf16[16])) all-gather-start(%p, %q), replica_groups={}, dimensions={0}": Collective(
        "all-gather", (Array("f32", (64,)), Array("bf16", (16,))), 8
    ),
    "%x = bf16[4,16]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={1}, to_apply=%add": Collective(
        "reduce-scatter", (Array("bf16", (4, 128)),), 8
    ),
    "%x = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}": Collective(
        "collective-permute", (Array("f32", (4,)),), 8
    ),
    "%x = f8e4m3fn[32]{0} all-to-all(%p), replica_groups={{0,1}}, dimensions={0}": Collective(
        "all-to-all", (Array("f8e4m3fn", (32,)),), 2
    ),
}


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_collective_is_read_in_every_form(text):
    assert scaling.collectives(text.replace("\n", ""), 8) == [SNIPPETS[text]]


def test_the_end_of_an_asynchronous_collective_is_not_another():
    text = """  %s = f32[16]{0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%add
  %d = f32[16]{0} all-reduce-done(%s)
  %f = f32[16]{0} fusion(%d), kind=kLoop, metadata={op_name="all-reduce(x)"}"""
    assert [c.kind for c in scaling.collectives(text, 8)] == ["all-reduce"]


def test_bytes():
    sizes = {"f32": 48, "bf16": 24, "pred": 12, "f8e5m2": 12, "f4e2m1fn": 6}
    assert {dtype: Array(dtype, (3, 4)).bytes for dtype in sizes} == sizes
    wire = {kind: scaling.wire_bytes(kind, 1000, 4) for kind in scaling.KINDS}
    assert wire == {
        "all-reduce": 1500, "all-gather": 750, "reduce-scatter": 750, "all-to-all": 750, "collective-permute": 1000
    }  # fmt: skip
    assert scaling.wire_bytes("all-reduce", 1000, 1) == 0


def test_arrays_are_laid_to_what_they_carry():
    kept = scaling.Kept({"kernel": (8, 64), "scale": (8,), "bias": (8,)}, frozenset({"kernel"}), {"mean": (8,)}, fsdp=4)
    array = lambda *shape: Array("f32", shape)
    found = [
        Collective("all-gather", (array(8, 64),), 4),
        Collective("all-reduce", (array(64, 8), array()), 8),
        Collective("all-reduce", (array(8),) * 5, 8),
        Collective("all-to-all", (array(3),), 8),
    ]
    t = scaling.traffic(found, kept)
    assert t.arrays == {GATHERS: 1, GRADIENTS: 3, SCALARS: 1, STATISTICS: 3, scaling.OTHER: 1}
    assert t.bytes[GRADIENTS] == 4 * (512 + 16) and t.split == 4 * 512
    assert t.wire[GRADIENTS] == 7 / 4 * 4 * (512 + 16) and t.wire[GATHERS] == 3 / 4 * 4 * 512
    # Scattered over 4, and a quarter reduced between 2.
    assert t.scattered == 3 / 4 * 2048 + 512 + 7 / 4 * 64


def small(fsdp: int, rows: int, dtype: str = "float32"):
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    traced, kept, _ = scaling.traced_step(scaling.recipe(rows, **SMALL, model__dtype=dtype), mesh, LEVELS)
    return kept, [scaling.traffic(scaling.collectives(text, 8), kept) for text in scaling.programs(traced)]


def test_gradients_that_travel_are_those_of_the_parameters_whatever_the_batch():
    kept, (few, few_compiled) = small(1, 8)
    _, (many, many_compiled) = small(1, 32)
    parameters = sum(4 * jnp.zeros(s).size for s in kept.params.values())
    for t in (few, few_compiled, many, many_compiled):
        assert t.bytes[GRADIENTS] == parameters and t.arrays[GRADIENTS] == len(kept.params)
        assert t.bytes[STATISTICS] == few.bytes[STATISTICS] > 0
        assert not t.arrays[GATHERS] and not t.arrays[scaling.OTHER]
    # Two vectors of each norm forward and three backward, of which two are gradients of its parameters.
    assert few.bytes[STATISTICS] == 3 * sum(4 * s[0] for p, s in kept.statistics.items() if p.endswith("/mean"))


def test_what_fsdp_splits_is_gathered_once():
    kept, (t, compiled) = small(8, 8)
    split = sum(4 * jnp.zeros(kept.params[path]).size for path in kept.split)
    assert 0 < split < sum(4 * jnp.zeros(s).size for s in kept.params.values())
    assert t.bytes[GATHERS] == compiled.bytes[GATHERS] == t.split == split
    assert t.scattered < t.wire[GRADIENTS] and not t.arrays[scaling.OTHER]


def test_gradients_of_bfloat16_kernels_travel_in_half_the_bytes_but_on_a_cpu():
    kept, (t, compiled) = small(1, 8, "bfloat16")
    kernels = sum(jnp.zeros(s).size for s in kept.params.values() if len(s) == 4)
    assert compiled.bytes[GRADIENTS] - t.bytes[GRADIENTS] == 2 * kernels > 0


def test_a_prediction_falls_with_the_number_of_gpus_and_gains_by_overlap():
    load = scaling.Load(3e12, 60e6, 50e6, 100e6, 3e5, 53)
    for strategy in scaling.STRATEGIES:
        found = [scaling.predict(load, nodes, strategy, 0.1) for nodes in (1, 8, 64)]
        assert 1 > found[0].serial > found[1].serial > found[2].serial > 0
        assert all(p.overlapped >= p.serial for p in found)
    data, whole, scattered = (scaling.predict(load, 8, s, 0.1) for s in scaling.STRATEGIES)
    assert data.gathers == 0 < whole.gathers and scattered.gradients < whole.gradients == data.gradients
    assert scaling.predict(load._replace(norms=0), 64, "data", 0.1).serial > scaling.predict(load, 64, "data", 0.1).serial


def test_the_document_says_what_the_formulas_give():
    text = (pathlib.Path(scaling.__file__).parents[2] / "SCALING.md").read_text()
    cells = {tuple(row.split(" | ")[:2]): row.split(" | ")[2:] for row in re.findall(r"^\| (.+) \|$", text, re.M)}
    mb = lambda mesh, what: float(cells[mesh, what][1]) * 1e6
    # The parameters of the recipe's model, without compiling it: kernels of convolutions travel in bfloat16.
    model = build_model(scaling.recipe(8).model, "taps", scaling.tree(), (224, 224, 3))
    init = lambda: model.init(jax.random.key(0), {"image": jnp.zeros((1, 224, 224, 3))}, model.everything, train=False)
    variables = jax.eval_shape(init)
    params = flatten_dict(variables["params"], sep="/")
    gradients = sum(p.size * (2 if p.ndim == 4 else 4) for p in params.values())
    gathers = sum(4 * p.size for p in params.values() if p.size >= 65536)
    assert mb("data=8", GRADIENTS) == pytest.approx(gradients, abs=501)
    assert mb("fsdp=8", GATHERS) == pytest.approx(gathers, abs=501)
    split = sum(p.size * (2 if p.ndim == 4 else 4) for p in params.values() if p.size >= 65536)
    means = [p for path, p in flatten_dict(variables["batch_stats"], sep="/").items() if path.endswith("/mean")]
    statistics = 3 * 4 * sum(p.size for p in means)
    assert mb("data=8", STATISTICS) == pytest.approx(statistics, abs=501)
    flops = float(re.search(r"128 images a device: ([\d,.]+) GFLOP", text)[1].replace(",", "")) * 1e9
    load = scaling.Load(flops, gradients, split, gathers, statistics, len(means))
    table = scaling.prediction_table(scaling.predictions(load, (0.075, 0.18)))
    assert table in text


TINY = train_step.Network((1,), (4,), 8, {"class": 4})


def test_train_step_without_torch(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train_step.SIZES, "small", TINY)
    monkeypatch.setitem(sys.modules, "torch", None)
    train_step.main(["--size=small", "--rounds=2", "--steps=1", "--batch=4", f"--json={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"ours images/s", "Flax images/s", "ours / Flax", "ours / Flax smallest"} <= set(figures)
    assert all(v > 0 for v in figures.values())
    said = capsys.readouterr().out
    assert "PyTorch is not installed" in said and "speed, ours / Flax" in said


def test_the_timed_model_is_that_of_the_recipe():
    network = train_step.SIZES["full"]
    shapes = [
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), {"image": jnp.zeros((1, 224, 224, 3))}, m.everything, train=False))
        for m in (
            train_step.model_of(network, list(network.levels)),
            build_model(scaling.recipe(8).model, "taps", scaling.tree(), (224, 224, 3)),
        )
    ]
    assert shapes[0] == shapes[1]


def test_all_train_the_same_network_and_a_compiler_that_fails_is_done_without():
    cases, said = [train_step.ours(TINY, 4, ["class"]), train_step.plain_flax(TINY, 4)], []
    assert cases[0].params == cases[1].params and cases[0].flops == cases[1].flops
    pytest.importorskip("torch")

    def broken(fn):
        raise RuntimeError("no compiler")

    name, case = train_step.torch_case(TINY, 4, said.append, broken)
    assert name == "PyTorch, eager" and case.params == cases[0].params
    assert said == ["torch.compile failed (RuntimeError: no compiler): PyTorch runs eagerly, and is slower for it"]


@pytest.mark.parametrize("script", [scaling, train_step])
def test_what_cannot_be_measured_ends_in_one_line(script):
    with pytest.raises(SystemExit, match="error: "):
        script.main({scaling: ["--mfu=0"], train_step: ["--rounds=0"]}[script])
