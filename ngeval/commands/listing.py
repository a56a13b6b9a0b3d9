"""``plot``, ``tasks`` and ``methods``: the commands that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ngeval import console
from ngeval.commands.common import say
from ngeval.errors import InputError, nearest_name
from ngeval.methods import all_methods
from ngeval.options import ForceOption
from ngeval.plots import (
    FIGURE_SUFFIXES,
    damping_figure,
    imbalance_figure,
    kfac_figure,
    layers_figure,
    ranking_figure,
    save_figure,
    stages_figure,
)
from ngeval.results import check_output, read_results
from ngeval.tasks import BUILTIN_TASKS, get_task


@dataclass(frozen=True)
class Chosen:
    """What part of a table is drawn.

    Attributes:
        damping: λ; None leaves it to the picture.
        checkpoints: likewise.
    """

    damping: float | None = None
    checkpoints: list[str] | None = None


FIGURES: dict[str, Callable[[pd.DataFrame, Chosen], Figure]] = {
    "stages": lambda t, c: stages_figure(t, None if c.damping is None else [c.damping]),
    "damping": lambda table, chosen: damping_figure(table, chosen.checkpoints),
    "imbalance": lambda table, _: imbalance_figure(table),
    "layers": lambda table, chosen: layers_figure(
        table, damping=chosen.damping, checkpoint=next(iter(chosen.checkpoints or []), None)
    ),
    "kfac": lambda table, chosen: kfac_figure(table, chosen.damping),
    "ranking": lambda table, chosen: ranking_figure(table, chosen.checkpoints),
}
"""Pictures by ``--kind``."""


def plot(
    results: Annotated[Path, typer.Argument(help="Result file of gamma, sweep, layers, ….")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf.")],
    kind: Annotated[str, typer.Option(help=f"{', '.join(FIGURES)}.")] = "stages",
    damping: Annotated[
        float | None, typer.Option(help="λ of a picture at one λ; default: the smallest.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint", "-c", help="Panels of damping, stages of ranking; the one of layers."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Draw a result file.

    [bold]Examples:[/bold]

    ngeval plot gamma.csv --kind stages --output stages.pdf

    ngeval plot layers.csv --kind layers --output layers.png
    """
    check_output(output, FIGURE_SUFFIXES, force=force)
    table = read_results(results)
    if kind not in FIGURES:
        raise InputError(f"unknown picture {kind!r}; {nearest_name(kind, FIGURES)}")
    save_figure(FIGURES[kind](table, Chosen(damping, checkpoint)), output)


def tasks() -> None:
    """List the built-in tasks.

    [bold]Example:[/bold] ngeval tasks
    """
    shown = Table("task", "what it is", "parameters")
    for name in BUILTIN_TASKS:
        task = get_task(name)
        count = sum(parameter.numel() for parameter in task.model().parameters())
        shown.add_row(name, task.description, f"{count:,}")
    console.table_console().print(shown)


def methods() -> None:
    """List the methods, with their formulas and parameters.

    [bold]Example:[/bold] ngeval methods
    """
    shown = Table("method", "d(λ), or what it is", "labels from", "after a colon", "from")
    for name, entry in all_methods().items():
        cells = (name, entry.formula, entry.labels, entry.parameter or "–", entry.source)
        shown.add_row(*(escape(cell) for cell in cells))
    console.table_console().print(shown)
    out = Console()
    out.print("example: --methods sgd,ief,sf:4,diag-ef:0.5,adamw,muon:20", highlight=False)
    say(
        out,
        "also the path of any torch.optim.Optimizer class, as pytorch_optimizer.SOAP:20; an "
        "optimizer alone takes its state from the checkpoint, :0 its first step, :K a state "
        "accumulated over K batches",
    )
