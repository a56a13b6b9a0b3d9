"""The documentation site: built in strict mode, whole, and readable without a network."""

from __future__ import annotations

import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from sphinx.cmd.build import build_main
from sphinx.util.inventory import InventoryFile

from ngeval.cli import app

ROOT = Path(__file__).parent.parent
PUBLIC = (
    "ngeval",
    "ngeval.checkpoints",
    "ngeval.comparison",
    "ngeval.layer_summary",
    "ngeval.likelihoods",
    "ngeval.methods",
    "ngeval.optim",
    "ngeval.performance",
    "ngeval.plots",
    "ngeval.results",
    "ngeval.studies",
    "ngeval.tasks",
    "ngeval.toy",
    "ngeval.training",
)
# What a browser fetches to show a page, and where it is named.
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
FETCHING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload"}


class Page(HTMLParser):
    """What a page links to, what it fetches, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and FETCHING_LINKS & set(values.get("rel", "").split()):
            self.fetched.append(values["href"])
        self.fetched += [values[name] for name in values if (tag, name) in FETCHED]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of docs/install.md, in this process: torch is imported already."""
    folder = tmp_path_factory.mktemp("site")
    path = list(sys.path)
    status = build_main(["-W", "-q", "-c", str(ROOT / "docs"), str(ROOT), str(folder / "site")])
    sys.path[:] = path
    assert status == 0
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Every page by its place in the site."""
    found = {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}
    assert len(found) > 40
    return found


def inside(page: str, target: str) -> tuple[str, str]:
    """The file of the site that a relative link on a page leads to, and the anchor there."""
    parts = urlsplit(target)
    place = (Path(page).parent / unquote(parts.path)).as_posix() if parts.path else page
    steps: list[str] = []
    for step in place.split("/"):
        if step == "..":
            steps.pop()
        elif step != ".":
            steps.append(step)
    return "/".join(steps), unquote(parts.fragment)


class TestLinks:
    def test_every_link_within_the_site_leads_somewhere(self, site: Path, pages: dict[str, Page]):
        checked, broken = 0, []
        for name, page in pages.items():
            for link in page.links:
                if urlsplit(link).scheme:
                    continue
                file, anchor = inside(name, link)
                checked += 1
                if not (site / file).is_file():
                    broken.append(f"{name}: {link}: no such file")
                elif anchor and file in pages and anchor not in pages[file].anchors:
                    broken.append(f"{name}: {link}: no such anchor")
        assert checked > 1000
        assert broken == []

    def test_links_to_other_sites_are_safe_ones(self, pages: dict[str, Page]):
        schemes = {urlsplit(link).scheme for page in pages.values() for link in page.links}
        assert schemes <= {"", "https", "mailto"}

    def test_the_first_page_leads_to_the_docs(self, site: Path):
        text = (site / "index.html").read_text()
        assert 'content="0; url=docs/index.html"' in text
        assert "How close is the update" in (site / "docs" / "index.html").read_text()

    @pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
    def test_every_page_of_docs_is_reached_from_the_menu(self, pages: dict[str, Page], page: str):
        name = f"docs/{Path(page).stem}.html"
        assert name in {
            inside("docs/index.html", link)[0] for link in pages["docs/index.html"].links
        }

    def test_markdown_links_work_as_files_too(self):
        broken = []
        for path in [*(ROOT / "docs").glob("**/*.md"), ROOT / "README.md"]:
            text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            broken += [
                f"{path.name}: {target}"
                for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
                if not urlsplit(target).scheme and not (path.parent / target).exists()
            ]
        assert broken == []


class TestOffline:
    def test_nothing_is_fetched_from_elsewhere(self, site: Path, pages: dict[str, Page]):
        fetched = [(name, target) for name, page in pages.items() for target in page.fetched]
        assert len(fetched) > 100
        for name, target in fetched:
            assert not urlsplit(target).netloc, (name, target)
            if urlsplit(target).scheme != "data":
                assert (site / inside(name, target)[0]).is_file(), (name, target)

    def test_styles_fetch_nothing_either(self, site: Path):
        styles = list(site.rglob("*.css"))
        assert styles
        for path in styles:
            for target in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", path.read_text()):
                assert not urlsplit(target).netloc, (path.name, target)

    def test_formulas_are_drawn_by_the_browser_itself(self, site: Path):
        text = (site / "docs" / "mathematics.html").read_text()
        assert text.count("<math ") > 100
        assert "$$" not in text
        assert "mathjax" not in text.lower()
        assert "<msqrt>" in text  # the root in γ


def public_names(module: str) -> list[str]:
    """``__all__``, or what is defined in the module itself under a name without underscore."""
    found = importlib.import_module(module)
    own = getattr(found, "__all__", None)
    if own is None:
        own = [
            name
            for name, value in vars(found).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module
        ]
    return [f"{module}.{name}" for name in own]


class TestApi:
    @pytest.fixture(scope="class")
    def inventory(self, site: Path) -> dict[str, str]:
        """Where each documented name is."""
        content = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
        return {
            name: item.uri
            for kind, items in content.data.items()
            if kind.startswith("py:")
            for name, item in items.items()
        }

    @pytest.mark.parametrize("module", PUBLIC)
    def test_every_public_name_is_documented(self, inventory: dict[str, str], module: str):
        names = public_names(module)
        assert len(names) >= 2
        assert [name for name in names if name not in inventory] == []

    @pytest.mark.parametrize("module", PUBLIC)
    def test_every_public_name_has_a_docstring(self, module: str):
        for name in public_names(module):
            thing = getattr(importlib.import_module(module), name.rpartition(".")[2])
            assert not callable(thing) or thing.__doc__, name

    def test_entries_of_the_inventory_are_anchors(
        self, inventory: dict[str, str], pages: dict[str, Page]
    ):
        for name, uri in inventory.items():
            file, anchor = uri.split("#")
            assert anchor.replace("$", name) in pages[file].anchors, name

    def test_errors_are_there_with_what_they_derive_from(self, site: Path):
        text = (site / "docs" / "api" / "ngeval.html").read_text()
        for name in ("InputError", "ModelError", "EngineError", "NumericalError", "TaskError"):
            assert f'id="ngeval.{name}"' in text


class TestCommandLine:
    def test_every_command_and_option_is_on_its_page(self, site: Path):
        text = (site / "docs" / "command-line.html").read_text()
        group = typer.main.get_command(app)
        for name, command in group.commands.items():
            assert f'<section id="ngeval-{name}">' in text
            for parameter in command.params:
                for option in parameter.opts:
                    if option.startswith("--"):
                        assert option in text, (name, option)
