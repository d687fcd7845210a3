"""Experiments on what is no image: as they are under eval_shape, shrunk for real steps, and what differs between them."""

import ast
import difflib
import importlib
import json
import os
import pathlib
import signal

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from sklearn.linear_model import LogisticRegression, Ridge

from experiments import common, imagenet_mg, predict, ratings_mg, tabular_mg, text_mg, vision
from experiments.plans import build_plan, points_of
from mgjax import config as cfg
from mgjax.config import ConfigError
from mgjax.data import DataError, eval_batches
from mgjax.errors import InputError
from mgjax.granularity import Columns
from mgjax.objective import Objective
from mgjax.train import Interrupted, OptimConfig
from mgjax.train.checkpoint import load_state
from mgjax.train.monitor import write_json
from mgjax.train.optim import make_optimizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = ("text_mg", "tabular_mg", "ratings_mg")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sentences whose first word tells the class, and whose second the coarser one."""
    rng, rows = np.random.default_rng(0), []
    for i in range(240):
        fine = i % 4
        filler = " ".join(f"w{n}" for n in rng.integers(0, 30, 4))
        rows.append({"text": f"f{fine} c{fine // 2} {filler} {i}", "kind": f"k{fine // 2}", "sort": f"s{fine}"})
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two columns of numbers and one of categories, some missing; two levels and a number to predict."""
    rng = np.random.default_rng(0)
    lines = ["height,weight,colour,family,species,price"]
    for i in range(240):
        species = i % 4
        height, weight = rng.normal(species // 2 * 3, 1), rng.normal(species % 2 * 3, 1)
        cells = ["" if i % 17 == 0 else f"{height:.3f}", f"{weight:.3f}", "NA" if i % 13 == 0 else "rgb"[species % 3]]
        lines.append(",".join([*cells, "ab"[species // 2], f"s{species}", f"{100 + 20 * height + 5 * weight:.2f}"]))
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return f"csv:{path}"


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """60 users, 30 items; people of a town like one kind, each user and item has a bias, u0 rated one item alone."""
    rng = np.random.default_rng(0)
    users, items = rng.normal(0, 0.5, 60), rng.normal(0, 0.5, 30)
    lines = ["user,item,rating,time,user_town,item_kind", "u0,i1,3,0,t0,k1"]
    for u in range(1, 60):
        for i in range(30):
            if rng.random() < 0.6:
                likes = 1.5 * (u % 3 == i % 3)
                rating = float(np.clip(2.5 + users[u] + items[i] + likes + rng.normal(0, 0.2), 1, 5).round(1))
                lines.append(f"u{u},i{i},{rating},{rng.integers(1000)},t{u % 3},k{i % 3}")
    path = tmp_path_factory.mktemp("ratings") / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return f"csv:{path}"


SHRUNK = {
    "ratings_mg": {"model.width": 8, "model.dropout": 0.0, "plan.batch_size": 32},
    "text_mg": {"model.embedding": 8, "model.width": 8, "model.fusion_width": 8, "model.buckets": 256, "model.characters": 24},
    "tabular_mg": {"model.widths": (8,), "model.fusion_width": 8},
}


def run(name, tmp_path, **given):
    """Trains in this process, and leaves a workdir as a command does."""
    module = importlib.import_module(f"experiments.{name}")
    small = {"plan.batch_size": 16, "plan.eval_batch_size": 16, "plan.joint": 15.0, "optim.learning_rate": 0.01} | SHRUNK[name]
    chosen, _ = module.resolve("cpu", given)
    if chosen.get("optim.name") == "sgd":  # its rate is what it learns by
        small.pop("optim.learning_rate")
    config = cfg.override(module.Config(), chosen | small | given)
    meta = {"experiment": name, "config": json.loads(json.dumps(cfg.to_dict(config)))}
    tmp_path.mkdir(exist_ok=True)
    write_json(tmp_path / "config.json", meta)
    facts, examples = module.train(config, tmp_path, meta)
    common.show({"experiment": name, "dataset": config.data.source, **facts})
    return facts | {"examples": examples}


def traced(model, data, plan):
    """The shapes of what every operating point answers."""
    reads = dict(inputs=data.inputs, targets=data.targets, present=data.present)
    batch = next(eval_batches(data.test, data.taxonomy, batch_size=8, **reads))
    for op in {s.op for s in plan} | set(points_of(model).values()):
        made = jax.eval_shape(lambda x, op=op: model.init_with_output(jax.random.key(0), x, op, train=False)[0], batch.inputs)
        assert made.logits and all(v.shape[0] == 8 for v in made.logits.values())


@pytest.mark.parametrize("words", ["conv", "transformer", "mean"])
@pytest.mark.parametrize("preset", text_mg.PRESETS)
def test_text_as_it_is_under_eval_shape(preset, words, texts):
    given = {"preset": preset, "model.words": words, "data.source": texts}
    chosen, _ = text_mg.resolve("cpu", given)
    config = cfg.override(text_mg.Config(), chosen | given)
    data = text_mg.load_texts(config.data, list(text_mg.views_of(config).values()))
    model = text_mg.build_model(config, data.encoder, data.taxonomy, data.classes)
    traced(model, data, build_plan(config.plan, model, len(data.train)))


def test_bags_of_nothing_are_no_granularities():
    names = lambda **keys: list(text_mg.views_of(cfg.override(text_mg.Config(), {f"model.{k}": v for k, v in keys.items()})))
    assert names() == ["characters", "words", "phrases", "sentence"]
    assert names(subwords=(0, 0)) == ["words", "phrases", "sentence"]
    assert names(anchors=0, phrases=0) == ["characters", "words"]


@pytest.mark.parametrize("preset", ["bags", "fused"])
def test_text_learns_what_its_words_tell(preset, texts, tmp_path):
    facts = run("text_mg", tmp_path, **{"data.source": texts, "preset": preset})
    assert facts["test"]["levels"]["sort"]["accuracy"] > 0.6 and facts["test"]["inconsistency"] == 0
    assert {p["name"] for p in facts["points"]} == {*text_mg.PRESETS[preset], "all"}


def test_what_a_text_is_said_to_be(texts, tmp_path, capsys):
    """As many answers as examples, a path with a probability at every level; alone, from a file and to a file the same."""
    facts = run("text_mg", tmp_path, **{"data.source": texts, "decoder": "top_down"})
    assert facts["test"]["decoder"] == "top_down"
    ask = lambda examples=(), source="", output="": predict.answer(
        text_mg.Config(), text_mg.see, "text", tmp_path, examples, source, output
    )
    capsys.readouterr()
    said = ask(["f0 c0 w1 w2", "f3 c1 w5", ""])
    assert [row["sort"] for row in said[:2]] == ["s0", "s3"]
    assert all(int(row["kind"][1]) == int(row["sort"][1]) // 2 for row in said)
    assert all(0 < row["sort_probability"] <= row["kind_probability"] <= 1 for row in said)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[0].startswith("f0 c0 w1 w2: k0 ") and " › s0 " in shown[0]
    examples = facts["examples"]  # those of the report
    assert len(examples) == common.EXAMPLES
    for row, example in zip(ask([e.shown for e in examples]), examples):
        assert {l: row[l] for l in ("kind", "sort")} == example.answer
        assert row["sort_probability"] == pytest.approx(example.probability["sort"], abs=1e-4)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": row["text"], "id": i}) for i, row in enumerate(said)))
    for suffix in ("csv", "jsonl"):
        ask(source=str(tmp_path / "in.jsonl"), output=str(tmp_path / f"out.{suffix}"))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row | {"id": i} for i, row in enumerate(said)] == written
    again = ask(source=str(tmp_path / "out.csv"))
    assert [row["sort"] for row in again] == [row["sort"] for row in said]
    for arguments, says in (
        ({}, "nothing to predict"),
        ({"source": str(tmp_path / "no.csv")}, "cannot be read"),
        ({"source": str(tmp_path / "config.json")}, r"read from .csv or .jsonl"),
        ({"examples": ["a"], "output": "x.txt"}, "written as .csv or .jsonl"),
    ):
        with pytest.raises(InputError, match=says):
            ask(**arguments)
    with pytest.raises(InputError, match="not the workdir of a trained model"):
        predict.answer(text_mg.Config(), text_mg.see, "text", tmp_path / "none", ["a"], "", "")


@pytest.mark.parametrize("preset, labels", [("words", 3), ("bags", 40)])
def test_texts_with_any_number_of_labels(preset, labels, tmp_path):
    """As many as forty of them: the loss, their mean, must not slow down what is learned of each."""
    names = [f"tag{i}" for i in range(labels)]
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(240):
        tags = [t for t in names if rng.random() < 0.4]
        rows.append({"text": " ".join(["the", *tags, f"w{rng.integers(9)}"]), "tags": tags})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"data.source": f"jsonl:{tmp_path / 'rows.jsonl'}", "data.several": ("tags",), "plan.joint": 20.0}
    facts = run("text_mg", tmp_path, preset=preset, **given)
    assert facts["test"]["tasks"]["tags"]["map"] > 0.8 and "levels" not in facts["test"]
    said = predict.answer(text_mg.Config(), text_mg.see, "text", tmp_path, [f"the {' '.join(names[::2])} w1", "the w2"], "", "")
    assert len(set(said[0]["tags"]) ^ set(names[::2])) <= labels // 5
    assert all(0.5 <= p <= 1 for row in said for p in row["tags"].values())


def test_what_an_image_is_said_to_be(tmp_path):
    """A test image, from its file, gets the answer of the test."""
    chosen, _ = imagenet_mg.resolve("cpu", {})
    small = {"model.widths": (4, 8, 8), "model.blocks": (1, 1, 1), "data.limit": 48}
    small |= {"plan.batch_size": 16, "plan.max_steps": 2}
    config = cfg.override(imagenet_mg.Config(), chosen | small | {"plan.eval_batch_size": 48, "preset": "flat"})
    meta = {"experiment": "imagenet_mg", "config": json.loads(json.dumps(cfg.to_dict(config)))}
    write_json(tmp_path / "config.json", meta)
    _, examples = imagenet_mg.train(config, tmp_path, meta)
    for i, example in enumerate(examples[:3]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), example.shown[..., ::-1])
    see = vision.see(vision.FORMS)
    said = predict.answer(imagenet_mg.Config(), see, "path", tmp_path, [str(tmp_path / f"{i}.png") for i in range(3)], "", "")
    assert [[row[l] for l in examples[0].answer] for row in said] == [list(e.answer.values()) for e in examples[:3]]
    for row, example in zip(said, examples):
        assert row["texture_probability"] == pytest.approx(example.probability["texture"], abs=1e-4)
    with pytest.raises(InputError, match="cannot be read"):
        predict.answer(imagenet_mg.Config(), see, "path", tmp_path, [str(tmp_path / "no.png")], "", "")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="does not decode"):
        predict.answer(imagenet_mg.Config(), see, "path", tmp_path, [str(tmp_path / "bad.png")], "", "")


def test_text_in_stages(texts, tmp_path):
    facts = run("text_mg", tmp_path, **{"data.source": texts, "plan.kind": "coarse_to_fine", "plan.max_steps": 2})
    assert [s["name"] for s in facts["stages"]] == ["characters", "words", "phrases", "sentence", "joint"]


@pytest.mark.parametrize("preset", tabular_mg.PRESETS)
def test_tables_shrunk(preset, table, tmp_path):
    given = {"preset": preset, "data.source": table, "data.levels": ("family", "species"), "data.targets": ("price",)}
    groups = {"model.groups": ("numbers=height+weight", "colour=colour")} if preset == "groups" else {}
    facts = run("tabular_mg", tmp_path, **given | groups, decoder="product")
    assert facts["test"]["decoder"] == "product"
    assert facts["test"]["levels"]["species"]["accuracy"] > 0.5 and facts["test"]["tasks"]["price"]["rmse"] < 45
    assert facts["test"]["inconsistency"] == 0
    said = predict.answer(
        tabular_mg.Config(),
        tabular_mg.see,
        "",
        tmp_path,
        ["height=3.1,weight=0,colour=b", "weight=3", "colour=unheard"],
        "",
        "",
    )
    assert all(row["species_probability"] > 0 and np.isfinite(row["price"]) for row in said)
    assert said[0]["family"] == "b" and abs(said[0]["price"] - 162) < 60
    with pytest.raises(InputError, match="sees no column 'colur'; the nearest is 'colour'"):
        predict.answer(tabular_mg.Config(), tabular_mg.see, "", tmp_path, ["colur=b"], "", "")
    with pytest.raises(InputError, match="'height' is no COLUMN=VALUE"):
        predict.answer(tabular_mg.Config(), tabular_mg.see, "", tmp_path, ["height"], "", "")


@pytest.mark.parametrize("preset", ratings_mg.PRESETS)
def test_ratings_as_they_are_under_eval_shape(preset, ratings):
    chosen, _ = ratings_mg.resolve("cpu", {})
    config = cfg.override(ratings_mg.Config(), chosen | {"preset": preset, "data.source": ratings})
    data = ratings_mg.load_ratings(config.data)
    model = ratings_mg.build_model(config, data.encoder, data.bounds, data.center, data.spread, True)
    assert [g.name for g in model.granularities] == list(ratings_mg.PRESETS[preset])
    traced(model, data, build_plan(config.plan, model, len(data.train)))


def test_ratings_are_learned_and_told(ratings, tmp_path, capsys):
    """Beside both tasks: who is new, baselines, rankings; then what the trained model says of pairs, old and new."""
    given = {"data.source": ratings, "data.negatives": 1, "data.cold": 0.1, "preset": "ladder", "plan.joint": 20.0}
    facts = run("ratings_mg", tmp_path, **given)
    rating, baselines = facts["test"]["tasks"]["rating"], facts["test"]["baselines"]
    assert rating["rmse"] < 0.7 and rating["rmse_warm"] < 0.8 * baselines["biases"]["rmse_warm"]
    for part in ("rmse_new_user", "rmse_new_item"):  # their groups tell what nothing else does
        assert rating[part] < 0.9 * baselines["mean"][part]
    assert baselines["biases"]["rmse"] < baselines["mean"]["rmse"]
    assert {"f1_micro", "map", "ndcg@10", "recall@10"} <= set(facts["test"]["tasks"]["seen"])
    assert rating["ndcg@10"] > baselines["popularity"]["ndcg@10"]
    assert "variables" not in facts and {p["name"] for p in facts["points"]} == {*ratings_mg.PRESETS["ladder"], "all"}
    shown = capsys.readouterr().out
    assert "(popularity)" in shown
    ask = lambda *rows: predict.answer(ratings_mg.Config(), ratings_mg.see, "", tmp_path, rows, "", "")
    said = ask("user=u4,item=i1", "user_town=t1,item=i1", "user_town=t2,item=i1", "user=u4,item_kind=k1")
    assert all(1 <= row["rating"] <= 5 for row in said)
    assert said[1]["rating"] > said[2]["rating"] + 0.5  # of nobody that is known, the town alone
    with pytest.raises(DataError, match="'user=x, item=y' names nobody"):
        ask("user=x,item=y")
    with pytest.raises(InputError, match="sees no column 'usr'; the nearest is 'user'"):
        ask("user=u4,item=i1", "usr=u4,item=i1")
    with pytest.raises(InputError, match="is of ratings_mg: ask python -m experiments.ratings_mg"):
        predict.answer(text_mg.Config(), text_mg.see, "text", tmp_path, ["a"], "", "", name="text_mg")


def test_what_is_told_of_ratings_is_what_was_measured(ratings, tmp_path):
    """The errors of the parts are those of the task, and of what the model says of each pair."""
    facts = run("ratings_mg", tmp_path, **{"data.source": ratings, "plan.max_steps": 3, "preset": "history"})
    figures = facts["test"]["tasks"]["rating"]
    data = ratings_mg.load_ratings(cfg.override(ratings_mg.Config(), {"data.source": ratings}).data)
    sides, test = data.encoder.sides, data.test
    rows = [f"user={sides['user'].names[u]},item={sides['item'].names[i]}" for u, i in zip(test.users, test.items)]
    said = predict.answer(ratings_mg.Config(), ratings_mg.see, "", tmp_path, rows, "", "")
    error = np.array([row["rating"] for row in said]) - test.targets["rating"]
    assert figures["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    warm = sides["user"].known[test.users] & sides["item"].known[test.items]
    assert figures["rmse_warm"] == pytest.approx(np.sqrt((error[warm] ** 2).mean()), rel=1e-5)


def test_all_folds_and_their_mean(ratings, tmp_path, capsys):
    given = {"data.source": ratings, "data.folds": 2, "data.fold": "all", "plan.max_steps": 2, "preset": "pairs"}
    facts = run("ratings_mg", tmp_path, **given)
    one = [json.loads((tmp_path / f"fold{k}" / "facts.json").read_text()) for k in (1, 2)]
    each = [of["test"]["tasks"]["rating"]["rmse"] for of in one]
    assert facts["test"]["tasks"]["rating"]["rmse"] == pytest.approx(np.mean(each)) and each[0] != each[1]
    assert facts["test"]["tasks"]["rating"]["rmse_std"] == pytest.approx(np.std(each, ddof=1))
    assert facts["steps"] == 4 and facts["test"]["examples"] == sum(of["test"]["examples"] for of in one)
    before = [(tmp_path / f"fold{k}" / "facts.json").stat().st_mtime_ns for k in (1, 2)]
    (tmp_path / "fold2" / "facts.json").unlink()  # as if it had been killed there
    assert run("ratings_mg", tmp_path, **given)["test"] == facts["test"]
    assert (tmp_path / "fold1" / "facts.json").stat().st_mtime_ns == before[0]
    said = predict.answer(ratings_mg.Config(), ratings_mg.see, "", tmp_path / "fold1", ["user=u4,item=i1"], "", "")
    assert 1 <= said[0]["rating"] <= 5
    with pytest.raises(DataError, match="data.fold=3: csv"):
        run("ratings_mg", tmp_path, **given | {"data.fold": "3"})


@pytest.mark.parametrize("name", ["text_mg", "ratings_mg"])
def test_a_staged_run_that_is_interrupted_continues_to_the_same_bits(name, texts, ratings, tmp_path, monkeypatch):
    """In its second stage, with the batch on all devices: as of images."""
    given = {"data.source": {"text_mg": texts, "ratings_mg": ratings}[name], "plan.kind": "coarse_to_fine", "plan.max_steps": 3}
    given |= {"checkpoint.every": 2}
    whole = run(name, tmp_path / "whole", **given)
    feed, began = common.train_batches, []

    def interrupted(*args, **keys):
        began.append(keys["examples_seen"])
        for i, batch in enumerate(feed(*args, **keys)):
            if len(began) == 2 and i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(common, "train_batches", interrupted)
        with pytest.raises(Interrupted):
            run(name, tmp_path / "cut", **given)
    assert len(began) >= 2 and not (tmp_path / "cut" / "summary.json").exists()
    again = run(name, tmp_path / "cut", **given)
    assert again["test"] == whole["test"] and [s["val"] for s in again["stages"]] == [s["val"] for s in whole["stages"]]
    states = [load_state(tmp_path / w) for w in ("whole", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("name, target", [("wine", "proline"), ("breast_cancer", "mean radius"), ("digits", "pixel_3_3")])
def test_linear_members_agree_with_scikit_learn(name, target):
    """A logistic and a linear regression as the experiment makes them, by objective and optimiser, all rows in a batch."""
    penalty = 0.01
    for keys in ({"data.levels": ("class",)}, {"data.targets": (target,), "data.ignore": ("class",)}):
        config = cfg.override(tabular_mg.Config(), {"data.source": f"sklearn:{name}", "preset": "linear"} | keys)
        data = tabular_mg.load_columns(config.data, [Columns()])
        model = tabular_mg.build_model(config, data.encoder, data.taxonomy, data.centers, data.spreads)
        n, reads = len(data.train), dict(inputs=data.inputs, targets=data.targets)
        batch = jax.device_put(next(eval_batches(data.train, data.taxonomy, batch_size=n, **reads)))
        objective = Objective(model.tasks, model.heads, taxonomy=data.taxonomy)
        optimizer = make_optimizer(OptimConfig(name="sgd", weight_decay=penalty))
        op, x = model.everything, np.asarray(batch.inputs["columns/numbers"], np.float64)
        paths = flatten_dict(model.init(jax.random.key(0), batch.inputs, op, train=False)["params"], sep="/")
        rate = 0.2 / np.linalg.eigvalsh(x.T @ x / n).max()

        @jax.jit
        def descend(params, model=model, objective=objective, optimizer=optimizer, batch=batch, op=op, rate=rate):
            said = lambda p: model.apply({"params": unflatten_dict(p, sep="/")}, batch.inputs, op, train=True)
            slope = jax.grad(lambda p: objective(said(p), batch)[0])

            def step(_, carry):
                params, state = carry
                updates, state = optimizer.update(slope(params), state, params)
                return optimizer.apply(params, updates, rate), state

            return jax.lax.fori_loop(0, 20_000, step, (params, optimizer.init(params)))[0]

        after = {k.rpartition("/")[2]: np.asarray(v, np.float64) for k, v in descend(paths).items()}
        ours, bias = after["kernel"], after["bias"]
        if "data.levels" in keys:
            y, binary = np.asarray(batch.targets["class"]), data.taxonomy.size("class") == 2
            # Of two classes scikit-learn has one vector, their difference, whose square is twice the sum of both.
            theirs = LogisticRegression(C=(2 if binary else 1) / (penalty * n), tol=1e-10, max_iter=100_000).fit(x, y)
            coefficients, intercept = theirs.coef_.T, theirs.intercept_ - (0 if binary else theirs.intercept_.mean())
            if binary:
                ours, bias = ours[:, 1:] - ours[:, :1], bias[1:] - bias[:1]
        else:
            y = (np.asarray(batch.targets[target], np.float64) - data.centers[target]) / data.spreads[target]
            theirs = Ridge(alpha=penalty * n, tol=1e-10).fit(x, y)
            coefficients, intercept = theirs.coef_[:, None], theirs.intercept_
        assert np.linalg.norm(ours - coefficients) < 1e-3 * np.linalg.norm(coefficients)
        np.testing.assert_allclose(ours, coefficients, rtol=1e-3, atol=1e-3 * abs(coefficients).max())
        np.testing.assert_allclose(bias - (0 if len(bias) == 1 else bias.mean()), intercept, atol=2e-3)


def test_bundled_tables_as_they_are(tmp_path):
    for source in ("sklearn:wine", "sklearn:diabetes"):
        chosen, _ = tabular_mg.resolve("cpu", {"data.source": source})
        config = cfg.override(tabular_mg.Config(), chosen | {"data.source": source})
        data = tabular_mg.load_columns(config.data, list(dict.fromkeys(tabular_mg.views_of(config).values())))
        model = tabular_mg.build_model(config, data.encoder, data.taxonomy, data.centers, data.spreads)
        traced(model, data, build_plan(config.plan, model, len(data.train)))


def test_what_does_not_fit(table, texts, tmp_path):
    with pytest.raises(ConfigError, match="preset groups needs groups"):
        run("tabular_mg", tmp_path, **{"data.source": table, "data.levels": ("species",), "preset": "groups"})
    with pytest.raises(DataError, match="name what is predicted"):
        run("tabular_mg", tmp_path, **{"data.source": table})
    with pytest.raises(ConfigError, match="has one resolution"):
        run("text_mg", tmp_path, **{"data.source": texts, "plan.kind": "coarse_to_fine", "plan.resolution": (0.5,)})


def test_experiments_differ_in_config_source_and_branches_alone():
    """Each is short, has the same functions, and how many lines differ is printed."""
    sources = {name: (ROOT / "experiments" / f"{name}.py").read_text() for name in EXPERIMENTS}
    for name, text in sources.items():
        functions = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        assert functions == ["views_of", "build_model", "resolve", "train", "see"] and len(text.splitlines()) < 150, name
    for i, a in enumerate(EXPERIMENTS):
        for b in EXPERIMENTS[i + 1 :]:
            lines = difflib.unified_diff(sources[a].splitlines(), sources[b].splitlines(), lineterm="", n=0)
            print(f"{a} → {b}: {sum(l[:1] in '+-' for l in lines) - 2} lines differ")
