"""Published architectures agree with torch's, leaf by leaf and tap by tap.

Skipped where torch or transformers is not installed. The weights are random: nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.branches import NAMED_BRANCHES, convnext, mobilenet, resnet, vgg, vit, xception
from tests import torch_models
from tests.torch_models import (
    CONVNEXT_RULES,
    RESNET_RULES,
    VIT_RULES,
    XCEPTION_RULES,
    Rule,
    convert,
    mobilenet_rules,
    randomise,
    state_of,
    vgg_rules,
)


def test_a_map_that_leaves_something_out_is_refused():
    like = {"params": {"a": np.zeros(2), "b": np.zeros(3)}}
    rules = (Rule("x", "params/a"), Rule("y", "params/b"), Rule("skipped", None))
    state = {"x": np.ones(2), "y": np.ones(3), "skipped": np.ones(1)}
    assert (convert(state, rules, like)["params"]["b"] == 1).all()
    for given, by, says in (
        (state | {"z": np.ones(1)}, rules, "'z' is matched by 0"),
        (state, (*rules, Rule("[xy]", "params/a")), "'x' is matched by 2"),
        ({"x": np.ones(2)}, rules, "'params/b' is not filled"),
        (state | {"y": np.ones(2)}, rules, r"'y' of \(2,\) does not fit"),
        (state, (rules[0], Rule("y", "params/a"), rules[2]), "filled already"),
        (state, (rules[0], Rule("y", "params/c"), rules[2]), "not there"),
    ):
        with pytest.raises(ValueError, match=says):
            convert(given, by, like)


def images(size, batch=1):
    return np.random.default_rng(batch).normal(size=(batch, size, size, 3)).astype(np.float32)


def compare(name, branch, model, rules, x, theirs, record):
    """Asserts that maps or vectors of the taps in `theirs` are ours to 1e-4 of their largest value."""
    taps = tuple(theirs)
    like = jax.eval_shape(lambda: branch.init(jax.random.key(0), jnp.asarray(x), taps=taps, train=False))
    variables = convert(state_of(model), rules, like)
    ours = jax.jit(lambda v, x: branch.apply(v, x, taps=taps, train=False))(variables, x)
    worst = absolute = largest = 0.0
    for tap, (their_map, their_vector) in theirs.items():
        for mine, their in ((ours[tap].map, their_map), (ours[tap].vector, their_vector)):
            if their is None:
                continue
            their = their.numpy()
            assert mine.shape == their.shape
            difference, scale = np.abs(mine - their).max(), np.abs(their).max()
            assert np.isfinite(scale) and scale > 1e-2 and their.std() > 1e-3 * scale, f"{tap} says nothing"
            worst, absolute, largest = max(worst, difference / scale), max(absolute, difference), max(largest, scale)
    record("parity", f"{name}: largest difference {absolute:.1e}, largest value {largest:.3g}, relative {worst:.1e}")
    print(f"{name}: max abs {absolute:.2e}, largest value {largest:.3g}, relative {worst:.2e}")
    assert worst < 1e-4


def first_channels(x):
    return pytest.importorskip("torch").from_numpy(x).permute(0, 3, 1, 2)


def last_channels(t):
    return t.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", resnet.NAMED)
def test_resnet(name, record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    branch, x = NAMED_BRANCHES[name](), images(64)
    widths = [info.channels for tap, info in branch.feature_info.items() if tap != "stem"]
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=widths, depths=list(branch.blocks), layer_type=branch.kind, hidden_act="relu"
    )
    model = randomise(transformers.ResNetModel(config), first_channels(images(64, 8)))
    with torch.no_grad():
        said = model(first_channels(x), output_hidden_states=True)
    theirs = {tap: (last_channels(h), h.mean((2, 3))) for tap, h in zip(branch.feature_info, said.hidden_states)}
    assert len(theirs) == 5
    compare(name, branch, model, RESNET_RULES, x, theirs, record_property)


@pytest.mark.parametrize("name", vgg.NAMED)
def test_vgg(name, record_property):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    branch, x = NAMED_BRANCHES[name](classifier=True), images(64)
    batch_norm = branch.norm == "batch"
    model = randomise(torch_models.torch_vgg(branch.blocks, batch_norm), first_channels(images(64, 8)))
    theirs, y = {}, first_channels(x)
    with torch.no_grad():
        for layer in model.features:
            y = layer(y)
            if isinstance(layer, torch.nn.MaxPool2d):
                theirs[f"stage{len(theirs) + 1}"] = (last_channels(y), y.mean((2, 3)))
        y = model.classifier[:3](model.avgpool(y))
        theirs |= {"fc1": (None, y), "fc2": (None, model.classifier[3:6](y))}
    assert list(theirs) == list(branch.feature_info)
    compare(name, branch, model, vgg_rules(branch.blocks, batch_norm), x, theirs, record_property)


VITS = (("vit_ti", 16, 64), ("vit_s", 16, 64), ("vit_b", 16, 224), ("vit_b", 32, 96))


@pytest.mark.parametrize("name, patch, size", VITS)
def test_vit(name, patch, size, record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    branch, x = NAMED_BRANCHES[name](patch=patch, image_size=size, epsilon=1e-12), images(size)
    config = transformers.ViTConfig(
        hidden_size=branch.features,
        num_hidden_layers=branch.depth,
        num_attention_heads=branch.heads,
        intermediate_size=4 * branch.features,
        image_size=size,
        patch_size=patch,
    )
    model = randomise(transformers.ViTModel(config), first_channels(x))
    # The published spread of initial weights is so small that attention would hardly attend.
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.ndim == 2:
                leaf.mul_(3.0)
    with torch.no_grad():
        said = model(first_channels(x), output_hidden_states=True)
    grid = size // patch

    def of(tokens, vector):
        return tokens[:, 1:].reshape(1, grid, grid, -1), vector

    theirs = {"embed": of(h := said.hidden_states[0], h[:, 1:].mean(1))}
    theirs |= {f"block{i}": of(said.hidden_states[i], said.hidden_states[i][:, 0]) for i in (1, 6, 12)}
    theirs["final"] = of(said.last_hidden_state, said.last_hidden_state[:, 0])
    compare(f"{name}/{patch}", branch, model, VIT_RULES, x, theirs, record_property)


@pytest.mark.parametrize("name", convnext.NAMED)
def test_convnext(name, record_property):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    branch, x = NAMED_BRANCHES[name](), images(64)
    model = torch_models.torch_convnext(branch.blocks, branch.widths, branch.stem_patch, branch.halvings)
    randomise(model, first_channels(x))
    theirs, y = {}, first_channels(x)
    with torch.no_grad():
        for i, layer in enumerate(model.features):
            y = layer(y)
            if i == 0 or i % 2:
                theirs["stem" if i == 0 else f"stage{i // 2 + 1}"] = (last_channels(y), y.mean((2, 3)))
        theirs["stage4"] = (last_channels(y), model.classifier(model.avgpool(y)))
    assert list(theirs) == list(branch.feature_info)
    compare(name, branch, model, CONVNEXT_RULES, x, theirs, record_property)


@pytest.mark.parametrize("name", xception.NAMED)
def test_xception(name, record_property):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    small = name.endswith("_cifar")
    size = 32 if small else 96  # maps of even and of odd sides: 47, 45, 23, 12, 6, 3
    branch, x = NAMED_BRANCHES[name](), images(size)
    model = torch_models.torch_xception(*((1, 1, 1) if small else (2, 0, 2)))
    randomise(model, first_channels(images(size, 8)))
    theirs = {}
    with torch.no_grad():
        y = model.stem2(model.stem1(first_channels(x)))
        theirs["stem"] = (last_channels(y), y.mean((2, 3)))
        for i, block in enumerate(model.blocks):
            y = block(y)
            if i in (0, 1, 10, 11):
                theirs[f"stage{len(theirs)}"] = (last_channels(y), y.mean((2, 3)))
        y = model.exit2(model.exit1(y))
        theirs["exit"] = (last_channels(y), y.mean((2, 3)))
    assert list(theirs) == list(branch.feature_info)
    compare(name, branch, model, XCEPTION_RULES, x, theirs, record_property)


MOBILENETS = (*mobilenet.NAMED_V1, *mobilenet.NAMED_V2)


@pytest.mark.parametrize("name", MOBILENETS)
def test_mobilenet(name, record_property):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    size = 32 if name.endswith("_cifar") else 96
    branch, x = NAMED_BRANCHES[name](), images(size)
    model = randomise(torch_models.torch_mobilenet(branch), first_channels(images(size, 8)))
    ends = list(np.cumsum([1, *branch.blocks, 1]))[: len(branch.feature_info)]  # layers up to each tap
    theirs, y, taps = {}, first_channels(x), iter(branch.feature_info)
    with torch.no_grad():
        for i, layer in enumerate(model.features, 1):
            y = layer(y)
            if i in ends:
                theirs[next(taps)] = (last_channels(y), y.mean((2, 3)))
    assert list(theirs) == list(branch.feature_info)
    compare(name, branch, model, mobilenet_rules(branch), x, theirs, record_property)


def test_every_named_branch_is_compared():
    # The hybrids are ours: no torch model has their parts together.
    hybrids = {name for name in vit.NAMED if name.endswith("_hybrid")}
    assert set(NAMED_BRANCHES) - hybrids == {
        *resnet.NAMED,
        *vgg.NAMED,
        *convnext.NAMED,
        *xception.NAMED,
        *MOBILENETS,
        *(name for name, _, _ in VITS),
    }
