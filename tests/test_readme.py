"""Every command and every snippet of the README runs; commands with their steps shrunk."""

import glob
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import ablation, compare
from mgjax import config as cfg
from tests.test_experiments import SMALL, command, finish, small_images

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.partition("#")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
RUNS = [line for line in LINES if re.match(r"python -m experiments\.\w+_mg", line)]
COMMANDS = [line for line in RUNS if "--predict" not in line]
SNIPPETS = [body for kind, body in BLOCKS if kind == "python"]


def test_the_readme_has_commands_and_snippets():
    assert len(COMMANDS) >= 5 and len(SNIPPETS) >= 2
    known = ("python -m experiments.", "python -m mgjax.data.prepare ", "make ", "pip install ", "source ")
    assert not [line for line in LINES if line and not line.startswith(known)]


def test_every_result_that_is_listed_is_there():
    listed = re.findall(r"^\| `([\w.-]+)`", (ROOT / "experiments" / "results" / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == {p.name for p in (ROOT / "experiments" / "results").glob("*.json")}


@pytest.mark.parametrize("line", [c for c in dict.fromkeys(COMMANDS) if "--help" not in c])
def test_a_command_of_the_readme(line, tmp_path, request):
    module, *arguments = shlex.split(line)[2:]
    if "DIR" in line:
        folder = request.getfixturevalue("shared_data") / "tfds"
        arguments = [a.replace("=DIR", f"={folder}") for a in arguments]
    if "PATH" in line:
        images = small_images(tmp_path / "images")
        arguments = [a.replace("=folder:PATH", f"=folder:{images}") for a in arguments]
    if "trec:TREC" in line:
        folder = request.getfixturevalue("shared_data") / "trec"
        arguments = [a.replace("=trec:TREC", f"=trec:{folder}") for a in arguments]
    if "MOVIELENS" in line:
        folder = request.getfixturevalue("shared_data") / "movielens100k"
        arguments = [a.replace("=movielens:MOVIELENS", f"=movielens:{folder}") for a in arguments]
    if "FILE.csv" in line:
        arguments = [a.replace("=csv:FILE.csv", f"=csv:{small_texts(tmp_path / 'texts.csv')}") for a in arguments]
    # The test's own workdir, and then its own, smaller sizes.
    arguments = [a for a in arguments if not a.startswith("--workdir")]
    devices = 2 if "mesh.fsdp=2" in line else 1
    # All stages in the first command; every other compiles the joint one alone.
    fewer = [] if line == COMMANDS[0] else ["--config.plan.alone=0"]
    known = cfg.leaves(importlib.import_module(module).Config())
    small = [a for a in SMALL if a.removeprefix("--config.").partition("=")[0] in known]
    if module == "experiments.text_mg":  # there widths are single numbers
        small = [*small, "--config.model.width=8", "--config.model.embedding=8"]
    said, code = finish(command(*arguments, *small, *fewer, f"--workdir={tmp_path / 'W'}", module=module, devices=devices))
    assert code == 0 and (tmp_path / "W" / "summary.json").exists(), said
    if "trec:TREC" in line:  # what it learned is then asked
        (asked,) = [r for r in RUNS if "--predict" in r]
        arguments = [a for a in shlex.split(asked)[3:] if not a.startswith("--workdir")]
        said, code = finish(command(f"--workdir={tmp_path / 'W'}", *arguments, module=module))
        assert code == 0 and re.search(r"^Who wrote Hamlet\?: [A-Z]+ \d+\.\d% › [A-Z]+:\w+ \d", said, re.MULTILINE), said
        assert "How far is it to the moon?: " in said
        said, code = finish(command(f"--workdir={tmp_path / 'W'}", "--predict", "x", "--config.seed=1", module=module))
        assert code == 2 and "error: a trained model keeps its config: leave out --config.seed" in said


def small_texts(path):
    rows = [f"what is {i},{'ab'[i % 2]},{'ab'[i % 2]}{i % 4}" for i in range(96)]
    path.write_text("\n".join(["text,kind,sort", *rows]) + "\n")
    return path


def test_runs_are_compared_as_the_readme_says(monkeypatch, capsys):
    (line,) = [line for line in LINES if line.startswith("python -m experiments.compare")]
    monkeypatch.chdir(ROOT)
    arguments = [path for a in shlex.split(line)[3:] for path in sorted(glob.glob(a))]
    assert len(arguments) >= 3
    compare.main(arguments)
    said = capsys.readouterr().out
    assert "texture" in said and "348,292" in said


def test_presets_are_compared_as_the_readme_says(shared_data, tmp_path, capsys, monkeypatch):
    """All that is asked for, shown; one of its runs, shrunk."""
    monkeypatch.chdir(ROOT)
    lines = [line for line in LINES if line.startswith("python -m experiments.ablation")]
    for line, runs in zip(reversed(lines), (33, 9), strict=True):
        arguments = [a.replace("=DIR", f"={shared_data / 'tfds'}") for a in shlex.split(line)[3:]]
        arguments = [a for a in arguments if not a.startswith("--workdir")] + [f"--workdir={tmp_path / 'W'}"]
        ablation.main([*arguments, "--dry_run"])
        assert capsys.readouterr().out.count("python -m experiments.cifar_mg") == runs
    shrunk = [a.removeprefix("--config.") for a in SMALL]
    ablation.main([*arguments, "--presets=flat", "--seeds=0", "--set", *shrunk])
    said = capsys.readouterr().out
    assert "flat" in said and "superclass" in said and (tmp_path / "W" / "flat-seed0" / "summary.json").exists()


def test_prepare_is_called_as_the_readme_says():
    """Without TensorFlow it says how to get it; with it, it would download."""
    (line,) = [line for line in LINES if line.startswith("python -m mgjax.data.prepare")]
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed: the command would download")
    run = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "pip install 'mgjax[prepare]'" in run.stderr


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme(snippet):
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    arrays = [v for v in names.values() if isinstance(v, jax.Array)]
    assert arrays and all(jnp.isfinite(a).all() for a in arrays)


@pytest.mark.parametrize("target", ["setup", "train", "test"])
def test_make_targets_exist(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_make_takes_cuda_where_a_gpu_answers(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    fake.chmod(0o755)
    said = {}
    for name, path in (("with", f"{tmp_path}:"), ("without", "")):
        monkeypatch.setenv("PATH", path + "/usr/local/bin:/usr/bin:/bin")
        run = subprocess.run(
            ["make", "-n", "setup", "PYTHON=python3", f"VENV={tmp_path}/venv"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        said[name] = run.stdout
    assert "'.[dev,cuda]'" in said["with"]
    if not pathlib.Path("/usr/bin/nvidia-smi").exists():
        assert "'.[dev]'" in said["without"]


def test_make_asks_for_a_python_that_is_new_enough(tmp_path):
    run = subprocess.run(
        ["make", "setup", "PYTHON=", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0 and "Python 3.11 or newer" in run.stdout
