"""Every notebook runs from top to bottom in a fresh kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# In a process of its own: the kernel client warns of its transport, and warnings are errors here.
RUNNER = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
print([number for number, cell in enumerate(notebook.cells) if cell.get("outputs")])
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    # Beside the committed rows that it reads, and where nothing that it writes remains.
    (tmp_path / "figures").symlink_to(path.parent.parent / "figures")
    place = tmp_path / "notebooks"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(path), str(place)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")},
    )
    assert done.returncode == 0, done.stderr
    committed = nbformat.read(path, as_version=4).cells
    showing = [number for number, cell in enumerate(committed) if cell.get("outputs")]
    assert len(showing) >= 4
    assert done.stdout.splitlines()[-1] == str(showing)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 500_000
