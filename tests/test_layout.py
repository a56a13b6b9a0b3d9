"""What the pages for developers say is so: files, rooms, the version, the citation."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]


def rooms_of_the_page() -> list[str]:
    """The names in the first column of the table of rooms, from top to bottom."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| room |") : text.index("Beside `ngeval/`")]
    rows = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]


class TestArchitecture:
    def test_every_room_is_on_the_page(self):
        listed = {name.rstrip("/").removesuffix(".py") for name in rooms_of_the_page()}
        package = ROOT / "ngeval"
        folders = {path.parent.name for path in package.glob("*/__init__.py")}
        files = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
        assert listed == folders | files

    def test_rooms_are_in_the_order_of_the_contract(self):
        [contract] = PROJECT["tool"]["importlinter"]["contracts"]
        storeys = {
            room.strip(): height
            for height, layer in enumerate(reversed(contract["layers"]))
            for room in layer.split("|")
        }
        listed = [name.rstrip("/").removesuffix(".py") for name in rooms_of_the_page()]
        heights = [storeys[name] for name in listed]
        assert heights == sorted(heights)

    def test_every_file_that_is_named_is_there(self):
        for page in ("docs/architecture.md", "CONTRIBUTING.md"):
            text = (ROOT / page).read_text()
            named = set(re.findall(r"`((?:ngeval|tests|docs|studies)/[\w./]*)`", text))
            assert len(named) > 10
            assert [name for name in named if not (ROOT / name).exists()] == [], page

    def test_every_object_of_the_table_is_in_its_file(self):
        text = (ROOT / "docs" / "architecture.md").read_text()
        rows = re.findall(r"^\| `(\w+)` \| `([\w./]+)` \|", text, re.MULTILINE)
        assert len(rows) == 4
        for name, file in rows:
            assert f"\nclass {name}" in (ROOT / file).read_text(), name

    def test_the_list_of_files_is_what_the_modules_say(self):
        page = runpy.run_path(str(ROOT / "docs" / "layout.py"))["page"]
        assert page() == (ROOT / "docs" / "architecture.md").read_text(), "python docs/layout.py"


class TestVersion:
    def test_it_is_the_same_everywhere(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["version"] == VERSION
        changes = (ROOT / "CHANGELOG.md").read_text()
        released = re.search(r"^## \[(\d.*)\] - (\S+)$", changes, re.MULTILINE)
        assert released is not None
        assert released.groups() == (VERSION, citation["date-released"])

    def test_the_citation_has_what_its_format_needs(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["cff-version"] == "1.2.0"
        assert citation["license"] == PROJECT["project"]["license"]
        assert citation["keywords"] == PROJECT["project"]["keywords"]
        for work in (citation, *citation["references"]):
            assert work["title"]
            assert work["type"]
            assert all(set(a) <= {"name", "given-names", "family-names"} for a in work["authors"])
        papers = {paper["url"].rpartition("/")[2] for paper in citation["references"]}
        assert papers == {"2406.06420", "2405.12807"}

    def test_the_source_distribution_holds_what_is_there(self):
        included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
        assert [name for name in included if not (ROOT / name.removeprefix("/")).exists()] == []
