"""Texts: tokens, vocabularies, sources, branches."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from mgjax.branches import TextConv, TextTransformer, TokenCounts, TokenMean
from mgjax.contracts import Batch
from mgjax.data import DataError
from mgjax.data.text import NONE, UNSEEN, TextEncoder, TokenDropout, ngrams, tokens
from mgjax.data.text_source import TextConfig, load_texts
from mgjax.errors import InputError
from mgjax.granularity import Characters, DeclarationError, Sentence, Words
from mgjax.taxonomy import TaxonomyError
from mgjax.views import apply_view

VIEWS = [Words(6), Characters(12), Sentence((1, 2), buckets=64, length=8)]


# ---------------------------------------------------------------------- tokens


def test_one_text_in_several_forms_has_the_same_tokens():
    assert tokens("Ｗho\u00a0 WROTE caf\u0065\u0301?") == tokens("who wrote café ?") == ["who", "wrote", "café", "?"]
    assert tokens("don't 3.5") == ["don", "'", "t", "3", ".", "5"] and tokens(" \t\n") == []


def test_numbers_go_by_frequency_then_by_name_whatever_the_order_of_the_texts():
    texts = ["b a", "c a", "b a d"]
    one, two = (TextEncoder.fit(t, [Words(3)]).vocabularies["words_3_1"] for t in (texts, texts[::-1]))
    assert one == two == ["a", "b", "c", "d"]
    assert TextEncoder.fit(texts, [Words(3, least=2)]).vocabularies["words_3_2"] == ["a", "b"]


def test_what_is_cut_unseen_or_empty():
    encoder = TextEncoder.fit(["who wrote it"], VIEWS)
    made = encoder.encode(["who are you and why ask me", ""])
    assert made["words_6_1"][0].tolist()[1:] == [UNSEEN] * 5 and made["words_6_1"].dtype == np.int32
    assert all((rows[1] == NONE).all() for rows in made.values())
    assert encoder.cut(["who are you and why ask me", "", "who"]) == {
        "words_6_1": 1, "characters_12": 1, "sentence_12_00_0_0_64_8": 1
    }  # fmt: skip
    assert all(rows.max() < encoder.sizes[key] for key, rows in made.items())


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_is_encoded_within_the_vocabulary(texts):
    encoder = TextEncoder.fit(["some words", *texts], VIEWS)
    for key, rows in encoder.encode(texts).items():
        assert rows.min() >= 0 and rows.max() < encoder.sizes[key]
        assert ((rows > 0) == (np.cumsum(rows[:, ::-1] > 0, 1)[:, ::-1] > 0)).all()  # no gap


def test_ngrams_tell_the_ends_of_a_text_and_of_a_word():
    grams = ngrams("to be", (1, 3), (3, 3))
    assert grams[:2] == ["wto", "wbe"] and "w\x02 to be" in grams and "c\x02to" in grams and "cbe\x03" in grams
    assert not {"w\x02", "w\x03"} & set(grams) and ngrams("", (1, 3), (3, 3)) == []


def test_phrases_are_runs_of_words_that_are_not_common():
    common = {"what", "is", "the", "of", "in"}
    grams = ngrams("What sea bird is the symbol of Utah?", (0, 0), (0, 0), 0, 2, common)
    told = [g for g in grams if not g.startswith(("p0c", "p1c"))]
    assert told == [
        "p0 sea bird", "p0^sea", "p0$bird", "p1 symbol", "p1^symbol", "p1$symbol",
        "p:what *", "p:what * is", "p:what * is the", "p:what * is the *",
    ]  # fmt: skip
    assert [g for g in grams if g.startswith("p0c")][:3] == ["p0c\x02bi", "p0cbir", "p0cird"]
    assert ngrams("what is the", (0, 0), (0, 0), 0, 1, common) == ["p:what is", "p:what is the"]


def test_common_words_are_those_of_train_that_stand_in_many_texts():
    view = Sentence((0, 0), phrases=1, common=0.5)
    texts = ["the cat", "the dog", "the dog sat", "a bird sat"] * 5
    assert TextEncoder.fit(texts, [view]).vocabularies[view.key] == ["dog", "sat", "the"]
    assert not TextEncoder.fit(texts[:4], [view]).vocabularies[view.key]  # few texts tell nothing of what is common


def test_weights_are_those_of_scikit_learn():
    """A linear model on `TokenCounts` sees what scikit-learn's tf-idf would show it."""
    texts = ["who wrote it", "who was it", "what is it ? it", "how far is the moon"]
    view = Sentence((1, 2), weighed=True, buckets=1 << 14)
    encoder = TextEncoder.fit(texts, [view])
    asked = [*texts, "who is nobody", "", "nobody"]
    made = encoder.encode(asked)
    assert set(made) == set(encoder.inputs) == {f"{view.key}/ids", f"{view.key}/weights"}
    seen = apply_view({k: jnp.asarray(v) for k, v in made.items()}, view)
    got = TokenCounts(encoder.sizes[view.key]).apply({}, seen, taps=("counts",), train=False)["counts"].vector
    tfidf = TfidfVectorizer(analyzer=lambda t: ngrams(t, (1, 2), (0, 0)))
    tfidf.fit(texts)
    expected = tfidf.transform(asked).toarray()
    at = [zlib.crc32(gram.encode()) % (view.buckets - 1) + 1 for gram in tfidf.get_feature_names_out()]
    assert len(set(at)) == len(at)
    np.testing.assert_allclose(got[:, np.array(at)], expected, rtol=1e-5)
    np.testing.assert_allclose((got**2).sum(1), [1, 1, 1, 1, 1, 0, 0], rtol=1e-5)
    with pytest.raises(DataError, match="no frequencies of 'sentence_12_00_0_0_16384_128_weighed' are known"):
        TextEncoder([view], {}, {})
    again = TextEncoder([view], encoder.vocabularies, encoder.frequencies)
    np.testing.assert_array_equal(again.encode(asked)[f"{view.key}/weights"], made[f"{view.key}/weights"])


def test_views_that_see_nothing_are_refused():
    for make in (lambda: Words(0), lambda: Characters(0), lambda: Words(3, least=0), lambda: Sentence((0, 0), (0, 0))):
        with pytest.raises(DeclarationError):
            make()
    with pytest.raises(DeclarationError, match="the shortest stands first"):
        Sentence((2, 1))
    for wrong in ({"phrases": -1}, {"phrases": 1, "common": 0.0}, {"buckets": 1}, {"anchors": -1}):
        with pytest.raises(DeclarationError, match="are needed"):
            Sentence(**wrong)
    with pytest.raises(DataError, match="nothing to learn from"):
        TextEncoder.fit(["", " "], [Words(3)])


def test_hidden_tokens():
    batch = Batch(
        {
            "words_4_1": jnp.array([[5, 6, 1, 0]] * 500),
            "sentence_x": jnp.array([[5, 6, 1, 0]] * 500),
            "sentence_x/weights": jnp.ones((500, 4)),
        },
        {}, jnp.ones(500, bool), jnp.arange(500),
    )  # fmt: skip
    hide = TokenDropout(0.3)
    made = jax.jit(hide)(batch, jax.random.key(0)).inputs
    assert set(np.unique(made["words_4_1"])) == {0, 1, 5, 6} and (np.asarray(made["words_4_1"])[:, 2:] == [1, 0]).all()
    assert 0.25 < float((made["words_4_1"][:, :2] == UNSEEN).mean()) < 0.35
    assert 0.25 < float((made["sentence_x"][:, :2] == NONE).mean()) < 0.35
    np.testing.assert_array_equal(made["sentence_x/weights"], 1)
    assert hide.normalise(batch) is batch and hide(batch, jax.random.key(0), 0.0) is batch
    with pytest.raises(DataError, match="not cut into pieces"):
        hide(batch, jax.random.key(0), 1.0, 2)


# ---------------------------------------------------------------------- sources


def write_trec(folder, train=("A:x what is it ?", "A:y who is it ?", "B:z how far is it ?") * 4, test=("A:x what ?",)):
    (folder / "train_5500.label").write_bytes("\n".join(f"{t} {i}" for i, t in enumerate(train)).encode("latin-1"))
    (folder / "TREC_10.label").write_bytes("\n".join(test).encode("latin-1"))
    return f"trec:{folder}"


def load(source, **keys):
    return load_texts(TextConfig(source=source, **keys), VIEWS)


def test_trec(tmp_path):
    data = load(write_trec(tmp_path, test=("A:x what is caf\xe9 ?", "B:z how ?")))
    assert data.taxonomy.levels == ("coarse", "fine") and data.taxonomy.names == (("A", "B"), ("A:x", "A:y", "B:z"))
    assert (len(data.train), len(data.validation), len(data.test)) == (11, 1, 2)
    assert data.test.take(np.arange(2))["fine"].tolist() == [0, 2] and data.texts["test"][0] == "what is café ?"
    assert set(data.inputs) == {v.key for v in VIEWS} <= set(data.train.take(np.arange(1)))
    assert "11 training, 1 validation, 2 test texts; levels coarse (2), fine (3)" in data.describe()


def test_the_vocabulary_is_of_train_alone(tmp_path):
    data = load(write_trec(tmp_path, test=("A:x zebra ?",)))
    held = {word for text in data.texts["train"] for word in tokens(text)}
    assert set(data.encoder.vocabularies["words_6_1"]) == held and "zebra" not in held


def test_a_text_of_the_test_is_in_no_other_split(tmp_path, capsys):
    train = ("A:x what is it ?", "B:z how far ?") * 6
    (tmp_path / "train_5500.label").write_text("\n".join(train))
    (tmp_path / "TREC_10.label").write_text("A:x what is it ?")
    data = load(f"trec:{tmp_path}")
    assert len(data.train) + len(data.validation) == 6 and set(data.texts["train"]) == {"how far ?"}
    said = capsys.readouterr().out
    assert "6 training texts stand in the test too" in said
    assert "classes of test of which train has no example, 1: A:x" in said and "of validation" not in said


def test_folds_are_parts_of_train(tmp_path):
    source = write_trec(tmp_path)
    parts = [text for k in (1, 2, 3, 4) for text in load(source, folds=4, fold=k).texts["test"]]
    whole = [line.split(" ", 1)[1] for line in (tmp_path / "train_5500.label").read_text().splitlines()]
    assert sorted(parts) == sorted(whole)
    with pytest.raises(DataError, match=r"data.fold=5 of data.folds=4"):
        load(source, folds=4, fold=5)


def test_jsonl_and_csv_say_the_same(tmp_path):
    rows = [
        {
            "text": f"word{i % 3}, and {i}",
            "kind": "ab"[i % 2],
            "sort": f"{'ab'[i % 2]}{i % 4}",
            "tags": [["t1"], ["t1", "t2"], []][i % 3],
        }
        for i in range(24)
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    table = tmp_path / "rows.csv"
    quoted = "\n".join(f'"{r["text"]}",{r["kind"]},{r["sort"]},{";".join(r["tags"])}' for r in rows)
    table.write_text(f"text,kind,sort,tags\n{quoted}\n")
    made = [load(s, several=("tags",)) for s in (f"jsonl:{lines}", f"csv:{table}")]
    for data in made:
        assert data.taxonomy.levels == ("kind", "sort") and data.classes == {"tags": ("t1", "t2")} and data.targets == ("tags",)
    one, two = (d.train.take(np.arange(len(d.train))) for d in made)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert set(map(tuple, one["tags"].tolist())) == {(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)}
    named = load(f"jsonl:{lines}", levels=("sort",))
    assert named.taxonomy.levels == ("sort",) and named.targets == ()


def test_labels_that_are_not_known_are_nan(tmp_path):
    lines = tmp_path / "rows.jsonl"
    rows = [{"text": f"a {i}", "tags": ["x"] if i % 2 else None} for i in range(20)]
    lines.write_text("\n".join(map(json.dumps, rows)))
    data = load(f"jsonl:{lines}", several=("tags",))
    assert data.taxonomy is None and {str(v) for v in data.train.take(np.arange(14))["tags"][:, 0]} == {"1.0", "nan"}


@pytest.mark.parametrize(
    "name, content, keys, says",
    [
        ("a.csv", b"text,kind\nfine,a\n\xff\xfe,b\n", {}, "line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "fine", "kind": "a"}\n{"text": "\xff", "kind": "a"}', {}, "line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "fine"', {}, "line 1 is no JSON"),
        ("a.jsonl", b'{"txt": "fine"}', {}, "line 1: an object with a 'text'"),
        ("a.jsonl", b"\n\n", {}, "holds no examples"),
        ("a.csv", b"words,kind\nfine,a\n", {}, "no column 'text' among words, kind"),
        ("a.csv", b"text,kind\nfine,a\n", {"levels": ("sort",)}, "no column 'sort'; there are kind"),
        ("a.csv", b"text\nfine\n", {}, "no column holds labels"),
        ("a.csv", b"text,split,kind\nfine,dev,a\n", {}, "line 2: no split 'dev'"),
        ("a.jsonl", b'{"text": "fine", "tags": 3}', {"several": ("tags",)}, "line 1: 'tags' holds 3, which is no list"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, content, keys, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load(f"{name[2:]}:{tmp_path / name}", **keys)


def test_sources_that_are_not_there(tmp_path):
    for source, says in (("trec:", "no dataset 'trec:'"), ("xml:a", "no dataset"), (f"trec:{tmp_path}", "cannot be read")):
        with pytest.raises(DataError, match=says):
            load(source)
    (tmp_path / "train_5500.label").write_text("A:x fine\nnonsense here")
    with pytest.raises(DataError, match="line 2: 'nonsense' is no COARSE:fine"):
        load(f"trec:{tmp_path}")
    with pytest.raises(DataError, match="do not apply to 'trec'"):
        load(f"trec:{tmp_path}", levels=("coarse",))


def test_labels_that_form_no_forest(tmp_path):
    (tmp_path / "a.csv").write_text("text,kind,sort\nfine,a,x\nwell,b,x\n")
    with pytest.raises((DataError, TaxonomyError), match="'x' has a second parent"):
        load(f"csv:{tmp_path / 'a.csv'}")


# ---------------------------------------------------------------------- branches

BRANCHES = {
    "mean": TokenMean(9, 8),
    "counts": TokenCounts(9),
    "conv": TextConv(9, 8, widths=(8, 12)),
    "transformer": TextTransformer(9, 6, features=8, blocks=2, heads=2),
}
X = jnp.array([[3, 8, 2, 0, 0], [4, 1, 1, 7, 2], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_texts(name):
    """Promised widths, jit = eager, finite gradients, nothing of what stands beyond the end; an empty text is finite."""
    branch = BRANCHES[name]
    taps = tuple(branch.feature_info)
    variables = branch.init(jax.random.key(0), X, taps=taps, train=False)
    read = lambda x: branch.apply(variables, x, taps=taps, train=False)
    eager, jitted = read(X), jax.jit(read)(X)
    for tap, info in branch.feature_info.items():
        assert eager[tap].vector.shape == (3, info.channels) and info.reduction is None and eager[tap].map is None
        np.testing.assert_allclose(eager[tap].vector, jitted[tap].vector, rtol=1e-5, atol=1e-6)
        assert jnp.isfinite(eager[tap].vector).all()
    longer = read(jnp.pad(X, ((0, 0), (0, 1))))
    for tap in taps:
        np.testing.assert_allclose(longer[tap].vector, eager[tap].vector, rtol=1e-5, atol=1e-6)
    loss = lambda params: sum(
        f.vector.sum() for f in branch.apply({**variables, "params": params}, X, taps=taps[-1:], train=False).values()
    )
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(variables.get("params", {}))))
    rows = jax.vmap(lambda row: read(row[None])[taps[-1]].vector[0])(X)
    np.testing.assert_allclose(rows, eager[taps[-1]].vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_texts_in_bfloat16(name):
    branch = BRANCHES[name].clone(dtype=jnp.bfloat16)
    tap = list(branch.feature_info)[-1]
    variables = branch.init(jax.random.key(0), X, taps=(tap,), train=False)
    full = BRANCHES[name].apply(variables, X, taps=(tap,), train=False)[tap].vector
    half = branch.apply(variables, X, taps=(tap,), train=False)[tap].vector
    assert half.dtype == jnp.bfloat16 and all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables.get("params", {})))
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", BRANCHES)
def test_what_is_no_token_is_refused(name):
    branch = BRANCHES[name]
    for x in (jnp.ones((2, 5)), jnp.ones((2, 5, 1), jnp.int32)):
        with pytest.raises(InputError, match=r"needs tokens, int \[B, L\]"):
            branch.init(jax.random.key(0), x, taps=tuple(branch.feature_info), train=False)
    if name == "transformer":
        with pytest.raises(InputError, match="got texts of 7 tokens"):
            branch.init(jax.random.key(0), jnp.ones((1, 7), jnp.int32), taps=("block1",), train=False)


def test_texts_that_all_stand_in_the_test(tmp_path):
    rows = [
        {"text": "the same", "kind": f"k{i % 2}", "split": s} for i, s in enumerate(("train", "train", "validation", "test"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no text of train is left"):
        load_texts(TextConfig(source=f"jsonl:{tmp_path / 'rows.jsonl'}"), VIEWS)
