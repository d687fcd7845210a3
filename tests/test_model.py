"""The composition: three forms through one code path, and what is not active costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mgjax import Granularity, Head, MultiGranularityModel, OperatingPoint, Resize, Task
from mgjax.branches import ResNet, SeparableNet
from mgjax.flops import count_flops
from mgjax.fusion import ConcatFusion
from mgjax.granularity import DeclarationError
from mgjax.projection import GranularityProjection

TASKS = [Task("super", "super", 3), Task("sub", "sub", 6)]
INPUTS = {"image": jax.random.normal(jax.random.key(0), (4, 16, 16, 3))}


def taps(**options):
    return MultiGranularityModel(
        [Granularity("coarse", "trunk", "stage1"), Granularity("fine", "trunk", "stage2")],
        TASKS,
        [Head("super", {"coarse": "grad", "fine": "stop"}), Head("sub", {"fine": "grad"})],
        {"trunk": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar")},
        **options,
    )


def branches():
    return MultiGranularityModel(
        [Granularity("coarse", "low", "stage1", Resize(0.5)), Granularity("fine", "high", "stage2")],
        TASKS,
        [Head("super", {"coarse": "grad", "fused": "stop"}), Head("sub", {"fused": "grad"})],
        {"low": SeparableNet((4,), 1), "high": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar")},
        ConcatFusion(6),
    )


def ensemble():
    trunk = ResNet(blocks=(1,), widths=(4,), stem="cifar")
    return MultiGranularityModel(
        [Granularity("a", "a", "stage1"), Granularity("b", "b", "stage1")],
        TASKS,
        [Head(t.name, {m: "grad"}, f"{t.name}_{m}") for t in TASKS for m in "ab"],
        {"a": trunk, "b": trunk.clone()},
    )


def projected():
    return MultiGranularityModel(
        [Granularity("coarse", "trunk", "stage1"), Granularity("fine", "trunk", "stage2")],
        TASKS,
        [Head("super", {"coarse": "grad", "fused": "stop"}), Head("sub", {"fused": "grad"})],
        {"trunk": SeparableNet((4, 8), 1)},
        ConcatFusion(6),
        projections={
            "coarse": GranularityProjection(4, keep=0.25, blocks=1, heads=2),
            "fine": GranularityProjection(8),
        },
    )


FORMS = {"taps": taps, "branches": branches, "ensemble": ensemble, "projected": projected}
TABLE = pytest.mark.parametrize("form", FORMS)


def initialise(model, op=None):
    return model.init(jax.random.key(0), INPUTS, op or model.everything, train=False)


def apply_train(model, variables, op):
    return model.apply(variables, INPUTS, op, train=True, mutable=["batch_stats"])[0]


@TABLE
def test_answers_of_every_head(form):
    model = FORMS[form]()
    outputs = model.apply(initialise(model), INPUTS, model.everything, train=False)
    classes = {t.name: t.classes for t in TASKS}
    assert {n: v.shape for n, v in outputs.logits.items()} == {h.name: (4, classes[h.task]) for h in model.heads}
    assert all(v.dtype == jnp.float32 for v in outputs.logits.values())


@TABLE
def test_features_then_answer_is_the_whole(form):
    model = FORMS[form]()
    variables, op = initialise(model), model.everything
    features = model.apply(variables, INPUTS, op, train=False, method="features")
    assert set(features) == set(op.active)
    parts = model.apply(variables, features, op, method="answer")
    whole = model.apply(variables, INPUTS, op, train=False)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@TABLE
def test_parameters_of_each_granularity_are_a_subtree(form):
    model = FORMS[form]()
    full = flatten_dict(initialise(model)["params"])
    for g in model.granularities:
        task = {"coarse": ("super",), "fine": ("sub",)}.get(g.name, ("super", "sub"))
        some = flatten_dict(initialise(model, OperatingPoint((g.name,), task))["params"])
        assert {k: v.shape for k, v in some.items()}.items() < {k: v.shape for k, v in full.items()}.items()


def test_what_is_not_active_is_not_traced():
    """FLOPs of a training pass with BatchNorm on are those of a model that has nothing else."""
    model = taps()
    variables = initialise(model)
    flops = lambda m, v, op: count_flops(lambda v: apply_train(m, v, op), v).total
    coarse = OperatingPoint(("coarse",), ("super",))
    alone = MultiGranularityModel(
        [Granularity("coarse", "trunk", "stage1")],
        TASKS[:1],
        [Head("super", {"coarse": "grad"})],
        {"trunk": ResNet(blocks=(1,), widths=(4,), stem="cifar")},
    )
    assert flops(model, variables, coarse) == flops(alone, initialise(alone), alone.everything)
    both = flops(model, variables, model.everything)
    assert flops(model, variables, coarse) < flops(model, variables, OperatingPoint(("fine",), ("sub",))) < both
    # Resolution is part of the operating point: half the side costs about a quarter.
    quarter = flops(model, variables, OperatingPoint(("coarse",), ("super",), resolution=0.5))
    assert 0.2 < quarter / flops(model, variables, coarse) < 0.3


def test_branches_and_members_that_are_not_active_are_not_traced():
    """One member asked alone costs what a model of that member alone costs, BatchNorm on."""
    flops = lambda m, v, op: count_flops(lambda v: apply_train(m, v, op), v).total
    trunk = ResNet(blocks=(1,), widths=(4,), stem="cifar")
    model = ensemble()
    alone = MultiGranularityModel(
        [Granularity("a", "a", "stage1")], TASKS, [Head(t.name, {"a": "grad"}) for t in TASKS], {"a": trunk}
    )
    one = flops(model, initialise(model), OperatingPoint(("a",), ("super", "sub")))
    assert one == flops(alone, initialise(alone), alone.everything)
    assert flops(model, initialise(model), model.everything) == 2 * one
    model = branches()
    alone = MultiGranularityModel(
        [Granularity("coarse", "low", "stage1", Resize(0.5))],
        TASKS[:1],
        [Head("super", {"coarse": "grad", "fused": "stop"})],
        {"low": SeparableNet((4,), 1)},
        ConcatFusion(6),
    )
    coarse = OperatingPoint(("coarse",), ("super",))
    assert flops(model, initialise(model), coarse) == flops(alone, initialise(alone), coarse)


def test_granularities_of_one_branch_and_view_share_one_pass():
    model = taps()
    jaxpr = str(jax.make_jaxpr(lambda v: apply_train(model, v, model.everything))(initialise(model)))
    trunk = model.branches["trunk"]
    params = trunk.init(jax.random.key(0), INPUTS["image"], taps=("stage2",), train=False)
    alone = str(jax.make_jaxpr(lambda v: trunk.apply(v, INPUTS["image"], taps=("stage2",), train=False))(params))
    assert jaxpr.count("conv_general_dilated[") == alone.count("conv_general_dilated[")


def test_a_stopped_read_sends_no_gradient():
    model = taps()
    variables = initialise(model)

    def loss(params, head):
        outputs = apply_train(model, {**variables, "params": params}, model.everything)
        return (outputs.logits[head] ** 2).sum()

    grads = flatten_dict(jax.grad(loss)(variables["params"], "super"), sep="/")
    size = lambda start: max(float(np.abs(v).max()) for k, v in grads.items() if k.startswith(start))
    assert size("branches_trunk/stage1") > 0
    assert size("branches_trunk/stage2") == 0
    # The head still reads the finer feature; a normed and rectified feature is not all zero.
    assert size("head_super/dense/fine") > 0


def test_heads_skip_sources_that_are_not_active():
    model = taps()
    variables = initialise(model)
    coarse = OperatingPoint(("coarse",), ("super",))
    outputs = model.apply(variables, INPUTS, coarse, train=False)
    assert set(outputs.logits) == {"super"}
    with pytest.raises(DeclarationError, match=r"no head can answer \['sub'\] from the active \['coarse'\]"):
        model.apply(variables, INPUTS, OperatingPoint(("coarse",), ("sub",)), train=False)


def test_absent_granularities_do_not_alter_an_example():
    model = branches()
    variables = initialise(model)
    present = {"coarse": jnp.array([True, False, True, False])}
    features = model.apply(variables, INPUTS, model.everything, train=False, method="features")
    spoiled = features | {"coarse": features["coarse"].replace(vector=features["coarse"].vector.at[1::2].set(9.0))}
    answer = lambda f: model.apply(variables, f, model.everything, present=present, method="answer").logits["sub"]
    np.testing.assert_array_equal(answer(features), answer(spoiled))


def declare(**changes):
    base = dict(
        granularities=[Granularity("g", "b", "stage1")],
        tasks=[Task("t", "t", 2)],
        heads=[Head("t", {"g": "grad"})],
        branches={"b": SeparableNet((4,), 1)},
    )
    return initialise(MultiGranularityModel(**base | changes))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: declare(granularities=[Granularity("g", "x", "stage1")]), "names branch 'x'"),
        (lambda: declare(granularities=[Granularity("g", "b", "stage7")]), "reads tap 'stage7'"),
        (lambda: declare(granularities=[Granularity("g", "b", "stem")] * 2), "two declarations of granularity"),
        (lambda: declare(projections={"h": GranularityProjection(4)}), r"projections of \['h'\]"),
        (lambda: declare(granularities=[]), "at least one granularity"),
        (lambda: declare(heads=[Head("t", {"h": "grad"})]), "reads .*'h'"),
        (lambda: declare(heads=[Head("u", {"g": "grad"})]), "answers task 'u'"),
        (lambda: declare(heads=[Head("t", {"fused": "grad"})]), "no fusion"),
        (lambda: declare(tasks=[Task("t", "t", 2), Task("u", "u", 2)]), "no head answers task"),
        (lambda: declare(branches={"b": SeparableNet((4,), 1), "c": SeparableNet((4,), 1)}), "no granularity names"),
        (lambda: Head("t", {}), "reads nothing"),
        (lambda: Head("t", {"g": "maybe"}), "'grad' or 'stop'"),
        (lambda: Granularity("fused", "b", "stem"), "cannot be called 'fused'"),
        (lambda: Resize(0.0), "scale"),
        (lambda: Resize(0.5, 0.6), "detail"),
        (lambda: OperatingPoint((), ("t",)), "at least one"),
        (lambda: OperatingPoint(("g",), ("t",), 1.5), "resolution"),
        (lambda: taps().init(jax.random.key(0), INPUTS, OperatingPoint(("x",), ("sub",)), train=False), "granularity"),
        (lambda: taps().init(jax.random.key(0), INPUTS, OperatingPoint(("fine",), ("x",)), train=False), "task"),
    ],
)
def test_declarations_that_do_not_fit(call, says):
    with pytest.raises(DeclarationError, match=says):
        call()


# ---------------------------------------------------------------------- granularity dropout


def dropped(rate, seed=0, train=True, model=None):
    """What the fused head says where granularities are dropped by chance, with fixed features."""
    model = (model or branches()).clone(granularity_dropout=rate)
    variables = initialise(model)
    features = model.apply(variables, INPUTS, model.everything, train=False, method="features")
    rngs = {"dropout": jax.random.key(seed)}
    say = lambda present=None: model.apply(
        variables, features, model.everything, present=present, train=train, rngs=rngs, method="answer"
    )
    return say, features


def test_a_dropped_granularity_is_as_one_that_is_absent():
    plain, _ = dropped(0.0, train=False)
    absent = jnp.zeros(4, bool)
    cases = [plain().logits["sub"]] + [plain({g: absent}).logits["sub"] for g in ("coarse", "fine")]
    seen = set()
    for seed in range(8):
        say, _ = dropped(0.6, seed)
        for row, logits in enumerate(np.asarray(say().logits["sub"])):
            (which,) = [i for i, case in enumerate(cases) if np.allclose(logits, case[row], atol=1e-6)]
            seen.add(which)
    assert seen == {0, 1, 2}, "both, and each of the two alone"


def test_granularity_dropout_spares_evaluation_single_sources_and_the_last_granularity():
    say, _ = dropped(0.9, train=False)
    plain, _ = dropped(0.0, train=False)
    np.testing.assert_array_equal(say().logits["sub"], plain().logits["sub"])
    # A head with one source reads it always, one with two does not.
    say, _ = dropped(0.9, model=taps())
    plain, _ = dropped(0.0, train=False, model=taps())
    np.testing.assert_array_equal(say().logits["sub"], plain().logits["sub"])
    assert (say().logits["super"] != plain().logits["super"]).any()
    # What is absent anyway is not what stays.
    say, _ = dropped(0.99)
    only_fine = say({"coarse": jnp.zeros(4, bool)}).logits["sub"]
    plain, _ = dropped(0.0, train=False)
    np.testing.assert_allclose(only_fine, plain({"coarse": jnp.zeros(4, bool)}).logits["sub"], atol=1e-6)


def test_granularities_of_one_tap_are_one_feature_at_the_seam():
    model = taps()
    assert model.shared(model.everything) == [["coarse"], ["fine"]]
    same = model.clone(granularities=[Granularity("coarse", "trunk", "stage2"), Granularity("fine", "trunk", "stage2")])
    assert same.shared(model.everything) == [["coarse", "fine"]]
    assert same.shared(OperatingPoint(("fine",), ("sub",))) == [["fine"]]
    other = same.clone(projections={"fine": GranularityProjection(4)})
    assert other.shared(model.everything) == [["coarse"], ["fine"]]
