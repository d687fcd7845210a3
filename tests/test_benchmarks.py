"""Benchmarks run and write what they measured; nothing here looks at a time."""

import json
import os

import numpy as np

from experiments.benchmarks import convolution, kill_resume


def test_convolution(tmp_path, capsys):
    convolution.main(["--rounds=1", "--batch=1", f"--json={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 2 * len(convolution.cases(1)) + 6 and all(v > 0 for v in figures.values())
    assert "by stride" in capsys.readouterr().out


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
