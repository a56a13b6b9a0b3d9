"""The tables of results that commands print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from ngeval.analysis import stages
from ngeval.analysis.best_damping import without_damping
from ngeval.analysis.layer_summary import leading_layers, summarize_layers, with_rest
from ngeval.analysis.norms import imbalances
from ngeval.analysis.stages import three_stages
from ngeval.analysis.summary import summarize
from ngeval.utils.text import visible

MAX_LAYERS = 16
"""Layers of an update in a printed table; the rest are summed."""

LAYERS = ["method", "layer", "parameters", "buys", "spends", "spends − buys", "γ/γ_SGD", "γ/best"]


def columns_table(columns: Iterable[str], left: Iterable[str], **options: Any) -> Table:
    """A table without rows whose columns are aligned to the right, except for those ``left``."""
    shown = Table(**options)
    for name in columns:
        shown.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return shown


def checkpoint_labels(table: pd.DataFrame) -> dict[str, str]:
    """`ngeval.analysis.stages.checkpoint_labels` for a terminal."""
    labels = stages.checkpoint_labels(table)
    return {name: escape(visible(label[-40:])) for name, label in labels.items()}


def stages_table(table: pd.DataFrame, damping: float) -> Table:
    """γ/γ_SGD by checkpoint and method at one λ: geometric mean over batches, with interval."""
    rows = table[table["damping"] == damping]
    summary = summarize(rows)
    methods = [name for name in dict.fromkeys(rows["method"]) if name != "sgd"]
    failures = rows[rows["status"] == "failed"]
    failed = set(zip(failures["checkpoint"], failures["method"], strict=True))
    shown = columns_table(
        ["checkpoint", *methods, "floor"],
        left=["checkpoint"],
        title=f"γ/γ_SGD at λ = {damping:g}: geometric mean over batches, 95 % interval below it",
        caption="below 1: closer to the natural gradient than SGD; floor: a bound on every update",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name, label in checkpoint_labels(table).items():
        part = summary[summary["checkpoint"] == name].set_index("method")
        cells = [
            "failed"
            if method not in part.index and (name, method) in failed
            else _ratio_cell(part, method)
            for method in methods
        ]
        shown.add_row(label, *cells, f"{part['floor_over_sgd'].median():.3g}")
    return shown


def sweep_table(table: pd.DataFrame) -> Table:
    """γ/γ_min by checkpoint and method: at the smallest λ, and the smallest over all λ."""
    summary = summarize(table)
    undamped = without_damping(table)
    smallest = summary["damping"].min()
    shown = columns_table(
        ("checkpoint", "method", f"at λ = {smallest:g}", "best", "at λ ="),
        left=("checkpoint", "method"),
        title="γ/γ_min (1 = the natural gradient itself), geometric mean over batches",
        caption="best: the smallest over the dampings, with its λ",
    )
    for name, label in checkpoint_labels(table).items():
        rows = summary[summary["checkpoint"] == name]
        first = True
        for method, part in rows.groupby("method", sort=False):
            values = part.set_index("damping")["gamma_over_ng_geomean"].dropna()
            if values.empty:
                continue
            at_smallest = f"{values[smallest]:.3g}" if smallest in values else "–"
            where = "–" if method in undamped else f"{values.idxmin():.1e}"
            cells = (at_smallest, f"{values.min():.3g}", where)
            shown.add_row(label if first else "", str(method), *cells)
            first = False
        shown.add_section()
    return shown


def layer_tables(table: pd.DataFrame) -> Iterator[Table]:
    """What each layer of an update buys and spends, for up to three checkpoints at the first λ."""
    labels = {"": ""}
    names = [""]
    if "checkpoint" in table:
        labels, names = checkpoint_labels(table), three_stages(table)
    summary = summarize_layers(table[table["damping"] == table["damping"].iloc[0]])
    for name in names:
        rows = summary[summary["checkpoint"] == name] if name else summary
        if rows.empty:  # no unit of the checkpoint could be graded
            continue
        where = f"{labels[name]}, " if name else ""
        shown = columns_table(
            LAYERS,
            left=("method", "layer"),
            title=f"{where}λ = {rows['damping'].iloc[0]:g}: layers of each update",
            caption="means over batches; spends above buys: a smaller step there would lower γ; "
            "γ/γ_SGD and γ/best: in this layer alone, over the gradient and over its natural "
            "gradient",
            box=box.SIMPLE_HEAD,
        )
        leading = leading_layers(rows, MAX_LAYERS)
        for method, part in rows.groupby("method", sort=False):
            _layer_rows(shown, str(method), with_rest(part, leading))
        yield shown


def _layer_rows(shown: Table, method: str, rows: pd.DataFrame) -> None:
    """A section of one method."""
    total = f"[dim]γ = {cell(rows['gamma_total'].iloc[0])}[/dim]"
    heads = [escape(method), total, *[""] * len(rows)]
    if len(rows) == 1:
        heads = [f"{escape(method)}\n{total}"]
    for head, (_, row) in zip(heads, rows.iterrows(), strict=False):
        shown.add_row(
            head,
            escape(str(row["layer"])),
            f"{row['num_parameters']:,.0f}",
            *(cell(row[name], ".1%") for name in ("decrease_share", "curvature_share")),
            cell(row["excess"], "+.1%"),
            cell(row["gamma_over_sgd"]),
            cell(row["gamma_over_best"]),
        )
    shown.add_section()


def ranking_tables(ranked: pd.DataFrame, table: pd.DataFrame) -> Iterator[Table]:
    """The methods of a γ table by rank, one table for each checkpoint."""
    labels = checkpoint_labels(table)
    natural = bool(ranked["gamma_over_ng"].notna().any())
    ratio, least = ("gamma_over_ng", "γ/γ_min") if natural else ("gamma_over_sgd", "γ/γ_SGD")
    last = ranked["checkpoint"].iloc[-1]
    is_range = table["damping"].nunique() > 1
    ends = (table["damping"].min(), table["damping"].max()) if is_range else ()
    single = ranked["checkpoint"].nunique() == 1
    for name, rows in ranked.groupby("checkpoint", sort=False):
        columns = ["", "method", least, "95 % interval", "at λ", "with one λ", "one λ"]
        partial = bool((rows["coverage"] < 100).any())
        columns += ["γ/γ_SGD"] * natural + ["covers"] * partial
        shown = columns_table(
            columns,
            left=["method"],
            title=("" if single else f"{rows['stage_name'].iloc[0]}: ") + labels[str(name)],
            box=box.SIMPLE_HEAD,
        )
        for _, row in rows.iterrows():
            interval = f"{row[f'{ratio}_low']:.3g} – {row[f'{ratio}_high']:.3g}"
            cells = [
                "" if math.isnan(row["rank"]) else f"{row['rank']:.0f}",
                escape(str(row["method"])),
                "failed" if row["status"] == "failed" else cell(row[ratio]),
                "" if math.isnan(row[f"{ratio}_low"]) else interval,
                cell(row["damping"], ".0e") + "*" * (row["damping"] in ends),
                cell(row[f"{ratio}_run"]),
                cell(row["damping_run"], ".0e"),
            ]
            cells += [cell(row["gamma_over_sgd"])] if natural else []
            cells += [f"{row['coverage']:.0f} %"] if partial else []
            shown.add_row(*cells)
        if name == last:
            shown.caption = (
                f"{least} at each method's best λ of the range, geometric mean over batches; one "
                "λ: the best single λ over all checkpoints"
                + ("; 1 is the natural gradient itself" if natural else "")
                + "; *: at an end of the range, try a wider one" * is_range
            )
        yield shown


def cell(value: float, form: str = ".3g") -> str:
    """A number in a table, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:{form}}"


def imbalance_table(table: pd.DataFrame) -> Table:
    """Quantiles of per-sample gradient norms, and their imbalance, for each checkpoint."""
    shown = columns_table(
        ("checkpoint", "min", "5 %", "median", "95 %", "max", "max/min"),
        left=["checkpoint"],
        title="per-sample gradient norms ‖g_n‖ (nats)",
        caption="max/min: geometric mean over batches",
    )
    batches = imbalances(table).groupby("checkpoint")["imbalance"]
    ratios = batches.agg(lambda values: np.exp(np.log(values).mean()))
    for name, label in checkpoint_labels(table).items():
        norms = table["gradient_norm"][table["checkpoint"] == name]
        cells = [*norms.quantile([0, 0.05, 0.5, 0.95, 1]), ratios[name]]
        shown.add_row(label, *[f"{value:.3g}" for value in cells])
    return shown


def _ratio_cell(rows: pd.DataFrame, method: str) -> str:
    if method not in rows.index:
        return "–"
    value, low, high = (
        float(rows[f"gamma_over_sgd_geomean{end}"][method]) for end in ("", "_low", "_high")
    )
    if math.isnan(low):
        return f"{value:.3g}"
    return f"{value:.3g}\n[dim]{low:.2g}–{high:.2g}[/dim]"
