"""The quickstart notebook runs from its own folder, and what it shows is there."""

import os
import re

import nbformat
from conftest import ROOT
from nbclient import NotebookClient


def test_the_quickstart_notebook_runs(monkeypatch):
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[output["data"] for output in cell.outputs if "data" in output] for cell in code]
    assert "torch.Size([4, 1, 64, 64])" in shown[1][-1]["text/plain"]
    assert len(shown[2][-1]["image/png"]) > 20_000
    called, left_over = (
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout").splitlines()
        for cell in code[3:]
    )
    assert [line.split(":")[0] for line in called] == ["asked for axion", "asked for cdm", "asked for no_sub"]
    assert [line.split(":")[0] for line in left_over] == ["axion", "cdm", "no_sub"]
    assert all(0 < float(share) < 10 for line in left_over for share in re.findall(r"([\d.]+)%", line))
