"""`csv:FILE`: a table of images and labels.

The column `path` (or `image`) holds the images' paths, relative to the file's folder; `split`, if it is there, one of
train, validation (val) and test. Each further column is a level, coarse to fine, or, where levels are named, a column by which
a granularity may choose its examples (`Column`). An empty cell below a label means
that the label is a leaf that ends early if no row has a finer label below it, and unknown if one has. A row
without any label is unknown at all levels.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mgjax.data.folder_source import SPLITS
from mgjax.data.labels import class_taxonomy, path_taxonomy
from mgjax.data.sources import DataError, FileSource, Source, with_test
from mgjax.taxonomy import UNKNOWN, Taxonomy
from mgjax.taxonomy.wordnet import is_wnid

PATHS, SPLIT = ("path", "image"), "split"


def load_table(
    file: str, taxonomy: str, levels: Sequence[str], size: int | None, on_error: str, test: float, seed: int
) -> tuple[dict[str, Source], Taxonomy]:
    """Opens a table.

    Args:
        taxonomy: as in `class_taxonomy`, for the classes in the last level column.
        levels: columns that are levels, coarse to fine (default: all that remain, from left to right). Where
            one column alone holds the classes, as in `class_taxonomy`.
        size, on_error: as in `EncodedSource`.
        test: share of train that becomes the test where the table has neither test nor validation.
        seed: of that split.

    Raises:
        DataError: no such file or column, or a row that does not fit, by its line.
        TaxonomyError: as `class_taxonomy` and `path_taxonomy`.
    """
    path, name = pathlib.Path(file).expanduser(), f"csv:{file}"
    header, rows = read_csv(path, name)
    column = next((c for c in PATHS if c in header), None)
    if column is None:
        raise DataError(f"{name}: no column 'path' (or 'image') among {', '.join(header)}")
    labels_in = [c for c in header if c not in (*PATHS, SPLIT)]
    if not labels_in:
        raise DataError(f"{name}: no column holds labels; there are {', '.join(header)}")
    missing = [c for c in levels if c not in labels_in]
    if missing and len(labels_in) > 1 and not taxonomy:
        raise DataError(f"{name}: no column '{missing[0]}' for a level; there are {', '.join(labels_in)}")
    columns, further = (list(levels), []) if levels and not missing else (labels_in, list(levels))
    if taxonomy:
        columns = columns[-1:]

    images: dict[str, list[str]] = {}
    splits: list[str] = []
    line_of: dict[str, int] = {}
    for line, row in rows:
        image, split = row[column], row.get(SPLIT, "train")
        if not image:
            raise DataError(f"{name} line {line}: the column '{column}' is empty")
        image = os.path.normpath(image)  # one file has one name, so that it cannot be in two splits
        if image in line_of:
            raise DataError(f"{name} line {line}: '{image}' stands in line {line_of[image]} already")
        if split not in SPLITS:
            raise DataError(f"{name} line {line}: no split '{split}'; there are {', '.join(SPLITS)}")
        if on_error == "error" and not (path.parent / image).is_file():
            raise DataError(
                f"{name} line {line}: there is no file '{path.parent / image}'; --config.data.on_error=mask goes on without it"
            )
        line_of[image] = line
        splits.append(SPLITS[split])
        images.setdefault(SPLITS[split], []).append(image)
    if "train" not in images:
        raise DataError(f"{name}: no row is of the split train")

    paths = label_paths(rows, columns, name)
    if len(columns) == 1:
        names = sorted({p[0] for p in paths if p})
        if not names:
            raise DataError(f"{name}: the column '{columns[0]}' is empty")
        if not taxonomy and not all(map(is_wnid, names)):
            further = further or columns
        tree, of_class = class_taxonomy(names, taxonomy, further, name)
        at = {n: i for i, n in enumerate(names)}
        labels = {
            level: np.array([table[at[p[0]]] if p else UNKNOWN for p in paths], np.int32) for level, table in of_class.items()
        }
    else:
        tree, labels = path_taxonomy(paths, columns, name)
    finest = labels[tree.levels[-1]]
    taught = set(finest[np.array(splits) == "train"].tolist()) | {UNKNOWN}
    for (line, _), split, label in zip(rows, splits, finest.tolist()):
        if label not in taught:
            raise DataError(
                f"{name} line {line}: no row of train is of the class '{tree.names[-1][label]}', which is in {split}"
            )
    sources = {}
    for split in images:
        rows_of = np.flatnonzero(np.array(splits) == split)
        own = {level: values[rows_of] for level, values in labels.items()}
        cells = {c: np.array([rows[i][1][c] for i in rows_of], object) for c in header if c not in labels}
        sources[split] = FileSource(path.parent, images[split], own, f"{name} {split}", size, on_error, cells)
    return with_test(sources, test, seed), tree


def read_csv(path: pathlib.Path, name: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(header, [(line, column → cell)])."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8: save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        for row in reader:
            if len(row) not in (0, len(header)):
                raise DataError(f"{name} line {reader.line_num}: {len(row)} cells, but the header has {len(header)}")
            if row:
                rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num}: {error}") from None
    if len(set(header)) < len(header):
        raise DataError(f"{name} line 1: two columns have one name: {', '.join(header)}")
    if not rows:
        raise DataError(f"{name} holds no examples")
    return header, rows


def label_paths(rows: Sequence[tuple[int, dict[str, str]]], columns: Sequence[str], name: str) -> list[tuple[str, ...]]:
    """Labels of each row, coarse to fine, down to the first empty cell; one parent per label."""
    parents: list[dict[str, tuple[str, int]]] = [{} for _ in columns]
    paths = []
    for line, row in rows:
        cells = [row[c] for c in columns]
        depth = cells.index("") if "" in cells else len(cells)
        if deeper := [c for c, cell in zip(columns[depth:], cells[depth:]) if cell]:
            raise DataError(f"{name} line {line}: '{deeper[0]}' is given, but '{columns[depth]}', which is coarser, is not")
        for level in range(1, depth):
            above, first = parents[level].setdefault(cells[level], (cells[level - 1], line))
            if above != cells[level - 1]:
                raise DataError(
                    f"{name} line {line}: '{cells[level]}' has a second parent: '{cells[level - 1]}', "
                    f"and '{above}' in line {first}"
                )
        paths.append(tuple(cells[:depth]))
    return paths
