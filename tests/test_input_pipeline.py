"""Windows that the host cuts, worker processes, and the benchmark of both."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time

import cv2
import grain
import jax
import numpy as np
import pytest
from PIL import Image

from mgjax import Taxonomy
from mgjax.data import ArraySource, Crop, DataConfig, DataError, FileSource, Subset, eval_batches, images, load_dataset
from mgjax.data import train_batches as make_batches
from mgjax.data.crops import Window
from mgjax.data.images import DecodeError, crop_factor, decode_crop, decode_rgb, resample, whole_pixels
from mgjax.data.sources import base_of, shuffled
from mgjax.data.tfds_source import TfdsSource
from mgjax.errors import InputError

TREE = Taxonomy.from_names({"c": ["a", "b", "d"]}, {})
ALL = Window(1.0, 1.0, 0.5, 0.5)
DECODERS = ["opencv", *(["simplejpeg"] if images.simplejpeg else [])]


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    if request.param == "opencv":
        monkeypatch.setattr(images, "simplejpeg", None)
    return request.param


def photo(height, width, seed=0):
    """Something smooth with edges, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8), (width, height))
    cv2.circle(image, (width // 2, height // 3), min(height, width) // 4, (250, 20, 60), -1)
    return image


def jpeg(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **{"quality": 92} | options)
    return buffer.getvalue()


def pillows(data, window, size):
    """The same window by Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    shape = image.height, image.width
    factor = crop_factor(shape, window, size)
    y0, x0, y1, x1 = (factor * edge for edge in window.place(*whole_pixels(shape, factor)))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, (x0, y0, x1, y1))).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FileSource of 24 photographs, in colour and grey; one is truncated and one is missing."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        image = photo(90 + 7 * i, 180 - 3 * i, i)
        (root / f"{i}.jpg").write_bytes(jpeg(image[..., 0] if i % 5 == 0 else image))
    (root / "7.jpg").write_bytes((root / "7.jpg").read_bytes()[:2000])
    (root / "9.jpg").unlink()
    return FileSource(root, [f"{i}.jpg" for i in range(24)], {"c": np.arange(24) % 3}, "photos", 40, "mask")


def train_batches(source, **changes):
    settings = dict(batch_size=8, seed=1, examples_seen=0, steps=6, crop=Crop(32, seed=5))
    return make_batches(source, TREE, **settings | changes)


def rows(batches):
    """Everything of all batches, row under row."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---------------------------------------------------------------------- order and windows


@pytest.mark.parametrize("length", [1, 10, 50_000])
def test_the_order_is_that_of_grain(length):
    expected = grain.MapDataset.range(length).seed(3).shuffle().repeat()
    order, start = shuffled(length, 3), max(0, 2 * length - 50)
    assert order.take(start, start + 100).tolist() == [expected[i] for i in range(start, start + 100)]


def test_windows_belong_to_positions():
    crop = Crop(32, (0.3, 0.9), seed=7)
    whole = crop.draw(0, 1000).rows
    np.testing.assert_array_equal(np.concatenate([crop.draw(s, 125).rows for s in range(0, 1000, 125)]), whole)
    assert (Crop(32, (0.3, 0.9), seed=8).draw(0, 1000).rows != whole).all()
    assert len(np.unique(whole)) == whole.size
    share, ratio, *place = whole.T
    assert 0.3 <= share.min() < 0.31 and 0.89 < share.max() <= 0.9 and abs(share.mean() - 0.6) < 0.03
    assert 0.75 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 and abs(np.log(ratio).mean()) < 0.03
    assert all(0 <= p.min() < 0.01 and 0.99 < p.max() < 1 for p in place)
    mild = Crop(32, (0.3, 0.9), strength=0.5).draw(0, 1000).rows
    assert 0.65 <= mild[:, 0].min() and mild[:, 0].max() <= 0.95 and np.abs(np.log(mild[:, 1])).max() <= np.log(4 / 3) / 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (375, 500), (500, 20)])
def test_windows_lie_in_the_image(shape):
    for row in Crop(32, (0.05, 1.0)).draw(0, 300).rows.tolist():
        y0, x0, y1, x1 = Window(*row).place(*shape)
        assert 0 <= y0 < y1 <= shape[0] and 0 <= x0 < x1 <= shape[1]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"size": 0}, "at least 1 is needed"),
        ({"share": (0.9, 0.3)}, "smallest <= largest"),
        ({"share": (0.5,)}, "two shares"),
        ({"strength": 1.5}, "strength of the augmentation is 1.5"),
    ],
)
def test_crops_that_are_none(changes, says):
    with pytest.raises(InputError, match=says):
        Crop(**{"size": 8} | changes)


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.2, 1.5, 2.0, 2.7, 6.0])
def test_resampling_is_nearly_pillows(scale):
    image = photo(round(90 * scale), round(70 * scale))
    expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resample(image, 64) - expected).mean() < 2


@pytest.mark.parametrize("shape", [(60, 90), (300, 200), (401, 603), (1203, 907), (2100, 2300)])
@pytest.mark.parametrize("kind", ["colour", "444", "grey", "progressive"])
def test_host_crops_are_pillows(decoder, shape, kind):
    options = {"444": {"subsampling": 0}, "progressive": {"progressive": True}}.get(kind, {})
    image = photo(*shape)
    data = jpeg(image[..., 0] if kind == "grey" else image, **options)
    for row in Crop(64).draw(0, 6).rows.tolist():
        apart = np.abs(decode_crop(data, Window(*row), 64) - pillows(data, Window(*row), 64))
        assert apart.mean() < 4


def test_host_crops_of_real_photographs(shared_data, decoder):
    files = sorted((shared_data / "imagenet_sample").glob("*/*"))
    for file, row in zip(files, Crop(224).draw(0, len(files)).rows.tolist()):
        data = file.read_bytes()
        assert np.abs(decode_crop(data, Window(*row), 224) - pillows(data, Window(*row), 224)).mean() < 4


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("size", [16, 40, 100])
def test_simplejpeg_changes_no_pixel(options, size, monkeypatch):
    """Neither do the rows that it leaves out."""
    data = [jpeg(photo(*shape), **options) for shape in ((150, 203), (331, 217), (17, 33))]
    windows = [Window(*row) for row in Crop(size, (0.02, 1.0)).draw(0, 40).rows.tolist()]
    run = lambda: ([decode_rgb(d) for d in data], [decode_crop(d, w, size) for d in data for w in windows])
    fast = run()
    monkeypatch.setattr(images, "simplejpeg", None)
    same(fast, run())


def test_what_is_not_plain_is_left_to_opencv(decoder):
    image = photo(120, 160)
    cmyk = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(cmyk, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = jpeg(image, exif=exif, quality=95)
    upright = jpeg(image, exif=Image.Exif(), quality=95)
    for data, plain in ((cmyk.getvalue(), False), (turned, False), (upright, True), (jpeg(image[..., 0]), False)):
        assert images.read_header(data).plain == plain
        expected = decode_rgb(data)
        assert expected.shape == ((160, 120, 3) if data is turned else (120, 160, 3))
        y0, x0, y1, x1 = ALL.place(*expected.shape[:2])
        np.testing.assert_array_equal(decode_crop(data, ALL, 100), resample(expected[y0:y1, x0:x1], 100))
    # Also where only a half is decoded.
    assert np.abs(decode_crop(turned, ALL, 40).astype(int) - decode_crop(jpeg(np.rot90(image, -1)), ALL, 40)).mean() < 2
    assert np.abs(decode_crop(cmyk.getvalue(), ALL, 100).astype(int) - decode_crop(jpeg(image), ALL, 100)).mean() < 8


def test_orientations_that_cannot_be_read_are_left_to_opencv():
    tag = lambda order, value: b"\x12\x01\x03\x00\x01\0\0\0" + value.to_bytes(2, order) + b"\0\0"
    assert images._turned(b"II*\0\x08\0\0\0\x01\0" + tag("little", 6))
    assert not images._turned(b"II*\0\x08\0\0\0\x01\0" + tag("little", 1))
    assert images._turned(b"no") and images._turned(b"") and images._turned(b"II*\0\x08\0\0\0\xff\xff")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files_are_refused(decoder, share):
    data = jpeg(photo(200, 200))
    with pytest.raises(DecodeError, match="of 200 × 200 pixels, do not decode to an image: the JPEG is truncated"):
        decode_crop(data[: int(share * len(data))], Window(0.2, 1.0, 0.0, 0.0), 32)


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
def test_broken_bytes_are_what_opencv_makes_of_them(monkeypatch):
    data = jpeg(photo(96, 96))
    scan = images.read_header(data).scan
    broken = [data[:at] + b"\x55\xaa\x13" + data[at + 3 :] for at in (20, 180, scan + 30, (scan + len(data)) // 2)]

    def made(data):
        try:
            return decode_rgb(data)
        except DecodeError:
            return np.zeros(0)

    fast = [made(d) for d in broken]
    monkeypatch.setattr(images, "simplejpeg", None)
    same(fast, [made(d) for d in broken])


def test_other_formats_are_cut_too():
    image = photo(300, 200)
    data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
    y0, x0, y1, x1 = ALL.place(300, 200)
    np.testing.assert_array_equal(decode_crop(data, ALL, 50), resample(image[y0:y1, x0:x1], 50))


# ---------------------------------------------------------------------- batches


def test_one_integer_is_the_position_of_windows_too(folder):
    whole = rows(train_batches(folder))
    assert whole.inputs["image"].shape == (48, 32, 32, 3)
    same(rows(train_batches(folder, batch_size=4, examples_seen=16, steps=8)), jax.tree.map(lambda x: x[16:], whole))
    parts = [list(train_batches(folder, process=p, processes=2)) for p in range(2)]
    index = rows([rows(pair) for pair in zip(*parts)]).index
    np.testing.assert_array_equal(index, whole.index)
    # An example is cut anew in each epoch.
    first, again = (np.flatnonzero(whole.index == 3)[k] for k in range(2))
    assert (whole.inputs["image"][first] != whole.inputs["image"][again]).any()
    other = rows(train_batches(folder, crop=Crop(32, seed=6)))
    np.testing.assert_array_equal(other.index, whole.index)
    assert (other.inputs["image"] != whole.inputs["image"]).any()


def test_bad_images_are_masked_under_a_crop(folder):
    batch = rows(train_batches(folder, steps=3))
    bad = np.isin(batch.index, [7, 9])
    np.testing.assert_array_equal(batch.mask, ~bad)
    assert bad.sum() == 2 and (batch.targets["c"][bad] == -1).all()
    for i in np.flatnonzero(bad):
        valid = i // 8 * 8 + np.argmax(batch.mask[i // 8 * 8 :])  # shows the first valid example of its batch
        np.testing.assert_array_equal(batch.inputs["image"][i], batch.inputs["image"][valid])


def test_a_subset_is_cut_as_its_source(folder):
    some = Subset(folder, np.array([5, 2]), "some")
    windows = Crop(32).draw(0, 2)
    same(some.take(np.array([1, 0]), windows), folder.take(np.array([2, 5]), windows))


def test_only_encoded_images_are_cut_on_the_host():
    source = ArraySource({"image": np.zeros((4, 8, 8, 3), np.uint8), "c": np.zeros(4, np.int32)}, "toy")
    with pytest.raises(DataError, match=r"toy: only images .*data.crop=device"):
        train_batches(source)
    with pytest.raises(DataError, match="procedural has no image files"):
        load_dataset(DataConfig(crop="host"))
    with pytest.raises(DataError, match="data.crop is 'device' or 'host'"):
        load_dataset(DataConfig(crop="here"))


def test_a_dataset_for_host_crops_keeps_its_files(folder, tmp_path):
    os.symlink(folder.root, tmp_path / "photo")
    kinds = {}
    for crop in ("device", "host"):
        data = load_dataset(DataConfig(source=f"folder:{tmp_path}", crop=crop, image_size=40, on_error="mask"))
        kinds[crop] = [type(base_of(split)) for split in (data.train, data.validation, data.test)]
        batch = next(eval_batches(data.validation, data.taxonomy, batch_size=1))
        assert batch.inputs["image"].shape == (1, 40, 40, 3) and data.image_shape == (40, 40, 3)
    assert kinds == {"device": [ArraySource] * 3, "host": [FileSource, ArraySource, ArraySource]}


# ---------------------------------------------------------------------- worker processes


def test_workers_change_nothing(folder):
    """Real processes, for training and evaluation."""
    here = list(train_batches(folder, steps=5, examples_seen=8))
    there = train_batches(folder, steps=5, examples_seen=8, workers=2)
    found = list(there)
    assert len(found) == 5 and all(type(b.inputs["image"]) is np.ndarray for b in found)
    same(rows(found), rows(here))
    assert list(there) == [] and not there.close.alive
    passed = [list(eval_batches(folder, TREE, batch_size=10, workers=workers)) for workers in (0, 2)]
    same(rows(passed[1]), rows(passed[0]))


def test_tfds_in_a_worker_and_an_error_from_there(shared_data):
    data = load_dataset(DataConfig(source="tfds:mnist", dir=str(shared_data / "tfds"), image_size=32, crop="host", cache_gb=0))
    assert isinstance(data.test, TfdsSource)
    make = lambda workers: make_batches(
        data.train, data.taxonomy, batch_size=8, seed=0, examples_seen=0, steps=2, workers=workers, crop=Crop(24)
    )
    same(rows(make(1)), rows(make(0)))
    broken = TfdsSource([{"image": b"x", "label": 0}] * 4, {"c": "label"}, "toy", 8, "error")
    with pytest.raises(DataError, match="toy: the image of example 0 does not decode"):
        next(eval_batches(broken, TREE, batch_size=2, workers=1))


def test_examples_in_memory_are_taken_here():
    source = ArraySource({"image": np.zeros((4, 8, 8, 3), np.uint8), "c": np.zeros(4, np.int32)}, "toy")
    some = Subset(source, np.arange(3), "some")
    assert not hasattr(eval_batches(some, TREE, batch_size=2, workers=2), "_elements")


ENDLESS = """
import pathlib, sys
import numpy as np
from mgjax import Taxonomy
from mgjax.data import Crop, FileSource, train_batches
if __name__ == "__main__":
    source = FileSource(pathlib.Path(sys.argv[1]), ["0.jpg", "1.jpg"], {"c": np.zeros(2, np.int32)}, "photos", 40, "error")
    tree = Taxonomy.from_names({"c": ["a"]}, {})
    batches = train_batches(source, tree, batch_size=2, seed=0, examples_seen=0, steps=10**6, crop=Crop(8), workers=2)
    for i, batch in enumerate(batches):
        if i == 3:
            print("running", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_program_that_ends(folder, tmp_path, number):
    """Of a plain module without absl, to whose whole group the signal goes, as a terminal's does."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc to see other processes")
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, "-m", "endless", str(folder.root)]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    try:
        said = program.stdout.readline()
        assert said == "running\n", program.stderr.read()
        children = []
        for entry in os.listdir("/proc"):
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry}/cmdline") as file:
                    spawned = "spawn_main" in file.read()
            except (OSError, IndexError, ValueError):
                continue
            if parent == program.pid and spawned:
                children.append(int(entry))
        assert len(children) == 2
        (os.kill if number == signal.SIGKILL else os.killpg)(program.pid, number)
        program.wait(150)
        end = time.monotonic() + 20
        while any(map(alive, children)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, children))
    finally:
        if program.poll() is None:
            program.kill()
        program.communicate()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------- the benchmark


def test_the_benchmark_runs_small(folder, tmp_path, capsys):
    from experiments.benchmarks import input_pipeline

    for i in range(6):
        (tmp_path / "photos" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "c" / f"{i}.jpg").write_bytes(jpeg(photo(100, 130, i)))
    options = ["--workers=0", "--rounds=2", "--batch=4", "--steps=2", "--size=32"]
    input_pipeline.main([*options, f"--folder={tmp_path / 'photos'}", f"--json={tmp_path / 'figures.json'}"])
    said, figures = " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / "figures.json").read_text())
    assert figures["ours images/s"] > 0 and figures["ours / ours, whole by the clock smallest"] > 0
    assert all(isinstance(v, float) for v in figures.values()) and "without decoding at a smaller scale" in said
    if importlib.util.find_spec("torch"):
        assert figures["mean absolute difference, largest of an image"] < 4 and "PyTorch" in said and "/255: within" not in said
    else:
        assert "torch and Pillow are not installed" in said


def test_the_benchmark_without_torch(tmp_path, monkeypatch, capsys):
    from experiments.benchmarks import input_pipeline

    monkeypatch.setattr(input_pipeline, "torch", None)
    (tmp_path / "c").mkdir()
    for i in range(6):
        (tmp_path / "c" / f"{i}.jpg").write_bytes(jpeg(photo(50, 60, i)))
    input_pipeline.main(["--workers=0", "--rounds=1", "--batch=2", "--steps=1", "--size=16", f"--folder={tmp_path}"])
    assert "torch and Pillow are not installed" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="error: folder:/no/such"):
        input_pipeline.main(["--folder=/no/such"])
