"""``report``: one page on result files."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ngeval.cli.options import ForceOption, QuietOption
from ngeval.utils.text import visible


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files of gamma, sweep, compare, imbalance, layers, train."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page: .html.")],
    title: Annotated[str | None, typer.Option(help="Of the page; default: the tasks.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained page on result files: findings, tables, charts, data.

    The page needs no network. Files of several tasks go into one page.

    [bold]Examples:[/bold]

    ngeval report sweep.parquet --output report.html

    ngeval report results.parquet imbalance.parquet layers.csv --title "digits, N = 160" -o r.html
    """
    from ngeval.report import write_report

    write_report(results, output, title=title, force=force)
    if not quiet:
        size = output.stat().st_size / 1e6
        typer.echo(visible(f"written: {output} ({size:.1f} MB)"))
    if open_page:
        webbrowser.open(output.resolve().as_uri())
