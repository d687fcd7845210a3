"""Folders, tables and TFDS sets of images, their taxonomies, and images that are not as they should be."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from mgjax import Taxonomy
from mgjax.data import DataConfig, DataError, eval_batches, images, load_dataset, prepare, sources, train_batches
from mgjax.data.images import DecodeError, decode_rgb, fit
from mgjax.data.labels import class_taxonomy
from mgjax.errors import InputError
from mgjax.taxonomy import TaxonomyError, wordnet, write_taxonomy

CAT, TENCH, RETRIEVER, CAR, DALMATIAN, BUS = "n02123045", "n01440764", "n02099601", "n04285008", "n02110341", "n03769881"
WNIDS = sorted([CAT, TENCH, RETRIEVER, CAR, DALMATIAN, BUS])


def picture(value=9, shape=(4, 4)):
    return np.full((*shape, 3), value, np.uint8)


def encode(image, ending=".png", *options):
    return cv2.imencode(ending, image, list(options))[1].tobytes()


def noise(shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def plant(root, *paths, images_each=1, ending=".png"):
    """Writes images into folders; each image's grey value is the number of its folder."""
    for value, path in enumerate(paths):
        (root / path).mkdir(parents=True, exist_ok=True)
        for i in range(images_each):
            (root / path / f"{i}{ending}").write_bytes(encode(picture(value), ending))
    return root


def load(source, **changes):
    return load_dataset(DataConfig(source=source, **changes))


def every(source):
    return source.take(np.arange(len(source)))


def whole(data, level):
    """Grey value of an image → its label, over all splits."""
    result = {}
    for split in (data.train, data.validation, data.test):
        got = every(split)
        result |= dict(zip(got["image"][:, 0, 0, 0].tolist(), got[level].tolist()))
    return dict(sorted(result.items()))


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95, 0.999])
def test_a_truncated_jpeg_does_not_pass(share, progressive):
    data = encode(noise((90, 70)), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    assert decode_rgb(data).shape == (90, 70, 3)
    with pytest.raises(DecodeError, match=r"of 70 × 90 pixels, do not decode to an image: the JPEG is truncated"):
        decode_rgb(data[: int(len(data) * share)])


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image():
    data, thumbnail = encode(noise((90, 70)), ".jpg"), encode(picture(), ".jpg")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail
    with_thumbnail = data[:2] + segment + data[2:]
    np.testing.assert_array_equal(decode_rgb(with_thumbnail + b"\0\0 behind the end"), decode_rgb(data))
    with pytest.raises(DecodeError, match="70 × 90 pixels.* truncated"):
        decode_rgb(with_thumbnail[:-40])


def test_stray_bytes_before_a_marker_do_no_harm():
    data = encode(noise((30, 20)), ".jpg")
    np.testing.assert_array_equal(decode_rgb(data[:2] + b"\xff\xff" + data[3:]), decode_rgb(data))
    end_of_first = 4 + int.from_bytes(data[4:6]) - 2 + 2
    assert decode_rgb(data[:end_of_first] + b"\0\x13" + data[end_of_first:]).shape == (30, 20, 3)


@pytest.mark.parametrize("ending, kind", [(".png", "PNG"), (".webp", "WebP")])
def test_other_truncated_files(ending, kind):
    data = encode(noise((40, 40)), ending)
    with pytest.raises(DecodeError, match=f"the {kind} is truncated"):
        decode_rgb(data[: len(data) // 2])


def test_a_decoder_that_fills_up_what_is_missing_is_not_asked(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: picture())
    with pytest.raises(DecodeError, match="truncated"):
        decode_rgb(encode(noise((40, 40)), ".jpg")[:-2])


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
def test_an_image_of_one_pixel(ending):
    image = decode_rgb(encode(picture(200, (1, 1)), ending), 16)
    assert image.shape == (1, 1, 3) and fit(image, 16).shape == (16, 16, 3)
    assert np.abs(fit(image, 16).astype(int) - 200).max() <= 2


def test_an_image_20000_pixels_wide_is_decoded_at_an_eighth():
    image = np.zeros((600, 20_000, 3), np.uint8)
    image[:, 9_600:10_400] = 255
    data = encode(image, ".jpg")
    small = decode_rgb(data, 32)
    assert small.shape == (75, 2500, 3) and decode_rgb(data).shape == (600, 20_000, 3)
    np.testing.assert_allclose(fit(small, 32), fit(decode_rgb(data), 32), atol=4)
    assert fit(small, 32).mean() > 250
    # Never below twice the size that is needed; a PNG cannot be decoded in part.
    assert decode_rgb(encode(noise((300, 300)), ".jpg"), 75).shape == (150, 150, 3)
    assert decode_rgb(encode(noise((300, 300)), ".jpg"), 76).shape == (300, 300, 3)
    assert decode_rgb(encode(noise((300, 300))), 10).shape == (300, 300, 3)


@pytest.mark.parametrize("shape", [(2, 20_000), (20_000, 2), (1, 20_000)])
def test_a_strip_is_cut_before_it_is_enlarged(shape, monkeypatch):
    sizes = []
    resize = cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda image, new, **kw: sizes.append(new) or resize(image, new, **kw))
    assert fit(noise(shape), 64).shape == (64, 64, 3)
    assert max(max(new) for new in sizes) <= 2 * 64


def test_an_image_that_is_too_large_is_refused_by_its_header(monkeypatch):
    def header(width, height):
        chunk = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"
        return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + b"\0" * 4 + b"IEND"

    with pytest.raises(DecodeError, match=r"an image of 60,000 × 50,000 pixels is larger than 134,217,728 pixels"):
        decode_rgb(header(60_000, 50_000), 32)
    monkeypatch.setattr(images, "MAX_PIXELS", 5_000)
    data = encode(noise((400, 400)), ".jpg")
    with pytest.raises(DecodeError, match="400 × 400"):
        decode_rgb(data)
    assert decode_rgb(data, 20).shape == (50, 50, 3)  # 2,500 pixels of it are enough


def test_what_opencv_refuses_is_a_decode_error(monkeypatch):
    def refuse(*_):
        raise cv2.error("too many pixels")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    with pytest.raises(DecodeError, match="of 4 × 4 pixels, do not decode"):
        decode_rgb(encode(picture()))


def test_a_palette_becomes_rgb():
    from PIL import Image

    buffer = io.BytesIO()
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    Image.fromarray(colours[np.arange(12).reshape(3, 4) % 3]).quantize(3).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_rgb(buffer.getvalue()), colours[np.arange(12).reshape(3, 4) % 3])


def test_grey_and_turned_jpegs():
    from PIL import Image

    grey = decode_rgb(encode(np.full((5, 7), 90, np.uint8), ".jpg"))
    assert grey.shape == (5, 7, 3) and np.abs(grey.astype(int) - 90).max() <= 1
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = (255, 0, 0)  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", exif=exif, quality=95)
    upright = decode_rgb(buffer.getvalue())
    assert upright.shape == (32, 16, 3) and upright[4, 8, 0] > 200 and upright[28, 8, 0] < 50


# ---------------------------------------------------------------------- folders


def test_a_flat_folder_is_split_the_same_way_each_time(tmp_path):
    plant(tmp_path, "ash", "birch", "cedar", images_each=10)
    (tmp_path / "ash" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "ash" / "notes.txt").write_text("no image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("no image")
    data = load(f"folder:{tmp_path}")
    assert data.taxonomy.levels == ("class",) and data.taxonomy.names == (("ash", "birch", "cedar"),)
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
    assert whole(data, "class") == {0: 0, 1: 1, 2: 2}
    again = load(f"folder:{tmp_path}")
    np.testing.assert_array_equal(every(data.test)["class"], every(again.test)["class"])
    assert len(load(f"folder:{tmp_path}", test=0.5).test) == 15
    # A quick look sees all classes.
    few = load(f"folder:{tmp_path}", limit=6, validation=0.2)
    assert set(every(few.train)["class"]) | set(every(few.validation)["class"]) == {0, 1, 2}


@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_a_folder_with_splits(tmp_path, val):
    plant(tmp_path / "train", "a", "b", images_each=6)
    plant(tmp_path / val, "a", "b", images_each=2, ending=".JPEG")
    data = load(f"folder:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (11, 1, 4)
    assert data.test.name == f"folder:{tmp_path} {val}"
    plant(tmp_path / "test", "a", "b")
    data = load(f"folder:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 2)


def test_folders_of_uneven_depth(tmp_path):
    plant(tmp_path, "animal/cat", "animal/dog/poodle", "animal/dog/spaniel", "plant", "animal", "animal/dog", images_each=4)
    data = load(f"folder:{tmp_path}")
    tree = data.taxonomy
    assert tree.levels == ("level_0", "level_1", "level_2")
    assert tree.names == (("animal", "plant"), ("cat", "dog", "plant"), ("poodle", "spaniel", "cat", "plant"))
    assert whole(data, "level_0") == {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0}
    assert whole(data, "level_1") == {0: 0, 1: 1, 2: 1, 3: 2, 4: -1, 5: 1}
    # A leaf that ends early stands for itself; an inner label is unknown below.
    assert whole(data, "level_2") == {0: 2, 1: 0, 2: 1, 3: 3, 4: -1, 5: -1}
    named = load(f"folder:{tmp_path}", levels=("kingdom", "species", "breed"))
    assert named.taxonomy.levels == ("kingdom", "species", "breed")
    batch = next(eval_batches(named.test, named.taxonomy, batch_size=len(named.test)))
    assert batch.mask.all()
    with pytest.raises(TaxonomyError, match="up to 3 levels, but data.levels names 1"):
        load(f"folder:{tmp_path}", levels=("kingdom",))


def test_splits_of_different_sizes_are_refused(tmp_path):
    plant(tmp_path / "train", "a", "b", images_each=4)
    plant(tmp_path / "val", "a", "b")
    for file in (tmp_path / "val").rglob("*.png"):
        cv2.imwrite(str(file), picture(1, (6, 6)))
    with pytest.raises(DataError, match=r"splits differ in size.*\(6, 6, 3\).*data.image_size"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}", image_size=5).image_shape == (5, 5, 3)


def test_names_that_stand_twice_are_given_with_their_path(tmp_path):
    plant(tmp_path, "animal/other", "plant/other", "animal/cat", "cat/kitten", "stone", "other/stone", images_each=3)
    data = load(f"folder:{tmp_path}")
    assert data.taxonomy.names == (
        ("animal", "cat", "other", "plant", "stone"),
        ("cat", "animal/other", "kitten", "other/stone", "plant/other", "stone"),
    )
    assert whole(data, "level_1") == {0: 1, 1: 4, 2: 0, 3: 2, 4: 5, 5: 3}


def test_links_are_followed_but_not_in_circles(tmp_path):
    plant(tmp_path / "data", "a", images_each=5)
    plant(tmp_path / "elsewhere", "x", images_each=5)
    os.symlink(tmp_path / "elsewhere" / "x", tmp_path / "data" / "b")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "loop")
    data = load(f"folder:{tmp_path / 'data'}")
    assert data.taxonomy.names[0] == ("a", "b")
    assert len(data.train) + len(data.validation) + len(data.test) == 10
    os.symlink(tmp_path / "data" / "a", tmp_path / "data" / "c")
    with pytest.raises(DataError, match="'c' and 'a' are one folder"):
        load(f"folder:{tmp_path / 'data'}")


def test_wnid_folders_get_levels_of_wordnet(tmp_path):
    plant(tmp_path, *WNIDS, images_each=4)
    data = load(f"folder:{tmp_path}")
    assert data.taxonomy == wordnet.taxonomy(WNIDS) and data.taxonomy.levels == ("groups2", "groups3", "class")
    assert whole(data, "class") == {i: i for i in range(6)}
    data = load(f"folder:{tmp_path}", levels=("kind=named:animal+other", "groups:4", "class"))
    assert data.taxonomy.levels == ("kind", "groups4", "class")
    assert whole(data, "kind") == dict(enumerate(data.taxonomy.lift(np.arange(6), "class", "kind").tolist()))
    plant(tmp_path, "n00000000")
    with pytest.raises(TaxonomyError, match=r"folder:.*WordNet's table does not know 'n00000000'.*data\.taxonomy"):
        load(f"folder:{tmp_path}")


def test_the_classes_of_a_taxonomy_file(tmp_path):
    plant(tmp_path / "data", "cat", "dog", "oak", images_each=5)
    tree = Taxonomy.from_nested({"life": {"plant": ["oak", "ash"], "animal": {"dog": None, "cat": ["tabby"]}}, "stone": None})
    write_taxonomy(tree, tmp_path / "tree.nwk")
    data = load(f"folder:{tmp_path / 'data'}", taxonomy=str(tmp_path / "tree.nwk"))
    assert data.taxonomy == tree
    said = [[names[i] if i >= 0 else "?" for i in whole(data, l).values()] for l, names in zip(tree.levels, tree.names)]
    assert said == [["life"] * 3, ["animal", "animal", "plant"], ["cat", "dog", "oak"], ["?", "dog", "oak"]]
    two = load(f"folder:{tmp_path / 'data'}", taxonomy=str(tmp_path / "tree.nwk"), levels=tree.levels[1:])
    assert two.taxonomy.levels == tree.levels[1:] and whole(two, tree.levels[1]) == whole(data, tree.levels[1])
    plant(tmp_path / "data", "elm")
    with pytest.raises(TaxonomyError, match=r"tree.nwk' lacks 1 of 4 classes: 'elm'"):
        load(f"folder:{tmp_path / 'data'}", taxonomy=str(tmp_path / "tree.nwk"))


def test_a_class_that_is_an_inner_label_is_unknown_below(tmp_path):
    write_taxonomy(Taxonomy.from_nested({"animal": ["cat", "dog"], "plant": ["oak"]}), tmp_path / "t.csv")
    tree, labels = class_taxonomy(["dog", "animal", "oak"], str(tmp_path / "t.csv"), (), "toy")
    assert tree.names[1] == ("cat", "dog", "oak")
    assert {l: v.tolist() for l, v in labels.items()} == {"level_0": [0, 0, 1], "level_1": [1, -1, 2]}


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"holds no image \(.jpg"):
        load(f"folder:{tmp_path}")


def test_an_empty_class_folder_is_named(tmp_path):
    plant(tmp_path, "a", "b", images_each=3)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="class folder 'c' holds no image: fill it or delete it"):
        load(f"folder:{tmp_path}")
    (tmp_path / "c" / "notes.txt").touch()
    with pytest.raises(DataError, match="class folder 'c' holds no image"):
        load(f"folder:{tmp_path}")


def test_a_class_may_be_empty_in_one_split_but_not_in_train(tmp_path):
    plant(tmp_path / "train", "a", "b", images_each=3)
    plant(tmp_path / "val", "a", images_each=3)
    (tmp_path / "val" / "b").mkdir()
    assert load(f"folder:{tmp_path}").taxonomy.size("class") == 2
    plant(tmp_path / "val", "c")
    with pytest.raises(DataError, match="class 'c' is in 'val', but not in 'train'"):
        load(f"folder:{tmp_path}")


def test_folders_that_are_not_as_they_should_be(tmp_path):
    with pytest.raises(DataError, match="folder:/no/such: there is no such folder"):
        load("folder:/no/such")
    plant(tmp_path / "one", "a", "b", images_each=3)
    (tmp_path / "one" / "x.png").write_bytes(encode(picture()))
    with pytest.raises(DataError, match=r"image 'x.png' lies in no class folder"):
        load(f"folder:{tmp_path / 'one'}")
    plant(tmp_path / "two" / "train", "a", images_each=3)
    plant(tmp_path / "two" / "val", "a")
    plant(tmp_path / "two" / "valid", "a")
    with pytest.raises(DataError, match="two folders are one split"):
        load(f"folder:{tmp_path / 'two'}")
    (tmp_path / "two" / "valid").rename(tmp_path / "two" / "extra")
    with pytest.raises(DataError, match="'extra' lies beside the splits train, val: move it elsewhere"):
        load(f"folder:{tmp_path / 'two'}")
    plant(tmp_path / "four" / "val", "a", images_each=3)
    with pytest.raises(DataError, match="there is 'val', but no 'train'"):
        load(f"folder:{tmp_path / 'four'}")
    plant(tmp_path / "five", "car", "train", images_each=4)  # a train is also a vehicle
    assert load(f"folder:{tmp_path / 'five'}").taxonomy.names == (("car", "train"),)
    plant(tmp_path / "three", "a", "b", images_each=3)
    with pytest.raises(DataError, match=r"data.test is the share in \(0, 1\)"):
        load(f"folder:{tmp_path / 'three'}", test=1.0)
    with pytest.raises(TaxonomyError, match="one level of classes, but data.levels names"):
        load(f"folder:{tmp_path / 'three'}", levels=("x", "y"))


def test_a_bad_file_is_named_or_masked(tmp_path, caplog):
    plant(tmp_path / "train", "a", "b", images_each=4)
    plant(tmp_path / "test", "a", "b", images_each=2)
    jpeg = encode(noise((40, 40)), ".jpg")
    (tmp_path / "train" / "a" / "bad.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "train" / "b" / "one.png").write_bytes(encode(picture(3, (1, 1))))
    with pytest.raises(DataError, match=r"example 4 \('a/bad.jpg'\) does not decode .*truncated.*on_error=mask"):
        load(f"folder:{tmp_path}", image_size=8)
    data = load(f"folder:{tmp_path}", image_size=8, on_error="mask")
    valid = np.concatenate([every(s)["valid"] for s in (data.train, data.validation)])
    assert (~valid).sum() == 1 and "'a/bad.jpg') is masked" in caplog.text
    with pytest.raises(DataError, match=r"example \d+ \('b/one.png'\) is \(1, 1, 3\), others are \(4, 4, 3\)"):
        load(f"folder:{tmp_path}", on_error="mask")


def test_a_file_that_vanishes_is_masked(tmp_path):
    plant(tmp_path, "a", "b")
    source = sources.FileSource(tmp_path, ["a/0.png", "b/gone.png"], {"class": np.array([0, 1])}, "toy", 8, "mask")
    got = every(source)
    assert got["valid"].tolist() == [True, False] and got["class"].tolist() == [0, 1]
    assert "cannot be read: No such file" in source.bad[1]


def test_many_images_are_decoded_in_order_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_WORKERS", 3)
    plant(tmp_path, *(f"c{i:02d}" for i in range(40)))
    paths = [f"c{i:02d}/0.png" for i in range(40)]
    source = sources.FileSource(tmp_path, paths, {"class": np.arange(40)}, "toy", None, "error")
    got = source.take(np.arange(39, -1, -1))
    assert got["image"][:, 0, 0, 0].tolist() == got["class"].tolist() == list(range(39, -1, -1))
    (tmp_path / "c17" / "0.png").write_bytes(b"x")
    with pytest.raises(DataError, match="example 17"):
        every(source)


def test_real_images_with_levels_of_wordnet(shared_data):
    data = load(f"folder:{shared_data / 'imagenet_sample'}", image_size=64)
    assert data.taxonomy.levels == ("groups4", "groups19", "class")
    assert [data.taxonomy.size(l) for l in data.taxonomy.levels] == [4, 19, 83]
    assert (len(data.train), len(data.validation), len(data.test)) == (62, 4, 17) and data.image_shape == (64, 64, 3)
    batch = next(train_batches(data.train, data.taxonomy, batch_size=32, seed=0, examples_seen=0, steps=1))
    assert batch.inputs["image"].shape == (32, 64, 64, 3) and batch.mask.all()
    for coarse, fine in itertools.pairwise(data.taxonomy.levels):
        np.testing.assert_array_equal(data.taxonomy.lift(batch.targets[fine], fine, coarse), batch.targets[coarse])
    np.testing.assert_allclose(np.array(data.mean) / 255, [0.485, 0.456, 0.406], atol=0.05)


# ---------------------------------------------------------------------- tables


def table(root, *rows, images_of="path", missing=(), encoding="utf-8"):
    """Writes a table, and an image for each row."""
    with open(root / "table.csv", "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    column = rows[0].index(images_of) if images_of in rows[0] else None
    for value, row in enumerate(rows[1:]):
        if column is not None and column < len(row) and row[column] and row[column] not in missing:
            (root / row[column]).parent.mkdir(parents=True, exist_ok=True)
            (root / row[column]).write_bytes(encode(picture(value)))
    return f"csv:{root / 'table.csv'}"


def many(*rows, times=4):
    """Each row several times, with images of their own."""
    return [(f"{i}/{j}.png", *row) for i, row in enumerate(rows) for j in range(times)]


def test_a_table_with_splits_and_levels(tmp_path):
    source = table(
        tmp_path,
        ("split", "kind", "image", "class"),
        ("train", "animal", "x/0.png", "dog"),
        ("train", "animal", "x/1.png", "cat"),
        ("train", "plant", "x/2.png", ""),
        ("val", "animal", "x/3.png", ""),
        ("test", "animal", "x/4.png", "dog"),
        ("test", "", "x/5.png", ""),
        images_of="image",
    )
    data = load(source)
    assert data.taxonomy.levels == ("kind", "class")
    assert data.taxonomy.names == (("animal", "plant"), ("cat", "dog", "plant"))
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 1, 2)
    assert whole(data, "kind") == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: -1}
    # "plant" has nothing below it and ends early; "animal" alone is unknown below.
    assert whole(data, "class") == {0: 1, 1: 0, 2: 2, 3: -1, 4: 1, 5: -1}


def test_columns_can_be_chosen(tmp_path):
    rows = many(("a1", "x", "a"), ("a2", "x", "a"), ("b1", "y", "b"))
    source = table(tmp_path, ("path", "species", "note", "genus"), *rows, encoding="utf-8-sig")
    data = load(source, levels=("genus", "species"))
    assert data.taxonomy.names == (("a", "b"), ("a1", "a2", "b1"))
    assert load(source, levels=("species",)).taxonomy.levels == ("species",)
    with pytest.raises(DataError, match="no column 'family' for a level; there are species, note, genus"):
        load(source, levels=("family", "genus"))


def test_a_table_of_classes_alone(tmp_path):
    data = load(table(tmp_path, ("path", "fruit"), *many(("fig",), ("apple",))))
    assert data.taxonomy.levels == ("fruit",) and data.taxonomy.names == (("apple", "fig"),)
    data = load(table(tmp_path, ("path", "wnid"), *many(*([w] for w in WNIDS))))
    assert data.taxonomy == wordnet.taxonomy(WNIDS)
    source = table(tmp_path, ("path", "wnid"), *many(*([w] for w in WNIDS)))
    assert load(source, levels=("groups:3",)).taxonomy.levels == ("groups3", "class")
    write_taxonomy(
        Taxonomy.from_nested({"sweet": ["fig", "apple"], "sour": ["lemon"]}, ["taste", "fruit"]), tmp_path / "t.json"
    )
    source = table(tmp_path, ("path", "fruit"), *many(("fig",), ("apple",)))
    data = load(source, taxonomy=str(tmp_path / "t.json"))
    assert data.taxonomy.levels == ("taste", "fruit") and set(whole(data, "taste").values()) == {0}


@pytest.mark.parametrize(
    "rows, says",
    [
        ([("path", "c"), ("0.png", "a"), ("0.png", "b")], r"line 3: '0.png' stands in line 2 already"),
        ([("path", "c"), ("0.png", "a"), ("./0.png", "b")], r"line 3: '0.png' stands in line 2 already"),
        (
            [("path", "split", "c"), ("0.png", "train", "a"), ("1.png", "test", "b")],
            r"line 3: no row of train is of the class 'b', which is in test",
        ),
        ([("path", "c"), ("0.png", "a"), ("1.png",)], r"line 3: 1 cells, but the header has 2"),
        ([("path", "c"), ("", "a")], r"line 2: the column 'path' is empty"),
        ([("path", "c"), ("0.png", "a"), ("gone.png", "a")], r"line 3: there is no file '.*gone.png'.*on_error=mask"),
        ([("path", "split", "c"), ("0.png", "dev", "a")], r"line 2: no split 'dev'; there are train"),
        ([("path", "split", "c"), ("0.png", "test", "a")], r"no row is of the split train"),
        ([("path", "s", "c"), ("0.png", "", "a")], r"line 2: 'c' is given, but 's', which is coarser, is not"),
        (
            [("path", "s", "c"), ("0.png", "x", "a"), ("1.png", "y", "a")],
            r"line 3: 'a' has a second parent: 'y', and 'x' in line 2",
        ),
        ([("path", "s", "c"), ("0.png", "x", ""), ("1.png", "y", "")], r"up to 1 levels, but data.levels names 2"),
        ([("path", "s", "c"), ("0.png", "", "")], "no example has a label"),
        ([("path", "c"), ("0.png", "")], "the column 'c' is empty"),
        ([("file", "c"), ("0.png", "a")], r"no column 'path' \(or 'image'\) among file, c"),
        ([("path",), ("0.png",)], "no column holds labels"),
        ([("path", "c", "c"), ("0.png", "a", "b")], "two columns have one name"),
        ([("path", "c")], "holds no examples"),
        ([], "holds no examples"),
    ],
)
def test_tables_that_are_not_as_they_should_be(tmp_path, rows, says):
    source = table(tmp_path, *(rows or [()]), missing=("gone.png",))
    with pytest.raises(InputError, match=says) as caught:
        load(source)
    assert str(tmp_path) in str(caught.value)


def test_a_table_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load("csv:/no/such.csv")
    (tmp_path / "t.csv").write_bytes(b"path,c\n0.png,caf\xe9\n")
    with pytest.raises(DataError, match="line 2: byte 0xe9 is not UTF-8"):
        load(f"csv:{tmp_path / 't.csv'}")


def test_a_missing_file_of_a_table_is_masked(tmp_path):
    rows = many(("a",), ("b",))
    data = load(table(tmp_path, ("path", "c"), *rows, missing=(rows[2][0],)), on_error="mask")
    valid = np.concatenate([every(s)["valid"] for s in (data.train, data.validation, data.test)])
    assert (~valid).sum() == 1


# ---------------------------------------------------------------------- TFDS


def write_tfds(root, name, version, features, splits):
    """A dataset as TFDS prepares it in the array_record format, written without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = root / name / version
    folder.mkdir(parents=True)
    features.save_config(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    described = []
    for split, examples in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        rows = [serializer.serialize_example(features.encode_example(e)) for e in examples]
        for row in rows:
            writer.write(row)
        writer.close()
        described.append(
            {
                "name": split,
                "numBytes": str(sum(map(len, rows))),
                "shardLengths": [str(len(rows))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """`imagenet2012` with its schema, its 1,000 classes, a few images of two sizes, and a test split without labels."""
    import tensorflow_datasets as tfds

    tree = wordnet.read_table()
    wnids = sorted(set(tree) - {s.parent for s in tree.values()})
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=wnids),
            "file_name": tfds.features.Text(),
        }
    )

    def examples(labels):
        for i, label in enumerate(labels):
            jpeg = encode(noise((40 + i % 2, 50)), ".jpg")
            yield {"image": io.BytesIO(jpeg), "label": label, "file_name": f"{i}.JPEG"}

    splits = {"train": range(0, 1000, 40), "validation": range(0, 1000, 200), "test": [-1] * 3}
    splits = {split: list(examples(labels)) for split, labels in splits.items()}
    return write_tfds(tmp_path_factory.mktemp("tfds"), "imagenet2012", "5.1.0", features, splits), wnids


def test_imagenet_is_read_with_levels_of_wordnet(imagenet):
    root, wnids = imagenet
    data = load("tfds:imagenet2012", dir=str(root), image_size=32)
    assert "tensorflow" not in sys.modules
    assert data.taxonomy.levels == ("groups10", "groups100", "class")
    assert data.taxonomy == wordnet.taxonomy(wnids)
    # The test labels are not published: validation is the test.
    assert (len(data.train), len(data.validation), len(data.test)) == (23, 2, 5)
    got = every(data.test)
    assert got["class"].tolist() == [0, 200, 400, 600, 800]
    for level in data.taxonomy.levels:
        np.testing.assert_array_equal(got[level], data.taxonomy.lift(got["class"], "class", level))
    batch = next(train_batches(data.train, data.taxonomy, batch_size=8, seed=0, examples_seen=0, steps=1))
    assert batch.inputs["image"].shape == (8, 32, 32, 3) and set(batch.targets) == set(data.taxonomy.levels)


def test_levels_of_imagenet_can_be_chosen(imagenet, tmp_path):
    root, wnids = imagenet
    load_with = lambda **changes: load("tfds:imagenet2012", dir=str(root), image_size=32, **changes).taxonomy
    chosen = load_with(levels=("depth:4", "groups:50"))
    assert chosen.levels == ("depth4", "groups50", "class")
    assert load_with(levels=("label",)).names == (tuple(wnids),)  # the feature alone
    halves = Taxonomy.from_names({"half": ["a", "b"], "wnid": wnids}, {"wnid": [i % 2 for i in range(1000)]})
    write_taxonomy(halves, tmp_path / "halves.csv")
    assert load_with(taxonomy=str(tmp_path / "halves.csv")) == halves
    with pytest.raises(TaxonomyError, match="tfds:imagenet2012: WordNet knows no level 'genus'"):
        load_with(levels=("genus",))


def test_images_of_imagenet_need_one_size(imagenet):
    with pytest.raises(DataError, match="give one size with --config.data.image_size"):
        load("tfds:imagenet2012", dir=str(imagenet[0]))


def test_unknown_labels_stay_unknown():
    from mgjax.data.tfds_source import TfdsSource

    records = [{"image": encode(picture()), "label": label} for label in (1, -1)]
    source = TfdsSource(records, {"c": "label", "s": "label"}, "toy", None, "error", {"s": np.array([5, 7])})
    got = every(source)
    assert got["c"].tolist() == [1, -1] and got["s"].tolist() == [7, -1]


def test_wordnet_must_know_the_classes(shared_data):
    with pytest.raises(TaxonomyError, match=r"tfds:mnist: WordNet's table does not know '0'"):
        load("tfds:mnist", dir=str(shared_data / "tfds"), taxonomy="wordnet")


# ---------------------------------------------------------------------- prepare


def run_prepare(*arguments):
    run = subprocess.run([sys.executable, "-m", "mgjax.data.prepare", *arguments], capture_output=True, text=True, check=False)
    return run.returncode, run.stderr.strip().splitlines()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "one dataset is named, none was given"),
        (["a", "b"], "one dataset is named, got a b"),
        (["cifar100", "--bogus"], "Unknown command line flag 'bogus'"),
    ],
)
def test_prepare_says_what_is_wrong_in_one_line(arguments, says):
    code, lines = run_prepare(*arguments)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_prepare_without_tensorflow_says_how_to_install_it():
    if prepare.importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    code, lines = run_prepare("cifar100", "--data_dir=/no/such")
    assert code == 2 and len(lines) == 1 and "pip install 'mgjax[prepare]'" in lines[0]


def test_prepare_asks_tfds_for_array_records(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    asked = []

    class Builder:
        data_dir = tmp_path / "cifar100"

        def download_and_prepare(self, download_config):
            asked.append(download_config and download_config.manual_dir)
            if download_config:
                raise AssertionError("ImageNet requires\n manual download")

    def builder(name, **options):
        if name == "cifar1000":
            raise tfds.core.DatasetNotFoundError(name)
        if name == "cifar100/x":
            raise ValueError("no\nconfig x")
        asked.append((name, options))
        return Builder()

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tfds, "builder", builder)
    assert prepare.prepare("cifar100", str(tmp_path)) == str(tmp_path / "cifar100")
    assert asked == [("cifar100", {"data_dir": str(tmp_path), "file_format": "array_record"}), None]
    for name, manual, says in [
        ("cifar1000", "", "TFDS knows no dataset 'cifar1000'"),
        ("cifar100/x", "", "cannot build 'cifar100/x': no config x"),
        ("imagenet2012", "/by/hand", "cannot be prepared: ImageNet requires manual download"),
    ]:
        with pytest.raises(DataError, match=says):
            prepare.prepare(name, manual_dir=manual)
