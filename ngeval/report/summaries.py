"""Rows over batches: what the findings, the table and the charts of a report are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ngeval.analysis.best_damping import best_rows, smallest_positive, without_damping
from ngeval.analysis.intervals import geometric_means, group_means
from ngeval.analysis.layer_summary import GEOMETRIC, summarize_layers
from ngeval.analysis.stages import in_order
from ngeval.analysis.summary import with_natural
from ngeval.report.checked_rows import LEFT_OUT

KEYS = ["checkpoint", "method", "damping"]


@dataclass(frozen=True)
class Grades:
    """A γ table in short.

    Attributes:
        rows: those that could be computed.
        summary: one row per (checkpoint, method, damping), in order of appearance: ``ratio, low,
            high``, the geometric mean of γ/γ_SGD over batches with its 95 % bootstrap interval;
            ``best, best_low, best_high``, the same of γ/γ_min; ``batches``.
        stages: one row per checkpoint: ``floor``, the geometric mean of the floor over γ_SGD, and
            ``least``, of γ_min over γ_SGD (NaN where it was not computed).
    """

    rows: pd.DataFrame
    summary: pd.DataFrame
    stages: pd.DataFrame

    @cached_property
    def natural(self) -> pd.DataFrame:
        """``ratio`` of the exact natural gradient by checkpoint and damping, if it is known."""
        rows = with_natural(self.rows)
        natural = rows[rows["method"] == "ng"]
        means = geometric_means(natural, ["checkpoint", "damping"], "gamma_over_sgd", resamples=0)
        return means[["checkpoint", "damping", "mean"]].rename(columns={"mean": "ratio"})

    @cached_property
    def best(self) -> pd.DataFrame:
        """The summary at each method's best λ for each checkpoint."""
        return best_rows(self.summary, value="ratio")

    @cached_property
    def free(self) -> set[str]:
        """The methods that λ does not enter."""
        return without_damping(self.rows)

    @cached_property
    def checkpoints(self) -> list[str]:
        """In order of training."""
        return [str(name) for name in self.summary["checkpoint"].unique()]

    @cached_property
    def methods(self) -> list[str]:
        """Without SGD, to which the others are compared."""
        return [str(name) for name in self.summary["method"].unique() if name != "sgd"]

    @cached_property
    def dampings(self) -> list[float]:
        """From the smallest."""
        return sorted(float(value) for value in self.summary["damping"].unique())

    @property
    def smallest(self) -> float:
        """The smallest positive λ, or 0 if that is the only one."""
        return smallest_positive(self.dampings)

    def at(self, checkpoint: str, damping: float | None = None) -> pd.DataFrame:
        """The summary at a checkpoint, for all λ or one."""
        part = self.summary[self.summary["checkpoint"] == checkpoint]
        return part if damping is None else part[part["damping"] == damping]


def grades(table: pd.DataFrame) -> Grades | None:
    """A γ table in short; None if no row could be computed."""
    rows = in_order(table)
    rows = rows[rows["status"] == "ok"]
    rows = rows[rows["gamma_over_sgd"].between(0, math.inf, inclusive="neither")]
    if rows.empty:
        return None
    over_sgd = geometric_means(rows, KEYS, "gamma_over_sgd").rename(
        columns={"mean": "ratio", "count": "batches"}
    )
    over_best = geometric_means(rows, KEYS, "gamma_over_ng").rename(
        columns={"mean": "best", "low": "best_low", "high": "best_high"}
    )
    summary = over_sgd.merge(over_best.drop(columns="count"), on=KEYS, how="left")
    return Grades(rows, summary, _stages(rows))


def _stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Floor and least γ over γ_SGD, with every batch once."""
    single = rows.drop_duplicates(["checkpoint", "batch"])
    sgd = single["gamma"] / single["gamma_over_sgd"]
    least = single.get("gamma_min", math.nan)
    single = single.assign(floor=single["gamma_floor"] / sgd, least=least / sgd)
    stages = single[["checkpoint"]].drop_duplicates()
    for name in ("floor", "least"):
        means = geometric_means(single, ["checkpoint"], name, resamples=0).set_index("checkpoint")
        stages = stages.assign(**{name: stages["checkpoint"].map(means["mean"])})
    return stages


def paired(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float, float]:
    """Geometric mean of the γ of first over second, over the batches that both have; its interval.

    Each has the rows of one method at one λ and checkpoint. Without common batches all are NaN.
    """
    columns = ["batch", "gamma_over_sgd"]
    both = first[columns].merge(second[columns], on="batch")
    ratios = (both["gamma_over_sgd_x"] / both["gamma_over_sgd_y"]).to_numpy(dtype=float)
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]  # of the largest numbers they overflow
    mean, low, high = np.exp(group_means([np.log(ratios)]))[:, 0].tolist()
    return mean, low, high


def layer_means(table: pd.DataFrame) -> pd.DataFrame | None:
    """The means of each layer over batches, in order of training; None without rows."""
    rows = table[~table["status"].isin({"failed", LEFT_OUT})]
    if rows.empty:
        return None
    unused = [name for name in GEOMETRIC if name in rows]  # these are not checked
    return summarize_layers(in_order(rows.drop(columns=unused)))
