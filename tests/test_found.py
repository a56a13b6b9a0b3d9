"""docs/what-we-found.md says what the committed rows say, and every study has its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from studies import STUDIES

pytestmark = pytest.mark.second_stage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("findings", ROOT / "figures" / "findings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_rows_give(maker):
    assert maker.page() == maker.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STUDIES)
def test_rows_of_the_full_size_with_figure_and_notebook_are_committed(name):
    path = ROOT / "figures" / "data" / f"{name}.parquet"
    rows = pd.read_parquet(path)
    assert set(rows["study"]) == {name}
    assert set(rows["size"]) == {"full"}
    assert path.stat().st_size < 1_000_000
    assert (ROOT / "figures" / f"{name}.png").is_file()
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert any(f"figures/data/{name}.parquet" in text for text in texts)
