"""The plan of the house: imports only go down, and the front page shows what there is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.readme import START, STOP, paper_table

ROOT = Path(__file__).parents[1]
ALLOWED = {"layers": {"layers"}, "zoo": {"layers", "zoo"}, "trainers": {"layers", "zoo", "trainers"}}
LAYERS_MAY_IMPORT = {"jax", "jaxtyping", "numpy", "functools", "typing", "collections", "dataclasses", "math", "abc",
                     "operator", "layers", "itertools", "importlib"}  # fmt: skip


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_only_go_down(floor):
    for path in (ROOT / floor).rglob("*.py"):
        assert (imported(path) & ALLOWED.keys()) <= ALLOWED[floor], path


def test_primitives_need_jax_alone():
    for path in (ROOT / "layers").rglob("*.py"):
        # Imported by whoever asks for that implementation by its name.
        optional = {"tokamax", "absl"} if path.name == "kernels.py" else set()
        assert imported(path) <= LAYERS_MAY_IMPORT | optional, path


def test_no_private_parts_of_jax():
    for floor in ALLOWED:
        for path in (ROOT / floor).rglob("*.py"):
            text = path.read_text()
            assert "jax._src" not in text, path
            assert "jaxlib" not in text, path


def test_every_public_primitive_says_its_source():
    import layers

    for name in layers.__all__:
        thing = getattr(layers, name)
        assert thing.__doc__, name
        if not isinstance(thing, type):
            assert "Source:" in thing.__doc__, name


def test_the_readme_shows_the_papers_there_are():
    text = (ROOT / "README.md").read_text()
    assert START in text
    shown = text.split(START)[1].split(STOP)[0].strip()
    assert shown == paper_table().strip(), "run: python -m trainers.readme README.md"


def test_the_commands_of_the_readme_are_those_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[test]' && pytest -n auto --dist loadfile --no-loadscope-reorder" in readme
    assert "pip install -e . && zoo train ister" in readme
    assert "-e '.[test]'" in ci
    assert "\npytest -n auto --dist loadfile --no-loadscope-reorder\n" in ci


def test_the_console_script_answers():
    done = subprocess.run(
        [sys.executable, "-m", "trainers.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()
