"""Findings of *diagonal*: FAdam's claim that a diagonal is enough."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from studies.base import Finding, decide
from studies.statistics import Interval, at_best_damping, geometric_interval, slope_interval

PAPER = "Hwang, arXiv 2405.12807"
DIAGONALS = ("diag", "diag-ef", "diag:0.5", "diag-ef:0.5")
NAMES = {
    "diag": "exact diagonal",
    "diag-ef": "empirical diagonal",
    "diag:0.5": "root of the exact diagonal",
    "diag-ef:0.5": "root of the empirical diagonal (Adam's)",
    "kfac": "KFAC",
    "sgd": "the plain gradient",
}
ENOUGH = 1.5
"""γ/γ_min up to which an approximation counts as enough: KL is spent at most 2.25 times as fast for
the same loss."""

CELL = ["depth", "width", "threshold"]


def findings(rows: pd.DataFrame) -> list[Finding]:
    """One finding for each claim.

    Raises:
        InputError: fewer than two widths or depths reached a stage.
    """
    best = at_best(rows)
    if best["width"].nunique() < 2 or best["depth"].nunique() < 2:
        raise InputError("the rows have fewer than two widths or depths; was the run interrupted?")
    slopes = [_slope(best, "width", -1), _slope(best, "depth", 1)]
    return [_enough(best), *slopes, _narrow(rows)]


def at_best(rows: pd.DataFrame) -> pd.DataFrame:
    """Each method at the λ with the least geometric mean over batches and seeds, for each cell.

    A row for each cell, method, seed and batch; the cell is depth, width and stage.
    """
    return at_best_damping(rows, CELL, "gamma_over_ng")


def cells(best: pd.DataFrame, method: str, column: str = "gamma_over_ng") -> pd.DataFrame:
    """Geometric mean in each cell: columns ``depth, width, threshold, value, low, high``."""
    rows = best[best["method"] == method]
    # The batches of one network are correlated: a network counts once.
    logs = rows.assign(log=np.log(rows[column]))
    networks = logs.groupby([*CELL, "seed"], as_index=False).agg({"log": "mean"})
    records = [
        (*cell, *geometric_interval(np.exp(part["log"]))) for cell, part in networks.groupby(CELL)
    ]
    return pd.DataFrame(records, columns=[*CELL, *Interval._fields])


def _enough(best: pd.DataFrame) -> Finding:
    outcomes, evidence = [], []
    for method, name in NAMES.items():
        table = cells(best, method)
        if method in ("diag", "diag-ef:0.5"):
            outcomes += list(table["value"] <= ENOUGH)
        table = table.sort_values("value")
        least, most = table.iloc[0], table.iloc[-1]
        evidence.append(
            f"{name} {least['value']:.2f} ({_place(least)}) to {most['value']:.2f} "
            f"({_place(most)}), {(table['value'] <= ENOUGH).sum()} of {len(table)} up to {ENOUGH:g}"
        )
    return Finding(
        "The diagonal of the Fisher is enough for an effective natural gradient",
        f"{PAPER}, §3.2",
        decide(outcomes),
        "γ/γ_min at each method's best λ, geometric means over networks of a depth, width and "
        "stage, least to largest: " + "; ".join(evidence) + ".",
        f"γ/γ_min of the exact diagonal and of Adam's root is at most {ENOUGH:g}; a case for each "
        "of both and cell",
    )


def _slope(best: pd.DataFrame, axis: str, sign: int) -> Finding:
    """Whether γ/γ_min falls with the width, or grows with the depth."""
    outcomes, evidence = [], []
    for method in (*DIAGONALS, "kfac"):
        for threshold in sorted(best["threshold"].unique(), reverse=True):
            slope = within_slope(best, method, float(threshold), axis)
            if method in ("diag", "diag-ef:0.5"):
                outcomes.append(slope.is_below(0) if sign < 0 else slope.is_above(0))
            evidence.append(f"{NAMES[method]}, loss {threshold:g}: {slope.text('.2f')}")
    what = {
        "width": "A diagonal fails where layers are small: γ/γ_min falls with the width",
        "depth": "A diagonal gets worse with depth: γ/γ_min grows with the number of layers",
    }[axis]
    source = {"width": f"{PAPER}, where the diagonal breaks down", "depth": "asked here"}[axis]
    return Finding(
        what,
        source,
        decide(outcomes),
        f"Slope of log γ/γ_min on log {axis}, networks of the same "
        f"{'depth' if axis == 'width' else 'width'} compared: " + "; ".join(evidence) + ".",
        f"the 95 % interval lies {'below' if sign < 0 else 'above'} 0 for the exact diagonal and "
        "for Adam's root, at each stage",
    )


def within_slope(best: pd.DataFrame, method: str, threshold: float, axis: str) -> Interval:
    """The slope of log γ/γ_min on the log of one axis, the other axis held fixed.

    Every value of the other axis has its own intercept (means are subtracted), so that a width that
    only shallow networks reach is not mistaken for an effect.
    """
    rows = best[(best["method"] == method) & (best["threshold"] == threshold)]
    other = "depth" if axis == "width" else "width"
    logs = rows.assign(x=np.log(rows[axis]), y=np.log(rows["gamma_over_ng"]))
    networks = logs.groupby(["depth", "width", "seed"], as_index=False)[["x", "y"]].mean()
    centred = networks[["x", "y"]] - networks.groupby(other)[["x", "y"]].transform("mean")
    return slope_interval(centred["x"], centred["y"])


def _narrow(rows: pd.DataFrame) -> Finding:
    """Whether a diagonal is worse than the plain gradient in the narrowest networks.

    At the smallest λ: at a large one every diagonal is the plain gradient.
    """
    width, damping = rows["width"].min(), rows["damping"].min()
    near = rows[(rows["status"] == "ok") & (rows["damping"] == damping)]
    outcomes, evidence = [], []
    for method in ("diag", "diag-ef:0.5"):
        table = cells(near[near["width"] == width], method, "gamma_over_sgd")
        for _, cell in table.iterrows():
            ratio = Interval(cell["value"], cell["low"], cell["high"])
            outcomes.append(ratio.is_above(1))
            evidence.append(f"{NAMES[method]}, {_place(cell)}: {ratio.text('.2f')}")
    return Finding(
        "With insufficient layer sizes the diagonal does worse than SGD",
        f"{PAPER}, failure signatures",
        decide(outcomes),
        f"γ/γ_SGD at λ = {damping:g} in the narrowest networks ({width} units): "
        + "; ".join(evidence)
        + ".",
        "the 95 % interval lies above 1; a case for each depth, stage and diagonal",
    )


def _place(cell: pd.Series[float]) -> str:
    return f"{cell['depth']:g} × {cell['width']:g}, loss {cell['threshold']:g}"
