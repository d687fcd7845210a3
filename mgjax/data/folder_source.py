"""`folder:PATH`: a folder of images, one folder per class.

* `PATH/train/CLASS/…`, `PATH/val/CLASS/…`, `PATH/test/CLASS/…` as ILSVRC has it, or `PATH/CLASS/…` without splits.
* Folders within folders are levels, coarse to fine: `PATH/animal/cat/x.jpg`. They may end early. An image
  beside folders of finer labels is unknown below its own.
* Class folders named by wnids get their levels from WordNet.

Files are known by their suffix; others, and names that begin with a dot, are ignored. Links are followed, but not
into a folder that they lie in.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from mgjax.data.labels import class_taxonomy, path_taxonomy
from mgjax.data.sources import DataError, FileSource, Source, with_test
from mgjax.taxonomy import Taxonomy

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_IGNORED = ("__MACOSX",)


def load_folder(
    path: str, taxonomy: str, levels: Sequence[str], size: int | None, on_error: str, test: float, seed: int
) -> tuple[dict[str, Source], Taxonomy]:
    """Opens a folder of images.

    Args:
        taxonomy, levels: as in `class_taxonomy` where the classes are one flat list; with folders in folders,
            `levels` names the levels (default `level_0`, …). With a taxonomy file the innermost folder is the class.
        size, on_error: as in `EncodedSource`.
        test: share of train that becomes the test where the folder has neither test nor validation.
        seed: of that split.

    Raises:
        DataError: no such folder, no images, an image outside any class folder, a class folder without
            images (delete it, or fill it), a class of another split that train lacks, a folder beside the splits.
    """
    root, name = pathlib.Path(path).expanduser(), f"folder:{path}"
    if not root.is_dir():
        raise DataError(f"{name}: there is no such folder")
    tops = [e.name for e in _entries(root) if e.is_dir()]
    splits = [top for top in tops if top in SPLITS]
    if len(splits) > 1 or (splits and splits == tops):  # one such folder among others is a class
        if others := [top for top in tops if top not in SPLITS]:
            raise DataError(f"{name}: '{others[0]}' lies beside the splits {', '.join(splits)}: move it elsewhere")
        if "train" not in splits:
            raise DataError(f"{name}: there is '{splits[0]}', but no 'train'")
        found = {SPLITS[top]: top for top in tops}
        if len(found) < len(tops):
            raise DataError(f"{name}: two folders are one split: {', '.join(tops)}")
    else:
        found = {"train": ""}
    images: dict[str, list[str]] = {}
    paths: dict[str, list[tuple[str, ...]]] = {}
    empty: set[tuple[str, ...]] = set()
    for split, top in found.items():
        images[split], folders = _scan(root / top, f"{name} {top}".strip())
        if not images[split]:
            raise DataError(f"{name}: '{root / top}' holds no image ({', '.join(SUFFIXES)}) in a folder of its class")
        paths[split] = [tuple(p.split("/")[:-1]) for p in images[split]]
        empty |= folders
    filled = {s: {p[: k + 1] for p in ps for k in range(len(p))} for s, ps in paths.items()}
    if nothing := sorted(empty - set().union(*filled.values())):
        raise DataError(f"{name}: class folder '{'/'.join(nothing[0])}' holds no image: fill it or delete it")
    for split in found:
        if alien := sorted(filled[split] - filled["train"]):
            raise DataError(f"{name}: class '{'/'.join(alien[0])}' is in '{found[split]}', but not in 'train'")

    every = [p for ps in paths.values() for p in ps]
    width = max(map(len, every))
    if width == 1 or taxonomy:
        names = sorted({p[-1] for p in every})
        at = {n: i for i, n in enumerate(names)}
        tree, of_class = class_taxonomy(names, taxonomy, levels, name)
        labels = {level: table[[at[p[-1]] for p in every]] for level, table in of_class.items()}
    else:
        tree, labels = path_taxonomy(every, levels or [f"level_{i}" for i in range(width)], name)
    sources, start = {}, 0
    for split, top in found.items():
        rows = slice(start, start := start + len(paths[split]))
        own = {level: values[rows] for level, values in labels.items()}
        sources[split] = FileSource(root / top, images[split], own, f"{name} {top or 'all'}", size, on_error)
    return with_test(sources, test, seed), tree


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in _IGNORED]
    return sorted(kept, key=lambda e: e.name)


def _scan(root: pathlib.Path, name: str) -> tuple[list[str], set[tuple[str, ...]]]:
    """(images below `root`, sorted; folders that hold neither image nor folder), as relative paths."""
    images, empty = [], set()
    seen: dict[str, str] = {}

    def walk(folder: str, above: tuple[str, ...], within: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in within:  # a link to a folder that it lies in
            return
        if real in seen:
            raise DataError(f"{name}: '{'/'.join(above)}' and '{seen[real]}' are one folder: delete one of the links")
        seen[real] = "/".join(above)
        folders = 0
        count = len(images)
        for entry in _entries(folder):
            if entry.is_dir():
                walk(entry.path, (*above, entry.name), (*within, real))
                folders += 1
            elif entry.name.lower().endswith(SUFFIXES):
                if not above:
                    raise DataError(f"{name}: image '{entry.name}' lies in no class folder")
                images.append("/".join((*above, entry.name)))
        if above and not folders and len(images) == count:
            empty.add(above)

    walk(str(root), (), ())
    return sorted(images), empty
