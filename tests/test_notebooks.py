"""Every notebook runs from top to bottom in a fresh kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.second_stage

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# In a process of its own: the kernel client warns of its transport, and warnings are errors here.
RUNNER = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
print([number for number, cell in enumerate(notebook.cells) if cell.get("outputs")])
# What the function behind sliders has drawn is kept in the state of an image.
widgets = notebook.metadata.get("widgets", {}).values()
models = [model for kind in widgets for model in kind["state"].values()]
images = [model for model in models if model["model_name"] == "ImageModel"]
print(sum(len(buffer["data"]) > 20_000 for image in images for buffer in image["buffers"]))
"""
INTERACTIVE = "interactive"
"""Tags cells with sliders, which are committed without output: that is nothing without a kernel."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    # Beside the rows and the studies that it reads, and where nothing that it writes remains.
    for name in ("figures", "studies"):
        (tmp_path / name).symlink_to(path.parent.parent / name)
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
    sliders = [number for number, cell in enumerate(committed) if is_interactive(cell)]
    showing = [number for number, cell in enumerate(committed) if cell.get("outputs")]
    assert len(showing) >= 4
    shown, drawn = done.stdout.splitlines()[-2:]
    assert shown == str(sorted(showing + sliders))
    assert int(drawn) == len(sliders)


def is_interactive(cell):
    return INTERACTIVE in cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.outputs for cell in code if is_interactive(cell))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_numbered_and_tells_a_story(path):
    number = NOTEBOOKS.index(path) + 1
    cells = nbformat.read(path, as_version=4).cells
    assert path.stem.startswith(f"{number:02d}_")
    assert cells[0].source.startswith(f"# {number}. ")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("**Question.**", "**What we expect.**", "**What we see.**", "**Try next.**"):
        assert part in text
    assert 'pip install -c constraints.txt ".[notebooks]"' in cells[0].source
