"""Datasets of texts: `trec:DIR`, `jsonl:FILE`, `csv:FILE`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.data.folder_source import SPLITS
from mgjax.data.labels import path_taxonomy
from mgjax.data.sources import ArraySource, DataError, Dataset, Subset, split_rows
from mgjax.data.table_source import label_paths, read_csv
from mgjax.data.text import TextEncoder, TextView, tokens
from mgjax.taxonomy import Taxonomy

TEXT, SPLIT = "text", "split"
TREC = {"train": "train_5500.label", "test": "TREC_10.label"}
SEPARATOR = ";"  # between the labels of a cell that holds several


@dataclasses.dataclass(frozen=True)
class TextConfig:
    source: str = key("trec:", "dataset: 'trec:DIR', 'jsonl:FILE' or 'csv:FILE', with a column 'text' and one per level")
    levels: tuple[str, ...] = key((), "columns that are levels, coarse to fine (empty: all that are not named elsewhere)")
    several: tuple[str, ...] = key((), "columns that hold any number of labels each: a list, or a cell with ; between them")
    validation: float = key(0.1, "share of train that is split off for validation where the dataset has none", low=0, high=0.9)
    test: float = key(0.2, "share of train that is split off for the test where there is no other split", low=0, high=0.9)
    folds: int = key(0, "the test is one of so many parts of train, for cross-validation (0: the dataset's own)", low=0)
    fold: int = key(1, "which of them", low=1)
    limit: int = key(0, "use only so many examples of each split, for a quick look (0: all)", low=0)
    seed: int = key(0, "of the splits that are split off")
    workers: int = key(0, "unused: texts are encoded once", low=0)


@dataclasses.dataclass(frozen=True)
class TextDataset(Dataset):
    """Texts, encoded for views, and what encoded them.

    Attributes:
        encoder: what it knows was learned from train alone.
        classes: task → names of its labels, for those of which an example has any number.
        texts: split → its texts, as they were read.
    """

    encoder: TextEncoder | None = None
    classes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def what(self) -> str:
        return "texts"

    def show(self, batch: Batch) -> list[str]:
        return [self.texts["test"][i] for i in batch.index]

    def record(self) -> dict:
        classes = {c: list(names) for c, names in self.classes.items()}
        learned = {"vocabularies": self.encoder.vocabularies, "frequencies": self.encoder.frequencies}
        return super().record() | learned | {"classes": classes}


@dataclasses.dataclass(frozen=True)
class _Table:
    """Texts with their labels: paths through the levels, and sets of labels by column."""

    texts: list[str]
    paths: list[tuple[str, ...]]
    several: dict[str, list[tuple[str, ...] | None]]
    splits: list[str]
    levels: tuple[str, ...]


def load_texts(config: TextConfig, views: Sequence[TextView]) -> TextDataset:
    """Loads a dataset of texts and encodes it for views, with what train alone shows.

    A text that stands twice is two examples; those of train that stand in the test too are left out of train, and counted in
    what is printed. An empty text is an example without a token. Classes of another split of which train has no example are
    counted in what is printed too.

    Raises:
        DataError: a file that is not there, bytes that are not UTF-8 (of TREC: not Latin-1), a row that does not fit, by its
            line, an empty split.
        TaxonomyError: labels that form no forest.
    """
    kind, _, name = config.source.partition(":")
    readers = {"trec": _trec, "jsonl": _jsonl, "csv": _csv}
    if kind not in readers or not name:
        raise DataError(f"no dataset '{config.source}': 'trec:DIR', 'jsonl:FILE' or 'csv:FILE'")
    table = readers[kind](pathlib.Path(name).expanduser(), config)
    tree, labels = (None, {}) if not table.levels else path_taxonomy(table.paths, table.levels, config.source)
    classes = {c: tuple(sorted({l for row in rows for l in row or ()})) for c, rows in table.several.items()}
    arrays = dict(labels)
    for column, names in classes.items():
        at = {n: i for i, n in enumerate(names)}
        told = np.full((len(table.texts), len(names)), np.nan, np.float32)
        for row, own in zip(told, table.several[column]):
            if own is not None:
                row[:] = 0
                row[[at[n] for n in own]] = 1
        arrays[column] = told
    rows = _split(table, config)
    train = set(rows["train"])
    _say_untaught(tree, labels, rows, config.source)
    encoder = TextEncoder.fit([table.texts[i] for i in sorted(train)], views)
    arrays |= encoder.encode(table.texts)
    for row, text in enumerate(table.texts):
        if not tokens(text):
            print(f"{config.source}: example {row} is empty: it is answered without a token")
            break
    cut = {k: n for k, n in encoder.cut(table.texts).items() if n}
    if cut:
        print(f"{config.source}: texts longer than what is read of them: " + ", ".join(f"{k} {n}" for k, n in cut.items()))
    whole = ArraySource(arrays, config.source)
    sources = {s: Subset(whole, np.array(at), f"{config.source} {s}") for s, at in rows.items()}
    return TextDataset(
        config.source,
        **sources,
        taxonomy=tree,
        inputs=encoder.inputs,
        targets=tuple(classes),
        encoder=encoder,
        classes=classes,
        texts={s: [table.texts[i] for i in at] for s, at in rows.items()},
    )


def _split(table: _Table, config: TextConfig) -> dict[str, list[int]]:
    """Split → rows of the table; a text of the test is in no other split."""
    rows = split_rows(
        config.source, table.splits, test=config.test, validation=config.validation,
        folds=config.folds, fold=config.fold, seed=config.seed, limit=config.limit,
    )  # fmt: skip
    known = {table.texts[i] for i in rows["test"]}
    kept = {s: [i for i in at if s == "test" or table.texts[i] not in known] for s, at in rows.items()}
    if gone := sum(map(len, rows.values())) - sum(map(len, kept.values())):
        print(f"{config.source}: {gone} training texts stand in the test too: left out")
    if empty := [s for s, at in kept.items() if not at]:
        raise DataError(f"{config.source}: no text of {empty[0]} is left, for all of them stand in the test too")
    return kept


def _say_untaught(tree: Taxonomy | None, labels: Mapping, rows: Mapping, name: str) -> None:
    """What no training example shows is answered wrongly, and counts so."""
    if tree is None:
        return
    finest = labels[tree.levels[-1]]
    taught = set(finest[rows["train"]].tolist())
    for s in ("validation", "test"):
        if gone := sorted({tree.names[-1][l] for l in finest[rows[s]].tolist() if l >= 0 and l not in taught}):
            shown = ", ".join(gone[:3]) + (", …" if len(gone) > 3 else "")
            print(f"{name}: classes of {s} of which train has no example, {len(gone)}: {shown}")


def _trec(folder: pathlib.Path, config: TextConfig) -> _Table:
    """Questions with `COARSE:fine` before them (Li & Roth 2002), in Latin-1."""
    if config.levels or config.several:
        raise DataError("data.levels and data.several do not apply to 'trec'")
    texts, paths, splits = [], [], []
    for name, file in TREC.items():
        try:
            lines = (folder / file).read_bytes().decode("latin-1").split("\n")
        except OSError as error:
            raise DataError(f"trec:{folder}: '{folder / file}' cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            label, _, text = line.strip().partition(" ")
            coarse, colon, fine = label.partition(":")
            if not (coarse and colon and fine):
                raise DataError(f"'{folder / file}' line {number}: '{label[:20]}' is no COARSE:fine before a question")
            texts.append(text)
            paths.append((coarse, label))
            splits.append(name)
    return _Table(texts, paths, {}, splits, ("coarse", "fine"))


def _jsonl(path: pathlib.Path, config: TextConfig) -> _Table:
    name, rows = f"jsonl:{path}", []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{name} line {number}: byte 0x{line[error.start]:02x} is not UTF-8: save it as UTF-8") from None
        except ValueError as error:
            raise DataError(f"{name} line {number} is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(TEXT), str):
            raise DataError(f"{name} line {number}: an object with a '{TEXT}' is needed")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{name} holds no examples")
    header = list(dict.fromkeys(column for _, row in rows for column in row))
    return _table(name, header, rows, config)


def _csv(path: pathlib.Path, config: TextConfig) -> _Table:
    header, rows = read_csv(path, f"csv:{path}")
    if TEXT not in header:
        raise DataError(f"csv:{path}: no column '{TEXT}' among {', '.join(header)}")
    return _table(f"csv:{path}", header, rows, config)


def _table(name: str, header: Sequence[str], rows: Sequence[tuple[int, dict]], config: TextConfig) -> _Table:
    labels = [c for c in header if c not in (TEXT, SPLIT)]
    for column in (*config.levels, *config.several):
        if column not in labels:
            raise DataError(f"{name}: no column '{column}'; there are {', '.join(labels)}")
    levels = config.levels or tuple(c for c in labels if c not in config.several)
    if not levels and not config.several:
        raise DataError(f"{name}: no column holds labels; there are {', '.join(header)}")
    splits = []
    for line, row in rows:
        given = str(row.get(SPLIT) or "train")
        if given not in SPLITS:
            raise DataError(f"{name} line {line}: no split '{given}'; there are {', '.join(SPLITS)}")
        splits.append(SPLITS[given])
    cells = [(line, {c: "" if row.get(c) is None else str(row[c]) for c in levels}) for line, row in rows]
    paths = label_paths(cells, list(levels), name) if levels else [()] * len(rows)
    several = {c: [_labels_of(row.get(c), f"{name} line {line}: '{c}'") for line, row in rows] for c in config.several}
    return _Table([row[TEXT] for _, row in rows], paths, several, splits, tuple(levels))


def _labels_of(cell, where: str) -> tuple[str, ...] | None:
    """The labels of a cell or list; None where they are not known (no value at all)."""
    if cell is None:
        return None
    if isinstance(cell, str):
        return tuple(dict.fromkeys(part.strip() for part in cell.split(SEPARATOR) if part.strip()))
    if isinstance(cell, list) and all(isinstance(part, str) for part in cell):
        return tuple(dict.fromkeys(cell))
    raise DataError(f"{where} holds {cell!r}, which is no list of labels")
