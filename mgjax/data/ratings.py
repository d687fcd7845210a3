"""Users and items with what is known of them, and who may be new.

Everything that an example shows beside its own rating comes from the ratings of train: which users and items are known, what
else the user rated, who else rated the item. An example's own pair is left out of both, so that training sees what a test does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mgjax.contracts import Batch
from mgjax.data.sources import DataError

SEPARATOR = ";"  # between the values of a cell that holds several
SIDES = ("user", "item")
LISTS = {"user": "history", "item": "audience"}  # what else a user rated, who else rated an item
DAMPING = {"user": 5.0, "item": 3.0}  # of the biases, in ratings; chosen on the validation of the first fold of MovieLens-100k


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


def several(cell: str) -> list[str]:
    """The values of a cell that holds any number of them."""
    return list(dict.fromkeys(part.strip() for part in cell.split(SEPARATOR) if part.strip()))


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
            DataError: a row with nothing that is known.
        """
        at, told = {}, {}
        for s, side in self.sides.items():
            place = {name: i for i, name in enumerate(side.names)}
            at[s] = np.array([place.get(str(row.get(s) or "").strip(), -1) for row in rows])
            for field, groups in side.groups.items():
                cells = [str(row.get(f"{s}_{field}") or "") for row in rows]
                said = ids_of([several(c) for c in cells], side.vocabularies[field], groups.shape[1])
                kept = np.where((at[s] >= 0)[:, None], groups[at[s]], 0)
                told[f"{s}_{field}"] = np.where(np.array([bool(c) for c in cells])[:, None], said, kept).astype(np.int32)
        for i in range(len(rows)):
            if all(a[i] < 0 for a in at.values()) and not any(t[i].any() for t in told.values()):
                known = ", ".join([*SIDES, *self.groups("user"), *self.groups("item")])
                row = ", ".join(f"{k}={v}" for k, v in rows[i].items()) or "an empty row"
                raise DataError(f"'{row}' names nobody that is known; there are {known}")
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
