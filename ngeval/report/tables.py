"""The table of a report, which can be sorted and filtered."""

from __future__ import annotations

import math
from typing import NamedTuple

from ngeval.analysis.stages import evenly
from ngeval.report.summaries import Grades
from ngeval.report.wording import damping_text, interval_text, value_text

MAX_ROWS = 5_000
"""Rows of a table in the page; of a longer one not all dampings are shown."""

HEADS = ["method", "γ/γ_SGD", "interval", "γ/γ_min", "interval", "λ", "checkpoint", "batches"]


class Cell(NamedTuple):
    """A cell's text, and the number that it sorts by; without one it sorts by the text."""

    text: str
    key: str | None = None


class Row(NamedTuple):
    """A row, with the values that its table can be filtered by."""

    cells: list[Cell]
    filters: dict[str, str]
    hidden: bool


class Filter(NamedTuple):
    """A list to choose rows by: pairs of value and label; ``""`` is all of them."""

    name: str
    label: str
    options: list[tuple[str, str]]
    chosen: str


class Table(NamedTuple):
    """All rows, of which those are hidden that the filters exclude at first; a note below them."""

    rows: list[Row]
    filters: list[Filter]
    note: str


def gamma_table(short: Grades, labels: dict[str, str]) -> Table:
    """γ ratios of every checkpoint, method and λ; at first the last checkpoint at the smallest λ.

    ``best`` among the λ is each method's best one at that checkpoint.
    """
    dampings = _shown_dampings(short)
    numbers = {value: str(place) for place, value in enumerate(short.dampings)}
    places = {name: str(place) for place, name in enumerate(short.checkpoints)}
    chosen = {"checkpoint": places[short.checkpoints[-1]], "damping": numbers[short.smallest]}
    summary = short.summary.assign(is_best=short.summary.index.isin(short.best.index))
    summary = summary[summary["damping"].isin(dampings) | summary["is_best"]]
    rows = []
    for row in summary.to_dict("records"):
        filters = {
            "checkpoint": places[row["checkpoint"]],
            "damping": numbers[row["damping"]] + (" best" if row["is_best"] else ""),
        }
        hidden = any(chosen[name] not in value.split() for name, value in filters.items())
        cells = [
            Cell(row["method"]),
            *_with_interval(row["ratio"], row["low"], row["high"]),
            *_with_interval(row["best"], row["best_low"], row["best_high"]),
            Cell(damping_text(row["damping"]), _key(row["damping"])),
            Cell(labels[row["checkpoint"]], filters["checkpoint"]),
            Cell(str(row["batches"]), _key(row["batches"])),
        ]
        rows.append(Row(cells, filters, hidden))
    by_damping = [(numbers[value], damping_text(value)) for value in dampings]
    by_checkpoint = [(place, labels[name]) for name, place in places.items()]
    best, all_rows = ("best", "the best of each method"), ("", "all")
    note = ""
    if len(dampings) < len(numbers):
        note = f"{len(dampings)} of {len(numbers)} λ, and each method's best."
    by = [
        Filter("checkpoint", "checkpoint", [all_rows, *by_checkpoint], chosen["checkpoint"]),
        Filter("damping", "damping λ", [all_rows, best, *by_damping], chosen["damping"]),
    ]
    return Table(rows, by, note)


def _shown_dampings(short: Grades) -> list[float]:
    """The λ in the table: all, or as many as fit, always with the smallest."""
    values = short.dampings
    count = max(2, int(MAX_ROWS * len(values) / len(short.summary)))
    return sorted({short.smallest, *(values[place] for place in evenly(len(values), count))})


def _with_interval(value: float, low: float, high: float) -> tuple[Cell, Cell]:
    """A value with as many digits as its interval has, and the interval."""
    interval = Cell(interval_text(low, high) or "–", _key(low))
    return Cell(value_text(value, low, high), _key(value)), interval


def _key(value: float) -> str:
    """What a number sorts by; "", which comes last, if there is none."""
    return "" if math.isnan(value) else f"{float(value):.6g}"
