import io
import itertools
import zlib

import cv2
import numpy as np
import pytest

from mgjax import Taxonomy
from mgjax.data import ArraySource, DataConfig, DataError, eval_batches, load_dataset, train_batches
from mgjax.data.images import DecodeError, decode_rgb, fit
from mgjax.data.procedural import COUNTS, ProceduralSource, taxonomy
from mgjax.data.sources import Subset, in_memory, shuffled, split
from mgjax.data.tfds_source import TfdsSource
from mgjax.taxonomy import TaxonomyError

TREE = Taxonomy.from_names({"s": ["a", "b"], "c": ["a1", "a2", "b1"]}, {"c": [0, 0, 1]})


def encode(image, ending=".png"):
    return cv2.imencode(ending, image)[1].tobytes()


# ---------------------------------------------------------------------- images


def test_every_kind_of_png_becomes_rgb(rng):
    rgb = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_rgb(encode(rgb[..., ::-1])), rgb)
    grey = rgb[..., 0]
    np.testing.assert_array_equal(decode_rgb(encode(grey)), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(decode_rgb(encode(np.dstack([rgb[..., ::-1], grey]))), rgb)
    deep = decode_rgb(encode(grey.astype(np.uint16) * 257))
    assert deep.dtype == np.uint8 and deep.shape == (5, 7, 3)
    assert np.abs(deep[..., 0].astype(int) - grey).max() <= 1


def test_cmyk_jpeg_becomes_rgb():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(buffer, "JPEG")
    decoded = decode_rgb(buffer.getvalue())
    assert decoded.shape == (6, 8, 3)
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.parametrize("data", [b"", b"no image", encode(np.zeros((9, 9, 3), np.uint8))[:20]])
def test_bytes_that_are_no_image(data):
    with pytest.raises(DecodeError, match="do not decode"):
        decode_rgb(data)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (8, 8), (1, 1), (3, 400)])
def test_fit_gives_a_square(shape, rng):
    assert fit(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), 16).shape == (16, 16, 3)


def test_fit_keeps_the_centre():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255
    assert (fit(image, 8) == 255).all()


# ---------------------------------------------------------------------- procedural


def test_procedural_is_balanced_deterministic_and_consistent():
    source, tree = ProceduralSource("validation"), taxonomy()
    assert [tree.size(l) for l in tree.levels] == [4, 12, 36] and min(COUNTS.values()) >= 2000
    every = source.take(np.arange(len(source)))
    for level in tree.levels:
        counts = np.bincount(every[level], minlength=tree.size(level))
        assert counts.max() == counts.min()
        np.testing.assert_array_equal(tree.lift(every["texture"], "texture", level), every[level])
    some = np.array([7, 2000, 3])
    again = ProceduralSource("validation").take(some)
    for key, value in again.items():
        np.testing.assert_array_equal(value, every[key][some])


def test_procedural_splits_and_seeds_share_no_image():
    images = [
        ProceduralSource(s, seed).take(np.arange(72))["image"].reshape(72, -1) for s, seed in itertools.product(COUNTS, (0, 1))
    ]
    hashes = [zlib.crc32(row.tobytes()) for split_ in images for row in split_]
    assert len(set(hashes)) == len(hashes)


def test_procedural_boxes_hold_the_masks_tightly():
    example = ProceduralSource("test").take(np.arange(144))
    for box, mask in zip(example["box"].astype(int), example["mask"]):
        inside = mask[box[0] : box[2], box[1] : box[3]]
        assert inside.sum() == mask.sum() > 30
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_a_quarter_resolution_view_sees_no_texture():
    """Means over 4 × 4 pixels differ between textures by no more than noise does."""
    example = ProceduralSource("train").take(np.arange(3600))
    small = example["image"].reshape(-1, 8, 4, 8, 4, 3).mean((2, 4))
    contrast = small.std((1, 2, 3))
    style = example["texture"] % 3
    means = [contrast[style == i].mean() for i in range(3)]
    assert np.ptp(means) < 3 * contrast.std() / np.sqrt(1200)
    steps = np.abs(np.diff(example["image"].astype(int), axis=1)).mean((1, 2, 3))
    assert steps[style == 0].mean() > 1.1 * steps[style == 1].mean()


# ---------------------------------------------------------------------- pipeline


def array_source(n=10, labels=None):
    c = np.arange(n) % 3 if labels is None else np.asarray(labels)
    image = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 2, 3))
    return ArraySource({"image": image, "s": TREE.parents[1][c % 3], "c": c}, "toy")


def indices(batches):
    return np.concatenate([b.index for b in batches])


def test_each_epoch_is_a_permutation_of_its_own():
    order = shuffled(10, seed=3)
    epochs = [[order[e * 10 + i] for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [shuffled(10, 4)[i] for i in range(10)] != epochs[0]


def test_one_integer_is_the_whole_position():
    make = lambda size, seen, steps: train_batches(
        array_source(), TREE, batch_size=size, seed=0, examples_seen=seen, steps=steps
    )
    whole = indices(make(4, 0, 9))
    np.testing.assert_array_equal(indices(make(4, 16, 5)), whole[16:])
    # The batch size may change at any position.
    np.testing.assert_array_equal(np.r_[indices(make(2, 0, 3)), indices(make(6, 6, 5))], whole)


def test_processes_share_a_batch():
    make = lambda p, n: train_batches(
        array_source(), TREE, batch_size=4, seed=0, examples_seen=4, steps=3, process=p, processes=n
    )
    whole = list(make(0, 1))
    for a, b, both in zip(make(0, 2), make(1, 2), whole):
        np.testing.assert_array_equal(np.r_[a.index, b.index], both.index)
        np.testing.assert_array_equal(np.r_[a.inputs["image"], b.inputs["image"]], both.inputs["image"])
    with pytest.raises(DataError, match="batch of 4 cannot be divided among 3"):
        make(0, 3)


@pytest.mark.parametrize("size, processes", [(4, 1), (4, 2), (16, 4), (5, 1)])
def test_evaluation_sees_every_example_once_and_pads(size, processes):
    parts = [
        list(eval_batches(array_source(), TREE, batch_size=size, process=p, processes=processes)) for p in range(processes)
    ]
    assert len({len(p) for p in parts}) == 1
    batches = [b for p in parts for b in p]
    assert {b.size for b in batches} == {size // processes}
    seen = np.concatenate([b.index[b.mask] for b in batches])
    assert sorted(seen) == list(range(10))
    for b in batches:
        assert (b.index[~b.mask] == -1).all() and (b.targets["c"][~b.mask] == -1).all()
        np.testing.assert_array_equal(b.inputs["image"][b.mask, 0, 0, 0], b.index[b.mask])


def test_a_label_outside_the_taxonomy_is_an_error():
    batches = eval_batches(array_source(4, [0, 1, 9, 2]), TREE, batch_size=4)
    with pytest.raises(TaxonomyError, match=r"label 9 at position 2.*toy.*'c'.*3 labels"):
        next(batches)


def test_split_is_deterministic_and_complete():
    source = array_source(100)
    rest, chosen = split(source, 20, seed=1)
    again = split(array_source(100), 20, seed=1)[1]
    np.testing.assert_array_equal(chosen.indices, again.indices)
    assert sorted(np.r_[rest.indices, chosen.indices]) == list(range(100)) and len(chosen) == 20
    assert set(split(source, 20, seed=2)[1].indices) != set(chosen.indices)
    for count in (0, 100):
        with pytest.raises(DataError, match="one side would be empty"):
            split(source, count)


def test_sources():
    with pytest.raises(DataError, match="one length"):
        ArraySource({"a": np.zeros(2), "b": np.zeros(3)})
    some = Subset(array_source(), np.array([5, 7]), "some")
    assert some.take(np.array([1]))["c"] == 7 % 3
    read = in_memory(array_source(), chunk=3)
    np.testing.assert_array_equal(read.take(np.arange(10))["image"], array_source().take(np.arange(10))["image"])


# ---------------------------------------------------------------------- TFDS


def records(*images):
    return [{"image": image, "label": i % 3} for i, image in enumerate(images)]


GOOD = encode(np.full((4, 4, 3), 9, np.uint8))


def test_an_undecodable_image_is_named():
    source = TfdsSource(records(GOOD, b"broken", GOOD), {"c": "label"}, "tfds:toy train", None, "error")
    with pytest.raises(DataError, match=r"tfds:toy train: the image of example 1 .*on_error=mask"):
        source.take(np.arange(3))


def test_an_undecodable_image_is_masked_and_counted(caplog):
    source = TfdsSource(records(GOOD, b"broken", GOOD), {"c": "label"}, "tfds:toy train", None, "mask")
    got = source.take(np.arange(3))
    assert got["valid"].tolist() == [True, False, True] and list(source.bad) == [1]
    assert "example 1 is masked, 1 so far" in caplog.text
    source.take(np.arange(3))
    assert len(source.bad) == 1
    memory = in_memory(TfdsSource(records(GOOD, b"x"), {"c": "label", "s": "label"}, "toy", None, "mask"))
    memory.arrays["s"] = np.zeros(2, np.int32)
    batch = next(eval_batches(memory, TREE, batch_size=2))
    assert batch.mask.tolist() == [True, False] and batch.targets["c"].tolist() == [0, -1]
    # Batch statistics see a valid image in its place.
    np.testing.assert_array_equal(batch.inputs["image"][1], batch.inputs["image"][0])


def test_a_bad_first_image_does_not_decide_the_size():
    first_bad = TfdsSource(records(b"x", GOOD), {"c": "label"}, "toy", None, "mask")
    assert first_bad.take(np.arange(1))["image"].shape == (1, 4, 4, 3)
    assert in_memory(first_bad, chunk=1).arrays["image"].shape == (2, 4, 4, 3)
    with pytest.raises(DataError, match="none of its 1 images decodes"):
        TfdsSource(records(b"x"), {"c": "label"}, "toy", None, "mask").take(np.arange(1))


def test_images_of_several_sizes_need_one_size():
    wide = encode(np.zeros((4, 9, 3), np.uint8))
    with pytest.raises(DataError, match="data.image_size"):
        TfdsSource(records(GOOD, wide), {"c": "label"}, "toy", None, "error").take(np.arange(2))
    fitted = TfdsSource(records(GOOD, wide), {"c": "label"}, "toy", 8, "error").take(np.arange(2))
    assert fitted["image"].shape == (2, 8, 8, 3)


def test_cifar100_is_read_without_tensorflow(shared_data):
    import sys

    data = load_dataset(DataConfig(source="tfds:cifar100", dir=str(shared_data / "tfds"), limit=640))
    assert "tensorflow" not in sys.modules
    assert data.taxonomy.levels == ("superclass", "class") and data.taxonomy.size("superclass") == 20
    assert data.taxonomy.names[0][data.taxonomy.parents[1][data.taxonomy.names[1].index("wolf")]] == "large_carnivores"
    assert (len(data.train), len(data.validation), len(data.test)) == (608, 32, 640)
    np.testing.assert_allclose(np.array(data.mean) / 255, [0.507, 0.487, 0.441], atol=0.03)
    batch = next(train_batches(data.train, data.taxonomy, batch_size=64, seed=0, examples_seen=0, steps=1))
    assert batch.inputs["image"].shape == (64, 32, 32, 3)
    lifted = data.taxonomy.lift(batch.targets["class"], "class", "superclass")
    np.testing.assert_array_equal(lifted, batch.targets["superclass"])


def test_a_dataset_of_one_level(shared_data):
    data = load_dataset(DataConfig(source="tfds:mnist", dir=str(shared_data / "tfds"), limit=100, image_size=32))
    assert data.taxonomy.levels == ("class",) and data.image_shape == (32, 32, 3)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"source": "imagnet"}, "no dataset 'imagnet'"),
        ({"source": "tfds:"}, "no dataset"),
        (
            {"source": "tfds:cifar100", "dir": "/no/such"},
            r"no directory '/no/such'; name the folder.*once: python -m mgjax.data.prepare cifar100 --data_dir /no/such",
        ),
        ({"on_error": "ignore"}, "on_error"),
        ({"limit": -1}, "data.limit is -1"),
        ({"levels": ("form",)}, "do not apply"),
    ],
)
def test_unknown_and_missing_datasets(changes, says):
    with pytest.raises(DataError, match=says):
        load_dataset(DataConfig(**changes))


def test_tfrecords_have_no_random_access(shared_data, tmp_path):
    """A dataset that was prepared in TFDS's other format is refused with the command that mends it."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (shared_data / "tfds" / "mnist" / "3.0.1").glob("*.json"):
        (folder / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"not in the array_record format.*python -m mgjax.data.prepare mnist"):
        load_dataset(DataConfig(source="tfds:mnist", dir=str(tmp_path)))


def test_a_folder_without_the_dataset(shared_data):
    with pytest.raises(DataError, match=r"holds \['cifar100', 'mnist'\], not 'imagenet2012'; name the folder"):
        load_dataset(DataConfig(source="tfds:imagenet2012", dir=str(shared_data / "tfds")))


def test_levels_that_are_no_labels(shared_data):
    with pytest.raises(TaxonomyError, match="no ClassLabel feature.*genus"):
        load_dataset(DataConfig(source="tfds:cifar100", dir=str(shared_data / "tfds"), levels=("genus",)))


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0])
def test_a_validation_share_that_leaves_nothing(shared_data, share):
    with pytest.raises(DataError, match="data.validation"):
        load_dataset(DataConfig(source="tfds:mnist", dir=str(shared_data / "tfds"), limit=50, validation=share))


def test_an_empty_split(monkeypatch):
    monkeypatch.setitem(COUNTS, "test", 0)
    with pytest.raises(DataError, match="procedural test is empty"):
        load_dataset(DataConfig())
