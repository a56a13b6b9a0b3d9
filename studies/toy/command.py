"""``python -m studies toy``: the figure of two parameters and two samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.options import ForceOption, MethodsOption, QuietOption, SeedOption
from ngeval.cli.tables import cell
from ngeval.errors import InputError
from ngeval.methods import get_methods
from ngeval.plots import FIGURE_SUFFIXES, save_figure
from ngeval.results.table_files import SUFFIXES, check_output, write_results
from studies.toy.least_squares import LeastSquares, Point, trajectories
from studies.toy.picture import toy_figure

MOST_STEPS = 10_000
"""A larger number is taken for a typing error; this many take about a minute for each path."""


def toy(
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf.")],
    inputs: Annotated[
        str, typer.Option(help="The two samples x₁; x₂.", rich_help_panel="Data")
    ] = "2,0; 0.4,0.6",
    targets: Annotated[
        str, typer.Option(help="Their targets y₁, y₂.", rich_help_panel="Data")
    ] = "2, 1",
    methods: MethodsOption = "sgd,ng,ief,ef",
    start: Annotated[
        list[str] | None,
        typer.Option(help="θ₁,θ₂ where paths start; repeat. Default: three around the minimum."),
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(help="Of all methods, or METHOD=η,…; default: one that shows the path."),
    ] = None,
    damping: Annotated[float, typer.Option(min=0, help="λ, absolute.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Of each path.")] = 60,
    arrows: Annotated[int, typer.Option(min=2, max=60, help="In a row of each field.")] = 13,
    table: Annotated[
        Path | None, typer.Option(help="The paths too: .csv, .parquet or .jsonl.")
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the updates of methods on a least squares problem with two parameters and two samples.

    The loss landscape, each method's steps at every point, its paths, the lines on which a sample
    is fitted, and EF's steps around the minimum enlarged.

    [bold]Examples:[/bold]

    python -m studies toy --output toy.pdf

    python -m studies toy --inputs "1,0; 0.9,0.3" --targets "1, 1" --start "-1,2" -o toy.png

    python -m studies toy -m ief,ef,sf:4 --learning-rate ef=0.05,sf:4=0.2 -o toy.svg
    """
    check_output(output, FIGURE_SUFFIXES, force=force)
    if table is not None:
        check_output(table, SUFFIXES, force=force)
    fit = LeastSquares(parse_pair("--inputs", inputs), parse_point("--targets", targets))
    starts = [parse_point("--start", text) for text in start] if start else list(fit.starts)
    names = [method.name for method in get_methods(methods)]
    rates = parse_rates(learning_rate, {name: fit.rate(name, starts) for name in names})
    tables = []
    with console.progress_bar(quiet) as bar:
        task = bar.add_task("paths", total=len(names) * len(starts))
        for rows in trajectories(fit, rates, starts, steps=steps, damping=damping, seed=seed):
            tables.append(rows)
            bar.advance(task)
    paths = pd.concat(tables, ignore_index=True)
    if table is not None:
        write_results(paths, table)
    save_figure(toy_figure(fit, paths, damping=damping, arrows=arrows, seed=seed), output)
    out = console.table_console(quiet)
    out.print(paths_table(paths))
    written = [str(path) for path in (output, table) if path is not None]
    console.say(out, "written: " + ", ".join(written))


def paths_table(paths: pd.DataFrame) -> Table:
    """The last losses of each method."""
    last = int(paths["step"].max())
    losses_table = Table(
        "method",
        "learning rate η",
        f"loss after {last} steps, by start",
        "mean cosine with the natural gradient",
        title="two parameters, two data",
    )
    for method, rows in paths.groupby("method", sort=False):
        losses = rows[rows["step"] == last].sort_values("start")["loss"]
        losses_table.add_row(
            str(method),
            cell(rows["learning_rate"].iloc[0]),
            ", ".join(cell(loss, ".2g") for loss in losses),
            cell(rows["cosine_ng"].mean()),
        )
    return losses_table


def parse_point(option: str, text: str) -> Point:
    """Read two numbers, as in ``"-1, 1.8"``.

    Raises:
        InputError: they are not two numbers.

    >>> parse_point("--start", "-1, 1.8")
    (-1.0, 1.8)
    """
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f'{option} {text!r}: write two numbers, as in "-1, 1.8"') from error
    return first, second


def parse_pair(option: str, text: str) -> tuple[Point, Point]:
    """Read two points, as in ``"2,0; 0.4,0.6"``.

    Raises:
        InputError: they are not two points.

    >>> parse_pair("--inputs", "2,0; 0.4,0.6")
    ((2.0, 0.0), (0.4, 0.6))
    """
    parts = text.split(";")
    if len(parts) != 2:
        raise InputError(
            f'{option} {text!r}: write two samples of two numbers, as in "2,0; 0.4,0.6"'
        )
    return parse_point(option, parts[0]), parse_point(option, parts[1])


def parse_rates(text: str | None, rates: dict[str, float]) -> dict[str, float]:
    """Read one learning rate, or ``METHOD=η,…``; other methods keep the one in ``rates``.

    Raises:
        InputError: the text is neither, or names a method that is not drawn.

    >>> parse_rates("ef=0.05", {"ief": 0.1, "ef": 0.02})
    {'ief': 0.1, 'ef': 0.05}
    """
    if text is None:
        return rates
    try:
        if "=" not in text:
            return dict.fromkeys(rates, float(text))
        named = {
            name.strip(): float(value)
            for name, _, value in (part.partition("=") for part in text.split(","))
        }
    except ValueError as error:
        raise InputError(
            f"--learning-rate {text!r}: write one number, or METHOD=η,… like sgd=0.1,ef=0.02"
        ) from error
    unknown = [name for name in named if name not in rates]
    if unknown:
        raise InputError(
            f"--learning-rate names {', '.join(unknown)}, and the methods are {', '.join(rates)}"
        )
    return rates | named
