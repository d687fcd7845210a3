"""Benchmarks run and write what they measured; nothing here looks at a time."""

import json

from experiments.benchmarks import convolution


def test_convolution(tmp_path, capsys):
    convolution.main(["--rounds=1", "--batch=1", f"--json={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 2 * len(convolution.cases(1)) + 6 and all(v > 0 for v in figures.values())
    assert "by stride" in capsys.readouterr().out
