"""Runs side by side: grouping, spread, what is best, what must not be compared."""

import builtins
import json
import math
import pathlib
import subprocess
import sys

import pytest

from experiments import compare
from mgjax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def make(tmp_path):
    """Writes the workdir of a finished run with given accuracies (coarse, fine) and keys of its config."""

    def run(name, accuracy=(0.8, 0.6), seed=0, preset="taps", summary=None, test=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        levels = {l: {"accuracy": a, "raw_accuracy": a - 0.05} for l, a in zip(("coarse", "fine"), accuracy)}
        figures = {"examples": 1000, "levels": levels, "full_path_accuracy": accuracy[-1]}
        figures |= {"mistake_severity": 1.5, "tree_distance": 2 - accuracy[-1]}
        said = {"experiment": "imagenet_mg", "dataset": "tfds:x", "seed": seed, "hardware": "1 × cpu"}
        said |= {"params": 1_263_608, "train_flops": 1.25e14, "seconds": 65.0, "test": figures | (test or {})}
        said |= {"config": {"preset": preset, "seed": seed, "data.dir": name, "model.widths": [64, 128]} | config}
        (folder / "config.json").write_text(json.dumps({"experiment": "imagenet_mg", "config": said["config"]}))
        (folder / "summary.json").write_text(json.dumps(said | (summary or {})))
        return folder

    return run


def test_runs_of_several_seeds_become_one_row(make, capsys):
    runs = [make(f"run{s}", (0.80 + s / 100, 0.60), seed=s) for s in (0, 1, 2)]
    said = compare.compare([*runs, make("other", (0.79, 0.65), preset="branches", seed=5)])
    first, second = said["groups"]
    assert [r["seed"] for r in first["runs"]] == [0, 1, 2] and first["n"] == 3 and (second["n"], second["std"]) == (1, None)
    assert first["mean"]["coarse/accuracy"] == pytest.approx(0.81)
    # ((−0.01)² + 0² + 0.01²) / (3 − 1) = 0.0001
    assert first["std"]["coarse/accuracy"] == pytest.approx(math.sqrt(0.0001)) and first["std"]["fine/accuracy"] == 0
    out = capsys.readouterr().out
    for shown in (
        "taps (3 runs)",
        "81.00 ± 1.00%",
        "run1, seed 1",
        "branches · other, seed 5",
        "1,263,608",
        "1.25e+14",
        "1:05",
    ):
        assert shown in out, shown
    assert "tfds:x: 1,000 test examples" in out and "± is the standard deviation of the sample" in out


def test_the_best_of_each_column_is_marked(make, capsys):
    runs = [
        make("a", (0.80, 0.60)),
        make("b", (0.80, 0.65), preset="branches", summary={"params": 2_000_000, "seconds": 60}),
        make("c", (0.70, 0.50), preset="linear", summary={"params": 1000, "seconds": 61}, test={"mistake_severity": 1.25}),
    ]
    said = compare.compare(runs)
    assert said["best"] == {
        "params": ["linear"],
        "train_flops": [],  # all alike: nothing to choose
        "seconds": ["branches"],
        "coarse/accuracy": ["taps", "branches"],
        "coarse/raw_accuracy": ["taps", "branches"],
        "fine/accuracy": ["branches"],
        "fine/raw_accuracy": ["branches"],
        "full_path_accuracy": ["branches"],
        "mistake_severity": ["linear"],
        "tree_distance": ["branches"],
    }
    out = capsys.readouterr().out
    rows = {name: next(l for l in out.splitlines() if l.startswith(f" {name}")) for name in ("taps", "branches", "linear")}
    assert [row.count("*") for row in rows.values()] == [1, 5, 2] and "1,000*" in rows["linear"]
    assert "raw 60.00%*" in out and "raw 45.00% " in out


def test_one_run_alone_is_best_of_nothing(make, capsys):
    assert not any(compare.compare([make("a")])["best"].values())
    assert "*" not in capsys.readouterr().out


@pytest.mark.parametrize("other, groups", [({}, 1), ({"model.widths": [64]}, 2), ({"preset": "linear"}, 2), ({"new": 1}, 2)])
def test_what_may_differ_within_a_group(make, other, groups):
    # Seed and data.dir always differ here.
    assert len(compare.compare([make("a"), make("b", seed=1, **other)])["groups"]) == groups


def test_groups_are_named_by_what_tells_them_apart(make):
    runs = [make("a"), make("b", **{"model.widths": [8, 16]}), make("c", preset="linear", **{"model.widths": [1]})]
    names = lambda runs: [g["name"] for g in compare.compare(runs)["groups"]]
    assert names(runs) == ["taps model.widths=64,128", "taps model.widths=8,16", "linear"]
    assert names([runs[0], make("d", **{"only.here": 3})]) == ["taps #1", "taps #2"]
    assert names([runs[0], make("e", summary={"experiment": "other"})]) == ["imagenet_mg taps", "other taps"]
    many = {f"key{i}": 0 for i in range(5)}
    assert names([make("f", **many), make("g", **dict.fromkeys(many, 1))])[1] == "taps key0=1 key1=1 key2=1 …"


def test_a_run_without_config_stands_alone(make):
    runs = [make(n, seed=s, summary={"config": None}) for s, n in enumerate("abc")]
    assert len(compare.compare(runs)["groups"]) == 1  # config.json has it
    for run in runs[:2]:
        (run / "config.json").unlink()
    said = compare.compare(runs)
    assert [g["name"] for g in said["groups"]] == [str(runs[0]), str(runs[1]), "taps"]
    assert any("config not recorded" in n and str(runs[1]) in n and str(runs[2]) not in n for n in said["notes"])


@pytest.mark.parametrize(
    "first, second, says",
    [
        ({}, {"summary": {"dataset": "tfds:y"}}, r"a: tfds:x, 1,000 examples; .*b: tfds:y, 1,000 examples"),
        ({}, {"test": {"examples": 500}}, r"a: tfds:x, 1,000 examples; .*b: tfds:x, 500 examples"),
        (
            {"summary": {"dataset": "procedural"}, "data.seed": 0},
            {"summary": {"dataset": "procedural"}, "data.seed": 1},
            r"b: procedural, 1,000 examples, data.seed=1",
        ),
    ],
)
def test_different_test_sets_are_refused(make, first, second, says):
    with pytest.raises(InputError, match=f"different test sets cannot be compared .*{says}"):
        compare.compare([make("a", **first), make("b", **second)])


def test_what_a_reader_must_know_is_said(make, capsys):
    said = compare.compare([make("a"), make("b"), make("c", seed=1, summary={"hardware": "8 × H100"})])
    assert any("seed 0 more than once" in n for n in said["notes"])
    assert any("different hardware: 1 × cpu | 8 × H100" in n for n in said["notes"])
    out = capsys.readouterr().out
    assert all(n in out for n in said["notes"])
    said = compare.compare([make("d"), make("e", (0.8,), preset="linear")])
    assert any("levels differ" in n and "coarse | coarse, fine" in n for n in said["notes"])
    assert "–" in capsys.readouterr().out  # no figure of the fine level for the second


def test_levels_stand_coarse_to_fine_whatever_the_order_of_the_file(make):
    shuffled = {"fine": {"accuracy": 0.5, "raw_accuracy": 0.9}, "coarse": {"accuracy": 0.7, "raw_accuracy": 0.6}}
    runs = [compare.read(make("a", test={"levels": shuffled}))]
    assert compare.levels_of(runs) == ["coarse", "fine"]


def test_tasks_beside_levels_and_alone(make, capsys):
    """An error is best where it is low, a ranking where it is high; a run may have no level at all."""
    tasks = lambda rmse, ndcg: {"levels": {}, "tasks": {"rating": {"rmse": rmse, "ndcg@10": ndcg}, "seen": {"map": 0.5}}}
    runs = [make("a", test=tasks(0.95, 0.2)), make("b", preset="pairs", test=tasks(0.9, 0.1))]
    for run in runs:
        said = json.loads((run / "summary.json").read_text())
        for key in ("levels", "full_path_accuracy", "mistake_severity", "tree_distance"):
            del said["test"][key]
        (run / "summary.json").write_text(json.dumps(said))
    said = compare.compare(runs)
    assert said["best"] | {"rating/rmse": ["pairs"], "rating/ndcg@10": ["taps"], "seen/map": []} == said["best"]
    out = capsys.readouterr().out
    assert "rating rmse" in out and "0.9500" in out and "0.9000*" in out and "ndcg@10 0.2000*" in out and "seen map" in out
    with pytest.raises(InputError, match="these runs have none"):
        compare.compare(runs, plot=runs[0] / "plot.svg")
    both = make("c", preset="both", test={"tasks": {"age": {"mae": 3.0, "mae_std": 0.1}}})
    said = compare.compare([runs[0], both])
    assert {"fine/accuracy", "age/mae"} <= set(said["groups"][1]["mean"]) and "age/mae_std" not in said["groups"][1]["mean"]
    assert not said["notes"]


def test_folds_are_different_test_sets(make):
    runs = [make(name, summary={"dataset": "trec:x"}, **{"data.fold": fold}) for name, fold in (("a", "1"), ("b", "2"))]
    with pytest.raises(InputError, match=r"b: trec:x, 1,000 examples, data.fold=2"):
        compare.compare(runs)


def test_missing_figures_are_dashes(make, capsys):
    runs = [
        make("a", summary={"params": None, "seconds": None, "train_flops": None}, test={"mistake_severity": None}),
        make("b"),
    ]
    said = compare.compare([runs[0]])
    assert "params" not in said["groups"][0]["mean"] and "mistake_severity" not in said["best"]
    runs.append(make("c", seed=1, summary={"params": None}))
    (group,) = compare.compare([*runs[1:]])["groups"]
    assert "params" not in group["mean"] and group["mean"]["seconds"] == 65  # no mean of some


def test_summary_files_and_their_folders(make, tmp_path):
    folder = make("a")
    (tmp_path / "result.json").write_text((folder / "summary.json").read_text())
    said = compare.compare([tmp_path / "result.json", folder / "summary.json"])
    assert [r["path"] for r in said["groups"][0]["runs"]] == [str(tmp_path / "result.json"), str(folder)]
    with pytest.raises(InputError, match="named twice"):
        compare.compare([folder, folder / "summary.json"])


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("PDF", b"%PDF")])
def test_plot_and_json(make, tmp_path, suffix, start):
    runs = [make("a"), make("b", (0.7, 0.5), seed=1), make("c", preset="branches [bold]$x$", summary={"params": 9})]
    written = []
    for name in ("one", "two"):
        plot, out = tmp_path / f"{name}.{suffix}", tmp_path / f"{name}.json"
        compare.main([*map(str, runs), f"--plot={plot}", f"--json={out}"])
        written.append(plot.read_bytes())
    assert written[0] == written[1] and written[0].startswith(start)
    said = json.loads(out.read_text())
    assert said["examples"] == 1000 and [g["n"] for g in said["groups"]] == [2, 1]
    assert said["groups"][0]["mean"]["coarse/accuracy"] == pytest.approx(0.75)
    assert said["groups"][0]["runs"][1]["figures"]["coarse/accuracy"] == 0.7
    if suffix == "svg":
        text = written[0].decode()
        assert ">coarse</text>" in text and ">branches [bold]$x$</text>" in text and "training FLOPs" in text


def test_only_the_plot_needs_matplotlib(make, tmp_path, monkeypatch):
    imported = builtins.__import__

    def absent(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    run = make("a")
    compare.compare([run], out=tmp_path / "figures.json")
    with pytest.raises(InputError, match=r"pip install 'mgjax\[report\]'"):
        compare.compare([run], plot=tmp_path / "plot.svg")


def test_names_that_look_like_markup_are_shown_as_they_are(make, capsys):
    compare.compare([make("a", preset="[bold]x[/y]", summary={"dataset": "[red]"})])
    out = capsys.readouterr().out
    assert "[bold]x[/y]" in out and "[red]: 1,000" in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "no run is named"),
        (["RUN", "--bar"], "unrecognized arguments: --bar"),
        (["absent"], "'absent' does not exist"),
        (["unfinished"], "'unfinished' has no summary.json: is the run finished? the same command continues it"),
        (["empty"], "'empty' has no summary.json: it is not the workdir of a run"),
        (["broken"], "'broken/summary.json' is not readable JSON"),
        (["bytes.json"], "'bytes.json' is not readable JSON"),
        (["list.json"], "'list.json' is no summary of a run"),
        (["figures.json"], "'figures.json' is no summary of a run"),
        (["RUN", "RUN"], "is named twice"),
        (["RUN", "--plot=plot.bmp"], "'plot.bmp'"),
        (["RUN", "--plot=absent/plot.svg"], "the plot 'absent/plot.svg' cannot be written"),
        (["RUN", "--json=absent/figures.json"], "'absent/figures.json' cannot be written"),
    ],
)
def test_errors_are_one_line_and_exit_status_2(make, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    run = make("run")
    for name in ("unfinished", "empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    (tmp_path / "broken" / "summary.json").write_text('{"test": ')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "figures.json").write_text('{"dense ms": 1.5}')
    with pytest.raises(SystemExit) as stop:
        compare.main([str(run) if a == "RUN" else a for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_as_a_command_the_table_is_never_cut(make):
    runs = [make(f"a_rather_long_name_of_a_run_{s}", seed=s) for s in range(2)]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.compare", *map(str, runs)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "a_rather_long_name_of_a_run_1" in result.stdout and "…" not in result.stdout
    assert len({len(l) for l in result.stdout.splitlines() if "%" in l}) == 1
