"""The tables of a report that can be sorted and filtered."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.training_results import performance
from ngeval.report.summaries import Grades, at_best
from ngeval.report.wording import damping_text, interval_text, number, value_text

MAX_ROWS = 5_000
"""Rows of a table in the page; beyond, dampings are thinned out."""


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: as shown.
        key: what it sorts by; None sorts by the text.
    """

    text: str
    key: str | None = None


@dataclass(frozen=True)
class Row:
    """A row, with the values that its table can be filtered by."""

    cells: list[Cell]
    filters: dict[str, str] = field(default_factory=dict)
    hidden: bool = False


@dataclass(frozen=True)
class Filter:
    """A list to choose rows by: pairs of value and label; ``""`` is all of them."""

    name: str
    label: str
    options: list[tuple[str, str]]
    chosen: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: above it.
        heads: of the columns, and whether each is of numbers.
        rows: all of them; those that the filters leave out at first are hidden.
        filters: to choose by.
        note: below it.
    """

    caption: str
    heads: list[tuple[str, bool]]
    rows: list[Row]
    filters: list[Filter] = field(default_factory=list)
    note: str = ""


def gamma_table(short: Grades, labels: dict[str, str]) -> Table:
    """γ ratios of every checkpoint, method and λ; at first the last checkpoint at the smallest λ.

    ``best`` among the λ is each method's best one at that checkpoint.
    """
    summary, kept = short.summary, _kept_dampings(short)
    best = at_best(short)
    marked = pd.Index(summary.index).isin(best.index)
    order = {value: place for place, value in enumerate(short.dampings)}
    places = {name: place for place, name in enumerate(short.checkpoints)}
    first = {"checkpoint": str(len(places) - 1), "damping": str(order[short.smallest])}
    chosen = summary.assign(marked=marked)
    chosen = chosen[chosen["damping"].isin(kept) | chosen["marked"]]
    rows = []
    for told in chosen.to_dict("records"):
        filters = {
            "checkpoint": str(places[told["checkpoint"]]),
            "damping": str(order[told["damping"]]) + (" best" if told["marked"] else ""),
        }
        hidden = any(first[name] not in value.split() for name, value in filters.items())
        label = labels[told["checkpoint"]]
        cells = [
            Cell(told["method"]),
            _ratio(told, "ratio", "low", "high"),
            Cell(interval_text(told["low"], told["high"]) or "–", _key(told["low"])),
            _ratio(told, "best", "best_low", "best_high"),
            Cell(interval_text(told["best_low"], told["best_high"]) or "–", _key(told["best_low"])),
            _numbered(told["damping"], damping_text(told["damping"])),
            Cell(label, filters["checkpoint"]),
            _numbered(told["batches"]),
        ]
        rows.append(Row(cells, filters, hidden))
    dampings = [(str(order[value]), damping_text(value)) for value in kept]
    checkpoints = [(str(place), labels[name]) for name, place in places.items()]
    thinned = len(kept) < len(order)
    return Table(
        "Geometric means over batches with 95 % bootstrap intervals",
        [
            *(("method", False), ("γ/γ_SGD", True), ("interval", True)),
            *(("γ/γ_min", True), ("interval", True)),
            *(("λ", True), ("checkpoint", False), ("batches", True)),
        ],
        rows,
        [
            Filter("checkpoint", "checkpoint", [("", "all"), *checkpoints], first["checkpoint"]),
            Filter(
                "damping",
                "damping λ",
                [("", "all"), ("best", "the best of each method"), *dampings],
                first["damping"],
            ),
        ],
        f"{len(kept)} of {len(order)} λ, and each method's best; the charts have all."
        if thinned
        else "",
    )


def _kept_dampings(short: Grades) -> list[float]:
    """The λ in the table: all, or so many as keep it short, the smallest always."""
    values = short.dampings
    each = len(short.summary) / len(values)
    count = max(2, int(MAX_ROWS / each))
    if count >= len(values):
        return values
    places = np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))
    return sorted({short.smallest, *(values[place] for place in places)})


def training_table(rows: pd.DataFrame) -> Table:
    """Tuned optimizers of every task."""
    table = performance(rows)
    shown = []
    for told in table.to_dict("records"):
        cells = [_numbered(told["rank"]), Cell(told["optimizer"])]
        for figure in ("test_accuracy", "test_loss", "train_loss"):
            mean, low, high = (told[f"{figure}_{end}"] for end in ("mean", "low", "high"))
            cells += [_numbered(mean), Cell(interval_text(low, high) or "–", _key(low))]
        cells += [_numbered(told["seeds"]), _numbered(told["diverged"])]
        for setting in (told["learning_rate"], told["damping"]):
            cells.append(_numbered(setting, "–" if math.isnan(setting) else damping_text(setting)))
        shown.append(Row(cells))
    data = next((name for name in table["data"] if name), "test")
    interval = ("interval", True)
    return Table(
        "Tuned optimizers: means over seeds with 95 % t-intervals",
        [
            *(("rank", True), ("optimizer", False)),
            *((f"{data} accuracy", True), interval, (f"{data} loss", True), interval),
            *(("training loss", True), interval, ("seeds", True), ("diverged", True)),
            *(("learning rate", True), ("λ", True)),
        ],
        shown,
    )


def _ratio(told: dict[Any, Any], *names: str) -> Cell:
    """The first of value, low and high end, with as many digits as the interval has."""
    value, low, high = (float(told[name]) for name in names)
    return _numbered(value, value_text(value, low, high))


def _numbered(value: float, text: str | None = None) -> Cell:
    return Cell(number(float(value)) if text is None else text, _key(value))


def _key(value: float) -> str:
    """What a number sorts by; nothing, which comes last, where there is none."""
    return "" if math.isnan(value) else f"{float(value):.9g}"
