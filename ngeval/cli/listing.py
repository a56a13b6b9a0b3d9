"""``plot``, ``report``, ``tasks`` and ``methods``: the commands that draw, report and list."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.options import ForceOption, QuietOption
from ngeval.errors import InputError, check_choice
from ngeval.methods import all_methods
from ngeval.tasks import BUILTIN_TASKS

if TYPE_CHECKING:
    import pandas as pd

KINDS = "stages, damping, imbalance, layers, kfac, ranking"
"""The kinds of figures, `ngeval.plots.FIGURES`, for ``--help``."""

MANY_LINES = 24
"""The most entries of a legend that a reader can distinguish."""


def plot(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files of gamma, sweep, compare, layers, imbalance, train."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf.")],
    kind: Annotated[
        str | None,
        typer.Option(help=f"{KINDS}; default: the one that the columns of the files fit."),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="λ of a picture at one λ; default: the smallest.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint", "-c", help="Panels of damping, stages of ranking, subject of layers."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Methods to draw, a comma list; default: all."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Of files with several tasks; stages draws them side by side."
        ),
    ] = None,
    relative: Annotated[
        str | None,
        typer.Option(
            help="Pairs of methods to compare in stages, as sf/ief,ef/ief; default: these, where "
            "there are several tasks or samples; none: leave them out."
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            help="Of the printed figure: column (3.4 in) or page (7 in); default: column for one "
            "panel, otherwise page."
        ),
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw figures of result files, at the width of print.

    [bold]Examples:[/bold]

    ngeval plot gamma.csv --output stages.pdf

    ngeval plot sweep.parquet --kind damping --width column --output damping.svg

    ngeval plot lora.parquet prompt.parquet imbalance.parquet --kind stages --output stages.pdf

    ngeval plot compare.parquet --kind ranking --methods sgd,ief,kfac,adamw --output ranking.pdf
    """
    from ngeval.plots import (
        COLUMN,
        FIGURE_SUFFIXES,
        FIGURES,
        PAGE,
        Chosen,
        figure_of,
        kind_of,
        save_figure,
    )
    from ngeval.results.table_files import check_output

    check_output(output, FIGURE_SUFFIXES, force=force)
    widths = {"column": COLUMN, "page": PAGE}
    if width is not None:
        check_choice("width", width, widths)
    tables = read_tables(results)
    chosen = Chosen(
        damping,
        checkpoint,
        relative_pairs(relative),
        widths.get(width or ""),
        None if methods is None else [name.strip() for name in methods.split(",")],
        task,
    )
    drawn = kind_of(tables) if kind is None else kind
    figure = figure_of(tables, drawn, chosen)
    most = max((len(legend.get_texts()) for legend in figure.legends), default=0)
    save_figure(figure, output)
    out = console.table_console(quiet)
    if kind is None:
        say(out, f"kind: {drawn} (--kind {'|'.join(FIGURES)})")
    if most > MANY_LINES:
        say(out, f"{most} lines are too many to distinguish: choose some with --methods")


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
        say(console.table_console(), f"written: {output} ({size:.1f} MB)")
    if open_page:
        webbrowser.open(output.resolve().as_uri())


def read_tables(paths: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Result files by their stems, or by their paths where files share a stem."""
    if len(set(paths)) < len(paths):
        raise InputError("a result file is given twice; name each of them once")
    stems = [path.stem for path in paths]
    from ngeval.results.table_files import read_results

    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    return {name: read_results(path) for name, path in zip(names, paths, strict=True)}


def relative_pairs(text: str | None) -> list[tuple[str, str]] | None:
    """Read ``sf/ief,ef/ief`` as pairs and ``none`` as no pairs; None stays None."""
    if text is None or text == "none":
        return None if text is None else []
    pairs = []
    for part in text.split(","):
        method, _, over = part.strip().partition("/")
        if not method or not over or "/" in over:
            raise InputError(f"--relative {text!r} is not a list of pairs such as sf/ief,ef/ief")
        pairs.append((method, over))
    return pairs


def tasks() -> None:
    """List the built-in tasks.

    [bold]Example:[/bold] ngeval tasks
    """
    shown = Table("task", "what it is", "parameters")
    for name, task in BUILTIN_TASKS.items():
        shown.add_row(name, task.description, f"{task.num_parameters:,}")
    console.table_console().print(shown)


def methods() -> None:
    """List the methods, with their formulas and parameters.

    [bold]Example:[/bold] ngeval methods
    """
    shown = Table("method", "d(λ), or what it is", "labels from", "after a colon", "from")
    for name, entry in all_methods().items():
        cells = (name, entry.formula, entry.labels, entry.parameter or "–", entry.source)
        shown.add_row(*(escape(cell) for cell in cells))
    out = console.table_console()
    out.print(shown)
    say(out, "example: --methods sgd,ief,sf:4,diag-ef:0.5,adamw,muon:20")
    say(
        out,
        "also the path of any torch.optim.Optimizer class, such as pytorch_optimizer.SOAP:20; an "
        "optimizer's name alone takes the state in the checkpoint, :0 is the first step, and :K "
        "takes a state accumulated over K batches",
    )
