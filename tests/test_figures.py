"""The figures of README and docs: made again from quick rows, each has the same structure.

The studies' pictures are compared where the studies are run, in tests/test_studies*.py and
tests/test_preconditioners.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from studies import STUDIES
from tests.committed_figures import FIGURES, KEPT, make
from tests.looks import faults
from tests.pages import in_folder

pytestmark = pytest.mark.second_stage

ROOT = FIGURES.parent
OWN = [name for name in make.PICTURES if name not in STUDIES]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Rows by name: each command is run once, with its quick options, when its rows are read.

    Those of ngeval in this process, which has imported torch.
    """
    folder = tmp_path_factory.mktemp("rows")
    built: dict[str, Path] = {}

    def read(name: str) -> pd.DataFrame:
        if name not in built:
            command = next(key for key, rows in make.ROWS.items() if name in rows.files)
            built.update(make.make_rows(command, folder, quick=True))
        return pd.read_parquet(built[name])

    here = SimpleNamespace(run=lambda words, cwd, check, env: in_folder(cwd, words[1:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "subprocess", here)
        yield read


@pytest.mark.parametrize("name", sorted(set(OWN) - {"toy"}))  # toy: tests/test_toy.py
def test_nothing_overlaps_in_the_committed_pictures(name):
    assert faults(make.PICTURES[name](make.committed)) == []


@pytest.mark.parametrize("name", OWN)
def test_quick_rows_make_the_same_picture(name, quick):
    assert make.structure(make.PICTURES[name](quick)) == KEPT[name]


def test_a_different_picture_has_a_different_structure():
    _, (left, right) = plt.subplots(1, 2)
    for axes in (left, right):
        axes.plot([1, 2], [1, 2], label="ef")
        axes.set_xlabel("epoch 12")
    before = make.structure(left.figure)
    right.set_xlabel("epoch 3")
    assert make.structure(left.figure) == before
    for change in (
        lambda: right.set_xlabel("step"),
        lambda: right.set_yscale("log"),
        lambda: right.plot([1, 2], [2, 1], label="sf"),
        left.legend,
        left.figure.add_subplot,
    ):
        change()
        after = make.structure(left.figure)
        assert after != before
        before = after


def test_every_picture_and_every_command_is_listed():
    page = (FIGURES / "README.md").read_text(encoding="utf-8")
    drawn = {path.stem for path in FIGURES.glob("*.png")}
    assert set(KEPT) == set(make.PICTURES) == drawn - {"report"}  # report: a look at a page
    for name in drawn:
        assert f"`{name}.png`" in page, name
    for rows in make.ROWS.values():
        assert f"`{rows.command}`" in page, rows.command
    kept = {path.stem for path in (FIGURES / "data").glob("*.parquet")}
    assert kept == {name for rows in make.ROWS.values() for name in rows.files}


def test_rows_name_no_place_of_the_machine_that_made_them():
    for path in (FIGURES / "data").glob("*.parquet"):
        texts = pd.read_parquet(path).select_dtypes(exclude="number")
        for column in texts:
            result = texts[column].dropna().astype(str).unique()
            assert not [text for text in result if re.search(r"(^|\s)/", text)], (path.name, column)


def test_every_picture_on_a_page_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
