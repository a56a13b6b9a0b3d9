"""Rows over batches: what the findings, the table and the charts of a report are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ngeval.analysis.intervals import geometric_means
from ngeval.analysis.layer_summary import GEOMETRIC, summarize_layers
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
        natural: one row per (checkpoint, damping): ``ratio``, the exact natural gradient's γ over
            γ_SGD; empty where the table does not tell it.
    """

    rows: pd.DataFrame
    summary: pd.DataFrame
    stages: pd.DataFrame
    natural: pd.DataFrame

    @cached_property
    def checkpoints(self) -> list[str]:
        """In order of training."""
        return [str(name) for name in self.summary["checkpoint"].unique()]

    @cached_property
    def methods(self) -> list[str]:
        """Without SGD, which the others are told over."""
        return [str(name) for name in self.summary["method"].unique() if name != "sgd"]

    @cached_property
    def dampings(self) -> list[float]:
        """From the smallest."""
        return sorted(float(value) for value in self.summary["damping"].unique())

    @property
    def smallest(self) -> float:
        """The smallest positive λ; where there is none, the largest of the others."""
        return smallest_positive(self.dampings)

    def at(self, checkpoint: str, damping: float | None = None) -> pd.DataFrame:
        """The summary at a checkpoint, for all λ or one."""
        part = self.summary[self.summary["checkpoint"] == checkpoint]
        return part if damping is None else part[part["damping"] == damping]


def smallest_positive(dampings: Iterable[float]) -> float:
    """The smallest positive λ; where there is none, the largest of the others."""
    values = sorted(map(float, dampings))
    return next((value for value in values if value > 0), values[-1])


def grades(table: pd.DataFrame) -> Grades | None:
    """A γ table in short; None where no row could be computed."""
    table = in_order(table)
    rows = table[(table["status"] == "ok") & (table["gamma_over_sgd"] > 0)]
    rows = rows[np.isfinite(rows["gamma_over_sgd"])]
    if rows.empty:
        return None
    over_sgd = geometric_means(rows, KEYS, "gamma_over_sgd").rename(
        columns={"mean": "ratio", "count": "batches"}
    )
    over_best = geometric_means(rows, KEYS, "gamma_over_ng").rename(
        columns={"mean": "best", "low": "best_low", "high": "best_high"}
    )
    summary = over_sgd.merge(over_best.drop(columns="count"), on=KEYS, how="left")
    return Grades(rows, summary, _stages(rows), _natural(rows))


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of training: parts of a run may have come in any."""
    single = table.drop_duplicates("checkpoint")
    told = next(
        (name for name in ("epoch", "step") if name in table and single[name].notna().all()), None
    )
    return table if told is None else table.sort_values(told, kind="stable")


def _stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Floor and least γ over γ_SGD, of every batch once."""
    single = rows.drop_duplicates(["checkpoint", "batch"])
    sgd = single["gamma"] / single["gamma_over_sgd"]
    least = single["gamma_min"] if "gamma_min" in single else single["gamma"] * np.nan
    single = single.assign(floor=single["gamma_floor"] / sgd, least=least / sgd)
    stages = single[["checkpoint"]].drop_duplicates()
    for name in ("floor", "least"):
        means = geometric_means(single, ["checkpoint"], name, resamples=1)
        stages = stages.merge(
            means[["checkpoint", "mean"]].rename(columns={"mean": name}), how="left"
        )
    return stages


def _natural(rows: pd.DataFrame) -> pd.DataFrame:
    """The exact natural gradient's γ over γ_SGD: between its bounds, which every row has."""
    if not {"gamma_ng_lower", "gamma_ng_upper"} <= set(rows):
        return pd.DataFrame(columns=["checkpoint", "damping", "ratio"])
    single = rows.drop_duplicates(["checkpoint", "batch", "damping"])
    product = single["gamma_ng_lower"] * single["gamma_ng_upper"]
    between = np.sqrt(product.where(product >= 0))
    single = single.assign(ratio=between / (single["gamma"] / single["gamma_over_sgd"]))
    means = geometric_means(single, ["checkpoint", "damping"], "ratio", resamples=1)
    return means[["checkpoint", "damping", "mean"]].rename(columns={"mean": "ratio"})


def free_of_damping(grades: Grades) -> set[str]:
    """Methods that λ does not enter: the same γ at every λ."""
    spread = grades.summary.groupby(["checkpoint", "method"])["ratio"].agg(["min", "max"])
    same = ((spread["max"] / spread["min"] - 1) < 1e-9).groupby("method").all()
    several = grades.summary["damping"].nunique() > 1
    return {str(name) for name in same[same].index} if several else set()


def at_best(grades: Grades) -> pd.DataFrame:
    """The summary at each method's best λ, for each checkpoint.

    The least geometric mean; a λ at which some batch could not be computed is taken only where
    there is no other.
    """
    summary = grades.summary
    most = summary.groupby(["checkpoint", "method"])["batches"].transform("max")
    whole = summary[summary["batches"] == most]
    return whole.loc[whole.groupby(["checkpoint", "method"], sort=False)["ratio"].idxmin()]


def paired(
    first: pd.DataFrame, second: pd.DataFrame, value: str = "gamma_over_sgd"
) -> tuple[float, float, float]:
    """Geometric mean over batches of first/second, with its interval; NaN without shared batches.

    Args:
        first: rows of one method at one λ and checkpoint.
        second: of another, on the same batches.
        value: the column.
    """
    both = first[["batch", value]].merge(second[["batch", value]], on="batch")
    both = both.assign(part=0, ratio=both[f"{value}_x"] / both[f"{value}_y"])
    found = geometric_means(both, ["part"], "ratio")
    if found.empty:
        return (float("nan"),) * 3
    mean, low, high = found[["mean", "low", "high"]].to_numpy(dtype=float)[0]
    return mean, low, high


def imbalances(samples: pd.DataFrame) -> pd.DataFrame:
    """Largest over smallest gradient norm of every batch.

    ∞ where the smallest is 0; NaN where some norm is none (NaN, infinite, negative), or all are 0.
    """
    rows = in_order(samples).assign(norm=lambda table: table["gradient_norm"])
    rows.loc[~are_norms(rows), "norm"] = np.nan
    norms = rows.groupby(["checkpoint", "batch"], sort=False)["norm"]
    ends = norms.agg(["min", "max", "size", "count"]).reset_index()
    ends.loc[ends["count"] < ends["size"], ["min", "max"]] = np.nan
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return ends.assign(imbalance=ends["max"] / ends["min"])


def are_norms(samples: pd.DataFrame) -> pd.Series:
    """Which rows have a finite norm that is not negative."""
    return samples["gradient_norm"].between(0, np.inf, inclusive="left")


def imbalance_means(samples: pd.DataFrame) -> pd.DataFrame:
    """Of every checkpoint: geometric mean over batches ``mean, low, high``; infinite ones left out.

    ``count`` batches are behind the mean.
    """
    return geometric_means(imbalances(samples), ["checkpoint"], "imbalance")


def norm_quantiles(samples: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """Quantiles of ‖g_n‖ over all samples of all batches: a row per checkpoint, a column each."""
    norms = in_order(samples).groupby("checkpoint", sort=False)["gradient_norm"]
    return norms.quantile(np.asarray(levels)).unstack().reset_index()


def layer_means(table: pd.DataFrame) -> pd.DataFrame | None:
    """What each layer buys and spends, over batches, in order of training; None without rows."""
    rows = table[~table["status"].isin({"failed", LEFT_OUT})]
    if rows.empty:
        return None
    unused = [name for name in GEOMETRIC if name in rows]  # which may hold anything
    return summarize_layers(in_order(rows.drop(columns=unused)))
