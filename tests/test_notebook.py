"""The quickstart notebook runs from its own folder, and what it shows is there."""

import os
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


@pytest.fixture
def run_folder(lens_data, generator_run, classifier_run, tmp_path) -> Path:
    """A folder laid out as the scripts leave it."""
    (tmp_path / "data").symlink_to(lens_data)
    (tmp_path / "diffusion_training").symlink_to(generator_run)
    (tmp_path / "classifier_training_resnet18").symlink_to(classifier_run)
    return tmp_path


def test_the_quickstart_notebook_runs(run_folder, monkeypatch):
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 'RUN = "demo"' in code[0].source
    code[0].source = code[0].source.replace('RUN = "demo"', f"RUN = {str(run_folder)!r}")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    shown = [[output["data"] for output in cell.outputs if "data" in output] for cell in code]
    assert "torch.Size([4, 1, 64, 64])" in shown[2][-1]["text/plain"]
    assert len(shown[3][-1]["image/png"]) > 20_000
    lines = "".join(output.get("text", "") for output in code[4].outputs if output.get("name") == "stdout").splitlines()
    assert [line.split(":")[0] for line in lines] == ["asked for axion", "asked for cdm", "asked for no_sub"]
