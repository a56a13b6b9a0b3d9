"""Layer tables over batches, and which layers are worth showing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.tables import require

SUMMED = ("decrease_share", "curvature_share")
"""Columns that add up to 1 over layers."""

GEOMETRIC = ("gamma", "gamma_over_sgd", "gamma_over_best", "gamma_total")
"""Columns whose geometric mean is taken."""


def summarize_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Means over batches of the numbers of `layer_table`.

    Args:
        table: rows of `layer_table` for several batches and checkpoints.

    Returns:
        One row per (checkpoint, method, damping, layer), in order of appearance: means of
        ``decrease_share, curvature_share, excess``, geometric means of ``gamma, gamma_over_sgd,
        gamma_over_best, gamma_total``, and ``num_parameters``. Rows that failed do not count.

    Raises:
        InputError: a column is missing.
    """
    require(table, "layer", *SUMMED, "excess")
    keys = [key for key in ("checkpoint", "method", "damping", "layer") if key in table]
    rows = table[table["status"] != "failed"]
    rows = rows.assign(layer=rows["layer"].astype(str))  # "0" comes from a file as a number
    rows = rows.assign(**{name: math.nan for name in GEOMETRIC if name not in rows})
    with np.errstate(divide="ignore"):
        logs = rows.assign(**{name: np.log(rows[name]) for name in GEOMETRIC})
    means = logs.groupby(keys, sort=False)[["num_parameters", *SUMMED, "excess", *GEOMETRIC]].mean()
    return means.assign(**{name: np.exp(means[name]) for name in GEOMETRIC}).reset_index()


def leading_layers(summary: pd.DataFrame, count: int) -> list[str]:
    """The layers with the largest absolute shares, of loss or of KL, in the table's order."""
    size = summary[[*SUMMED]].abs().max(axis=1).groupby(summary["layer"], sort=False).max()
    if len(size) <= count:
        return list(size.index)
    largest = set(size.nlargest(count - 1).index)
    return [name for name in size.index if name in largest]


def with_rest(rows: pd.DataFrame, leading: Sequence[str]) -> pd.DataFrame:
    """The rows of the leading layers, and one with the sums over the others, which has no γ."""
    is_leading = rows["layer"].isin(leading)
    if is_leading.all():
        return rows
    others = rows[~is_leading]
    sums = others[["num_parameters", *SUMMED, "excess"]].sum()
    rest = {**rows.iloc[0], **sums, "layer": f"rest ({len(others)})"}
    rest |= dict.fromkeys(("gamma", "gamma_over_sgd", "gamma_over_best"), math.nan)
    return pd.concat([rows[is_leading], pd.DataFrame([rest])], ignore_index=True)
