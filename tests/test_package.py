"""What a user gets by installing and importing."""

import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)


def test_importing_defines_no_flag_and_touches_no_device():
    code = (
        "from absl import flags; before = set(flags.FLAGS)\n"
        "import mgjax, mgjax.train, mgjax.data, mgjax.layers, mgjax.branches\n"
        "from jax._src import xla_bridge\n"
        "new = [f for f in set(flags.FLAGS) - before if 'mgjax' in str(flags.FLAGS.find_module_defining_flag(f))]\n"
        "assert not new, new\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
        "import sys; assert 'experiments' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "requirements.txt").read_text().splitlines() == project["dependencies"]
    assert {"cuda", "cuda13", "tpu", "prepare", "bench", "report", "dev"} <= set(project["optional-dependencies"])
    assert project["optional-dependencies"]["cuda"] == ["jax[cuda]"]


def test_the_package_leaves_experiments_out(tmp_path):
    import setuptools

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_packages(str(ROOT), include=options["include"])
    assert "mgjax.train" in found and not any(p.startswith(("experiments", "tests")) for p in found)


def test_layers_can_be_imported_one_by_one():
    result = python("from mgjax.layers import SeparableConv; import sys; assert 'grain' not in sys.modules")
    assert result.returncode == 0, result.stderr
