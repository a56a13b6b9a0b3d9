"""The documentation site: built in strict mode, complete, and readable without a network."""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from sphinx.util.inventory import InventoryFile

from ngeval.cli.app import app

pytestmark = pytest.mark.second_stage

ROOT = Path(__file__).parent.parent
COMMAND = "sphinx-build -W -c docs . build/site"
PUBLIC = (
    "ngeval",
    "ngeval.checkpoints",
    "ngeval.analysis.best_damping",
    "ngeval.analysis.intervals",
    "ngeval.analysis.layer_summary",
    "ngeval.analysis.norms",
    "ngeval.analysis.ranking",
    "ngeval.analysis.stages",
    "ngeval.analysis.tables",
    "ngeval.likelihoods",
    "ngeval.methods",
    "ngeval.optim",
    "ngeval.plots",
    "ngeval.report",
    "ngeval.results.table_files",
    "ngeval.tasks",
    "ngeval.training",
)
# What a browser fetches to show a page, and the attribute that names it.
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
FETCHING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload"}


class Page(HTMLParser):
    """A page's links, the files that it fetches, and its anchors."""

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
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built by the command of docs/install.md, once for all workers."""
    local = tmp_path_factory.getbasetemp()
    folder = local if worker_id == "master" else local.parent
    target, log = folder / "site" / "html", folder / "site.txt"
    with (folder / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            options = shlex.split(COMMAND)[1:-1]
            command = [sys.executable, "-m", "sphinx", *options, "-q", str(target)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            log.write_text(f"{done.returncode}\n{done.stderr}")
    code, _, errors = log.read_text().partition("\n")
    assert code == "0", errors[-4000:]
    return target


def test_the_command_is_that_of_the_install_page():
    assert f"\n{COMMAND} " in (ROOT / "docs" / "install.md").read_text()


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Every page by its path in the site."""
    all_pages = {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}
    assert len(all_pages) > 40
    return all_pages


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
    def test_every_link_within_the_site_has_a_target(self, site: Path, pages: dict[str, Page]):
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

    def test_links_to_other_sites_are_safe(self, pages: dict[str, Page]):
        schemes = {urlsplit(link).scheme for page in pages.values() for link in page.links}
        assert schemes <= {"", "https", "mailto"}

    def test_the_first_page_leads_to_the_docs(self, site: Path):
        text = (site / "index.html").read_text()
        assert 'content="0; url=docs/index.html"' in text
        assert "How close is the update" in (site / "docs" / "index.html").read_text()

    def test_every_page_of_docs_is_reached_from_the_menu(self, pages: dict[str, Page]):
        listed = {inside("docs/index.html", link)[0] for link in pages["docs/index.html"].links}
        files = [path.relative_to(ROOT).with_suffix(".html") for path in ROOT.glob("docs/**/*.md")]
        assert len(files) > 30
        assert [file for file in files if file.as_posix() not in listed] == []

    def test_every_notebook_is_shown_with_its_outputs(self, site: Path):
        files = sorted((ROOT / "notebooks").glob("*.ipynb"))
        assert len(files) >= 7
        for file in files:
            text = (site / "notebooks" / f"{file.stem}.html").read_text()
            assert "cell_output" in text, file.name

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

    def test_formulas_are_drawn_by_the_browser_itself(self, site: Path, pages: dict[str, Page]):
        text = (site / "docs" / "mathematics.html").read_text()
        assert text.count("<math ") > 100
        assert "$$" not in text
        scripts = pages["docs/mathematics.html"].fetched
        assert not [name for name in scripts if re.search("mathjax|katex", name, re.IGNORECASE)]
        assert "<msqrt>" in text  # the root in γ


def public_names(module: str) -> list[str]:
    """``__all__``, or the module's own definitions without an underscore."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(loaded).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module
        ]
    return [f"{module}.{name}" for name in names]


def names_used(notebook: Path) -> set[str]:
    """The names of ngeval in a notebook's code, with their modules, as ``ngeval.optim.iEF``."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [
        line
        for cell in cells
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
        if not line.startswith(("%", "!"))
    ]
    nodes = list(ast.walk(ast.parse("\n".join(lines))))
    imported = {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "ngeval"
        for alias in node.names
    }
    chains = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    attributes = {chain for chain in chains if re.fullmatch(r"ngeval(\.\w+)+", chain)}
    modules = {name for name in attributes if importlib.util.find_spec(name)}
    return imported | (attributes - modules)


@pytest.fixture(scope="module")
def inventory(site: Path) -> dict[str, str]:
    """The place of each documented name."""
    content = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {
        name: item.uri
        for kind, items in content.data.items()
        if kind.startswith("py:")
        for name, item in items.items()
    }


class TestApi:
    def test_every_public_name_is_documented(self, inventory: dict[str, str]):
        names = [name for module in PUBLIC for name in public_names(module)]
        assert len(names) > 100
        assert [name for name in names if name not in inventory] == []

    def test_every_public_name_has_a_docstring(self):
        for name in [name for module in PUBLIC for name in public_names(module)]:
            module, _, attribute = name.rpartition(".")
            value = getattr(importlib.import_module(module), attribute)
            assert not callable(value) or value.__doc__, name

    def test_each_public_module_has_a_page(self, site: Path):
        for module in PUBLIC:
            page = ".".join(module.split(".")[:2])  # a module's page, or that of its room
            assert f'id="module-{module}"' in (site / "docs/api" / f"{page}.html").read_text()

    def test_every_name_that_notebooks_use_is_documented(self, inventory: dict[str, str]):
        names = {
            (path.name, name)
            for path in (ROOT / "notebooks").glob("*.ipynb")
            for name in names_used(path)
        }
        assert len({name for _, name in names}) > 25
        assert [(notebook, name) for notebook, name in names if name not in inventory] == []

    def test_entries_of_the_inventory_are_anchors(
        self, inventory: dict[str, str], pages: dict[str, Page]
    ):
        for name, uri in inventory.items():
            file, anchor = uri.split("#")
            assert anchor.replace("$", name) in pages[file].anchors, name

    def test_errors_are_on_the_page_of_ngeval(self, site: Path):
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
