"""The notebooks run from their own folder, and their output has the expected pictures and numbers."""

import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


@pytest.fixture
def executed(monkeypatch):
    """Executes a notebook; returns the outputs that each code cell shows, and the text that it prints."""
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")

    def execute(name):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        shown = [[output["data"] for output in cell.outputs if "data" in output] for cell in code]
        printed = ["".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in code]
        return shown, printed

    return execute


def test_the_quickstart_notebook_runs(executed):
    shown, printed = executed("quickstart.ipynb")
    assert "torch.Size([4, 1, 64, 64])" in shown[1][-1]["text/plain"]
    assert len(shown[2][-1]["image/png"]) > 20_000
    called, left_over = (text.splitlines() for text in printed[3:])
    assert [line.split(":")[0] for line in called] == ["asked for axion", "asked for cdm", "asked for no_sub"]
    assert [line.split(":")[0] for line in left_over] == ["axion", "cdm", "no_sub"]
    assert all(0 < float(share) < 10 for line in left_over for share in re.findall(r"([\d.]+)%", line))


def test_the_notebook_of_parameters_draws_the_lenses_of_the_simulator(executed):
    shown, printed = executed("parameters.ipynb")
    assert "source_x, -0.35 to 0.35 arcsec" in printed[0]
    assert all(len(cell[-1]["image/png"]) > 20_000 for cell in shown[2:])
    axion, smooth = ([float(share) for share in re.findall(r"([\d.]+)%", text)] for text in printed[2:4])
    assert len(axion) == len(smooth) == 7
    assert max(axion) < 2  # other lenses of the class differ by 10% of the peak
    assert max(smooth) < 2
