"""Ratings: `movielens:DIR` and `csv:FILE`, users and items with what is known of them, and who may be new.

Everything that an example shows beside its own rating comes from the ratings of train: which users and items are known, what
else the user rated, who else rated the item. An example's own pair is left out of both, so that training sees what a test does.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mgjax.config import key
from mgjax.contracts import Batch
from mgjax.data.folder_source import SPLITS
from mgjax.data.sources import DataError, Dataset, split_rows
from mgjax.data.table_source import read_csv

FOLDS = 5  # that MovieLens-100k comes with
AGES = ((18, "under 18"), (25, "18–24"), (35, "25–34"), (45, "35–44"), (50, "45–49"), (56, "50–55"), (200, "56 or more"))
SEPARATOR = ";"  # between the values of a cell that holds several
SIDES = ("user", "item")
LISTS = {"user": "history", "item": "audience"}  # what else a user rated, who else rated an item
DAMPING = {"user": 5.0, "item": 3.0}  # of the biases, in ratings; chosen on the validation of the first fold of MovieLens-100k


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
class Side:
    """Users, or items.

    Attributes:
        names: as the dataset calls them.
        known: bool [N]; whether train has a rating of them.
        vocabularies: field → its values; their ids begin at 1.
        groups: field → int32 [N, K]; ids of the values that each has, 0 where there are fewer.
    """

    names: list[str]
    known: np.ndarray
    vocabularies: dict[str, list[str]]
    groups: dict[str, np.ndarray]

    @classmethod
    def of(cls, names: Sequence[str], told: Mapping[str, Sequence[Sequence[str]]]) -> Side:
        """Without knowing yet whom train knows. `told`: field → the values of each."""
        vocabularies = {f: sorted({v for own in values for v in own}) for f, values in told.items()}
        groups = {f: ids_of(values, vocabularies[f]) for f, values in told.items()}
        return cls(list(names), np.ones(len(names), bool), vocabularies, groups)


def ids_of(values: Sequence[Sequence[str]], vocabulary: Sequence[str], width: int = 0) -> np.ndarray:
    """int32 [rows, K]; ids from 1, 0 where there is no further value; values that the vocabulary lacks are left out."""
    at = {v: i + 1 for i, v in enumerate(vocabulary)}
    rows = [[at[v] for v in own if v in at] for own in values]
    ids = np.zeros((len(rows), max([1, width, *map(len, rows)])), np.int32)
    for row, own in zip(ids, rows):
        row[: len(own)] = own
    return ids[:, :width] if width else ids


class Biases:
    """Mean, and how much users and items deviate from it: r = μ + b_u + b_i, by damped means, one after the other.

    The baseline of Koren 2010 (doi:10.1145/1644873.1644874, section 2.1), repeated until it settles.

    Example:
        >>> biases = Biases(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([5.0, 3.0, 3.0]), 2, 2)
        >>> round(biases.mean, 3), biases(np.array([0]), np.array([0])).round(2).tolist()
        (3.667, [4.07])
    """

    def __init__(self, users, items, ratings, count_users: int, count_items: int, rounds: int = 10):
        self.mean = float(ratings.mean())
        self.user, self.item = np.zeros(count_users), np.zeros(count_items)
        damped = lambda of, rest, size, by: np.bincount(of, rest, size) / (np.bincount(of, minlength=size) + by)
        for _ in range(rounds):
            self.item = damped(items, ratings - self.mean - self.user[users], count_items, DAMPING["item"])
            self.user = damped(users, ratings - self.mean - self.item[items], count_users, DAMPING["user"])

    def __call__(self, users, items) -> np.ndarray:
        """Predictions; whoever has no rating has bias 0."""
        return self.mean + self.user[users] + self.item[items]


class RatingsEncoder:
    """Pairs of a user and an item → what a model sees of them.

    Inputs: `user`, `item` int32 [B], 0 for whom train does not know; `user_FIELD`, `item_FIELD` int32 [B, K]; `history` and
    `audience` int32 [B, L], ids of items and of users, the latest first, with `history_values`, `audience_values` float32: by
    how much the rating lies above what mean and biases say, in standard deviations of ratings. `present/user`, `present/item`,
    `present/pair` and `present/history` say who is known.

    Args:
        users, items: the sides.
        entries: (int user, int item, float deviation) of train, in order of time.
        length: of the lists; 0: the longest.
    """

    def __init__(self, users: Side, items: Side, entries: tuple[np.ndarray, np.ndarray, np.ndarray], length: int = 0):
        self.sides = {"user": users, "item": items}
        self.entries, self.length = tuple(np.asarray(e) for e in entries), length
        us, its, deviation = self.entries
        self.lists = {
            "user": _lists(us, its, deviation, len(users.names), length),
            "item": _lists(its, us, deviation, len(items.names), length),
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Field → ids that there are, 0 included."""
        count = {s: len(side.names) + 1 for s, side in self.sides.items()}
        groups = {f"{s}_{f}": len(v) + 1 for s, side in self.sides.items() for f, v in side.vocabularies.items()}
        return count | groups | {"history": count["item"], "audience": count["user"]}

    def groups(self, side: str) -> tuple[str, ...]:
        """The fields of a side that are groups."""
        return tuple(f"{side}_{f}" for f in self.sides[side].vocabularies)

    def encode(self, users: np.ndarray, items: np.ndarray, told: Mapping[str, np.ndarray] | None = None) -> dict:
        """Inputs and what is present, for pairs by their positions; −1: nobody that the dataset names.

        Args:
            told: groups that are said in place of the known ones, int32 [B, K].
        """
        at, made, there = {"user": users, "item": items}, {}, {}
        for s, side in self.sides.items():
            there[s] = (at[s] >= 0) & side.known[at[s]]
            made[s] = np.where(there[s], at[s] + 1, 0).astype(np.int32)
            for field, groups in side.groups.items():
                made[f"{s}_{field}"] = np.where((at[s] >= 0)[:, None], groups[at[s]], 0).astype(np.int32)
        others = {"user": items, "item": users}
        for s, name in LISTS.items():
            ids, values = (table[at[s]] for table in self.lists[s])
            own = (ids == others[s][:, None] + 1) | ~there[s][:, None]
            made[name], made[f"{name}_values"] = np.where(own, 0, ids), np.where(own, np.float32(0), values)
        made |= told or {}
        seen = (made["history"] > 0).any(1) & (made["audience"] > 0).any(1)
        present = {"user": there["user"], "item": there["item"], "pair": there["user"] & there["item"], "history": seen}
        return made | {f"present/{g}": mask for g, mask in present.items()}

    def read(self, rows: Sequence[Mapping]) -> dict:
        """As `encode`, of rows of names: `user`, `item`, and groups of whoever is new or described anew.

        A name that the dataset lacks is somebody new; so is no name at all.

        Raises:
            DataError: a row with nothing that is known, by its number.
        """
        at, told = {}, {}
        for s, side in self.sides.items():
            place = {name: i for i, name in enumerate(side.names)}
            at[s] = np.array([place.get(str(row.get(s) or "").strip(), -1) for row in rows])
            for field, groups in side.groups.items():
                cells = [str(row.get(f"{s}_{field}") or "") for row in rows]
                said = ids_of([_several(c) for c in cells], side.vocabularies[field], groups.shape[1])
                kept = np.where((at[s] >= 0)[:, None], groups[at[s]], 0)
                told[f"{s}_{field}"] = np.where(np.array([bool(c) for c in cells])[:, None], said, kept).astype(np.int32)
        for i in range(len(rows)):
            if all(a[i] < 0 for a in at.values()) and not any(t[i].any() for t in told.values()):
                known = ", ".join([*SIDES, *self.groups("user"), *self.groups("item")])
                raise DataError(f"row {i + 1} of what is to be predicted names nobody that is known; there are {known}")
        return self.encode(at["user"], at["item"], told)

    def record(self) -> dict:
        """What makes the same encoder again, ready for JSON; see `restored`."""
        sides = {
            s: {
                "names": side.names,
                "known": side.known.tolist(),
                "vocabularies": side.vocabularies,
                "groups": {f: g.tolist() for f, g in side.groups.items()},
            }
            for s, side in self.sides.items()
        }
        return sides | {"entries": [e.tolist() for e in self.entries], "length": self.length}

    @classmethod
    def restored(cls, record: Mapping) -> RatingsEncoder:
        """The encoder of a record."""
        users, items = (
            Side(
                of["names"], np.array(of["known"], bool), of["vocabularies"],
                {f: np.array(g, np.int32) for f, g in of["groups"].items()},
            )
            for of in (record[s] for s in SIDES)
        )  # fmt: skip
        return cls(users, items, record["entries"], record["length"])


def _lists(of: np.ndarray, others: np.ndarray, values: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32 [count, L]: ids and values of the others, the latest first."""
    longest = int(np.bincount(of, minlength=1).max()) if len(of) else 1
    length = min(length, longest) if length else longest
    ids, kept = np.zeros((count, length), np.int32), np.zeros((count, length), np.float32)
    order = np.argsort(of[::-1], kind="stable")  # by whose they are, each from the last to the first
    of, others, values = (a[::-1][order] for a in (of, others, np.asarray(values, np.float32)))
    place = np.arange(len(of)) - np.searchsorted(of, of)
    keep = place < length
    ids[of[keep], place[keep]], kept[of[keep], place[keep]] = others[keep] + 1, values[keep]
    return ids, kept


class PairSource:
    """Pairs of a user and an item with what is asked of them, encoded when they are taken."""

    def __init__(self, encoder: RatingsEncoder, users, items, targets: Mapping[str, np.ndarray], name: str):
        self.encoder, self.users, self.items, self.targets, self.name = encoder, users, items, dict(targets), name

    def __len__(self) -> int:
        return len(self.users)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        made = self.encoder.encode(self.users[indices], self.items[indices])
        return {"valid": np.ones(len(indices), bool)} | made | {t: v[indices] for t, v in self.targets.items()}


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


# ---------------------------------------------------------------------- files


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
                values_of = _several(row[f"{s}_{field}"])
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


def _several(cell: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in cell.split(SEPARATOR) if part.strip()))


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


# ---------------------------------------------------------------------- training


class NewcomerDropout:
    """In training, takes some users, and some items, for new: what is known of them alone is absent.

    So that a model learns what to say of who is new, from their groups.

    Attributes:
        rate: probability for the user, and for the item, of each example; a stage's strength scales it.

    Example:
        >>> batch = Batch({}, {}, jax.numpy.ones(2, bool), jax.numpy.arange(2), {"pair": jax.numpy.ones(2, bool)})
        >>> NewcomerDropout(0.999)(batch, jax.random.key(0)).present["pair"].tolist()
        [False, False]
    """

    def __init__(self, rate: float = 0.0):
        self.rate = rate

    def __call__(self, batch: Batch, rng: jax.Array, strength: float = 1.0, pieces: int = 1) -> Batch:
        if pieces != 1:
            raise DataError("ratings are not cut into pieces: plan.kind=progressive_jigsaw is for images")
        rate = self.rate * strength
        if not rate:
            return batch
        known = ~jax.random.bernoulli(rng, rate, (2, batch.size))
        both = known[0] & known[1]
        of = {"user": known[0], "item": known[1], "pair": both, "history": both}
        return batch.replace(present={g: mask & of.get(g, True) for g, mask in batch.present.items()})

    def normalise(self, batch: Batch) -> Batch:
        return batch
