"""Benchmarks run and write what they measured; nothing here looks at a time."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmarks import balancing, convolution, depthwise, kill_resume, questions, tables
from mgjax.balancing import BALANCERS
from mgjax.branches import MobileNetV2
from mgjax.ops.depthwise import shift

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_convolution(tmp_path, capsys):
    convolution.main(["--rounds=1", "--batch=1", f"--json={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 2 * len(convolution.cases(1)) + 3 and all(v > 0 for v in figures.values())
    assert "by stride" in capsys.readouterr().out


def test_depthwise(tmp_path, capsys):
    file, shapes = tmp_path / "figures.json", "2x6x6x8k3s2,2x9x8k3"
    depthwise.main(["--only=ops", "--rounds=2", f"--shapes={shapes}", f"--json={file}"])
    figures = json.loads(file.read_text())
    assert all(np.isfinite(v) and v >= 0 for v in figures.values())
    for shape in ("2×6×6×8 k3 s2", "2×9×8 k3"):
        for which in depthwise.PASSES:
            assert {f"{shape} {which} {what}" for what in ("auto ms", "lax ms", "lax / auto", "of a copy")} <= set(figures)
    means = {f"geometric mean, {which} lax / auto" for which in depthwise.PASSES}
    assert {mean + end for mean in means for end in ("", " lower quartile", " upper quartile")} <= set(figures)
    assert "geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["convolve", "input_gradient", "kernel_gradient"])
def test_depthwise_notices_what_is_wrong(name, monkeypatch):
    right = getattr(shift, name)
    monkeypatch.setattr(shift, name, lambda *args: right(*args) * 1.001)
    wrong = {"convolve": "result", "input_gradient": "gradient of x", "kernel_gradient": "gradient of the kernel"}[name]
    with pytest.raises(SystemExit, match=f"auto: the {wrong} differs"):
        depthwise.main(["--only=ops", "--rounds=1", "--shapes=2x9x8k3"])


def test_depthwise_shapes():
    with pytest.raises(SystemExit, match="is no shape as"):
        depthwise.main(["--shapes=8x8x3k3,8x8k3"])
    assert str(depthwise.Shape.parse("8x112x112x32k3s2")) == "8×112×112×32 k3 s2"
    assert depthwise.Shape.parse("2x9x8k3s2").arrays == ((2, 9, 8), (3, 1, 8), (2, 5, 8))


def test_depthwise_step(monkeypatch):
    branch = MobileNetV2(widths=(8,), blocks=1, expansions=1, strides=1, stem_width=8, head_width=None)
    figures = depthwise.compare_steps(branch, batch=2, side=4, rounds=1, say=print)
    assert len(figures) == 9 and all(v > 0 for v in figures.values())
    monkeypatch.setattr(depthwise, "as_flax", lambda call, args, kwargs, context: call(*args, **kwargs))
    with pytest.raises(SystemExit, match="has our depthwise convolution"):
        depthwise.compare_steps(branch, batch=2, side=4, rounds=1, say=print)
    monkeypatch.undo()
    right = shift.kernel_gradient
    monkeypatch.setattr(shift, "kernel_gradient", lambda *args: 2 * right(*args))
    with pytest.raises(SystemExit, match="the gradient differs"):
        depthwise.compare_steps(branch, batch=2, side=4, rounds=1, say=print)


def test_balancing(tmp_path, capsys):
    shrunk = ["--rounds=2", "--batch=4", "--granularities=3", "--side=8"]
    balancing.main([*shrunk, f"--json={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(np.isfinite(v) and v > 0 for v in figures.values())
    for name, method in BALANCERS.items():
        titles = [f"{name} every {method().every}", f"{name} every 1"] if method.seam else [name]
        for title in titles:
            assert {f"{title} ms"} | ({f"{title} / equal"} if name != "equal" else set()) <= set(figures), title
    assert "every 10 steps" in capsys.readouterr().out


def test_tables(tmp_path, capsys):
    file = tmp_path / "figures.json"
    figures = tables.main(["--sets=wine", "--folds=2", f"--json={file}"], **{"plan.max_steps": 80, "plan.eval_batch_size": 96})
    assert figures == json.loads(file.read_text()) and all(np.isfinite(v) for v in figures.values())
    assert all(0.5 < figures[f"wine_{m}"] <= 1 for m in ("mgjax_both", "mgjax_linear", "logistic_regression", "random_forest"))
    assert "gradient boosting" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tables.main(["--sets=wine,iris"])


def test_questions(tmp_path, capsys):
    pytest.importorskip("hiclass", reason="HiClass is not installed: it is in the extra bench")
    rows = [{"text": f"f{i % 4} c{i % 4 // 2} w{i % 7} {i}", "kind": f"k{i % 4 // 2}", "sort": f"s{i % 4}"} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = [
        "--config.model.buckets=512",
        "--config.plan.eval_batch_size=16",
        "--config.plan.batch_size=16",
        "--config.plan.joint=20",
    ]
    source, file = f"--source=jsonl:{tmp_path / 'rows.jsonl'}", tmp_path / "figures.json"
    figures = questions.main([source, "--folds=2", "--seeds=0,1", f"--json={file}", "--", *small])
    assert figures == json.loads(file.read_text())
    for where in ("test", "folds"):
        for model in ("mgjax", "svm", "svm_same_n-grams", "hiclass"):
            assert figures[f"{where}_{model}_kind"] > 0.9 and figures[f"{where}_{model}_sort"] > 0.9, (where, model)
    assert "mgjax" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        questions.main([source, "--", "--config.model.wdith=3"])


@pytest.mark.parametrize("name", ["tables", "questions"])
def test_as_a_command(name):
    """Its own arguments reach it, and what is wrong with them is told."""
    more = ["--source=trec:x"] if name == "questions" else []
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *more, "--folds=1"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert said.returncode == 2 and "two folds or more are needed" in said.stderr, said.stderr


def test_kill_resume(tmp_path, capsys):
    """The short form: real processes, really killed, compared bit by bit."""
    shrunk = ["--config.plan.max_steps=4", "--config.plan.alone=1,0,0", "--config.data.limit=96"]
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    figures = kill_resume.main(["--kills=2", f"--cache={cache}", f"--json={tmp_path / 'figures.json'}", "--", *shrunk])
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert figures["kills"] == figures["kills_survived"] == 2 and figures["runs"] == figures["runs_bit_identical"] >= 1
    assert sum(v for k, v in figures.items() if k.startswith("killed_in")) == 2
    assert "2 of 2 kills survived" in capsys.readouterr().out


def test_a_difference_of_one_bit_is_seen():
    a = {"x": np.float32([1.0, 2.0]), "y": np.int32(3)}
    b = {"x": np.nextafter(a["x"], np.float32(9)), "y": np.int32(3)}
    assert kill_resume.identical(a, dict(a)) == [] and kill_resume.identical(a, b) == ["x"]
    assert kill_resume.identical(a, {"x": a["x"]}) == ["y"]
