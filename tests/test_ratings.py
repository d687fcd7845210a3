"""Ratings: bags, factorisations, what is known of whom, sources, rankings, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import ndcg_score

from mgjax.branches import Factors, FieldConv
from mgjax.branches.factors import Field
from mgjax.contracts import Batch
from mgjax.data import DataError, eval_batches, train_batches
from mgjax.data.ratings import Biases, NewcomerDropout, RatingsEncoder
from mgjax.data.ratings_source import RatingsConfig, folds_of, load_ratings
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError, Fields
from mgjax.layers import EmbeddingBag
from mgjax.ranking import ranking_figures
from mgjax.train.mesh import make_mesh
from mgjax.views import apply_view

# ---------------------------------------------------------------------- bags and branches

IDS = jnp.array([[3, 1, 3, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]] * 2)
VALUES = jax.random.normal(jax.random.key(1), IDS.shape)


@pytest.mark.parametrize("size", [5, 100])  # added up before the table, or looked up
@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bag_is_the_sum_over_the_root_of_its_members(size, valued, dtype):
    layer, args = EmbeddingBag(size, 6, valued, dtype=dtype), (IDS, VALUES) if valued else (IDS,)
    variables = layer.init(jax.random.key(0), *args)
    tables = [np.asarray(variables["params"][n], np.float64) for n in ("embedding", "value_embedding")[: 1 + valued]]
    for made in (layer.apply(variables, *args), jax.jit(layer.apply)(variables, *args)):
        assert made.dtype == dtype
        for row, ids, values in zip(np.asarray(made, np.float64), np.asarray(IDS), np.asarray(VALUES)):
            there = ids > 0
            want = sum((t[ids[there]] * w).sum(0) for t, w in zip(tables, (1.0, values[there][:, None])))
            tolerance = 1e-5 if dtype == jnp.float32 else 0.02
            np.testing.assert_allclose(row, want / np.sqrt(max(1, there.sum())), rtol=tolerance, atol=tolerance)
    # What is not there counts for nothing, whatever its value, and however many such there are.
    wider = [jnp.pad(a, ((0, 0), (0, 3)), constant_values=c) for a, c in zip(args, (0, 7.0))]
    np.testing.assert_allclose(layer.apply(variables, *wider), layer.apply(variables, *args), rtol=1e-6)


def test_bags_long_and_short_teach_the_same():
    grads = {}
    for size in (5, 100):
        layer = EmbeddingBag(size, 6, True)
        params = {n: jnp.ones((size, 6)) for n in ("embedding", "value_embedding")}
        loss = lambda p, layer=layer: (layer.apply({"params": p}, IDS, VALUES) ** 2).sum()
        grads[size] = jax.grad(loss)(params)
    for name, g in grads[100].items():
        assert (g[5:] == 0).all() and (g[0] == 0).all()
        np.testing.assert_allclose(g[:5], grads[5][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [5, 100])
def test_a_bag_of_a_sharded_batch_moves_nothing(size):
    """Forward, no device needs what another one has."""
    layer = EmbeddingBag(size, 6, True)
    variables = layer.init(jax.random.key(0), IDS, VALUES)
    rows = NamedSharding(make_mesh(), PartitionSpec("data"))
    args = [jax.device_put(a, rows) for a in (IDS, VALUES)]
    step = jax.jit(layer.apply, out_shardings=rows).lower(variables, *args).compile()
    assert not [w for w in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if w in step.as_text()]
    np.testing.assert_allclose(step(variables, *args), layer.apply(variables, IDS, VALUES), rtol=1e-5, atol=1e-6)


def test_a_bag_wants_values_where_it_has_them():
    with pytest.raises(ValueError, match="valued=True was given no values"):
        EmbeddingBag(5, 6, True).init(jax.random.key(0), IDS)
    with pytest.raises(ValueError, match="valued=False was given values"):
        EmbeddingBag(5, 6).init(jax.random.key(0), IDS, VALUES)
    one = EmbeddingBag(5, 6)
    variables = one.init(jax.random.key(0), IDS)
    np.testing.assert_allclose(one.apply(variables, IDS[:, 0]), one.apply(variables, IDS[:, :1]))


SIDES = [Field("user", 9), Field("age", 4)], [Field("item", 5), Field("genre", 7)]
X = {
    "user": jnp.array([1, 8, 0, 3]), "age": jnp.array([[2], [0], [1], [3]]), "item": jnp.array([4, 0, 2, 1]),
    "genre": jnp.array([[1, 6], [2, 0], [0, 0], [3, 4]]), "history": jnp.array([[1, 2], [3, 0], [0, 0], [4, 1]]),
    "history_values": jnp.array([[0.5, -1.0], [2.0, 9.0], [9.0, 9.0], [0.0, 0.3]]),
}  # fmt: skip
BRANCHES = {
    "pairs": Factors([Field("user", 9)], [Field("item", 5)], 6, 3),
    "sides": Factors(*SIDES, 6, 3),
    "biases": Factors(*SIDES[:1], [], 6, 3),
    "history": Factors([Field("history", 5, True)], [Field("item", 5)], 6, 0),
    "conv": FieldConv(*SIDES, 6, (5, 4)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", BRANCHES)
def test_the_branches(name, dtype):
    branch = BRANCHES[name].clone(dtype=dtype)
    taps = tuple(branch.feature_info)
    variables = branch.init(jax.random.key(0), X, taps=taps, train=False)
    read = lambda x: branch.apply(variables, x, taps=taps, train=False)
    eager, jitted = read(X), jax.jit(read)(X)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == jnp.float32 else dict(rtol=0.05, atol=0.05)
    for tap, info in branch.feature_info.items():
        assert eager[tap].vector.shape == (4, info.channels) and eager[tap].vector.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(f[tap].vector, np.float32) for f in (eager, jitted)), **tolerance)
    # Rows know nothing of each other.
    alone = [read({k: v[i : i + 1] for k, v in X.items()})[taps[-1]].vector for i in range(4)]
    np.testing.assert_allclose(
        np.concatenate([np.asarray(a, np.float32) for a in alone]), np.asarray(eager[taps[-1]].vector, np.float32), **tolerance
    )
    loss = lambda p: (branch.apply({"params": p}, X, taps=taps, train=False)[taps[-1]].vector.astype(jnp.float32) ** 2).sum()
    grads = jax.grad(loss)(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    if name != "biases":  # at 0, where their square has no slope
        assert any((g != 0).any() for g in jax.tree.leaves(grads))


def test_a_factorisation_is_the_product_of_embeddings_beside_biases():
    branch = BRANCHES["pairs"]
    variables = branch.init(jax.random.key(0), X, taps=("factors",), train=False)
    p = {k[0]: np.asarray(v) for k, v in flatten_dict(variables["params"]).items()}
    p = {k: v + (0.1 if k.startswith("bias") else 0) for k, v in p.items()}
    given = {"params": {k: {"embedding": jnp.asarray(v)} for k, v in p.items()}}
    made = branch.apply(given, X, taps=("factors",), train=False)["factors"].vector
    np.testing.assert_allclose(made[0, 3:], p["factor_user"][1] * p["factor_item"][4], rtol=1e-5)
    np.testing.assert_allclose(made[0, :3], p["bias_user"][1] + p["bias_item"][4], rtol=1e-5)
    np.testing.assert_allclose(made[1, 3:], 0)  # an item that is not there
    np.testing.assert_allclose(made[1, :3], p["bias_user"][8], rtol=1e-5)
    # Dropout is of the products alone.
    dropped = branch.clone(dropout=0.9).apply(given, X, taps=("factors",), train=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(dropped["factors"].vector[:, :3], made[:, :3])
    assert (dropped["factors"].vector[0, 3:] == 0).any()


def test_the_map_of_products_has_a_cell_for_each_two_fields():
    branch = BRANCHES["conv"]
    variables = branch.init(jax.random.key(0), X, taps=("map",), train=False)
    assert not [k for k in variables["params"] if k.startswith("conv")]  # what lies deeper is not there
    p = {k: np.asarray(v["embedding"]) for k, v in variables["params"].items()}
    made = branch.apply(variables, X, taps=("map",), train=False)["map"].map
    assert made.shape == (4, 2, 2, 6)
    np.testing.assert_allclose(made[0, 1, 0], p["field_age"][2] * p["field_item"][4], rtol=1e-5)
    genres = p["field_genre"][[1, 6]].sum(0) / np.sqrt(2)
    np.testing.assert_allclose(made[0, 0, 1], p["field_user"][1] * genres, rtol=1e-5)


def test_branches_and_views_that_lack_a_field():
    with pytest.raises(InputError, match="needs the input 'history_values'"):
        BRANCHES["history"].init(
            jax.random.key(0), {k: v for k, v in X.items() if k != "history_values"}, taps=("factors",), train=False
        )
    for branch in (Factors([], SIDES[1], 6, 0), Factors([], [Field("history", 5, True)], 6, 3)):
        with pytest.raises(InputError, match="needs a field on each side, or biases"):
            branch.init(jax.random.key(0), X, taps=("factors",), train=False)
    with pytest.raises(InputError, match="map of products needs a field"):
        FieldConv([], SIDES[1]).init(jax.random.key(0), X, taps=("map",), train=False)
    assert set(apply_view(X, Fields(("user", "age")))) == {"user", "age"}
    with pytest.raises(ValueError, match="needs the input 'town'"):
        apply_view(X, Fields(("user", "town")))
    with pytest.raises(DeclarationError, match="names one at least"):
        Fields(())


# ---------------------------------------------------------------------- sources


def movielens(folder):
    """12 users, 10 items, in the form of MovieLens-100k; every rating is in the test of one fold."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    (folder / "u.genre").write_text("unknown|0\nDrama|1\nComedy|2\n")
    users = [f"{u}|{15 + 5 * u}|{'MF'[u % 2]}|{('writer', 'artist', 'other')[u % 3]}|0000{u}" for u in range(1, 13)]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    items = [
        f"{i}|Été {i} (19{80 + i})|{f'01-Jan-19{80 + i}' if i > 1 else ''}||x|0|{i % 2}|{int(i % 3 == 0)}" for i in range(1, 11)
    ]
    (folder / "u.item").write_bytes(("\n".join(items) + "\n").encode("latin-1"))
    rows = [(u, i, 1 + (u + i) % 5, int(rng.integers(1000))) for u in range(1, 13) for i in range(1, 11) if rng.random() < 0.8]
    line = lambda row: "\t".join(map(str, row)) + "\n"
    (folder / "u.data").write_text("".join(map(line, rows)))
    for k in range(5):
        (folder / f"u{k + 1}.test").write_text("".join(map(line, rows[k::5])))
    return f"movielens:{folder}", rows


def load(source, **keys):
    return load_ratings(RatingsConfig(source=source, **keys))


def test_movielens(tmp_path, capsys):
    source, rows = movielens(tmp_path / "ml")
    data = load(source, fold="2", validation=0.1)
    told = {(str(u), str(i)): (r, t) for u, i, r, t in rows}
    names = [data.encoder.sides[s].names for s in ("user", "item")]
    seen = {}
    for split in ("train", "validation", "test"):
        of = getattr(data, split)
        pairs = list(zip((names[0][u] for u in of.users), (names[1][i] for i in of.items)))
        assert [told[p][0] for p in pairs] == of.targets["rating"].tolist()
        assert sorted(told[p][1] for p in pairs) == [told[p][1] for p in pairs]  # in order of time
        seen[split] = set(pairs)
    assert seen["test"] == {(str(u), str(i)) for u, i, *_ in rows[1::5]}
    assert sum(map(len, seen.values())) == len(rows) == len(set().union(*seen.values()))
    assert data.bounds == (1, 5) and data.targets == ("rating",) and data.present == ("user", "item", "pair", "history")
    assert data.encoder.sizes == {
        "user": 13, "item": 11, "user_age": 8 - 1, "user_gender": 3, "user_occupation": 4, "item_decade": 3, "item_genre": 3,
        "history": 11, "audience": 13,
    }  # fmt: skip
    item = {k: v[0] for k, v in data.encoder.encode(np.array([0]), np.array([2])).items()}
    genres = data.encoder.sides["item"].vocabularies["genre"]
    assert sorted(genres[g - 1] for g in item["item_genre"] if g) == ["Comedy", "Drama"]
    assert data.encoder.encode(np.array([0]), np.array([0]))["item_decade"].tolist() == [[0]]  # no date
    np.testing.assert_allclose(data.center, data.train.targets["rating"].mean(), rtol=1e-6)
    assert "ratings of" in data.describe()


def test_what_else_was_rated_is_of_train_without_the_pair_itself(tmp_path):
    source, rows = movielens(tmp_path / "ml")
    data = load(source, validation=0.1)
    names = [data.encoder.sides[s].names for s in ("user", "item")]
    when = {(str(u), str(i)): t for u, i, _, t in rows}
    train = list(zip(data.train.users, data.train.items))
    for split in ("train", "test"):
        of = getattr(data, split)
        example = of.take(np.arange(len(of)))
        for row, (u, i) in enumerate(zip(of.users, of.items)):
            for name, others in (
                ("history", [b for a, b in train if a == u and b != i]),
                ("audience", [a for a, b in train if b == i and a != u]),
            ):
                ids = [x - 1 for x in example[name][row] if x]
                assert sorted(ids) == sorted(others)
                times = [when[(names[0][u], names[1][x]) if name == "history" else (names[0][x], names[1][i])] for x in ids]
                assert times == sorted(times, reverse=True)
                values = example[f"{name}_values"][row]
                assert (values[example[name][row] == 0] == 0).all()
            known = [u in data.train.users, i in data.train.items]
            present = [example[f"present/{g}"][row] for g in ("user", "item", "pair")]
            assert present == [known[0], known[1], all(known)]
            assert [example[s][row] for s in ("user", "item")] == [(u + 1) * known[0], (i + 1) * known[1]]
    # A deviation is the rating beyond mean and biases.
    row = int(np.argmax((data.train.take(np.arange(len(data.train)))["history"] > 0).any(1)))
    example, u = data.train.take(np.array([row])), data.train.users[row]
    other = int(example["history"][0][example["history"][0] > 0][0]) - 1
    at = next(k for k, pair in enumerate(train) if pair == (u, other))
    want = (data.train.targets["rating"][at] - data.biases(np.array([u]), np.array([other]))[0]) / data.spread
    value = example["history_values"][0][np.flatnonzero(example["history"][0] == other + 1)[0]]
    assert value == pytest.approx(want, abs=1e-4)


def test_lists_are_cut_to_the_latest(tmp_path):
    source, _ = movielens(tmp_path / "ml")
    whole, cut = (load(source, history=n).encoder.encode(np.arange(5), np.arange(5)) for n in (0, 3))
    lists = load(source, history=3).encoder.lists["user"][0]
    assert lists.shape[1] == 3 and cut["history"].shape == (5, 3)
    np.testing.assert_array_equal(lists, load(source).encoder.lists["user"][0][:, :3])
    assert whole["history"].shape[1] > 3


def test_biases_solve_their_normal_equations(rng):
    users, items = rng.integers(0, 20, 400), rng.integers(0, 15, 400)
    ratings = rng.normal(3, 1, 400) + rng.normal(size=20)[users] + rng.normal(size=15)[items]
    biases = Biases(users, items, ratings, 20, 15, rounds=200)
    for own, at, damping in ((biases.user, users, 5.0), (biases.item, items, 3.0)):
        left = np.bincount(at, ratings - biases(users, items), len(own))
        np.testing.assert_allclose(left, damping * own, atol=1e-8)


def test_cold_users_and_items_are_the_tests_alone(tmp_path):
    source, _ = movielens(tmp_path / "ml")
    warm, cold = load(source), load(source, cold=0.2)
    assert len(cold.test) == len(warm.test) and len(cold.train) < len(warm.train)
    for s in ("user", "item"):
        known, count = cold.encoder.sides[s].known, len(cold.encoder.sides[s].names)
        assert (~known).sum() >= round(0.2 * count)
        at = getattr(cold.train, f"{s}s")
        assert not (~known[at]).any()
    example = cold.test.take(np.arange(len(cold.test)))
    new = ~cold.encoder.sides["user"].known[cold.test.users]
    assert new.any() and (example["user"][new] == 0).all() and not example["history"][new].any()
    assert (example["user_gender"][new] > 0).all()  # their groups are known
    assert not example["present/history"][new].any() and not example["present/pair"][new].any()
    with pytest.raises(DataError, match="with data.cold=0.9 no rating is left for"):
        load(source, cold=0.9)


def test_pairs_that_nobody_rated(tmp_path):
    source, rows = movielens(tmp_path / "ml")
    data, again = (load(source, negatives=2) for _ in range(2))
    rated = {(u - 1, i - 1) for u, i, *_ in rows}
    for split in ("train", "validation", "test"):
        of = getattr(data, split)
        seen = of.targets["seen"][:, 0]
        full = [u for u in range(12) if sum(a == u for a, _ in rated) == 10]
        assert len(of) - seen.sum() == 2 * sum(u not in full for u in of.users[seen == 1])
        assert np.isnan(of.targets["rating"][seen == 0]).all()
        assert [(u, i) in rated for u, i in zip(of.users, of.items)] == seen.astype(bool).tolist()
        np.testing.assert_array_equal(of.items, getattr(again, split).items)
    full = [(u, i, 3, 0) for u in (1,) for i in range(1, 11)]  # who rated everything has no other pair
    (tmp_path / "ml" / "u.data").write_text(
        "".join("\t".join(map(str, r)) + "\n" for r in {(*r[:2],): r for r in [*rows, *full]}.values())
    )
    data = load(source, negatives=1)
    of = data.train
    assert not (of.users[of.targets["seen"][:, 0] == 0] == 0).any()


def test_batches_have_what_a_model_needs(tmp_path):
    source, _ = movielens(tmp_path / "ml")
    data = load(source)
    reads = dict(inputs=data.inputs, targets=data.targets, present=data.present)
    batch = next(train_batches(data.train, None, batch_size=8, seed=0, examples_seen=0, steps=1, **reads))
    assert batch.inputs["history"].shape[0] == 8 and set(batch.present) == {"user", "item", "pair", "history"}
    last = list(eval_batches(data.test, None, batch_size=7, **reads))[-1]
    assert last.mask.sum() == (len(data.test) - 1) % 7 + 1


CSV = "user,item,rating,time,user_town,item_kind\n"


def test_a_csv(tmp_path, capsys):
    lines = [f"u{i % 7},i{i % 5},{1 + i % 4 / 2},{i},{'ab'[i % 7 % 2]},{'x;y' if i % 5 else 'z'}" for i in range(60)]
    path = tmp_path / "r.csv"
    path.write_text(CSV + "\n".join(lines) + "\n")
    data = load(f"csv:{path}")
    assert "25 pairs of a user and an item stand there again later: the latest rating counts" in capsys.readouterr().out
    assert data.bounds == (1.0, 2.5) and len(data.train) + len(data.validation) + len(data.test) == 35
    assert data.encoder.groups("item") == ("item_kind",) and data.encoder.sizes["item_kind"] == 4
    every = [load(f"csv:{path}", folds=3, fold=str(k)).test for k in (1, 2, 3)]
    assert sorted(p for t in every for p in zip(t.users, t.items)) == sorted({(u, i) for u in range(7) for i in range(5)})
    assert [c.fold for c in folds_of(RatingsConfig(source=f"csv:{path}", folds=3, fold="all"))] == ["1", "2", "3"]
    latest = max(int(l.split(",")[3]) for l in lines if l.startswith("u3,i1,"))
    of = {(u, i): r for s in (data.train, data.validation, data.test) for u, i, r in zip(s.users, s.items, s.targets["rating"])}
    assert of[data.encoder.sides["user"].names.index("u3"), data.encoder.sides["item"].names.index("i1")] == 1 + latest % 4 / 2


@pytest.mark.parametrize(
    "text, keys, says",
    [
        ("user,item\na,b\n", {}, "no column 'rating' among user, item"),
        (CSV + "a,b,much,1,t,k\n", {}, "line 2: rating 'much' or time '1' is no number"),
        (CSV + "a,b,3,1,t,k\na,c,6,1,t,k\n", {"bounds": (1.0, 5.0)}, "line 3: the rating is 6, not between 1 and 5"),
        (CSV + "a,b,nan,1,t,k\n", {}, "line 2: the rating is nan, not a finite number"),
        (CSV + ",b,3,1,t,k\n", {}, "line 2: no user"),
        (CSV + "a,b,3,1,t,k\na,c,4,1,s,k\n", {}, "line 3: user 'a' has another user_town than before"),
        (CSV + "a,b,3,1,t,k\na,c,3,1,t,k\n", {}, "all ratings are 3; there is nothing to learn"),
        (CSV + "a,b,3,1,t,k\n", {"bounds": (5.0, 1.0)}, "a lowest and a highest rating are needed"),
        (CSV + "a,b,3,1,t,k\na,c,4,2,t,k\n", {"folds": 3, "fold": "4"}, "data.fold=4: csv:.* has folds 1 to 3, or all"),
        ("user,item,rating,split\na,b,3,later\n", {}, "line 2: no split 'later'"),
    ],
)
def test_ratings_that_do_not_fit(tmp_path, text, keys, says):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        load(f"csv:{path}", **keys)


def test_sources_that_are_not_there(tmp_path):
    for source, says in (
        ("movielens:", "no dataset"), ("netflix:x", "no dataset"), (f"csv:{tmp_path / 'x'}", "cannot be read"),
        (f"movielens:{tmp_path}", "'.*u.genre' cannot be read"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            load(source)
    source, _ = movielens(tmp_path / "ml")
    with pytest.raises(DataError, match="data.fold=6: .* has folds 1 to 5, or all"):
        load(source, fold="6")
    (tmp_path / "ml" / "u.data").write_text("1\t2\t3\n")
    with pytest.raises(DataError, match="u.data' line 1: 4 cells are needed"):
        load(source)
    (tmp_path / "ml" / "u.data").write_text("99\t2\t3\t0\n")
    with pytest.raises(DataError, match="line 1: user '99' is not listed"):
        load(source)
    (tmp_path / "bytes.csv").write_bytes(CSV.encode() + b"a,b\xff,3,1,t,k\n")
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        load(f"csv:{tmp_path / 'bytes.csv'}")
    with pytest.raises(DataError, match="has no folds of its own"):
        folds_of(RatingsConfig(source="csv:x", fold="all"))


def test_an_encoder_is_restored_from_its_record(tmp_path):
    import json

    source, _ = movielens(tmp_path / "ml")
    encoder = load(source, history=4).encoder
    again = RatingsEncoder.restored(json.loads(json.dumps(encoder.record())))
    at = np.arange(8)
    for key, value in encoder.encode(at, at).items():
        np.testing.assert_array_equal(again.encode(at, at)[key], value)
        assert again.encode(at, at)[key].dtype == value.dtype


def test_rows_of_names(tmp_path):
    source, _ = movielens(tmp_path / "ml")
    encoder = load(source).encoder
    known = encoder.encode(np.array([3]), np.array([4]))
    rows = [
        {"user": "4", "item": "5"},
        {"user": "4", "item": "5", "user_gender": "M"},
        {"user_occupation": "writer", "item": "5"},
        {"user": "nobody", "item": "5"},
    ]
    made = encoder.read(rows)
    for key, value in known.items():
        np.testing.assert_array_equal(made[key][:1], value)
    gender = encoder.sides["user"].vocabularies["gender"]
    assert gender[known["user_gender"][0, 0] - 1] == "M" or made["user_gender"][1].tolist() != made["user_gender"][0].tolist()
    assert made["user"].tolist() == [4, 4, 0, 0] and made["present/user"].tolist() == [True, True, False, False]
    assert made["user_occupation"][2, 0] > 0 and not made["user_occupation"][3].any()
    assert made["present/item"].all() and not made["present/history"][2:].any()
    with pytest.raises(
        DataError, match="'user=x, item_genre=Opera' names nobody that is known; there are user, item, user_age"
    ):
        encoder.read([{"user": "4"}, {"user": "x", "item_genre": "Opera"}])


def test_newcomers_lose_what_is_known_of_them_alone():
    there = jnp.ones(4000, bool)
    batch = Batch({}, {}, there, jnp.arange(4000), {g: there for g in ("user", "item", "pair", "history")})
    assert (
        NewcomerDropout(0.0)(batch, jax.random.key(0)) is batch and NewcomerDropout(0.5)(batch, jax.random.key(0), 0.0) is batch
    )
    made = NewcomerDropout(0.2)(batch, jax.random.key(0)).present
    assert abs(float(made["user"].mean()) - 0.8) < 0.03 and abs(float(made["item"].mean()) - 0.8) < 0.03
    np.testing.assert_array_equal(made["pair"], made["user"] & made["item"])
    np.testing.assert_array_equal(made["history"], made["pair"])
    with pytest.raises(DataError, match="not cut into pieces"):
        NewcomerDropout(0.2)(batch, jax.random.key(0), pieces=2)


# ---------------------------------------------------------------------- rankings


def test_rankings_agree_with_scikit_learn(rng):
    scores, relevant = rng.normal(size=(40, 30)), rng.random((40, 30)) < 0.2
    relevant[0] = False
    candidates = relevant | (rng.random((40, 30)) < 0.7)
    made = ranking_figures(scores, relevant, candidates, 10)
    rows = [r for r in range(40) if relevant[r].any()]
    want = [ndcg_score([relevant[r][candidates[r]]], [scores[r][candidates[r]]], k=10) for r in rows]
    assert made["ndcg@10"] == pytest.approx(np.mean(want), rel=1e-9) and made["users"] == len(rows)
    recall = []
    for r in rows:
        first = np.flatnonzero(candidates[r])[np.argsort(-scores[r][candidates[r]])[:10]]
        recall.append(relevant[r][first].sum() / relevant[r].sum())
    assert made["recall@10"] == pytest.approx(np.mean(recall), rel=1e-9)


def test_rankings_of_few_items_and_of_what_is_not_right():
    one = np.ones((1, 3), bool)
    relevant = np.array([[False, False, True]])
    assert ranking_figures(np.array([[1.0, 1.0, 1.0]]), relevant, one, 2)["recall@2"] == 0  # of equals the first
    assert ranking_figures(np.array([[1.0, 2.0, 3.0]]), relevant, one, 10) == {"ndcg@10": 1.0, "recall@10": 1.0, "users": 1}
    with pytest.raises(ValueError, match="relevant that is no candidate"):
        ranking_figures(np.zeros((1, 3)), relevant, ~relevant)
    with pytest.raises(ValueError, match="no finite score"):
        ranking_figures(np.full((1, 3), np.nan), relevant, one)
    with pytest.raises(ValueError, match="no row has anything"):
        ranking_figures(np.zeros((1, 3)), ~one, one)
