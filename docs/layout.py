"""``python docs/layout.py``: the list of files in docs/architecture.md, from docstrings."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "architecture.md"
MARKS = "<!-- files: written by python docs/layout.py -->", "<!-- end of files -->"


def first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


def file_list() -> str:
    """A table for each room: its files and what each holds."""
    package = DOCS.parent / "ngeval"
    files = sorted(
        path.relative_to(package)
        for path in package.rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    )
    lines = []
    for room, paths in groupby(files, key=lambda path: path.parts[0] if path.parent.parts else ""):
        lines += ["", f"**`{room}/`**" if room else "**The package's root**", ""]
        lines += ["| file | what it holds |", "|---|---|"]
        lines += [
            f"| `{path.relative_to(room)}` | {first_sentence(package / path)} |" for path in paths
        ]
    return "\n".join(lines)


def page() -> str:
    """The page with its list of files written again."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    return before + MARKS[0] + "\n" + file_list() + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
