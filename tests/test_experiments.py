"""Experiments: their own configs under eval_shape, shrunk for a few real steps, and as commands."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar_mg, common, digits_mg, imagenet_mg
from experiments.plans import PLANS, build_plan, points_of
from experiments.vision import FORMS, branch_of, build_model, taps_of
from mgjax import Taxonomy
from mgjax import config as cfg
from mgjax.branches import NAMED_BRANCHES
from mgjax.config import ConfigError
from mgjax.data import procedural
from mgjax.errors import InputError
from mgjax.flops import count_flops
from mgjax.taxonomy import wordnet

ROOT = pathlib.Path(__file__).resolve().parent.parent
CIFAR = Taxonomy.from_names(
    {"superclass": [f"s{i}" for i in range(20)], "class": [f"c{i}" for i in range(100)]},
    {"class": [i // 5 for i in range(100)]},
)
FLAT = Taxonomy.from_names({"class": [str(i) for i in range(10)]})
DATASETS = {
    "procedural": (procedural.taxonomy(), (32, 32, 3)),
    "tfds:cifar100": (CIFAR, (32, 32, 3)),
    "tfds:mnist": (FLAT, (28, 28, 3)),
}


# Classes of ILSVRC-2012: synsets of the table that are nobody's parent.
WNIDS = set(wordnet.read_table()) - {s.parent for s in wordnet.read_table().values()}


def configured(**given):
    chosen, _ = imagenet_mg.resolve("cpu", given)
    return cfg.override(imagenet_mg.Config(), chosen | given)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_preset_as_it_is_under_eval_shape(dataset, form, size):
    config = configured(**{"preset": form, "size": size, "data.source": dataset})
    tree, shape = DATASETS[dataset]
    model = build_model(config.model, form, tree, shape)
    plan = build_plan(config.plan, model, 1000)
    assert plan[-1].name == "joint"
    for op in {s.op for s in plan} | set(points_of(model).values()):
        image = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
        outputs = jax.eval_shape(
            lambda x, op=op: model.init_with_output(jax.random.key(0), {"image": x}, op, train=False)[0], image
        )
        assert {n: v.shape[1] for n, v in outputs.logits.items()} == {
            h.name: tree.size(h.task) for h in model.heads if h.task in op.tasks and set(h.sources) & {*op.active, "fused"}
        }


@pytest.mark.parametrize("form", ["flat", "separate"])
@pytest.mark.parametrize("dataset", ["procedural", "tfds:cifar100"])
def test_baselines_have_as_many_parameters_as_what_they_are_compared_with(dataset, form):
    tree, shape = DATASETS[dataset]
    image = {"image": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    counts, steps = [], []
    for preset in ("taps", form):
        config = configured(**{"preset": preset, "data.source": dataset})
        model = build_model(config.model, preset, tree, shape)
        made = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, m.everything, train=False), image)
        counts.append(sum(p.size for p in jax.tree.leaves(made["params"])))
        plan = build_plan(config.plan, model, 50_000, alike=len(tree.levels))
        steps.append(sum(s.steps for s in plan))
    assert abs(counts[1] / counts[0] - 1) < 0.05, counts
    assert abs(steps[1] - steps[0]) <= 3, "both see as many examples"


@pytest.mark.parametrize("branch", ["resnet18", "separable", "mlp", "conv"])
@pytest.mark.parametrize("dataset", ["procedural", "tfds:cifar100"])
def test_other_branches_fit_every_form(dataset, branch):
    tree, shape = DATASETS[dataset]
    for form in ("taps", "branches", "ensemble"):
        given = {"model.branch": branch, "model.stem": "cifar", "plan.resolution": (1.0,), "data.source": dataset}
        config = configured(**given | {"model.widths": (4, 8, 8), "model.blocks": (1, 1, 1), "preset": form})
        model = build_model(config.model, form, tree, shape)
        image = {"image": jax.ShapeDtypeStruct((2, *shape), jnp.float32)}
        for stage in build_plan(config.plan, model, 1000):
            made = jax.eval_shape(lambda x, m=model, op=stage.op: m.init(jax.random.key(0), x, op, train=False), image)
            assert {f"branches_{g.branch}" for g in model.granularities if g.name in stage.op.active} <= set(made["params"])


def test_attention_and_sampling_of_the_separable_preset():
    image = {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)}
    costs, sizes = {}, {}
    for attention, keep in ((0, 1.0), (1, 1.0), (1, 0.5)):
        config = configured(**{"preset": "separable", "model.attention": attention, "model.keep": keep})
        model = build_model(config.model, "separable", procedural.taxonomy(), (32, 32, 3))
        init = lambda x, m=model: m.init(jax.random.key(0), x, m.everything, train=False)
        variables = jax.eval_shape(init, image)
        at = attention, keep
        sizes[at] = {k for k in variables["params"]["projections_part"]}
        costs[at] = count_flops(lambda v, x, m=model: m.apply(v, x, m.everything, train=False), variables, image).matmul
    assert sizes == {(0, 1.0): {"project"}, (1, 1.0): {"project", "block1"}, (1, 0.5): {"project", "sample", "block1"}}
    assert costs[0, 1.0] < costs[1, 0.5] < costs[1, 1.0]
    with pytest.raises(cfg.ConfigError, match=r"4 heads.*model.projection=30"):
        build_model(configured(**{"preset": "separable", "model.attention": 1, "model.projection": 30}).model,
                    "separable", procedural.taxonomy(), (32, 32, 3))  # fmt: skip


@pytest.mark.parametrize("fusion", ["cross_attention", "pyramid"])
def test_sampling_leaves_no_maps_to_fuse(fusion):
    given = {"preset": "separable", "model.keep": 0.5, "model.fusion": fusion}
    with pytest.raises(cfg.ConfigError, match=rf"model.fusion={fusion} reads maps, of which model.keep=0.5"):
        build_model(configured(**given).model, "separable", procedural.taxonomy(), (32, 32, 3))


def test_granularities_are_read_at_different_reductions():
    for branch in ("mobilenet_v2", "xception", "vgg16"):
        made = branch_of(configured(**{"model.branch": branch}).model, (224, 224, 3))
        reductions = [made.feature_info[tap].reduction for tap in taps_of(made, 3)]
        assert reductions == [8, 16, 32]


@pytest.mark.parametrize("branch", ["mobilenet_v1", "mobilenet_v2_cifar", "xception"])
def test_a_norm_that_is_asked_for_is_the_branchs(branch):
    assert branch_of(configured(**{"model.branch": branch, "model.norm": "group"}).model, (64, 64, 3)).norm == "group"
    with pytest.raises(cfg.ConfigError, match=r"convnext_t.*model.norm=group"):
        branch_of(configured(**{"model.branch": "convnext_t", "model.norm": "group"}).model, (64, 64, 3))


@pytest.mark.parametrize("branch", NAMED_BRANCHES)
def test_every_published_branch_fits_small_images(branch):
    given = {"model.branch": branch, "model.stem": "cifar", "model.patch": 8, "model.width": 0.125, "model.activation": "silu"}
    config = configured(**given)
    model = build_model(config.model, "taps", procedural.taxonomy(), (32, 32, 3))
    image = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)}
    made = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, model.everything, train=False)[0], image)
    assert {n: v.shape[1] for n, v in made.logits.items()} == {"form": 4, "part": 12, "texture": 36}
    taps = [g.tap for g in model.granularities]
    depth = list(model.branches["trunk"].feature_info)
    assert [depth.index(t) for t in taps] == sorted({depth.index(t) for t in taps}), "the coarser, the shallower"


def test_views_of_less_detail_or_noise_are_seen_by_the_same_model():
    sizes = []
    for given in ({}, {"model.view_scale": 0.25}, {"model.denoise": "median"}):
        config = configured(**given)
        model = build_model(config.model, "taps", procedural.taxonomy(), (32, 32, 3))
        image = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)}
        variables = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, m.everything, train=False), image)
        sizes.append(jax.tree.map(lambda p: p.shape, variables))
    assert sizes[0] == sizes[1] == sizes[2]


SHRUNK = {
    "model.widths": (4, 8, 8),
    "model.blocks": (1, 1, 1),
    "data.limit": 96,
    "plan.batch_size": 16,
    "plan.eval_batch_size": 48,
    "plan.max_steps": 2,
    "log.every": 1,
}


def shrunk(tmp_path, **given):
    """Runs the experiment in this process, on 8 devices."""
    config = configured(**SHRUNK | given)
    meta = {"experiment": "imagenet_mg", "config": json.loads(json.dumps(cfg.to_dict(config)))}
    facts, examples = imagenet_mg.train(config, tmp_path, meta)
    # Examples show the path, coarse to fine.
    assert list(examples[0].answer) == list(examples[0].truth) == list(facts["test"]["levels"])
    return facts


@pytest.mark.parametrize("form", FORMS)
def test_every_preset_shrunk_for_a_few_steps(form, tmp_path):
    facts = shrunk(tmp_path, preset=form)
    stages = {"taps": 4, "branches": 4, "separable": 4, "ensemble": 3, "flat": 2, "separate": 2, "linear": 1}[form]
    assert len(facts["stages"]) == stages and facts["steps"] == 2 * stages
    assert set(facts["test"]["levels"]) == {"form", "part", "texture"}
    assert facts["test"]["inconsistency"] == 0 and facts["test"]["examples"] == 96
    assert np.isfinite(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    common.show({"experiment": "imagenet_mg", "dataset": "procedural", **facts})
    points = {p["name"]: p for p in facts["points"]}
    assert set(points) == {"all"} | (set() if form in ("flat", "linear") else set(points["all"]["granularities"]))
    for name, point in points.items():
        assert point["params"] <= facts["params"] and point["flops"] > 0 and set(point["latency_ms"]) == {"1", "64"}, name
    assert points["all"]["accuracy"] == {l: v["accuracy"] for l, v in facts["test"]["levels"].items()}
    for level, figures in facts["test"]["levels"].items():
        assert ("raw_accuracy" in figures) == (form != "flat" or level == "texture")
        assert sum(figures["reliability"]["count"]) == 96
    assert np.sum(facts["test"]["confusion"]["counts"]) == 96 and facts["test"]["confusion"]["level"] == "form"


def test_single_stages_cost_less_than_the_joint_one(tmp_path):
    facts = shrunk(tmp_path, preset="taps")
    per_step = [s["flops"] / s["steps"] for s in facts["stages"]]
    assert per_step == sorted(per_step) and per_step[0] < per_step[1] < per_step[-1]


def test_cifar100_shrunk(shared_data, tmp_path):
    facts = shrunk(tmp_path, **{"data.source": "tfds:cifar100", "data.dir": str(shared_data / "tfds"), "data.limit": 200})
    assert set(facts["test"]["levels"]) == {"superclass", "class"}


def small_images(folder):
    """A folder of random JPEGs in ILSVRC's layout: 24 of its classes, two training images each."""
    rng = np.random.default_rng(0)
    for i, wnid in enumerate(sorted(w for w in wordnet.read_table() if w in WNIDS)[::42]):
        for split, count in (("train", 2), ("val", 1)):
            (folder / split / wnid).mkdir(parents=True)
            for k in range(count):
                image = rng.integers(0, 255, (40 + i, 60, 3)).astype(np.uint8)
                cv2.imwrite(str(folder / split / wnid / f"{wnid}_{k}.JPEG"), image)
    return folder


def test_a_folder_of_photographs_shrunk(tmp_path):
    """ILSVRC's layout, three levels of WordNet, the recipe for large images, mixing in the joint stage."""
    given = {
        "data.source": f"folder:{small_images(tmp_path / 'images')}",
        "data.levels": ("groups:3", "groups:8", "class"),
        "augment.cutmix": 1.0,
        "augment.layers": 1,
    }
    facts = shrunk(tmp_path, **given)
    assert list(facts["test"]["levels"]) == ["groups3", "groups8", "class"] and facts["test"]["examples"] == 24
    assert [s["name"] for s in facts["stages"]] == ["groups3", "groups8", "class", "joint"]


def test_real_photographs_shrunk(shared_data, tmp_path):
    facts = shrunk(tmp_path, **{"data.source": f"folder:{shared_data / 'imagenet_sample'}"})
    assert len(facts["test"]["levels"]) >= 3 and facts["test"]["inconsistency"] == 0


def digits(**given):
    chosen, _ = digits_mg.resolve("cpu", given)
    return cfg.override(digits_mg.Config(), chosen | given)


def test_digits_local_global_and_fused_have_equal_parameters():
    image, counts, steps = {"image": jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)}, {}, {}
    for preset in digits_mg.FORMS:
        config = digits(preset=preset)
        model = build_model(config.model, preset, FLAT, (28, 28, 3), digits_mg.FORMS)
        made = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, m.everything, train=False), image)
        counts[preset] = sum(p.size for p in jax.tree.leaves(made["params"]))
        steps[preset] = sum(s.steps for s in build_plan(config.plan, model, 54_000, alike=2))
    assert max(counts.values()) / min(counts.values()) < 1.04, counts
    assert max(steps.values()) - min(steps.values()) <= 3, steps


@pytest.mark.parametrize("preset", digits_mg.FORMS)
def test_digits_shrunk(preset, tmp_path):
    small = {"model.widths": (8, 8, 8, 8), "model.fusion_width": 8, "data.limit": 200, "plan.max_steps": 2}
    config = digits(preset=preset, decoder="lifted", **small | {"plan.batch_size": 16, "plan.eval_batch_size": 40})
    assert config.data.source == "sklearn:digits"
    facts, examples = digits_mg.train(config, tmp_path, {})
    assert facts["test"]["decoder"] == "lifted" and facts["test"]["examples"] == 200 and len(examples) == common.EXAMPLES
    assert [s["name"] for s in facts["stages"]] == (["local", "global", "joint"] if preset == "fused" else ["early", "joint"])
    assert set(examples[0].answer) == {"class"} and 0 < examples[0].probability["class"] <= 1


@pytest.mark.parametrize(
    "given, says",
    [
        ({"model.branch": "resnet18"}, "model.branch does not apply"),
        ({"model.widths": (8, 8, 8)}, r"two numbers each or more, as many of both, not \(8, 8, 8\) and \(2, 1, 2, 1\)"),
        ({"model.widths": (8,), "model.blocks": (1,)}, "two numbers each"),
    ],
)
def test_digits_that_do_not_fit(given, says):
    with pytest.raises(ConfigError, match=says):
        build_model(digits(**given).model, "fused", FLAT, (28, 28, 3), digits_mg.FORMS)


def cifar(**given):
    chosen, _ = cifar_mg.resolve("cpu", given)
    return cfg.override(cifar_mg.Config(), chosen | given)


def cifar_model(config):
    return build_model(config.model, config.preset, CIFAR, (32, 32, 3), cifar_mg.FORMS)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("preset", cifar_mg.FORMS)
def test_cifar_as_it_is_under_eval_shape(preset, size):
    config = cifar(preset=preset, size=size)
    model, image = cifar_model(config), {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)}
    plan = build_plan(config.plan, model, 47_500)
    for op in {s.op for s in plan} | set(points_of(model).values()):
        made = jax.eval_shape(lambda x, op=op: model.init_with_output(jax.random.key(0), x, op, train=False)[0], image)
        assert {n: v.shape[1] for n, v in made.logits.items()} == {h: CIFAR.size(h) for h in op.tasks}
    assert config.objective.balance == (preset.removeprefix("balanced-") if "balanced" in preset else "equal")
    assert len(plan) == (3 if preset == "staged" else 1)


def test_presets_of_cifar_train_for_as_many_flops():
    image, costs = {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)}, {}
    for preset in ("flat", "superclass", "joint", "stopgrad", "staged"):
        config = cifar(preset=preset)
        model = cifar_model(config)
        variables = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, m.everything, train=False), image)
        cost = lambda op, m=model, v=variables: count_flops(lambda v, x: m.apply(v, x, op, train=False).logits, v, image).total
        costs[preset] = sum(s.steps * s.batch_size * cost(s.op) for s in build_plan(config.plan, model, 47_500))
    assert max(costs.values()) / min(costs.values()) < 1.05, costs


@pytest.mark.parametrize("preset", ["flat", "joint", "staged", "balanced-cagrad", "balanced-dwa"])
def test_cifar_shrunk(preset, shared_data, tmp_path):
    small = {"data.dir": str(shared_data / "tfds"), "data.limit": 200, "plan.max_steps": 2, "model.widths": (4, 8, 8)}
    config = cifar(preset=preset, **small | {"plan.batch_size": 16, "plan.eval_batch_size": 40, "log.contributions": 2})
    facts, _ = cifar_mg.train(config, tmp_path, {})
    assert len(facts["stages"]) == (3 if preset == "staged" else 1) and set(facts["test"]["levels"]) == {"superclass", "class"}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("part/gradient/class" in r for r in records)


@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_of_plan_fits_a_form(kind):
    preset = "branches" if kind == "growth" else "taps"
    config = configured(**{"preset": preset, "plan.kind": kind, "plan.resolution": (0.5, 0.75)})
    model = build_model(config.model, preset, procedural.taxonomy(), (32, 32, 3))
    plan = build_plan(config.plan, model, 1000)
    assert plan[-1].op == model.everything and plan[-1].pieces == 1
    stages = {"joint": 1, "backbone_first": 2, "progressive_resolution": 3}.get(kind, 4)
    assert len(plan) == stages
    assert [s.pieces for s in plan] == ([8, 4, 2, 1] if kind == "progressive_jigsaw" else [1] * stages)
    if kind == "growth":
        assert plan[1].grows == (("branches_form", "branches_part"),)
        with pytest.raises(ConfigError, match="needs a branch per granularity"):
            taps = configured(**{"plan.kind": kind})
            build_plan(taps.plan, build_model(taps.model, "taps", procedural.taxonomy(), (32, 32, 3)), 1000)


def test_stochastic_depth_where_a_branch_has_it():
    assert branch_of(configured(**{"model.drop_path": 0.2}).model, (32, 32, 3)).drop_path == 0.2
    with pytest.raises(ConfigError, match="'conv' has no stochastic depth"):
        branch_of(configured(**{"model.branch": "conv", "model.drop_path": 0.2}).model, (32, 32, 3))


@pytest.mark.parametrize("branch", ["mlp", "vit_ti"])
def test_odd_images_fit_what_branches_expect(branch):
    given = {"preset": "branches", "model.branch": branch, "model.patch": 2, "model.width": 0.25, "model.blocks": (1, 1, 1)}
    config = configured(**given | {"model.widths": (8, 8, 8)})
    model = build_model(config.model, "branches", procedural.taxonomy(), (33, 25, 3))
    image = {"image": jax.ShapeDtypeStruct((2, 33, 25, 3), jnp.float32)}
    made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, model.everything, train=False), image)
    if branch == "vit_ti":  # the positions are learned for the size that is seen
        assert made["params"]["branches_form"]["position"].shape[1] == 1 + 4 * 3


def test_mixing_needs_pairs_on_every_device(tmp_path):
    with pytest.raises(
        InputError, match=r"stage 'form': mixing needs an even number of rows on each of 8 devices; a batch of 24"
    ):
        shrunk(tmp_path, **{"augment.mixup": 1.0, "plan.batch_size": 24})


def test_digits_of_a_directory_are_mnist():
    assert digits(**{"data.dir": "somewhere"}).data.source == "tfds:mnist"
    assert digits(**{"data.source": "folder:x"}).data.source == "folder:x"


@pytest.mark.parametrize(
    "given, says",
    [
        ({"preset": "tabs"}, "preset is 'tabs'.*nearest: taps"),
        ({"size": "tpu"}, "size is 'tpu'"),
        ({"plan.alone": ()}, "plan.alone"),
        ({"model.dtype": "float8"}, "model.dtype is 'float8'"),
        ({"model.branch": "resnet99"}, "model.branch is 'resnet99'.*nearest: resnet"),
        ({"model.stem": "foo"}, "model.stem is 'foo'"),
        ({"model.downsample": "foo"}, "model.downsample is 'foo'"),
        ({"model.norm": "foo"}, "model.norm is 'foo'"),
        ({"model.blocks": (4, 8)}, r"a width per stage is needed: --config.model.blocks has \(4, 8\), --config.model.widths"),
        ({"plan.batch_size": 0}, "plan.batch_size is 0; it is at least 1"),
        ({"plan.eval_batch_size": 0}, "at least 1"),
        ({"checkpoint.every": 0}, "at least 1"),
        ({"log.every": 0}, "at least 1"),
        ({"optim.warmup": -0.5}, "optim.warmup is -0.5; it is at least 0 and at most 1"),
        ({"model.branch": "mlp", "plan.resolution": (0.5,)}, "plan.resolution=1"),
        ({"model.branch": "vit_ti", "model.patch": 32}, "patches of 32 pixels are too large.*model.patch"),
        ({"model.branch": "vgg11", "model.norm": "group"}, "'vgg11' has the norm that it was published with"),
        ({"model.match": "tabs"}, "no preset 'tabs'"),
    ],
)
def test_configs_that_do_not_fit(given, says):
    with pytest.raises(InputError, match=says):
        config = configured(**given)
        model = build_model(config.model, config.preset, procedural.taxonomy(), (32, 32, 3))
        build_plan(config.plan, model, 100)


def test_keys_that_belong_together_follow_the_one_that_is_given():
    assert configured(**{"model.widths": (8, 16)}).model.blocks == (1, 1)
    assert configured(**{"model.widths": (8, 16), "model.blocks": (2, 1)}).model.blocks == (2, 1)
    folder = {"data.source": "folder:x"}
    assert configured(**folder).augment.size == 64 and configured(**folder | {"data.image_size": 32}).augment.size == 28
    assert configured(**folder | {"data.image_size": 32, "augment.size": 0}).augment.size == 0


def test_the_command_line_comes_after_the_preset():
    assert configured(**{"model.stem": "cifar"}).model.stem == "cifar"
    assert configured().model.stem == "patch"
    with pytest.raises(ConfigError, match="nearest is --config.model.widths"):
        cfg.override(imagenet_mg.Config(), {"model.witdhs": 3})


# ---------------------------------------------------------------------- as a command


def command(*arguments, module="experiments.imagenet_mg", devices=1, **options):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process, timeout=600):
    try:
        return process.communicate(timeout=timeout)[0], process.returncode
    except BaseException:
        process.kill()
        process.communicate()
        raise


SMALL = [f"--config.{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SHRUNK.items()]


def test_help_lists_every_key_with_default_and_meaning():
    said, _ = finish(command("--help"))
    text = " ".join(said.split())
    for dotted, leaf in cfg.leaves(imagenet_mg.Config()).items():
        assert f"config.{dotted}" in text, dotted
        assert leaf.help.split(":")[0][:40] in text, dotted
    assert "--workdir" in text and "default: '0.2'" in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config.optim.lr=1"], "error: unknown key --config.optim.lr; the nearest is --config.optim.learning_rate"),
        (["--config.data.source=imagnet"], "error: no dataset 'imagnet'"),
        (["--config.data.source=tfds:cifar100", "--config.data.dir=/no/such"], "error: tfds:cifar100: there is no directory"),
        (["--config.seed=x"], "error: flag --config.seed=x"),
        (["--preset=flat"], "error: unknown key --preset; the nearest is --config.preset"),
        (["cifar100"], "error: unexpected argument 'cifar100'"),
        (["--workdir=/proc/x"], "error: workdir '/proc/x' cannot be written to"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, says, tmp_path):
    arguments = arguments if any("workdir" in a for a in arguments) else [*arguments, f"--workdir={tmp_path}"]
    said, code = finish(command(*arguments))
    assert says in said and code == 2 and "Traceback" not in said, said
    assert not (tmp_path / "checkpoints").exists()


def test_a_command_that_is_interrupted_continues_when_it_is_repeated(tmp_path):
    """Also: what the workdir holds, the shape of the summary, and what a third call does."""
    workdir, slow = tmp_path / "W", "--config.plan.max_steps=40"
    arguments = [f"--workdir={workdir}", *SMALL, slow, "--config.plan.joint=40", "--config.checkpoint.every=5"]
    first = command(*arguments)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            path = workdir / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) >= 6:
                break
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        said, code = finish(first)
    finally:
        first.kill()
    assert code == 130 and "the same command with --workdir" in said, said
    assert not (workdir / "summary.json").exists()

    said, code = finish(command(*arguments))
    assert code == 0 and "continuing at step" in said and "image" in said, said
    assert re.search(r"no accelerator: the CPU-sized preset", said)
    summary = json.loads((workdir / "summary.json").read_text())
    assert {"experiment", "dataset", "seed", "command", "hardware", "versions", "params", "train_flops"} <= set(summary)
    assert {"steps", "seconds", "stages", "test"} <= set(summary) and summary["versions"]["jax"] == jax.__version__
    assert {"name", "steps", "seconds", "flops", "val"} <= set(summary["stages"][0])
    level = summary["test"]["levels"]["texture"]
    assert {"accuracy", "top5", "precision", "recall", "f1", "ece", "raw_accuracy"} <= set(level)
    assert {"full_path_accuracy", "inconsistency", "raw_inconsistency", "tree_distance", "mistake_severity"} <= set(
        summary["test"]
    )
    assert set(summary["test"]["decoders"]) == {"combined", "product", "lifted", "top_down"}
    written = {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "summary.json", "report.html"}
    assert written <= {p.name for p in workdir.iterdir()}
    (workdir / "report.html").unlink()

    said, code = finish(command(*arguments))
    assert code == 0 and "this run is complete" in said and "F1" in said and (workdir / "report.html").exists()
    said, code = finish(command(*arguments, "--config.seed=1"))
    assert code == 2 and "config.seed was 0, is 1" in said


def test_accelerator_hint_names_the_command(monkeypatch):
    from mgjax.train import monitor

    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(monitor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="GPU 0: NVIDIA H200\n", stderr="")
    monkeypatch.setattr(monitor.subprocess, "run", lambda *a, **k: answer)
    assert "pip install -U 'jax[cuda]'" in monitor.accelerator_hint()
    monkeypatch.setattr(monitor.jax, "default_backend", lambda: "gpu")
    assert monitor.accelerator_hint() is None


def test_records_of_other_runs_are_told_apart():
    old = {"experiment": "a", "config": {"seed": 0, "data.dir": "x"}}
    common.check_same(old, {"experiment": "a", "config": {"seed": 0, "data.dir": "y"}}, pathlib.Path("w"))
    with pytest.raises(ValueError, match="experiment was 'a', is 'b'"):
        common.check_same(old, {"experiment": "b", "config": old["config"]}, pathlib.Path("w"))


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    """Its record is replaced, so that the finished run can be shown again."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "imagenet_mg", "config": {"seed": 9}}))
    arguments = [f"--workdir={tmp_path}", *SMALL]
    assert finish(command(*arguments))[1] == 0
    said, code = finish(command(*arguments))
    assert code == 0 and "this run is complete" in said, said
