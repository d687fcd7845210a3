"""Datasets of ratings: `movielens:DIR` and `csv:FILE`, in splits and folds."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mgjax.config import key
from mgjax.data.folder_source import SPLITS
from mgjax.data.ratings import SIDES, Biases, PairSource, RatingsEncoder, Side, several
from mgjax.data.sources import DataError, Dataset, split_rows
from mgjax.data.table_source import read_csv

FOLDS = 5  # that MovieLens-100k comes with
AGES = ((18, "under 18"), (25, "18–24"), (35, "25–34"), (45, "35–44"), (50, "45–49"), (56, "50–55"), (200, "56 or more"))


@dataclasses.dataclass(frozen=True)
class RatingsConfig:
    source: str = key(
        "movielens:",
        "dataset: 'movielens:DIR' (MovieLens-100k) or 'csv:FILE' with columns user, item, rating, if known time and split, and "
        "user_NAME, item_NAME for groups",
    )
    fold: str = key("1", "which of the folds is the test, or all, one after the other")
    folds: int = key(0, "parts of a csv, for cross-validation (0: its own split, or data.test); MovieLens has 5", low=0)
    validation: float = key(0.05, "share of train that is split off for validation where there is none", low=0, high=0.9)
    test: float = key(0.2, "share of train that is split off for the test where there is no other split", low=0, high=0.9)
    bounds: tuple[float, ...] = key((), "lowest and highest rating (empty: of the dataset)")
    cold: float = key(0.0, "share of the users, and of the items, whose ratings train does not see", low=0, high=0.9)
    negatives: int = key(0, "pairs that nobody rated per rating, for the task 'seen' (0: no such task)", low=0)
    history: int = key(0, "ratings that are seen of a user and of an item, the latest (0: all)", low=0)
    limit: int = key(0, "use only so many examples of each split, for a quick look (0: all)", low=0)
    seed: int = key(0, "of the splits, of who is cold, and of negatives")
    workers: int = key(0, "unused: ratings are in memory", low=0)


@dataclasses.dataclass(frozen=True)
class RatingsDataset(Dataset):
    """Ratings, and what train tells of them.

    Attributes:
        encoder: what it knows was learned from train alone.
        biases: of train, the baseline.
        center, spread: mean and standard deviation of the ratings of train.
        bounds: between which ratings lie.
    """

    encoder: RatingsEncoder | None = None
    biases: Biases | None = None
    center: float = 0.0
    spread: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def what(self) -> str:
        known = {s: int(side.known.sum()) for s, side in self.encoder.sides.items()}
        return f"ratings of {known['user']:,} users and {known['item']:,} items"

    def record(self) -> dict:
        own = {"center": self.center, "spread": self.spread, "bounds": list(self.bounds), "encoder": self.encoder.record()}
        own["columns"] = [c for s in SIDES for c in (s, *self.encoder.groups(s))]
        return super().record() | own


@dataclasses.dataclass(frozen=True)
class _Ratings:
    """Rows in order of time, of users and items by their positions."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    splits: list[str]
    sides: dict[str, Side]


def load_ratings(config: RatingsConfig) -> RatingsDataset:
    """Loads ratings, and what train tells of users and items.

    Of a pair that stands twice the latest rating counts; how many do is printed. Who has no rating in train is new: their id
    is 0, and what is known of them are their groups.

    Raises:
        DataError: a file that is not there or not UTF-8, a row that does not fit, by its line, such as a rating outside its
            bounds, a fold that there is not, an empty split.
    """
    kind, _, name = config.source.partition(":")
    if kind not in ("movielens", "csv") or not name:
        raise DataError(f"no dataset '{config.source}': 'movielens:DIR' or 'csv:FILE'")
    bounds = tuple(config.bounds) or ((1.0, 5.0) if kind == "movielens" else None)
    if bounds and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise DataError(f"data.bounds={bounds}: a lowest and a highest rating are needed")
    found = (_movielens if kind == "movielens" else _csv)(pathlib.Path(name).expanduser(), config, bounds)
    bounds = bounds or (float(found.ratings.min()), float(found.ratings.max()))
    if not bounds[0] < bounds[1]:
        raise DataError(f"{config.source}: all ratings are {bounds[0]:g}; there is nothing to learn")
    found = _latest(found, config.source)
    own = kind == "csv" and config.folds
    rows = split_rows(
        config.source, found.splits, test=config.test, validation=config.validation, folds=config.folds if own else 0,
        fold=fold_of(config) if own else 1, seed=config.seed, limit=config.limit,
    )  # fmt: skip
    rows = {s: np.array(at) for s, at in rows.items()}
    if config.cold:
        _hide(rows, found, config)
    of_train = rows["train"]
    users, items, ratings = found.users[of_train], found.items[of_train], found.ratings[of_train]
    sides = {
        s: dataclasses.replace(side, known=np.isin(np.arange(len(side.names)), at))
        for (s, side), at in zip(found.sides.items(), (users, items))
    }
    biases = Biases(users, items, ratings, *(len(side.names) for side in sides.values()))
    spread = float(ratings.std()) or 1.0
    encoder = RatingsEncoder(
        sides["user"], sides["item"], (users, items, np.round((ratings - biases(users, items)) / spread, 4)), config.history
    )
    splits = {s: _source(found, at, s, encoder, config) for s, at in rows.items()}
    example = splits["train"].take(np.arange(1))
    return RatingsDataset(
        config.source,
        **splits,
        inputs=tuple(k for k in example if not k.startswith("present/") and k not in ("valid", "rating", "seen")),
        targets=tuple(splits["train"].targets),
        present=tuple(k.partition("/")[2] for k in example if k.startswith("present/")),
        encoder=encoder,
        biases=biases,
        center=float(ratings.mean()),
        spread=spread,
        bounds=bounds,
    )


def fold_of(config: RatingsConfig) -> int:
    """The number of the fold. DataError for one that there is not."""
    count = FOLDS if config.source.startswith("movielens") else config.folds or 1
    if not config.fold.isdigit() or not 1 <= int(config.fold) <= count:
        raise DataError(f"data.fold={config.fold}: {config.source} has folds 1 to {count}, or all")
    return int(config.fold)


def folds_of(config: RatingsConfig) -> list[RatingsConfig]:
    """The configs of all folds that a config asks for."""
    if config.fold != "all":
        return [config]
    count = FOLDS if config.source.startswith("movielens") else config.folds
    if not count:
        raise DataError(f"data.fold=all: {config.source} has no folds of its own; say how many by --config.data.folds")
    return [dataclasses.replace(config, fold=str(i + 1)) for i in range(count)]


def _latest(found: _Ratings, name: str) -> _Ratings:
    pair = found.users.astype(np.int64) * len(found.sides["item"].names) + found.items
    _, last = np.unique(pair[::-1], return_index=True)
    keep = np.sort(len(pair) - 1 - last)
    if gone := len(pair) - len(keep):
        print(f"{name}: {gone} pairs of a user and an item stand there again later: the latest rating counts")
    return dataclasses.replace(
        found, users=found.users[keep], items=found.items[keep], ratings=found.ratings[keep],
        splits=[found.splits[i] for i in keep],
    )  # fmt: skip


def _hide(rows: dict[str, np.ndarray], found: _Ratings, config: RatingsConfig) -> None:
    """Takes a share of the users, and of the items, out of train and validation."""
    rng = np.random.default_rng((config.seed, 0xC01D))
    for s, of in (("user", found.users), ("item", found.items)):
        count = len(found.sides[s].names)
        cold = rng.permutation(count)[: max(1, round(config.cold * count))]
        for split in ("train", "validation"):
            rows[split] = rows[split][~np.isin(of[rows[split]], cold)]
    if empty := [s for s, at in rows.items() if not len(at)]:
        raise DataError(f"{config.source}: with data.cold={config.cold:g} no rating is left for {empty[0]}")


def _source(found: _Ratings, rows: np.ndarray, split: str, encoder: RatingsEncoder, config: RatingsConfig) -> PairSource:
    users, items = found.users[rows], found.items[rows]
    targets = {"rating": found.ratings[rows].astype(np.float32)}
    if config.negatives:
        others = _unrated(found, np.repeat(users, config.negatives), (config.seed, list(SPLITS.values()).index(split)))
        none = len(others[0])
        users, items = np.concatenate([users, others[0]]), np.concatenate([items, others[1]])
        targets["rating"] = np.concatenate([targets["rating"], np.full(none, np.nan, np.float32)])
        targets["seen"] = np.repeat(np.float32([1, 0]), (len(rows), none))[:, None]
    return PairSource(encoder, users, items, targets, f"{config.source} {split}")


def _unrated(found: _Ratings, users: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that nobody rated: the users given, each with an item at random."""
    count = len(found.sides["item"].names)
    rated = np.unique(found.users.astype(np.int64) * count + found.items)
    full = np.bincount((rated // count).astype(np.int64), minlength=users.max() + 1) >= count
    users = users[~full[users]] if full[users].any() else users
    rng = np.random.default_rng((0x5EE, *seed))
    items = rng.integers(0, count, len(users))
    while len(again := np.flatnonzero(np.isin(users.astype(np.int64) * count + items, rated))):
        items[again] = rng.integers(0, count, len(again))
    return users, items


def _movielens(folder: pathlib.Path, config: RatingsConfig, bounds: tuple[float, float]) -> _Ratings:
    """MovieLens-100k (Harper & Konstan 2015, doi:10.1145/2827872), in Latin-1, with the folds that it comes with."""

    def lines(file: str) -> list[str]:
        try:
            return [l for l in (folder / file).read_bytes().decode("latin-1").split("\n") if l.strip()]
        except OSError as error:
            raise DataError(f"movielens:{folder}: '{folder / file}' cannot be read: {error.strerror}") from None

    def cells(file: str, separator: str, count: int) -> list[list[str]]:
        rows = [l.split(separator) for l in lines(file)]
        if wrong := [i for i, row in enumerate(rows, 1) if len(row) != count]:
            raise DataError(f"'{folder / file}' line {wrong[0]}: {count} cells are needed")
        return rows

    genres = [row[0] for row in cells("u.genre", "|", 2)]
    users, items = cells("u.user", "|", 5), cells("u.item", "|", 5 + len(genres))
    rows = [(i, *row) for i, row in enumerate(cells("u.data", "\t", 4), 1)]
    tested = {tuple(row[:2]) for row in cells(f"u{fold_of(config)}.test", "\t", 4)}
    decade = lambda date: [f"{date[-4:-1]}0s"] if re.fullmatch(r".*\d{4}", date) else []
    sides = {
        "user": Side.of(
            [u[0] for u in users],
            {
                "age": [[next((name for top, name in AGES if int(u[1]) < top), AGES[-1][1])] for u in users],
                "gender": [[u[2]] for u in users],
                "occupation": [[u[3]] for u in users],
            },
        ),
        "item": Side.of(
            [i[0] for i in items],
            {
                "decade": [decade(i[2]) for i in items],
                "genre": [[g for g, own in zip(genres, i[5:]) if own == "1"] for i in items],
            },
        ),
    }
    splits = ["test" if (user, item) in tested else "train" for _, user, item, *_ in rows]
    return _rows(rows, splits, sides, bounds, f"'{folder / 'u.data'}'")


def _csv(path: pathlib.Path, config: RatingsConfig, bounds: tuple[float, float] | None) -> _Ratings:
    name = f"csv:{path}"
    header, rows = read_csv(path, name)
    if lacking := [c for c in ("user", "item", "rating") if c not in header]:
        raise DataError(f"{name}: no column '{lacking[0]}' among {', '.join(header)}")
    sides = {}
    for s in SIDES:
        told: dict[str, dict] = {c.removeprefix(f"{s}_"): {} for c in header if c.startswith(f"{s}_")}
        names: dict[str, None] = {}
        for line, row in rows:
            if not (own := row[s].strip()):
                raise DataError(f"{name} line {line}: no {s}")
            names.setdefault(own)
            for field, values in told.items():
                values_of = several(row[f"{s}_{field}"])
                if values.setdefault(own, values_of) != values_of:
                    raise DataError(f"{name} line {line}: {s} '{own}' has another {s}_{field} than before")
        sides[s] = Side.of(list(names), {f: [values[n] for n in names] for f, values in told.items()})
    splits = []
    for line, row in rows:
        given = str(row.get("split") or "train")
        if given not in SPLITS:
            raise DataError(f"{name} line {line}: no split '{given}'; there are {', '.join(SPLITS)}")
        splits.append(SPLITS[given])
    cells = [(line, row["user"].strip(), row["item"].strip(), row["rating"], row.get("time") or "0") for line, row in rows]
    return _rows(cells, splits, sides, bounds, name)


def _rows(rows: Sequence[tuple], splits: Sequence[str], sides: Mapping[str, Side], bounds, name: str) -> _Ratings:
    """(line, user, item, rating, time) → positions and numbers, in order of time."""
    place = {s: {n: i for i, n in enumerate(side.names)} for s, side in sides.items()}
    users, items, ratings, times = [], [], [], []
    for line, user, item, rating, when in rows:
        for s, own in (("user", user), ("item", item)):
            if own not in place[s]:
                raise DataError(f"{name} line {line}: {s} '{own}' is not listed")
        try:
            value, moment = float(rating), float(when)
        except ValueError:
            raise DataError(f"{name} line {line}: rating '{rating}' or time '{when}' is no number") from None
        if not np.isfinite(value) or (bounds and not bounds[0] <= value <= bounds[1]):
            limits = f"between {bounds[0]:g} and {bounds[1]:g}" if bounds else "a finite number"
            raise DataError(f"{name} line {line}: the rating is {rating}, not {limits}; --config.data.bounds says otherwise")
        users.append(place["user"][user])
        items.append(place["item"][item])
        ratings.append(value)
        times.append(moment)
    order = np.argsort(np.array(times), kind="stable")
    take = lambda values, dtype: np.array(values, dtype)[order]
    return _Ratings(
        take(users, np.int64), take(items, np.int64), take(ratings, np.float64), [splits[i] for i in order], dict(sides)
    )
