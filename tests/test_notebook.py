"""The notebook of the documentation runs from its first cell to its last."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "first_look.ipynb"


@pytest.mark.slow
def test_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    paths = [str(NOTEBOOK.parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # whatever other kernels this machine knows
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = "".join(out.get("text", "") for cell in cells for out in cell.outputs if out.output_type == "stream")
    for words in ("pre-trained | image", "(4, 37, 128) on a grid of (6, 6)", "validation after epoch 12", "test: top1"):
        assert words in shown
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1
