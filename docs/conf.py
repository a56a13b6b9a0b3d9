"""How Sphinx builds the site: ``sphinx-build -W -c docs . site``, from the root of a clone.

The source folder is the root, not ``docs``: pages link to figures, notebooks, benchmarks and the
changelog by their places in the repository, and so they work on a code host as on the site.
Nothing is fetched, neither while building nor while reading: mathematics is MathML, which browsers
draw, and fonts are the reader's own.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry, PyObject
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402
from typer.cli import get_docs_for_click  # noqa: E402

import ngeval  # noqa: E402
from ngeval.cli.app import app as command_line  # noqa: E402

# What is built

project = "ngeval"
version = release = ngeval.__version__
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "notebooks/*.ipynb",
    "benchmarks/*.md",
    "figures/README.md",
]
exclude_patterns = [".*", "**/.*", "build", "dist", "ngeval", "tests"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

nitpicky = True
nitpick_ignore_regex = [  # other packages: their inventories are on the network
    ("py:.*", r"(abc|collections|os|pathlib|types|typing)\..*"),
    ("py:.*", r"(matplotlib|numpy|pandas|pd|pydantic|scipy|torch)\..*"),
    ("py:class", "Tensor"),
    ("py:.*", r"Optimizer|param_groups"),  # in docstrings that torch's optimizers pass on
    ("py:class", r"ngeval\..*\.T"),  # a type variable
    ("py:class", r"ngeval\.model\.sharding\.Shards"),  # no part of the public face
]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_merge_streams = True
nb_execution_mode = "off"  # as they were committed; tests/test_notebooks.py runs them

default_role = "py:obj"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 140
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# What it looks like

html_theme = "furo"
html_title = "ngeval"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_additional_pages = {"index": "start.html"}
html_math_renderer = "mathml"
templates_path = ["_templates"]


def mathml(node: nodes.Element, *, block: bool) -> str:
    """A formula as MathML.

    Raises:
        ExtensionError: docutils does not know this LaTeX.
    """
    try:
        text = str(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        raise ExtensionError(f"{node.source}:{node.line}: {error}: {node.astext()}") from error
    # Bars must not stretch, or one of a pair grows with the term beside it.
    return re.sub(r"<mo( class=\"\w+\")?>([|‖∥])</mo>", r'<mo\1 stretchy="false">\2</mo>', text)


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula."""
    translator.body.append(f'<div class="math">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def commands() -> str:
    """Every command with its options in Markdown, from the program itself."""
    group = typer.main.get_command(command_line)
    context = group.make_context("ngeval", [], resilient_parsing=True)
    text = get_docs_for_click(obj=group, ctx=context, name="ngeval")
    text = text[text.index("\n## ") :]  # after the list of commands, whose sentences are cut
    text = re.sub(r"\[/?bold\]", "**", text)
    text = re.sub(r"^(\*\*Example:\*\*) (ngeval .*)", r"\1\n\n\2", text, flags=re.MULTILINE)
    return re.sub(
        r"^(?P<example>ngeval .*(?:\n.+)*)|`[^`\n]+`|--[a-z][a-z-]*",
        _as_code,
        text,
        flags=re.MULTILINE,
    )


def _as_code(match: re.Match[str]) -> str:
    if match["example"]:
        return f"```bash\n{' '.join(match[0].splitlines())}\n```"
    return match[0] if match[0].startswith("`") else f"`{match[0]}`"


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Insert the commands into their page."""
    if docname == "docs/command-line":
        source[0] += commands()


COLON = "\N{ONE DOT LEADER}"


def before_napoleon(
    app: Sphinx, what: str, name: str, member: object, options: Any, lines: list[str]
) -> None:
    """Keep the bars of |dᵀg| from being a substitution, and a first colon from being a type."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda match: match[1] or r"\|", line) for line in lines]
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)


def after_napoleon(
    app: Sphinx, what: str, name: str, member: object, options: Any, lines: list[str]
) -> None:
    """Put the colon back."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def documented_elsewhere(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: Any
) -> bool | None:
    """Skip names on a package's page that the page of ``ngeval`` has."""
    page = app.env.docname.rpartition("/")[2]
    return True if page != "ngeval" and getattr(ngeval, name, None) is member else None


def named(env: BuildEnvironment, name: str) -> dict[str, ObjectEntry]:
    """The entries documented under this name in any module, each once."""
    objects = env.domains.python_domain.objects
    entries = {o[:2]: full for full, o in objects.items() if f".{full}".endswith(f".{name}")}
    return {full: objects[full] for full in entries.values()}


def add_other_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Add the second name of what is public in two modules to the inventory."""
    objects = env.domains.python_domain.objects
    modules = [full for full, entry in objects.items() if entry.objtype == "module"]
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", ()):
            for full, entry in named(env, name).items():
                home = sys.modules.get(full.rpartition(".")[0])
                if getattr(home, name, None) is getattr(module, name):
                    objects.setdefault(f"{module.__name__}.{name}", entry._replace(aliased=True))


def find_by_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a docstring's `Problem` to a different module, if exactly one entry has this name."""
    if node.get("refdomain") != "py" or len(entries := named(env, node["reftarget"])) != 1:
        return None
    [(full, entry)] = entries.items()
    return make_refnode(
        app.builder, node["refdoc"], entry.docname, entry.node_id, content, title=full
    )


def import_lazy_names() -> None:
    """Import the names that packages import on first use, so that autodoc lists them."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8")):
            module = importlib.import_module(name)
            for public in getattr(module, "__all__", ()):
                vars(module).setdefault(public, getattr(module, public))


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    import_lazy_names()
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("autodoc-skip-member", documented_elsewhere)
    app.connect("env-updated", add_other_names)
    app.connect("missing-reference", find_by_name)
