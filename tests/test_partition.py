"""Which granularity learns from which example, and labels that are partly missing."""

import csv
import dataclasses
import itertools

import cv2
import jax
import numpy as np
import pytest

from mgjax import Cluster, Column, Everyone, Granularity, Resolution, Subtree, Taxonomy
from mgjax.data import ArraySource, Crop, DataConfig, DataError, FileSource, Subset, load_dataset, membership
from mgjax.data import train_batches as make_batches
from mgjax.data.datasets import _cached
from mgjax.data.procedural import ProceduralSource
from mgjax.data.sources import Unlabelled, base_of, in_memory, partly_labelled
from mgjax.data.tfds_source import TfdsSource
from mgjax.errors import InputError
from mgjax.taxonomy import TaxonomyError

TREE = Taxonomy.from_names({"s": ["a", "b"], "c": ["a1", "a2", "b1"]}, {"c": [0, 0, 1]})
FINEST = [0, 1, 2, 2, -1, 0, 2, -1, 2, 2]
COARSE = [0, -1, 1, 1, 0, 0, 1, -1, 1, 1]


def toy(**arrays):
    """Ten examples; 1 is known at the finer level alone, 4 at the coarser alone, 7 at neither."""
    image = np.broadcast_to(np.arange(10, dtype=np.uint8)[:, None, None, None], (10, 4, 6, 3))
    return ArraySource({"image": image, "s": np.array(COARSE), "c": np.array(FINEST)} | arrays, "toy")


def weigh(source, members=Everyone(), weighted_by="none", tree=TREE):
    return membership(Granularity("some", "trunk", "stage1", members=members, weighted_by=weighted_by), source, tree)


def chosen(source, members, tree=TREE):
    """The members, of which each counts 1."""
    table = weigh(source, members, tree=tree)
    assert table.dtype == np.float32 and table.shape == (len(source),) and set(table.tolist()) <= {0.0, 1.0}
    return np.flatnonzero(table).tolist()


# ---------------------------------------------------------------------- who is a member


def test_everyone_needs_no_table():
    assert weigh(toy()) is None and weigh(toy(), weighted_by="loss") is None


def test_a_subtree_lifts_finer_labels():
    assert chosen(toy(), Subtree("s", ("a",))) == [0, 1, 4, 5]
    assert chosen(toy(), Subtree("s", ("a", "b"))) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert chosen(toy(), Subtree("c", ("a2", "a1"))) == [0, 1, 5]
    some = Subset(Subset(toy(), np.arange(10)[::-1], "back"), np.array([9, 0, 5, 8]), "some")  # examples 0, 9, 4, 1
    assert chosen(some, Subtree("s", ("a",))) == [0, 2, 3]
    only_fine = ArraySource({"c": np.array(FINEST)})
    assert chosen(only_fine, Subtree("s", ("a",))) == [0, 1, 5]
    assert chosen(in_memory(toy(), chunk=3), Subtree("s", ("a",))) == [0, 1, 4, 5]


def test_of_encoded_images_none_is_decoded():
    """Neither for labels nor for what else is known: these do not decode."""
    records = [{"image": b"broken", "fine": label} for label in FINEST]
    tfds = TfdsSource(records, {"s": "fine", "c": "fine"}, "tfds:toy", 8, "error", {"s": np.array([0, 0, 1])})
    assert chosen(tfds, Subtree("s", ("a",))) == [0, 1, 5]
    assert chosen(Unlabelled(tfds, "c", np.arange(10) < 6), Subtree("c", ("b1",))) == [6, 8, 9]


@pytest.mark.parametrize(
    "held, values, expected",
    [
        (np.array([3, 1, 2, 3, 1, 2, 3, 1, 2, 3]), (3, 1), [0, 1, 3, 4, 6, 7, 9]),
        (np.array([3, 1, 2, 3, 1, 2, 3, 1, 2, 3], np.uint8), (2.0, 300, -1), [2, 5, 8]),
        (np.float32([0.1, 0.2] * 5), (0.1,), [0, 2, 4, 6, 8]),
        (np.arange(10) < 3, (True,), [0, 1, 2]),
        (np.array(["y", "x", "X", "x "] + ["y"] * 6), ("x",), [1]),
        (np.array([b"x", b"y"] * 5), ("y",), [1, 3, 5, 7, 9]),
        (np.array(["1", "1.0", "true", "False", "", "no", "nan", "-", "2e0", "2"], object), (2, False), [3, 8, 9]),
    ],
)
def test_a_column_by_its_values(held, values, expected):
    assert chosen(toy(note=held), Column("note", values)) == expected
    assert chosen(Subset(toy(note=held), np.arange(1, 10), "rest"), Column("note", values)) == [i - 1 for i in expected if i]


def test_of_any_other_source_examples_are_read():
    class Counted:
        name = "counted"

        def __len__(self):
            return 2500

        def take(self, indices):
            return {"number": indices, "valid": np.ones(len(indices), bool)}

    assert chosen(Counted(), Column("number", (3, 2400))) == [3, 2400]
    with pytest.raises(DataError, match="'some': counted has no column 'other'"):
        weigh(Counted(), Column("other", (3,)))
    with pytest.raises(DataError, match="'some': counted does not tell how large its images were"):
        weigh(Counted(), Resolution(1))
    with pytest.raises(DataError, match="counted holds no images to cluster"):
        weigh(Counted(), Cluster(2, 0))


def blobs(rng, sizes=(7, 20, 3), side=16):
    """Images of three colours, so many of each, in random order; and who is of which."""
    of = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    image = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])[of][:, None, None] + rng.integers(
        -20, 20, (len(of), side, side, 3)
    )
    return of, image.astype(np.uint8)


def test_clusters_of_the_images_from_large_to_small(rng):
    of, image = blobs(rng)
    source = ArraySource({"image": image}, "colours")
    for index, blob in enumerate([1, 0, 2]):
        assert chosen(source, Cluster(3, index)) == np.flatnonzero(of == blob).tolist()
        assert chosen(source, Cluster(3, index, seed=5)) == np.flatnonzero(of == blob).tolist()
    some = np.flatnonzero(of != 1)
    assert chosen(Subset(source, some, "some"), Cluster(2, 0)) == np.flatnonzero(of[some] == 0).tolist()
    assert chosen(source, Cluster(1, 0)) == list(range(30))
    # Where nothing is clear, the seed decides, and always alike.
    noise = ArraySource({"image": rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)}, "noise")
    drawn = [[chosen(noise, Cluster(4, i, seed=seed)) for i in range(4)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(itertools.chain(*drawn[0])) == list(range(60))
    assert [len(c) for c in drawn[0]] == sorted((len(c) for c in drawn[0]), reverse=True)


def test_clusters_that_are_as_large_stand_as_their_first_examples_do():
    source = ArraySource({"image": np.float32([[5], [0], [0], [5]])}, "rows")
    for seed in range(4):
        assert [chosen(source, Cluster(2, i, seed=seed)) for i in (0, 1)] == [[0, 3], [1, 2]]


def test_detail_below_an_eighth_of_the_image_is_not_clustered():
    """Stripes of one pixel average out; a bright half does not."""
    image = np.zeros((8, 32, 32, 3), np.uint8)
    image[:4, ::2], image[4:, :, ::2] = 200, 200
    image[::2, :, :16] //= 2
    assert chosen(ArraySource({"image": image}), Cluster(2, 0)) == [0, 2, 4, 6]


def test_an_image_that_could_not_be_read_is_in_no_cluster(rng):
    of, image = blobs(rng)
    valid = np.arange(30) % 5 > 0
    image[~valid] = 0
    source = ArraySource({"image": image, "valid": valid}, "colours")
    members = [chosen(source, Cluster(3, index)) for index in range(3)]
    assert sorted(itertools.chain(*members)) == np.flatnonzero(valid).tolist()
    assert {tuple(np.flatnonzero((of == b) & valid).tolist()) for b in range(3)} == set(map(tuple, members))


def test_clusters_of_feature_vectors(tmp_path, rng):
    of = rng.permutation(np.repeat([0, 1], [4, 6]))
    path = tmp_path / "features.npy"
    np.save(path, np.eye(5)[of] + rng.normal(0, 0.01, (10, 5)))
    for index, blob in enumerate([1, 0]):
        assert chosen(toy(), Cluster(2, index, str(path))) == np.flatnonzero(of == blob).tolist()
    for array, says in (
        (np.zeros((9, 5)), "feature vectors of 9 examples, but toy has 10"),
        (np.zeros(10), r"no array of numbers \[examples, D\]"),
        (np.full((10, 2), np.nan), "feature vectors that are not finite"),
        (np.array([["a"]] * 10), "no array of numbers"),
    ):
        np.save(path, array)
        with pytest.raises(DataError, match=f"granularity 'some': '.*features.npy' holds {says}"):
            weigh(toy(), Cluster(2, 0, str(path)))
    path.write_text("no array")
    with pytest.raises(DataError, match=r"features.npy' cannot be read \(.*\): save an array by numpy.save"):
        weigh(toy(), Cluster(2, 0, str(path)))
    with pytest.raises(DataError, match="none.npy' cannot be read"):
        weigh(toy(), Cluster(2, 0, str(tmp_path / "none.npy")))


def test_too_few_examples_for_the_clusters():
    same = ArraySource({"image": np.repeat(np.uint8([[[[9]]], [[[8]]]]), 5, 0)}, "same")
    assert chosen(same, Cluster(2, 0)) == [0, 1, 2, 3, 4]
    with pytest.raises(
        DataError, match="granularity 'some': the 10 examples of same do not fall into 3 clusters: ask for fewer"
    ):
        weigh(same, Cluster(3, 0))
    with pytest.raises(DataError, match="the 0 examples of"):
        weigh(ArraySource({"image": np.zeros((2, 1)), "valid": np.zeros(2, bool)}), Cluster(1, 0))


# ---------------------------------------------------------------------- resolution


SHAPES = [(24, 40), (50, 30), (64, 64), (300, 20), (31, 32)]


def picture(shape):
    return np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files of several sizes and formats, in the order of `SHAPES`, as a source and a dataset."""
    root = tmp_path_factory.mktemp("files")
    names = [f"{i}{ending}" for i, ending in enumerate((".png", ".jpg", ".webp", ".jpg", ".bmp"))]
    for name, shape in zip(names, SHAPES):
        (root / name).write_bytes(cv2.imencode(name[1:], picture(shape))[1].tobytes())
    labels = {"s": np.int32([0, 0, 0, 1, 1]), "c": np.int32([0, 1, 1, 2, 2])}
    return FileSource(root, names, labels, "files", 16, "error", {"place": np.array(["x", "y", "x", "y", "y"])})


@pytest.mark.parametrize("hold", [lambda s: s, in_memory], ids=["files", "in memory"])
def test_the_resolution_is_that_of_the_file(files, hold):
    source = hold(files)
    assert source.take(np.arange(5))["image"].shape == (5, 16, 16, 3)
    assert chosen(source, Resolution(30)) == [1, 2, 4]
    assert chosen(source, Resolution(high=24)) == [3]
    assert chosen(source, Resolution(24, 31)) == [0, 1]
    assert chosen(source, Resolution(20, 64)) == [0, 1, 3, 4]
    part = Subset(Unlabelled(source, "c", np.arange(5) == 0), np.array([4, 3, 2]), "part")
    assert chosen(part, Resolution(30)) == [0, 2]
    assert chosen(hold(part), Resolution(30)) == [0, 2]


def test_only_the_head_of_a_file_is_read(tmp_path):
    """Unless what says the size stands far behind, as after a large profile of colours; neither of these would decode."""
    data = cv2.imencode(".jpg", picture((20, 30)))[1].tobytes()
    comment = b"\xff\xfe" + (60_000).to_bytes(2) + bytes(59_998)
    (tmp_path / "far.jpg").write_bytes(data[:2] + 2 * comment + data[2:-20])
    (tmp_path / "cut.png").write_bytes(cv2.imencode(".png", picture((40, 50)))[1].tobytes()[:24])
    source = FileSource(tmp_path, ["far.jpg", "cut.png"], {}, "cut", 8, "error")
    assert source.sides(np.array([1, 0, 1])).tolist() == [40, 20, 40]


def test_a_file_that_cannot_be_read_has_no_resolution(tmp_path, caplog):
    (tmp_path / "0.png").write_bytes(cv2.imencode(".png", picture((9, 9)))[1].tobytes())
    (tmp_path / "1.png").write_bytes(b"broken")
    make = lambda on_error: FileSource(tmp_path, ["0.png", "1.png", "2.png"], {}, "toy", 8, on_error)
    assert chosen(make("mask"), Resolution(0)) == [0]
    assert "example 1 ('1.png') is masked" in caplog.text and "example 2 ('2.png') is masked" in caplog.text
    with pytest.raises(DataError, match=r"'some': toy: the image of example 1 \('1.png'\) does not decode .*on_error=mask"):
        weigh(make("error"), Resolution(0))


def test_arrays_are_as_large_as_they_are():
    assert chosen(toy(), Resolution(4, 5)) == list(range(10))
    with pytest.raises(DataError, match=r"'some' learns from no example of toy: none is a member of Resolution\(low=5"):
        weigh(toy(), Resolution(5))
    tfds = TfdsSource(
        [{"image": cv2.imencode(".png", picture(s))[1].tobytes(), "c": 0} for s in SHAPES], {"c": "c"}, "t", 8, "error"
    )
    assert chosen(tfds, Resolution(31)) == [2, 4]


@pytest.mark.parametrize("crop", ["device", "host"])
@pytest.mark.parametrize("gigabytes", [4.0, 0.0])
def test_columns_and_sizes_of_a_loaded_table(tmp_path, crop, gigabytes):
    """In memory, behind the splits; a column of a table that is no level is there for members."""
    rows = [(f"{i}.png", "ab"[i % 2], str(i % 3), "p" if i < 12 else "q", "test" if i % 4 == 0 else "train") for i in range(24)]
    for i, (name, *_) in enumerate(rows):
        (tmp_path / name).write_bytes(cv2.imencode(".png", picture((10 + i, 40)))[1].tobytes())
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "class", "rank", "where", "split"), *rows])
    data = load_dataset(
        DataConfig(
            source=f"csv:{tmp_path / 't.csv'}", levels=("class",), image_size=8, crop=crop, cache_gb=gigabytes, labelled=0.5
        )
    )
    assert isinstance(base_of(data.train), ArraySource if crop == "device" and gigabytes else FileSource)
    example = data.train.take(np.arange(len(data.train)))
    assert set(example) == {"image", "valid", "class"}
    which = [int(path.removesuffix(".png")) for path in _paths(data.train)]
    assert len(which) == 17 and all(i % 4 for i in which)
    at = lambda members: [which[i] for i in chosen(data.train, members, data.taxonomy)]
    assert at(Column("where", ("q",))) == [i for i in which if i >= 12]
    assert at(Column("rank", (0, 2))) == at(Column("rank", ("0", "2"))) == [i for i in which if i % 3 != 1]
    assert at(Resolution(15, 25)) == [i for i in which if 5 <= i < 15]
    left = [i for i, label in zip(which, example["class"]) if label == 0]
    assert at(Subtree("class", ("a",))) == left and 0 < len(left) < 6 and all(i % 2 == 0 for i in left)


def _paths(source):
    """Of the files, through whatever stands before them."""
    at = np.arange(len(source))
    while not isinstance(source, FileSource):
        if isinstance(source, Subset):
            at = source.indices[at]
        source = source.origin if isinstance(source, ArraySource) else source.source
    return [source.paths[i] for i in at]


# ---------------------------------------------------------------------- weights of examples


def test_classes_count_alike():
    table = weigh(toy(), weighted_by="class")  # 2 of a1, 1 of a2, 5 of b1, 2 unknown
    expected = {0: 8 / (3 * 2), 1: 8 / 3, 2: 8 / (3 * 5), -1: 1.0}
    np.testing.assert_allclose(table, [expected[label] for label in FINEST], rtol=1e-6)
    np.testing.assert_allclose(table.mean(), 1, rtol=1e-6)
    table = weigh(toy(), Subtree("s", ("a",)), "class")  # members 0, 1, 4, 5; a1 a2 ? a1
    np.testing.assert_allclose(table, [0.75, 1.5, 0, 0, 1, 0.75, 0, 0, 0, 0], rtol=1e-6)
    some = weigh(Subset(toy(), np.array([2, 0, 3]), "some"), weighted_by="class")
    np.testing.assert_allclose(some, [0.75, 1.5, 0.75], rtol=1e-6)
    unknown = weigh(ArraySource({"c": np.full(3, -1), "s": np.full(3, 0)}), weighted_by="class")
    assert unknown.tolist() == [1, 1, 1]


# ---------------------------------------------------------------------- bad declarations


@pytest.mark.parametrize(
    "members, says",
    [
        (Subtree("s", ("c",)), "granularity 'some': there is no 'c' at level 's'; the nearest are"),
        (
            Subtree("s", ()),
            r"granularity 'some' learns from no example of toy: none is a member of Subtree\(level='s', names=\(\)\)",
        ),
        (Subtree("x", ("a",)), "no level 'x'; the taxonomy has"),
        (Column("note", (1,)), "granularity 'some': toy has no column 'note'"),
        (Column("s", ("a",)), r"granularity 'some': a column of numbers \(int64\) holds no 'a'"),
        (Column("s", (7,)), r"'some' learns from no example of toy: none is a member of Column\(key='s', values=\(7,\)\)"),
        (Column("s", ()), "'some' learns from no example"),
        (Column("image", (1,)), r"toy holds arrays of shape \(4, 6, 3\) in 'image'"),
        ("everyone", "'everyone' says nothing of who is a member"),
    ],
)
def test_declarations_that_do_not_fit(members, says):
    with pytest.raises(InputError, match=says):
        weigh(toy(), members)


def test_labels_that_are_not_there_or_outside():
    with pytest.raises(DataError, match="arrays has no labels of level 's' or a finer one"):
        weigh(ArraySource({"image": np.zeros((2, 4))}), Subtree("s", ("a",)))
    with pytest.raises(TaxonomyError, match="label 3 at position 1"):
        weigh(ArraySource({"c": np.array([0, 3])}), weighted_by="class")


# ---------------------------------------------------------------------- batches


def batches(source, weights, **changes):
    settings = dict(batch_size=4, seed=0, examples_seen=0, steps=6, weights=weights) | changes
    return make_batches(source, TREE, **settings)


def rows(found):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


TABLES = {"fine": np.arange(10.0), "coarse": np.arange(10) % 2 == 0}


def test_weights_stand_in_the_rows_of_their_examples():
    """Across the ends of batches and of epochs."""
    found = list(batches(toy(), TABLES))
    assert all(b.weights["fine"].dtype == b.weights["coarse"].dtype == np.float32 for b in found)
    whole = rows(found)
    assert set(whole.weights) == {"fine", "coarse"} and sorted(whole.index[:10]) == list(range(10))
    np.testing.assert_array_equal(whole.weights["fine"], whole.index)
    np.testing.assert_array_equal(whole.weights["coarse"], whole.index % 2 == 0)
    np.testing.assert_array_equal(whole.inputs["image"][:, 0, 0, 0], whole.weights["fine"])
    later = rows(batches(toy(), TABLES, batch_size=2, examples_seen=6, steps=3))
    np.testing.assert_array_equal(later.weights["fine"], whole.weights["fine"][6:12])
    parts = [list(batches(toy(), TABLES, process=p, processes=2)) for p in range(2)]
    together = [rows([a, b]) for a, b in zip(*parts)]
    np.testing.assert_array_equal(rows(together).weights["fine"], whole.weights["fine"])
    some = rows(batches(Subset(toy(), np.array([7, 2, 5]), "some"), {"fine": np.array([0.5, 2, 3])}))
    np.testing.assert_array_equal(some.weights["fine"], np.float32([0.5, 2, 3])[some.index])


def test_without_tables_a_batch_has_no_weights():
    assert next(batches(toy(), None)).weights == next(batches(toy(), {})).weights == {}


def test_a_masked_row_has_no_weight():
    valid = np.arange(10) % 3 > 0
    found = rows(batches(toy(valid=valid), {"fine": np.full(10, 2.0)}))
    np.testing.assert_array_equal(found.mask, valid[found.index])
    np.testing.assert_array_equal(found.weights["fine"], np.where(valid[found.index], 2, 0))


@pytest.mark.parametrize(
    "table, says",
    [
        (np.ones(9), r"toy has 10 examples, but the weights of granularity 'fine' are of shape \(9,\)"),
        (np.ones((10, 1)), r"are of shape \(10, 1\)"),
        (-np.ones(10), "a weight of granularity 'fine' is below 0 or not finite"),
        (np.full(10, np.nan), "below 0 or not finite"),
    ],
)
def test_tables_that_do_not_fit(table, says):
    with pytest.raises(DataError, match=says):
        batches(toy(), {"fine": table})


def test_workers_carry_weights_and_missing_labels(files):
    """Real processes; what they are sent is pickled."""
    source = Unlabelled(files, "c", np.array([True, False, False, True, False]))
    weights = {"fine": weigh(source, Column("place", ("y",)), "class")}
    make = lambda workers: rows(batches(source, weights, steps=5, workers=workers, crop=Crop(8)))
    here, there = make(0), make(2)
    jax.tree.map(np.testing.assert_array_equal, there, here)
    np.testing.assert_array_equal(here.weights["fine"], weights["fine"][here.index])
    np.testing.assert_array_equal(here.targets["c"], np.array([-1, 1, 1, -1, 2])[here.index])
    np.testing.assert_array_equal(here.targets["s"], np.array([0, 0, 0, 1, 1])[here.index])
    assert here.inputs["image"].shape == (20, 8, 8, 3)


# ---------------------------------------------------------------------- labels that are partly missing


LIMIT = 240  # examples of each split


@pytest.fixture(scope="module")
def procedural():
    """(share, what becomes of the others, seed) → dataset."""
    made = {}

    def make(labelled=1.0, unlabelled="keep", seed=0):
        key = (labelled, unlabelled, seed)
        if key not in made:
            made[key] = load_dataset(DataConfig(limit=LIMIT, labelled=labelled, unlabelled=unlabelled, seed=seed))
        return made[key]

    return make


def take(source):
    return source.take(np.arange(len(source)))


@pytest.mark.parametrize("share, count", [(0.5, 120), (0.1, 24), (0.26, 62), (1e-6, 1)])
def test_a_share_keeps_its_finest_label(procedural, share, count):
    whole, kept, dropped = procedural(), procedural(share), procedural(share, "drop")
    assert (len(whole.train), len(kept.train), len(dropped.train)) == (LIMIT, LIMIT, count)
    before, after, left = (take(d.train) for d in (whole, kept, dropped))
    known = after["texture"] >= 0
    assert known.sum() == count and after["texture"].dtype == np.int32
    np.testing.assert_array_equal(after["texture"][known], before["texture"][known])
    for key in ("form", "part", "image", "box"):
        np.testing.assert_array_equal(after[key], before[key])
    for key in before:  # dropped are those that would have lost it
        np.testing.assert_array_equal(left[key], before[key][known])
    for split in ("validation", "test"):
        for data in (kept, dropped):
            jax.tree.map(np.testing.assert_array_equal, take(getattr(data, split)), take(getattr(whole, split)))
    assert kept.mean == dropped.mean == whole.mean and kept.std == whole.std


def test_who_keeps_it_depends_on_the_seed_alone(procedural):
    known = lambda *of: set(np.flatnonzero(take(procedural(*of).train)["texture"] >= 0).tolist())
    assert known(0.1) < known(0.26) < known(0.5)
    assert known(0.5, "keep", 1) != known(0.5)
    plain = DataConfig(limit=LIMIT, labelled=0.5)
    for changes in ({"cache_gb": 0.0}, {"workers": 2}, {"on_error": "mask"}):
        train = load_dataset(dataclasses.replace(plain, **changes)).train
        assert set(np.flatnonzero(take(train)["texture"] >= 0).tolist()) == known(0.5)


def test_the_order_of_training_is_unchanged_and_knows_nothing_of_it(procedural):
    make = lambda data: rows(make_batches(data.train, data.taxonomy, batch_size=20, seed=0, examples_seen=0, steps=LIMIT // 20))
    whole, half = make(procedural()), make(procedural(0.5))
    np.testing.assert_array_equal(half.index, whole.index)
    np.testing.assert_array_equal(half.inputs["image"], whole.inputs["image"])
    known = half.targets["texture"] >= 0
    assert known.sum() == 120
    # Were both of one draw, the labelled would come first in the first epoch.
    assert 40 <= known[:120].sum() <= 80
    np.testing.assert_array_equal(known, take(procedural(0.5).train)["texture"][whole.index] >= 0)


def test_one_level_may_lose_labels_too():
    source = ArraySource({"c": np.arange(10)})
    assert (take(partly_labelled(source, "c", 0.45, 0))["c"] >= 0).sum() == 4
    assert partly_labelled(source, "c", 1.0, 0) is source and partly_labelled(source, "c", 0.99, 0) is source
    small = ArraySource({"c": np.arange(4, dtype=np.uint8)})
    assert sorted(take(partly_labelled(small, "c", 0.5, 0))["c"].tolist())[:2] == [-1, -1]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labelled": 0.0}, r"data.labelled is a share in \(0, 1\], not 0.0"),
        ({"labelled": 1.5}, "not 1.5"),
        ({"labelled": float("nan")}, "not nan"),
        ({"unlabelled": "forget"}, "data.unlabelled is 'keep' or 'drop', not 'forget'"),
    ],
)
def test_shares_that_are_none(changes, says):
    with pytest.raises(DataError, match=says):
        load_dataset(DataConfig(limit=20, **changes))


def test_examples_in_memory_are_not_copied_again():
    some = Subset(toy(), np.arange(3), "some")
    assert _cached(some, (4, 6, 3), 4.0) is some
    assert type(_cached(ProceduralSource("test", count=5), (32, 32, 3), 4.0)) is ArraySource
