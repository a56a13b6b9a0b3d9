"""Tables of tuned optimizers, as ``python -m studies trained`` prints them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ngeval.cli.tables import cell
from studies.training_results import average_ranks

CAPTION = "mean over seeds ± half its 95 % t-interval; bold: the best mean"


def performance_tables(table: pd.DataFrame, width: int | None = None) -> Iterator[Table]:
    """Tuned optimizers: test performance, final training loss, tuned settings.

    The optimizers are columns and the tasks are rows; where that is too wide, every optimizer on a
    task is a row.

    Args:
        table: the result of `studies.training_results.performance`.
        width: characters in a line; None is as many as the tables need.
    """
    wide = _side_by_side(table)
    if width is None or all(_width(part) <= width for part in wide):
        yield from wide
    else:
        yield _below_each_other(table)
    yield _tuned_table(table)


def _width(table: Table) -> int:
    """The characters in a line of a table that is not wrapped."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _side_by_side(table: pd.DataFrame) -> tuple[Table, Table]:
    optimizers = list(dict.fromkeys(table["optimizer"]))
    test = _of_optimizers(f"{_performance(table)} at the best validation epoch", optimizers)
    train = _of_optimizers("training loss after the last epoch (nats)", optimizers)
    for task, part in table.groupby("task", sort=False):
        rows = part.set_index("optimizer").reindex(optimizers)
        unit, tests, trains = _cells(part, rows)
        test.add_row(f"{escape(str(task))}\n{unit}", *tests)
        train.add_row(escape(str(task)), *trains)
    if table["task"].nunique() > 1:
        test.add_section()
        test.add_row("average rank", *_rank_cells(table).values())
    return test, train


def _below_each_other(table: pd.DataFrame) -> Table:
    shown = Table(
        title=f"{_performance(table)} at the best validation epoch, training loss after the last",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("task", overflow="fold")
    shown.add_column("optimizer", overflow="fold")
    for column in ("test", "training loss\n(nats)", "rank"):
        shown.add_column(column, justify="right")
    for task, part in table.groupby("task", sort=False):
        unit, tests, trains = _cells(part, part)
        names = [escape(str(task)), unit] if len(part) > 1 else [f"{escape(str(task))}\n{unit}"]
        names += [""] * (len(part) - len(names))
        ranks = [cell(float(rank), ".0f") for rank in part["rank"]]
        optimizers = map(escape, part["optimizer"])
        for cells in zip(names, optimizers, tests, trains, ranks, strict=True):
            shown.add_row(*cells)
        shown.add_section()
    if table["task"].nunique() > 1:
        for number, (name, rank) in enumerate(_rank_cells(table).items()):
            shown.add_row("" if number else "average rank", escape(name), "", "", rank)
    return shown


def _performance(table: pd.DataFrame) -> str:
    """The measure in the titles; where a task has no test data, the unit of each names the data."""
    return "test performance" if set(table["data"]) <= {"test", ""} else "performance"


def _cells(part: pd.DataFrame, rows: pd.DataFrame) -> tuple[str, list[str], list[str]]:
    """The unit of a task's performance, its cells, and the cells of the training loss.

    Args:
        part: the task's rows of the table.
        rows: its rows for all optimizers of the table, empty where the task lacks one.
    """
    metric, data = part["metric"].iloc[0], next(filter(None, part["data"]), "test")
    percent = metric == "test_accuracy"
    unit = f"[dim]{data} {'accuracy, %' if percent else 'loss, nats'}[/dim]"
    records = [row for _, row in rows.iterrows()]
    best = [row["rank"] == 1 and row["seeds"] > 0 for row in records]
    tests = [_mean_cell(row, metric, 100.0 if percent else 1.0) for row in records]
    least = list(rows["train_loss_mean"] == rows["train_loss_mean"].min())
    trains = [_mean_cell(row, "train_loss", 1.0) for row in records]
    return unit, _bold(tests, best), _bold(trains, least)


def _rank_cells(table: pd.DataFrame) -> dict[str, str]:
    ranks = average_ranks(table)
    cells = [cell(float(rank), ".2f") for rank in ranks]
    return dict(zip(map(str, ranks.index), _bold(cells, list(ranks == ranks.min())), strict=True))


def _of_optimizers(title: str, optimizers: list[str]) -> Table:
    shown = Table(title=title, caption=CAPTION, box=box.SIMPLE_HEAD)
    shown.add_column("task")
    for name in optimizers:
        shown.add_column(escape(name), justify="right")
    return shown


def _mean_cell(row: pd.Series, name: str, scale: float) -> str:
    mean, high = (float(row[f"{name}_{end}"]) for end in ("mean", "high"))
    if math.isnan(mean):
        return "diverged" if row["trials_diverged"] > 0 or row["diverged"] > 0 else "–"
    form = ".2f" if scale > 1 else ".3g"
    text = f"{scale * mean:{form}}"
    if not math.isnan(high):
        half = scale * (high - mean)
        text += f" ± {half:{form if scale > 1 else '.2g'}}"
    if row["diverged"] > 0:
        text += f"\n[dim]{row['diverged']:.0f} diverged[/dim]"
    return text


def _bold(cells: list[str], best: list[bool]) -> list[str]:
    return [f"[bold]{c}[/bold]" if wins else c for c, wins in zip(cells, best, strict=True)]


def _tuned_table(table: pd.DataFrame) -> Table:
    shown = Table(
        title="tuned settings" if table["trials"].any() else "settings (not tuned)",
        caption="*: at an end of the values tried, so a better one may lie beyond"
        if bool((table["edge"] != "").any())
        else None,
        box=box.SIMPLE_HEAD,
    )
    for column in ("task", "optimizer"):
        shown.add_column(column, overflow="fold")
    for column in ("learning\nrate", "λ", "trials", "seeds", "diverged"):
        shown.add_column(column, justify="right")
    for task, part in table.groupby("task", sort=False):
        for number, (_, row) in enumerate(part.iterrows()):
            edges = str(row["edge"]).split(", ")
            rate = cell(row["learning_rate"], "g") + "*" * ("learning_rate" in edges)
            damping = cell(row["damping"], "g") + "*" * ("damping" in edges)
            lost = row["trials_diverged"] + row["diverged"]
            cells = (rate, damping, f"{row['trials']}", f"{row['seeds']}", f"{lost}")
            shown.add_row(
                escape(str(task)) if number == 0 else "", escape(row["optimizer"]), *cells
            )
        shown.add_section()
    return shown
