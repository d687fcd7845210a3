"""Tables: `csv:FILE`, `parquet:FILE` and the sets that scikit-learn brings, encoded by what train alone shows."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mgjax.config import key
from mgjax.data.folder_source import SPLITS
from mgjax.data.labels import path_taxonomy
from mgjax.data.sources import ArraySource, DataError, Dataset, Subset, split_rows
from mgjax.data.table_source import label_paths, read_csv
from mgjax.granularity import Columns

MISSING, UNSEEN = 0, 1  # what a cell without a value, and a category that training did not show, are encoded as
NOTHING = ("", "na", "n/a", "nan", "null", "none", "?")  # cells without a value, in lower case
BUNDLED = ("iris", "wine", "breast_cancer", "digits", "diabetes")
SPLIT = "split"


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    source: str = key("sklearn:wine", f"dataset: csv:FILE, parquet:FILE or sklearn:NAME ({', '.join(BUNDLED)})")
    levels: tuple[str, ...] = key((), "columns that are levels of a taxonomy, coarse to fine")
    targets: tuple[str, ...] = key((), "columns of numbers that are predicted")
    categories: tuple[str, ...] = key((), "columns that are categories although all that they hold are numbers")
    ignore: tuple[str, ...] = key((), "columns that are not read, such as a row's name")
    validation: float = key(0.1, "share of train that is split off for validation where there is none", low=0, high=0.9)
    test: float = key(0.2, "share of train that is split off for the test where there is no other split", low=0, high=0.9)
    folds: int = key(0, "the test is one of so many parts of train, for cross-validation (0: the dataset's own)", low=0)
    fold: int = key(1, "which of them", low=1)
    limit: int = key(0, "use only so many examples of each split, for a quick look (0: all)", low=0)
    seed: int = key(0, "of the splits that are split off")
    workers: int = key(0, "unused: tables are encoded once", low=0)


class ColumnEncoder:
    """Cells → numbers, by what the training rows show.

    A column of numbers becomes (x − mean) / std, and 0 where there is none; if training rows lack it, a further column is 1
    where it is lacking. A column of categories becomes their numbers, which begin at 2: 0 where there is none, 1 for one that
    training did not show. A column that no training row has is left out.

    Args:
        numbers: column → (mean, std, whether training rows lack it).
        categories: column → categories, in the order of their numbers.

    Example:
        >>> encoder = ColumnEncoder.fit({"age": ["1", "3", ""], "town": ["b", "a", "b"], "gone": ["", "?", "NA"]})
        >>> made = encoder.encode({"age": ["2", ""], "town": ["b", "c"]}, Columns(("age", "town")))
        >>> made["numbers"].tolist(), made["categories"].tolist(), encoder.left_out
        ([[0.0, 0.0], [0.0, 1.0]], [[3], [1]], ['gone'])
    """

    def __init__(
        self,
        numbers: Mapping[str, tuple[float, float, bool]],
        categories: Mapping[str, Sequence[str]],
        left_out: Sequence[str] = (),
    ):
        self.numbers, self.left_out = dict(numbers), list(left_out)
        self.categories = {c: list(v) for c, v in categories.items()}
        self._at = {c: {name: i + 2 for i, name in enumerate(v)} for c, v in self.categories.items()}

    @classmethod
    def fit(cls, table: Mapping[str, Sequence], categories: Sequence[str] = ()) -> ColumnEncoder:
        """Learns from columns of cells, numbers or texts.

        Args:
            categories: columns that are categories whatever they hold; else a column is one if a cell is no number.
        """
        numbers, named, left_out = {}, {}, []
        for column, cells in table.items():
            present = [c for c in cells if not lacks(c)]
            if not present:
                left_out.append(column)
            elif column in categories or any(_number(c) is None for c in present):
                named[column] = sorted({_name(c) for c in present})
            else:
                values = np.array([_number(c) for c in present], np.float64)
                std = float(values.std())
                numbers[column] = (
                    float(values.mean()),
                    std if std > 1e-12 * max(1.0, abs(values).max()) else 1.0,
                    len(present) < len(cells),
                )
        return cls(numbers, named, left_out)

    def columns(self, view: Columns) -> tuple[list[str], list[str]]:
        """(columns of numbers, of categories) that a view sees, in the order of the view.

        Raises:
            DataError: a column that is not there.
        """
        known = [*self.numbers, *self.categories]
        if unknown := [n for n in view.names if n not in known]:
            why = "no training row has it" if unknown[0] in self.left_out else f"there are {', '.join(known)}"
            raise DataError(f"no column '{unknown[0]}' that a granularity could see: {why}")
        names = view.names or known
        return [n for n in names if n in self.numbers], [n for n in names if n in self.categories]

    def sizes(self, view: Columns) -> tuple[int, tuple[int, ...]]:
        """(how many numbers a view sees, sizes of its categories)."""
        numbers, categories = self.columns(view)
        return len(numbers) + sum(self.numbers[n][2] for n in numbers), tuple(len(self.categories[c]) + 2 for c in categories)

    def encode(self, table: Mapping[str, Sequence], view: Columns) -> dict[str, np.ndarray]:
        """{"numbers": float32 [rows, N], "categories": int32 [rows, M]}.

        Raises:
            DataError: a cell that is no number in a column of numbers, by its row.
        """
        numbers, categories = self.columns(view)
        count = len(next(iter(table.values())))
        parts, lacking = [], []
        for column in numbers:
            mean, std, sometimes = self.numbers[column]
            values = np.full(count, np.nan)
            for row, cell in enumerate(table[column]):
                if not lacks(cell):
                    if (value := _number(cell)) is None:
                        raise DataError(f"column '{column}' holds numbers in training, but {cell!r} in row {row}")
                    values[row] = value
            parts.append(np.where(np.isnan(values), 0.0, (values - mean) / std))
            if sometimes:
                lacking.append(np.isnan(values))
        ids = [
            [MISSING if lacks(c) else self._at[column].get(_name(c), UNSEEN) for c in table[column]] for column in categories
        ]
        stack = lambda columns, dtype: np.array(columns, dtype).T.reshape(count, len(columns))
        return {"numbers": stack([*parts, *lacking], np.float32), "categories": stack(ids, np.int32)}


def lacks(cell) -> bool:
    """Whether a cell holds no value."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    return isinstance(cell, str) and cell.strip().lower() in NOTHING


def _number(cell) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _name(cell) -> str:
    """The same category whether it is read from text or from a typed column: 3.0 is 3."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


@dataclasses.dataclass(frozen=True)
class ColumnsDataset(Dataset):
    """Rows of a table, encoded for views.

    Attributes:
        encoder: what it knows was learned from train alone.
        centers: target → mean over train.
        spreads: target → standard deviation over train.
    """

    encoder: ColumnEncoder | None = None
    centers: dict[str, float] = dataclasses.field(default_factory=dict)
    spreads: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def what(self) -> str:
        return "rows"

    def record(self) -> dict:
        of_targets = {"centers": self.centers, "spreads": self.spreads}
        of_targets["columns"] = [*self.encoder.numbers, *self.encoder.categories]
        return super().record() | of_targets | {k: getattr(self.encoder, k) for k in ("numbers", "categories", "left_out")}


def load_columns(config: ColumnsConfig, views: Sequence[Columns]) -> ColumnsDataset:
    """Loads a table and encodes it for views, with what train alone shows.

    A row that stands twice is two examples; how many do is printed, and how many of the test stand in train too.

    Raises:
        DataError: a file or column that is not there, a row that does not fit, by its line, an empty split, a target that is
            no number.
        TaxonomyError: labels that form no forest.
    """
    name = config.source
    table = _read(config)
    levels, targets = list(config.levels), list(config.targets)
    for column in (*levels, *targets, *config.categories, *config.ignore):
        if column not in table:
            raise DataError(f"{name}: no column '{column}'; there are {', '.join(table)}")
    if not levels and not targets:
        raise DataError(
            f"{name}: name what is predicted, by --config.data.levels or --config.data.targets; there are {', '.join(table)}"
        )
    count = len(next(iter(table.values())))
    given = [str(c or "train") for c in table.get(SPLIT, ["train"] * count)]
    if wrong := [s for s in given if s not in SPLITS]:
        raise DataError(f"{name}: no split '{wrong[0]}'; there are {', '.join(SPLITS)}")
    rows = split_rows(
        name, [SPLITS[s] for s in given], test=config.test, validation=config.validation,
        folds=config.folds, fold=config.fold, seed=config.seed, limit=config.limit,
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    tree = None
    if levels:
        cells = [(i + 1, {l: "" if lacks(table[l][i]) else _name(table[l][i]) for l in levels}) for i in range(count)]
        tree, labels = path_taxonomy(label_paths(cells, levels, name), levels, name)
        arrays |= labels
    centers, spreads = {}, {}
    for target in targets:
        values = np.array(
            [np.nan if lacks(c) else _target(c, f"{name} row {i + 1}: '{target}'") for i, c in enumerate(table[target])]
        )
        known = values[rows["train"]]
        known = known[np.isfinite(known)]
        if not len(known):
            raise DataError(f"{name}: no training row has the target '{target}'")
        centers[target], spreads[target] = float(known.mean()), float(known.std()) or 1.0
        arrays[target] = values.astype(np.float32)
    seen = {c: v for c, v in table.items() if c not in (*levels, *targets, *config.ignore, SPLIT)}
    pick = lambda at: {c: [v[i] for i in at] for c, v in seen.items()}
    encoder = ColumnEncoder.fit(pick(rows["train"]), config.categories)
    if encoder.left_out:
        print(f"{name}: left out, since no training row has them: {', '.join(encoder.left_out)}")
    if not (encoder.numbers or encoder.categories):
        raise DataError(f"{name}: no column is left to predict from")
    for view in views:
        arrays |= {f"{view.key}/{kind}": a for kind, a in encoder.encode(seen, view).items()}
    _say_repeated(table, rows, name)
    whole = ArraySource(arrays, name)
    return ColumnsDataset(
        name,
        **{s: Subset(whole, np.array(at), f"{name} {s}") for s, at in rows.items()},
        taxonomy=tree,
        inputs=tuple(f"{v.key}/{kind}" for v in views for kind in ("numbers", "categories")),
        targets=tuple(targets),
        encoder=encoder,
        centers=centers,
        spreads=spreads,
    )


def _read(config: ColumnsConfig) -> dict[str, list]:
    """Column → cells."""
    kind, _, name = config.source.partition(":")
    if kind == "csv" and name:
        header, rows = read_csv(pathlib.Path(name).expanduser(), config.source)
        return {c: [row[c] for _, row in rows] for c in header}
    if kind == "parquet" and name:
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError("'parquet:' needs pyarrow: pip install 'mgjax[parquet]'") from None
        try:
            table = pyarrow.parquet.read_table(pathlib.Path(name).expanduser())
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{config.source} cannot be read: {error}") from None
        if not table.num_rows:
            raise DataError(f"{config.source} holds no examples")
        return {c: table.column(c).to_pylist() for c in table.column_names}
    if kind == "sklearn" and name in BUNDLED:
        try:
            from sklearn import datasets
        except ImportError:
            raise DataError(
                f"'{config.source}' comes with scikit-learn, which is not installed: pip install scikit-learn"
            ) from None
        found = getattr(datasets, f"load_{name}")()
        columns = {str(c): found.data[:, i].tolist() for i, c in enumerate(found.feature_names)}
        names = getattr(found, "target_names", None)
        labels = found.target.tolist() if name == "diabetes" else [str(names[t]) for t in found.target]
        return columns | {"target" if name == "diabetes" else "class": labels}
    raise DataError(f"no dataset '{config.source}': 'csv:FILE', 'parquet:FILE' or 'sklearn:NAME', one of {', '.join(BUNDLED)}")


def _target(cell, where: str) -> float:
    if (value := _number(cell)) is None:
        raise DataError(f"{where} holds {cell!r}, which is no number: predict it by --config.data.levels")
    return value


def _say_repeated(table: Mapping[str, Sequence], rows: Mapping[str, Sequence[int]], name: str) -> None:
    whole = list(zip(*(table[c] for c in table if c != SPLIT)))
    text = [repr(row) for row in whole]
    twice = len(text) - len(set(text))
    both = len({text[i] for i in rows["train"]} & {text[i] for i in rows["test"]})
    if twice:
        print(f"{name}: {twice} rows stand there before; {both} of the test stand in train too")
