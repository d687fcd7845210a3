"""How many photographs a second this machine feeds to an ImageNet recipe: ours against PyTorch's DataLoader.

    python -m experiments.benchmarks.input_pipeline [--workers=2] [--rounds=7] [--batch=128] [--json=FILE]

Both decode the JPEGs of a folder, cut the same windows, resize them to 224 pixels, antialiased, and collate
batches of uint8, in as many worker processes, one per core. A round times each once, in turn, over as many images,
without the start of the workers; printed are medians and the ratio round by round with its range. "Per core" is per
second of computation, of the workers and of the process that they feed, which other programs on the machine hardly
change; the ratio by the clock they do. The same run compares the pixels. The folder is `imagenet_sample` below
$MGJAX_SHARED_DATA, or `--folder`. Without torch and Pillow (`pip install 'mgjax[bench]'`) only our own figures are
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator

import cv2
import numpy as np
from rich.console import Console

from mgjax.data import Crop, DataConfig, FileSource, images, load_dataset, train_batches
from mgjax.data.crops import Window
from mgjax.data.sources import base_of, shuffled
from mgjax.errors import InputError
from mgjax.train.monitor import hardware

try:
    import PIL.Image
    import torch
except ImportError:
    torch = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 4.0  # mean absolute difference of the pixels that still counts as the same image


class Whole(FileSource):
    """A folder whose JPEGs are decoded at full resolution, however little of it is needed."""

    _cut = staticmethod(functools.partial(images.decode_crop, scaled=False))


class Reference:
    """A map-style dataset for a DataLoader: Pillow, and a resized crop as torchvision has it.

    Args:
        paths: of the images, in the order in which they are seen.
        windows: float64 [images, 4]; see `Window`.
    """

    def __init__(self, paths: list[str], windows: np.ndarray, size: int):
        self.paths, self.windows, self.size = paths, windows, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        with open(self.paths[i], "rb") as file:
            image = PIL.Image.open(io.BytesIO(file.read())).convert("RGB")
        y0, x0, y1, x1 = placed(Window(*self.windows[i]), image.height, image.width, self.size)
        image = image.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR, (x0, y0, x1, y1))
        return torch.from_numpy(np.array(image))


def placed(window: Window, height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Where our own pipeline cuts an upright JPEG, in pixels of the whole image."""
    factor = images.crop_factor((height, width), window, size)
    y0, x0, y1, x1 = (factor * edge for edge in window.place(*images.whole_pixels((height, width), factor)))
    return y0, x0, y1, x1


def repeated(source: FileSource, times: int, kind: type[FileSource] = FileSource) -> FileSource:
    """A folder's files several times over, read by a source of the given kind."""
    labels = {level: np.tile(values, times) for level, values in source.labels.items()}
    return kind(source.root, source.paths * times, labels, "benchmark", None, "error")


def timed(batches: Iterator, skipped: int, counted: int) -> tuple[float, float]:
    """(seconds, seconds of computation in this process and its workers) for `counted` batches, behind the first ones."""
    for _ in range(skipped):
        next(batches)
    began, busy = time.perf_counter(), computed()
    for _ in range(counted):
        next(batches)
    taken = time.perf_counter() - began, computed() - busy
    for _ in batches:  # workers that are stopped at work complain
        pass
    return taken


def computed() -> float:
    """Seconds that this process and those that it started have computed so far; NaN where /proc does not say."""
    try:
        ticks, parents = {}, {}
        for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = entry.read_text().rpartition(")")[2].split()
                pid = int(entry.parent.name)
                parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
        own = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        return sum(ticks[pid] for pid in own) / os.sysconf("SC_CLK_TCK")
    except (KeyError, ValueError, IndexError, AttributeError):
        return math.nan


def measure(folder: pathlib.Path, workers: int, batch: int, steps: int, rounds: int, size: int = 224) -> dict[str, float]:
    """name → figure; see the head of this file."""
    data = load_dataset(DataConfig(source=f"folder:{folder}", image_size=size, crop="host", cache_gb=0))
    ahead = 4 * max(1, workers)  # batches while workers start and buffers fill; as many stay, so that no worker ends
    count = batch * (steps + 2 * ahead)
    crop, seed = Crop(size, (0.25, 1.0)), 0
    files = base_of(data.train)
    source, whole = (repeated(files, -(-count // len(files)), kind) for kind in (FileSource, Whole))
    ours = lambda source: train_batches(
        source, data.taxonomy, batch_size=batch, seed=seed, examples_seen=0, steps=count // batch, workers=workers, crop=crop
    )
    cases = {"ours": lambda: ours(source), "ours, whole": lambda: ours(whole)}
    figures: dict[str, float] = {}
    if torch is not None:
        order = shuffled(len(source), seed).take(0, count)
        dataset = Reference([str(source.root / source.paths[i]) for i in order], crop.draw(0, count).rows, size)
        theirs = functools.partial(torch.utils.data.DataLoader, dataset, batch)
        cases["torch"] = lambda: iter(theirs(num_workers=workers, multiprocessing_context="spawn" if workers else None))
        first, expected = next(ours(source)), next(iter(theirs()))
        apart = np.abs(first.inputs["image"].astype(np.int16) - expected.numpy()).mean((1, 2, 3))
        figures["mean absolute difference"] = round(float(apart.mean()), 3)
        figures["mean absolute difference, largest of an image"] = round(float(apart.max()), 3)
    rates = {name: [] for name in cases}
    for _ in range(rounds):
        for name, open_one in cases.items():
            rates[name].append([batch * steps / np.maximum(s, 1e-2) for s in timed(open_one(), ahead, steps)])
    clock, core = ({name: np.array(of)[:, k] for name, of in rates.items()} for k in range(2))
    for name in rates:
        figures |= spread(f"{name} images/s per core", core[name], 1) | spread(f"{name} images/s", clock[name], 1)
    for name in list(rates)[1:]:
        figures |= spread(f"ours / {name} per core", core["ours"] / core[name], 3)
        figures |= spread(f"ours / {name} by the clock", clock["ours"] / clock[name], 3)
    return figures


def spread(name: str, values: np.ndarray, digits: int) -> dict[str, float]:
    """Median, smallest and largest, under names of their own."""
    of = {"": np.median(values), " smallest": values.min(), " largest": values.max()}
    return {name + which: round(float(v), digits) for which, v in of.items()}


def main(arguments: list[str] | None = None) -> None:
    shared = pathlib.Path(os.environ.get("MGJAX_SHARED_DATA", ROOT / ".." / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=(shared / "imagenet_sample").resolve())
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        figures = measure(options.folder, options.workers, options.batch, options.steps, options.rounds, options.size)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    decoder = f"simplejpeg {images.simplejpeg.__version__}" if images.simplejpeg else f"OpenCV {cv2.__version__}"
    print(
        f"{hardware()}; {options.workers} worker processes, batch {options.batch} of {options.size} pixels, decoded by "
        f"{decoder}; {options.rounds} rounds of {options.steps * options.batch:,} images"
    )
    console = Console(highlight=False, soft_wrap=True)
    say = lambda name, unit="": f"{figures[name]:g}{unit} ({figures[f'{name} smallest']:g}–{figures[f'{name} largest']:g})"
    rate = lambda name: f"{say(f'{name} images/s per core')} images/s per core, {say(f'{name} images/s')} images/s in all"
    ratio = lambda name: (
        f"{say(f'ours / {name} per core', '×')} per core, {say(f'ours / {name} by the clock', '×')} by the clock"
    )
    console.print(f"ours: {rate('ours')}")
    console.print(f"ours without decoding at a smaller scale: {rate('ours, whole')}; with / without: {ratio('ours, whole')}")
    if torch is None:
        console.print("no comparison: torch and Pillow are not installed (pip install 'mgjax[bench]')")
    else:
        console.print(f"PyTorch {torch.__version__}, Pillow {PIL.__version__}: {rate('torch')}")
        console.print(f"ours / PyTorch: {ratio('torch')}")
        apart, most = (figures[f"mean absolute difference{which}"] for which in ("", ", largest of an image"))
        console.print(
            f"pixels differ by {apart:g}/255 in the mean, {most:g}/255 in the image that differs most: "
            f"{'within' if max(apart, most) <= LIMIT else 'NOT within'} {LIMIT:g}/255"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
