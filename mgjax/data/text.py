"""What text branches see: vocabularies learned from the training texts alone, and texts as arrays."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import unicodedata
import zlib
from collections.abc import Container, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mgjax.contracts import Batch
from mgjax.data.sources import DataError
from mgjax.granularity import Characters, Sentence, Words

NONE, UNSEEN = 0, 1  # what no token, and one that training did not show, are encoded as
TextView = Characters | Words | Sentence
_COMMON = 10  # texts in which a word that is common stands at least, however few there are
_BEGIN, _END = "\x02", "\x03"
_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and signs, in lower case.

    Example:
        >>> tokens("Who wrote  Hamlet?")
        ['who', 'wrote', 'hamlet', '?']
    """
    return _TOKEN.findall(normal(text))


def normal(text: str) -> str:
    """One of all forms of the same text (Unicode NFKC), in lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


class TextEncoder:
    """Texts → the arrays that views see.

    Args:
        views: of the granularities.
        vocabularies: key of a view → its tokens, in the order of their numbers, which begin at 2; of a sentence with phrases,
            the words that are common.
        frequencies: key of a weighed view → in how many training texts each number stands; of number 0, how many texts
            there were. None: still to be learned.

    Raises:
        DataError: a weighed view without frequencies.

    Example:
        >>> encoder = TextEncoder.fit(["who wrote it", "who was it"], [Words(4)])
        >>> encoder.sizes["words_4_1"], encoder.encode(["who is it", ""])["words_4_1"].tolist()
        (6, [[3, 1, 2, 0], [0, 0, 0, 0]])
    """

    def __init__(
        self,
        views: Sequence[TextView],
        vocabularies: Mapping[str, Sequence[str]],
        frequencies: Mapping[str, Sequence[int]] | None = None,
    ):
        self.views = tuple(dict.fromkeys(views))
        self.vocabularies = {key: list(v) for key, v in vocabularies.items()}
        self.frequencies = {key: list(v) for key, v in (frequencies or {}).items()}
        self._weights = {key: _rarity(np.array(v)) for key, v in self.frequencies.items()}
        lacking = [v.key for v in self.views if _weighed(v) and v.key not in self._weights]
        if lacking and frequencies is not None:
            raise DataError(f"no frequencies of '{lacking[0]}' are known: of an older version, or of another config?")
        self._at = {key: {token: i + 2 for i, token in enumerate(v)} for key, v in self.vocabularies.items()}

    @classmethod
    def fit(cls, texts: Sequence[str], views: Sequence[TextView]) -> TextEncoder:
        """Learns what tokens there are.

        Raises:
            DataError: texts without a token.
        """
        found: dict[str, list[str]] = {}
        for view in views:
            if isinstance(view, Sentence) and not view.phrases:
                continue
            split = normal if isinstance(view, Characters) else tokens
            count = collections.Counter(token for text in texts for token in set(split(text)))
            if isinstance(view, Sentence):
                found[view.key] = sorted(t for t, n in count.items() if n >= max(_COMMON, view.common * len(texts)))
                continue
            least = view.least if isinstance(view, Words) else 1
            # By number, then by name: the same for every order of the texts.
            found[view.key] = sorted((t for t, n in count.items() if n >= least), key=lambda t: (-count[t], t))
            if not found[view.key]:
                raise DataError(
                    f"no token stands in {least} of the {len(texts)} training texts: there is nothing to learn from"
                )
        encoder, frequencies = cls(views, found), {}
        for view in (v for v in encoder.views if isinstance(v, Sentence) and v.weighed):
            count = np.zeros(view.buckets, int)
            for text in texts:
                count[list(set(encoder._ids(view, text)[: view.length]))] += 1
            count[0] = len(texts)
            frequencies[view.key] = count.tolist()
        return cls(views, found, frequencies)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys of what `encode` makes."""
        return tuple(k for v in self.views for k in ((f"{v.key}/ids", f"{v.key}/weights") if _weighed(v) else (v.key,)))

    @property
    def sizes(self) -> dict[str, int]:
        """Key → how many numbers there are, those of no token and of an unseen one included."""
        return {v.key: v.buckets if isinstance(v, Sentence) else len(self.vocabularies[v.key]) + 2 for v in self.views}

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """key → int32 [texts, length], all 0 without a token; of a weighed view `key/ids`, and `key/weights`, float32."""
        result = {}
        for view in self.views:
            rows = np.zeros((len(texts), view.length), np.int32)
            for row, text in zip(rows, texts):
                ids = self._ids(view, text)[: view.length]
                row[: len(ids)] = ids
            if _weighed(view):
                result |= {f"{view.key}/ids": rows, f"{view.key}/weights": self._weights[view.key][rows]}
            else:
                result[view.key] = rows
        return result

    def cut(self, texts: Sequence[str]) -> dict[str, int]:
        """key → how many texts are longer than what is read of them."""
        return {v.key: sum(len(self._ids(v, text)) > v.length for text in texts) for v in self.views}

    def grams(self, view: Sentence, text: str) -> list[str]:
        """What a sentence is made of, before it is hashed."""
        common = self._at.get(view.key, {})
        return ngrams(text, view.words, view.characters, view.anchors, view.phrases, common)

    def _ids(self, view: TextView, text: str) -> list[int]:
        if isinstance(view, Sentence):
            return [zlib.crc32(gram.encode()) % (view.buckets - 1) + 1 for gram in self.grams(view, text)]
        at = self._at[view.key]
        return [at.get(token, UNSEEN) for token in (tokens if isinstance(view, Words) else normal)(text)]


def _weighed(view: TextView) -> bool:
    return isinstance(view, Sentence) and view.weighed


def _rarity(frequencies: np.ndarray) -> np.ndarray:
    """float32: 1 + log((1 + texts) / (1 + texts that have it)), as scikit-learn has it; 0 of what none has, and of number 0."""
    weights = 1 + np.log((1 + frequencies[0]) / (1 + frequencies))
    return np.where((frequencies > 0) & (np.arange(len(frequencies)) > 0), weights, 0).astype(np.float32)


def ngrams(
    text: str,
    words: tuple[int, int],
    characters: tuple[int, int],
    anchors: int = 0,
    phrases: int = 0,
    common: Container[str] = frozenset(),
) -> list[str]:
    """N-grams of words, the ends of the text being words too; pairs of the first words, 1 to `anchors` of them, with each later
    one; what tells of the first `phrases`; then n-grams of characters, the ends of a word being characters. See `Sentence`.

    Example:
        >>> [g.replace("\\x02", "<").replace("\\x03", ">") for g in ngrams("to be", (2, 2), (0, 0))]
        ['w< to', 'wto be', 'wbe >']
        >>> [g.replace("\\x02", "<").replace("\\x03", ">") for g in ngrams("to", (0, 0), (3, 3))]
        ['c<to', 'cto>']
        >>> ngrams("what is it", (0, 0), (0, 0), 2)
        ['awhat|is', 'awhat|it', 'awhat is|it']
        >>> ngrams("what sea bird is it", (0, 0), (0, 0), 0, 1, {"what", "is", "it"})[:3]
        ['p0 sea bird', 'p0^sea', 'p0$bird']
    """
    parts = tokens(text)
    if not parts:
        return []
    result = []
    if words[1]:
        marked = [_BEGIN, *parts, _END]
        for n in range(words[0], words[1] + 1):
            grams = [marked[i : i + n] for i in range(len(marked) - n + 1)]
            result += ["w" + " ".join(gram) for gram in grams if len(gram) > 1 or gram[0] not in (_BEGIN, _END)]
    for n in range(1, anchors + 1):
        first = " ".join(parts[:n])
        result += [f"a{first}|{part}" for part in parts[n:]]
    if phrases:
        result += _phrase_grams(parts, phrases, common)
    if characters[1]:
        result += ["c" + gram for part in parts for gram in _spelling(part, *characters)]
    return result


def _spelling(word: str, low: int, high: int) -> list[str]:
    marked = _BEGIN + word + _END
    return [marked[i : i + n] for n in range(low, high + 1) for i in range(len(marked) - n + 1)]


def _phrase_grams(parts: Sequence[str], phrases: int, common: Container[str]) -> list[str]:
    """Whole, first and last word of each phrase, the latter's spelling, and how the text begins, a phrase being one word."""
    between = lambda part: part in common or not part[0].isalnum()
    runs = [(between_, list(run)) for between_, run in itertools.groupby(parts, between)]
    result = []
    for i, run in enumerate([run for between_, run in runs if not between_][:phrases]):
        result += [f"p{i} {' '.join(run)}", f"p{i}^{run[0]}", f"p{i}${run[-1]}"]
        result += [f"p{i}c{gram}" for gram in _spelling(run[-1], 3, 5)]
    outline = [part for between_, run in runs for part in (run if between_ else ["*"])]
    return result + [f"p:{' '.join(outline[:n])}" for n in range(2, min(5, len(outline)) + 1)]


@dataclasses.dataclass(frozen=True)
class TokenDropout:
    """In training, hides tokens at random: those of a sequence become unseen ones, those of a bag are left out.

    Attributes:
        rate: probability that a token is hidden; a stage's strength scales it.

    Example:
        >>> batch = Batch({"words_3_1": jnp.array([[5, 7, 0]])}, {}, jnp.array([True]), jnp.arange(1))
        >>> TokenDropout(0.5)(batch, jax.random.key(2)).inputs["words_3_1"].shape
        (1, 3)
    """

    rate: float = 0.0

    def __call__(self, batch: Batch, rng: jax.Array, strength: float = 1.0, pieces: int = 1) -> Batch:
        if pieces != 1:
            raise DataError("texts are not cut into pieces: plan.kind=progressive_jigsaw is for images")
        rate = self.rate * strength
        if not rate:
            return batch
        shown = dict(batch.inputs)
        for i, (key, x) in enumerate(sorted((k, x) for k, x in batch.inputs.items() if jnp.issubdtype(x.dtype, jnp.integer))):
            hidden = jax.random.bernoulli(jax.random.fold_in(rng, i), rate, x.shape) & (x > UNSEEN)
            shown[key] = jnp.where(hidden, NONE if key.startswith("sentence") else UNSEEN, x)
        return batch.replace(inputs=shown)

    def normalise(self, batch: Batch) -> Batch:
        return batch
