"""The law of the layout: a file imports only files that stand above it."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the top down. A name is a module, or a package with all that is in it.
ORDER = [
    "errors",
    "taxonomy",
    "granularity",
    "contracts",
    "config",
    "flops",
    "ops",
    "views",
    "layers",
    "branches",
    "projection",
    "fusion",
    "heads",
    "model",
    "pretrained",
    "cost",
    "decode",
    "losses",
    "balancing",
    "objective",
    "metrics",
    "ranking",
    "data",
    "train",
]
MODEL = {
    "cost",
    "branches",
    "projection",
    "fusion",
    "heads",
    "model",
    "layers",
    "decode",
    "losses",
    "balancing",
    "objective",
    "metrics",
    "ranking",
    "views",
}
MODEL |= {"pretrained"}
# What a package must not import, although it stands above.
FORBIDDEN = {"data": MODEL, "train": MODEL | {"data", "taxonomy"}, "ops": {"taxonomy", "granularity", "contracts", "config"}}
# Within a package files may import each other; these third parties must stay out of a layer.
WITHOUT = {
    "taxonomy": {"jax", "flax"},
    "granularity": {"jax", "flax"},
    "config": {"jax", "flax"},
    "ops": {"flax"},
    "decode": {"flax.linen"},
    "data": {"flax", "optax", "orbax"},
}
FILES = sorted((ROOT / "mgjax").rglob("*.py"))


def layer(path):
    parts = path.relative_to(ROOT / "mgjax").with_suffix("").parts
    return parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "mgjax":
                yield from (f"mgjax.{a.name}" for a in node.names)
            else:
                yield node.module


def test_every_file_has_its_place():
    assert {layer(f) for f in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_above_it(path):
    own = layer(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("experiments", "tests"), f"{path} imports {name}"
        if top == "mgjax" and own != "__init__":
            other = rest.split(".")[0]
            assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {other}, which stands below it"
            assert other not in FORBIDDEN.get(own, ()), f"{own} must not know {other}"
        for banned in WITHOUT.get(own, ()):
            assert name != banned and not name.startswith(banned + "."), f"{own} imports {name}"


def test_train_speaks_of_no_modality():
    words = re.compile(r"\b(image|pixel|text|token|rating|user|resnet|procedural|cifar)s?\b", re.IGNORECASE)
    for path in (ROOT / "mgjax" / "train").glob("*.py"):
        assert not words.findall(path.read_text()), path


def test_nothing_but_the_project_is_spoken_of():
    """No path of a machine, and the README knows nothing of the developers' data."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("experiments/**/*.py"), *FILES]:
        assert not re.search(r"/(root|home|work|tmp)/", path.read_text()), path
    assert "shared/data" not in (ROOT / "README.md").read_text()
