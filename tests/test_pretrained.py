"""Weights of others: that they answer as they should, and that nothing is loaded where something does not fit."""

import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.data.images import decode_rgb, fit
from mgjax.errors import InputError
from mgjax.pretrained import Rule, fill, load_mobilenet_v1, read_tensors
from mgjax.taxonomy import wordnet

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
FILE = "mobilenet_v1_0.25_224.npz"


def tflite_tensors(rng, width=0.25, classes=7):
    """Random tensors of MobileNetV1, named and laid out as TFLite's; maps stay of order 1."""

    def layer(weights, bias, shape, fan_in):
        tensors[f"MobilenetV1.{weights}"] = rng.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)
        tensors[f"MobilenetV1.{bias}"] = rng.normal(0, 0.1, shape[3] if shape[0] == 1 else shape[0]).astype(np.float32)

    tensors, inputs = {}, int(32 * width)
    layer("Conv2d_0.weights", "MobilenetV1.Conv2d_0.Conv2D_bias", (inputs, 3, 3, 3), 27)
    for i, outputs in enumerate(WIDTHS, 1):
        outputs = int(outputs * width)
        name = f"Conv2d_{i}_depthwise"
        layer(f"{name}.depthwise_weights", f"MobilenetV1.{name}.depthwise_bias", (1, 3, 3, inputs), 9)
        name = f"Conv2d_{i}_pointwise"
        layer(f"{name}.weights", f"MobilenetV1.{name}.Conv2D_bias", (outputs, 1, 1, inputs), inputs)
        inputs = outputs
    name = "Logits.Conv2d_1c_1x1"
    layer(f"{name}.weights", f"{name}.Conv2D_bias", (classes, 1, 1, inputs), inputs)
    return tensors


def padded(x, stride):
    """For a 3×3 window as TensorFlow's SAME pads it: what is odd comes last."""
    amounts = [max(0, (-(-n // stride) - 1) * stride + 3 - n) for n in x.shape[1:3]]
    return np.pad(x, ((0, 0), *((a // 2, a - a // 2) for a in amounts), (0, 0)))


def windows(x, stride):
    """[B, H', W', 3, 3, C]."""
    views = np.lib.stride_tricks.sliding_window_view(padded(x, stride), (3, 3), (1, 2))
    return views[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def numpy_mobilenet(tensors, x):
    """Logits in numpy, of TFLite's tensors as they are."""
    get = lambda name: tensors[f"MobilenetV1.{name}"].astype(np.float64)
    relu6 = lambda y: np.clip(y, 0, 6)
    y = np.einsum("bhwuvc,ouvc->bhwo", windows(x, 2), get("Conv2d_0.weights"))
    y = relu6(y + get("MobilenetV1.Conv2d_0.Conv2D_bias"))
    for i, stride in enumerate(STRIDES, 1):
        name = f"Conv2d_{i}_depthwise"
        y = np.einsum("bhwuvc,uvc->bhwc", windows(y, stride), get(f"{name}.depthwise_weights")[0])
        y = relu6(y + get(f"MobilenetV1.{name}.depthwise_bias"))
        name = f"Conv2d_{i}_pointwise"
        y = relu6(y @ get(f"{name}.weights")[:, 0, 0].T + get(f"MobilenetV1.{name}.Conv2D_bias"))
    name = "Logits.Conv2d_1c_1x1"
    return y.mean((1, 2)) @ get(f"{name}.weights")[:, 0, 0].T + get(f"{name}.Conv2D_bias")


@pytest.fixture
def tensors(rng):
    return tflite_tensors(rng)


@pytest.fixture
def saved(tmp_path):
    """Saves tensors and tells where."""

    def save(tensors):
        np.savez(tmp_path / "weights.npz", **tensors)
        return tmp_path / "weights.npz"

    return save


def load(path, **options):
    return load_mobilenet_v1(path, **{"width": 0.25, "classes": 7, **options})


def test_mobilenet_computes_what_numpy_does(tensors, saved, rng):
    x = rng.uniform(-1, 1, (2, 45, 38, 3)).astype(np.float32)  # odd maps, and such that need one pixel more behind
    want = numpy_mobilenet(tensors, x)
    assert want.std(0).min() > 1e-3
    for options in ({}, {"impl": "xla"}, {"impl": "shift", "remat": True}):
        net = load(saved(tensors), **options)
        np.testing.assert_allclose(jax.jit(net.logits)(x), want, rtol=1e-4, atol=1e-4)
        assert all(isinstance(p, jax.Array) and p.dtype == jnp.float32 for p in jax.tree.leaves(net.variables))


def test_the_tree_is_that_of_a_fresh_branch(tensors, saved):
    net = load(saved(tensors))
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    fresh = jax.eval_shape(lambda x: net.branch.init(jax.random.key(0), x, taps=(net.tap,), train=True), x)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, net.variables)


def preprocessed(files):
    """The central 87.5 % of the shorter side at 224×224, as the network was trained to see it."""
    images = [fit(decode_rgb(file.read_bytes()), 256)[16:240, 16:240] for file in files]
    return np.stack(images).astype(np.float32) / 127.5 - 1


def test_trained_mobilenet_knows_real_images(shared_data, record_property):
    synsets = wordnet.read_table()
    inner = {synset.parent for synset in synsets.values()}
    classes = sorted(wnid for wnid in synsets if wnid not in inner)
    assert len(classes) == 1000
    files = sorted((shared_data / "imagenet_sample").glob("*/*"))
    truth = np.array([classes.index(file.parent.name) + 1 for file in files])  # 0 is the background
    x = preprocessed(files)
    logits = {}
    for impl in ("shift", "xla"):
        net = load_mobilenet_v1(shared_data / "weights" / FILE, width=0.25, impl=impl)
        logits[impl] = np.asarray(jax.jit(net.logits)(x))
    np.testing.assert_allclose(logits["shift"], logits["xla"], atol=1e-4)
    ranked = np.argsort(-logits["shift"], 1)
    top1, top5 = (int((ranked[:, :k] == truth[:, None]).any(1).sum()) for k in (1, 5))
    record_property("trained", f"MobileNetV1-0.25-224: {top1} and {top5} of {len(files)} at top-1 and top-5")
    print(f"top-1 {top1}, top-5 {top5} of {len(files)}")
    # What numpy's forward pass gets; one image is the least difference that decoding and resizing can make.
    assert len(files) == 83 and abs(top1 - 48) <= 1 and abs(top5 - 67) <= 1
    # The file's own tensors in numpy, on a few of these images.
    want = numpy_mobilenet(read_tensors(shared_data / "weights" / FILE), x[:3])
    np.testing.assert_allclose(logits["shift"][:3], want, atol=1e-3)


def test_all_that_does_not_fit_is_told_at_once(tensors, saved):
    del tensors["MobilenetV1.Conv2d_0.weights"], tensors["MobilenetV1.MobilenetV1.Conv2d_5_depthwise.depthwise_bias"]
    tensors["global_step"] = np.zeros(())
    tensors["MobilenetV1.Conv2d_14_pointwise.weights"] = np.zeros((2, 1, 1, 3), np.float32)
    tensors["MobilenetV1.Conv2d_3_pointwise.weights"] = np.zeros((9, 1, 1, 32), np.float32)
    tensors["MobilenetV1.Conv2d_4_pointwise.weights"] = np.zeros((64, 3, 3, 32), np.float32)
    tensors["MobilenetV1.Conv2d_6_pointwise.weights"] = np.zeros((128, 1, 1, 64), np.uint8)
    tensors["MobilenetV1.MobilenetV1.Conv2d_7_depthwise.depthwise_bias"][3] = np.nan
    path = saved(tensors)
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"'{path}' as mobilenet_v1 of width 0.25: nothing was loaded. ")
    for says in (
        "2 missing: ",
        "'MobilenetV1.Conv2d_0.weights' for 'branch/params/stem/conv/kernel' (3, 3, 3, 8)",
        "depthwise_bias' for 'branch/params/stage3_block2/depthwise/bias' (64,)",
        "2 unexpected: ",
        "'global_step' ()",
        "'MobilenetV1.Conv2d_14_pointwise.weights' (2, 1, 1, 3)",
        "4 unfit: ",
        "'MobilenetV1.Conv2d_3_pointwise.weights' (9, 1, 1, 32) becomes (32, 9) "
        "for 'branch/params/stage2_block2/pointwise/dense/kernel' (32, 32)",
        "'MobilenetV1.Conv2d_4_pointwise.weights' (64, 3, 3, 32) is not ohwi->io for",
        "'MobilenetV1.Conv2d_6_pointwise.weights' (128, 1, 1, 64) is uint8, not floating, for",
        "depthwise_bias' (128,) holds values that are not finite",
    ):
        assert says in message, says


@pytest.mark.parametrize(
    "options, says",
    [({"classes": 8}, r"2 unfit: 'MobilenetV1.Logits.*\(256, 8\)"), ({"width": 0.5}, r"55 unfit: .*, …$")],
)
def test_another_network_than_that_of_the_file(tensors, saved, options, says):
    with pytest.raises(InputError, match=says):
        load(saved(tensors), **options)


def test_what_is_no_npz_file_is_refused(tmp_path, tensors, saved):
    whole = saved(tensors).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.zeros(2), b=np.array([{}], object))
    for name, content, says in (
        ("absent.npz", None, "absent.npz' cannot be read.*No such file"),
        ("text.npz", b"not an npz file", "text.npz' is no .npz file"),
        ("empty.npz", b"", "empty.npz' is no .npz file"),
        ("cut.npz", whole[: len(whole) // 2], "cut.npz' is no .npz file, or not the whole"),
        ("damaged.npz", bytes(damaged), "damaged.npz' cannot be read.*at 'MobilenetV1"),
        ("single.npy", None, "single.npy' is no .npz file"),
        ("objects.npz", None, "objects.npz' cannot be read.*at 'b'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=says):
            read_tensors(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder' cannot be read"):
        read_tensors(tmp_path / "folder")


def test_a_file_in_an_npz_that_is_no_array_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "mixed.npz", "w") as archive:
        archive.writestr("readme.txt", "weights")
    with pytest.raises(InputError, match="'readme.txt', which is no array"):
        read_tensors(tmp_path / "mixed.npz")


def test_rules_name_leaves_by_groups_and_leave_out_on_purpose():
    like = {
        "a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)},
        "b": {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)},
    }
    rules = [Rule(r"net\.(\w)\.weight", r"\1/kernel"), Rule(r"net\.counter", None)]
    tensors = {"net.a.weight": np.ones((2, 3)), "net.b.weight": np.arange(2, dtype=np.float16), "net.counter": np.array(3)}
    filled = fill(tensors, rules, like, source="toy")
    assert filled["a"]["kernel"].dtype == jnp.bfloat16 and filled["b"]["kernel"].tolist() == [0, 1]
    for more, says in (
        ({"net.c.weight": np.ones(2)}, "'net.c.weight' (2,), for a 'c/kernel' that the network does not have"),
        ({"other": np.ones(2)}, "1 unexpected: 'other' (2,)"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            fill(tensors | more, rules, like, source="toy")
    twice = [*rules, Rule(r"copy\.(\w)", r"\1/kernel")]
    with pytest.raises(InputError, match="'copy.b' is 'b/kernel', as 'net.b.weight' is"):
        fill(tensors | {"copy.b": np.ones(2)}, twice, like, source="toy")
    with pytest.raises(ValueError, match=r"'net.counter' is known to 2 rules"):
        fill(tensors, [*rules, Rule(r"net\.c.*", None)], like, source="toy")
