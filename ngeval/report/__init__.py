"""A report on result files: one self-contained page with findings, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ngeval.report.page import make_page
from ngeval.report.sources import Source, read_sources
from ngeval.results.table_files import check_output
from ngeval.utils.atomic import replace_file

__all__ = ["SUFFIXES", "Source", "make_page", "read_sources", "write_report"]

SUFFIXES = (".html", ".htm")
"""Extensions of a report's file."""


def write_report(
    results: Sequence[Path], output: Path, *, title: str | None = None, force: bool = False
) -> Path:
    """Read result files and write the report on them.

    Args:
        results: files of ``ngeval gamma``, ``sweep``, ``compare``, ``imbalance`` and
            ``layers``; the page also shows their manifests, if there are any.
        output: ``.html``; its folder is created.
        title: of the page; None names the tasks.
        force: replace a file that exists.

    Returns:
        The output's path.

    Raises:
        InputError: a file does not hold a result table, or a column has a wrong value.
        OutputError: a file cannot be read, or the output cannot be written, which is checked first.
    """
    check_output(output, SUFFIXES, force=force)
    page = make_page(read_sources(results), title)
    replace_file(output, lambda place: place.write_text(page, encoding="utf-8"))
    return output
