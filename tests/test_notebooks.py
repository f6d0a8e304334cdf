"""The notebooks run from top to bottom, and carry no outputs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import pytest
from nbclient import NotebookClient

import zoo

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    # What load_pretrained would otherwise download.
    model = zoo.create("backbone_qwen2", "tiny")
    variables = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    zoo.save(tmp_path / "checkpoint", model, variables, layout="hf")
    monkeypatch.setenv("ZOO_CHECKPOINT", str(tmp_path / "checkpoint"))
    monkeypatch.setenv("ZOO_STEPS", "2")  # of the rooms' models, whose own recipes are measured elsewhere
    notebook = nbformat.read(path, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) >= 2, "at least a result and an attention map"


def test_there_are_a_quickstart_and_a_way_to_pretrained_weights():
    assert {"quickstart", "load_pretrained"} <= {path.stem for path in NOTEBOOKS}
