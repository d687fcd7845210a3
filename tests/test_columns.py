"""Tables: cells, encodings, sources, the branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax.branches import TableNet
from mgjax.data import DataError
from mgjax.data.columns import ColumnEncoder, ColumnsConfig, lacks, load_columns
from mgjax.errors import InputError
from mgjax.granularity import Columns

ALL = Columns()


def test_cells_without_a_value():
    assert all(map(lacks, (None, "", " ", "NA", "n/a", "?", "NaN", float("nan")))) and not any(map(lacks, (0, 0.0, "0", "no")))


def test_numbers_are_standardised_by_train_alone():
    encoder = ColumnEncoder.fit({"a": ["1", "2", "3"], "same": ["7", "7", "7"]})
    made = encoder.encode({"a": ["2", "5"], "same": ["7", "8"]}, ALL)
    np.testing.assert_allclose(made["numbers"], [[0, 0], [3 / np.std([1, 2, 3]), 1]], rtol=1e-6)
    assert made["numbers"].dtype == np.float32 and made["categories"].shape == (2, 0)


def test_missing_numbers_have_a_column_where_train_lacks_them():
    encoder = ColumnEncoder.fit({"a": ["1", "", "3"], "b": ["1", "2", "3"]})
    made = encoder.encode({"a": ["", "3"], "b": ["", "3"]}, ALL)["numbers"]
    np.testing.assert_allclose(made[:, 2], [1, 0])  # of a alone
    assert made[0, :2].tolist() == [0, 0] and encoder.sizes(ALL) == (3, ())


def test_categories_missing_and_unseen():
    encoder = ColumnEncoder.fit({"town": ["b", "a", "", "b"], "code": ["1", "2", "1", "2"]}, categories=("code",))
    made = encoder.encode({"town": ["a", "b", "c", "?"], "code": ["2", 2.0, "3", None]}, ALL)["categories"]
    assert made.tolist() == [[2, 3], [3, 3], [1, 1], [0, 0]] and encoder.sizes(ALL) == (0, (4, 4))


def test_views_see_their_columns():
    encoder = ColumnEncoder.fit({"a": ["1", "2"], "town": ["x", "y"], "gone": ["", "NA"]})
    assert encoder.sizes(Columns(("town",))) == (0, (4,)) and encoder.sizes(Columns(("a",))) == (1, ())
    with pytest.raises(DataError, match="no column 'gone'.*no training row has it"):
        encoder.sizes(Columns(("gone",)))
    with pytest.raises(DataError, match="no column 'b'.*there are a, town"):
        encoder.sizes(Columns(("b",)))
    with pytest.raises(DataError, match="column 'a' holds numbers in training, but 'much' in row 1"):
        encoder.encode({"a": ["1", "much"], "town": ["x", "y"]}, ALL)


def write(path, rows=40):
    lines = ["size,colour,gone,family,species,price"]
    lines += [f"{i % 7},{'rgb'[i % 3]},,{'ab'[i % 2]},s{i % 4},{i}" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return f"csv:{path}"


def load(source, **keys):
    return load_columns(ColumnsConfig(source=source, **keys), [ALL])


def test_a_csv(tmp_path, capsys):
    source = write(tmp_path / "a.csv")
    data = load(source, levels=("family", "species"), targets=("price",))
    assert (len(data.train), len(data.validation), len(data.test)) == (29, 3, 8)
    assert data.taxonomy.levels == ("family", "species") and data.targets == ("price",)
    assert data.inputs == ("columns/numbers", "columns/categories") and data.encoder.left_out == ["gone"]
    said = capsys.readouterr().out
    assert "left out, since no training row has them: gone" in said
    train = data.train.take(np.arange(29))
    np.testing.assert_allclose(data.centers["price"], train["price"].mean(), rtol=1e-6)
    assert abs(train["columns/numbers"].mean()) < 1e-6


def test_rows_that_stand_twice_are_counted(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("x,y,split\n1,2,train\n1,2,train\n3,4,train\n5,6,validation\n1,2,test\n")
    data = load(f"csv:{path}", targets=("y",))
    assert len(data.train) == 3 and "2 rows stand there before; 1 of the test stand in train too" in capsys.readouterr().out


def test_parquet_says_what_csv_does(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pa = pytest.importorskip("pyarrow")

    source = write(tmp_path / "a.csv")
    header, *lines = (tmp_path / "a.csv").read_text().splitlines()
    columns = dict(zip(header.split(","), zip(*(l.split(",") for l in lines))))
    typed = {k: [int(v) for v in vs] if k in ("size", "price") else [v or None for v in vs] for k, vs in columns.items()}
    parquet.write_table(pa.table(typed), tmp_path / "a.parquet")
    one, two = (load(s, levels=("species",)) for s in (source, f"parquet:{tmp_path / 'a.parquet'}"))
    for key, values in one.train.take(np.arange(5)).items():
        np.testing.assert_array_equal(values, two.train.take(np.arange(5))[key])


@pytest.mark.parametrize(
    "keys, says",
    [
        ({}, "name what is predicted"),
        ({"levels": ("sort",)}, "no column 'sort'; there are size"),
        ({"targets": ("colour",)}, "row 1: 'colour' holds 'r', which is no number"),
        ({"targets": ("gone",)}, "no training row has the target 'gone'"),
        ({"targets": ("price",), "ignore": ("size", "colour", "gone", "family", "species")}, "no column is left"),
        ({"targets": ("price",), "folds": 3, "fold": 4}, "data.fold=4 of data.folds=3"),
        ({"targets": ("price",), "test": 0.0}, r"data.test is a share in \(0, 1\)"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, keys, says):
    with pytest.raises(DataError, match=says):
        load(write(tmp_path / "a.csv"), **keys)


def test_sources_that_are_not_there(tmp_path):
    for source, says in (
        ("csv:", "no dataset"),
        ("sklearn:titanic", "no dataset"),
        (f"csv:{tmp_path / 'x'}", "cannot be read"),
    ):
        with pytest.raises(DataError, match=says):
            load(source, targets=("y",))


# ---------------------------------------------------------------------- the branch

X = {"numbers": jnp.array([[1.0, -1.0], [0.5, 2.0]]), "categories": jnp.array([[2], [0]])}


@pytest.mark.parametrize("embedding", [0, 3])
def test_the_branch(embedding):
    branch = TableNet(2, (4,), embedding, widths=(8, 6), norm="none")
    taps = tuple(branch.feature_info)
    variables = branch.init(jax.random.key(0), X, taps=taps, train=False)
    read = lambda x: branch.apply(variables, x, taps=taps, train=False)
    eager, jitted = read(X), jax.jit(read)(X)
    for tap, info in branch.feature_info.items():
        assert eager[tap].vector.shape == (2, info.channels)
        np.testing.assert_allclose(eager[tap].vector, jitted[tap].vector, rtol=1e-5)
    if not embedding:
        assert eager["input"].vector[:, 2:].tolist() == [[0, 1, 0], [0, 0, 0]]
    grads = jax.grad(lambda p: branch.apply({"params": p}, X, taps=("layer2",), train=False)["layer2"].vector.sum())
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads(variables["params"])))


def test_tables_of_another_width_are_refused():
    with pytest.raises(InputError, match="needs 3 numbers and 1 categories a row"):
        TableNet(3, (4,)).init(jax.random.key(0), X, taps=("input",), train=False)
