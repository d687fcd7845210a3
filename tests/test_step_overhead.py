"""The benchmark of the loop runs and writes what it measured; nothing here looks at a time."""

import functools
import json
import types

import jax

from experiments.benchmarks import step_overhead
from mgjax.train import loop

TINY = ["--pairs=2", "--steps=3", "--batch=8", "--images=64", "--width=0.125", "--rounds=1", "--most=1"]
SPREAD = ("", " lower quartile", " upper quartile", " smallest", " largest")


def test_step_overhead(tmp_path, capsys, monkeypatch):
    lowered, make = {"loop": [], "bare": []}, loop.make_train_step

    def noted(where):
        """make_train_step, whose lowered programs are noted."""

        def trace(step, *args, **options):
            traced = step.trace(*args, **options)

            def lower():
                program = traced.lower()
                lowered[where].append(program.as_text())
                return program

            return types.SimpleNamespace(jaxpr=traced.jaxpr, lower=lower)

        return lambda *a, **o: types.SimpleNamespace(trace=functools.partial(trace, make(*a, **o)))

    monkeypatch.setattr(loop, "make_train_step", noted("loop"))
    monkeypatch.setattr(step_overhead, "make_train_step", noted("bare"))
    for name in ("BLOCKS", "WARM"):
        monkeypatch.setattr(step_overhead, name, 1)
    step_overhead.main([*TINY, f"--json={tmp_path / 'figures.json'}"])
    assert lowered["loop"] == lowered["bare"][:1]  # the very program that the loop runs
    figures = json.loads((tmp_path / "figures.json").read_text())
    cases = ["taps N=1", "branches N=1"]
    promised = [
        name + which
        for name in ("loop / bare", "loop / bare CPU time", "bare step ms", *(f"{c} one / several" for c in cases))
        for which in SPREAD
    ]
    promised += [f"{c} {part}" for c in cases for part in ("one step ms", "several steps ms", "one / several by FLOPs")]
    assert sorted(figures) == sorted(promised)
    assert all(isinstance(v, float) and v > 0 for v in figures.values())
    said = capsys.readouterr().out
    assert jax.__version__ in said and "2 pairs of 3 steps" in said
    assert "stage joint" not in said  # the loop speaks to a file, not to a terminal


def test_the_pairs_are_blocks_of_equal_length():
    """The loop is paused before a batch is taken, every so many steps; each pause runs as many bare steps."""
    taken, events, seconds = [], [], []

    class Bare:
        def run(self, steps):
            events.append((len(taken), steps))

    count = step_overhead.WARM + 2 * 5 + 1
    feed = (taken.append(i) or i for i in range(count))
    assert list(step_overhead.interleave(feed, count, 5, Bare(), seconds)) == list(range(count))
    assert events == [(step_overhead.WARM + k * 5, 5) for k in range(3)]
    assert len(seconds) == 2
