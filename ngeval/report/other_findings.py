"""Sentences on gradient norms, layers and tuned trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy

from ngeval.analysis.training_results import performance
from ngeval.report.summaries import (
    Grades,
    imbalance_means,
    imbalances,
    layer_means,
    smallest_positive,
)
from ngeval.report.wording import counted, damping_text, listed, method_text, with_interval

FEW = 5
"""Batches below which a bootstrap interval is too narrow to lean on."""


def imbalance_findings(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """Largest over smallest gradient norm, at the first and the last checkpoint."""
    means, batches = imbalance_means(samples), imbalances(samples)
    # Of a batch whose gradients all vanish, 0/0.
    broken = int((batches["count"] < batches["size"]).sum())
    lost = int((~np.isfinite(batches["imbalance"])).sum()) - broken
    if means.empty and lost == len(batches):
        yield "Every batch has a sample with no gradient, so the imbalance of norms is infinite."
        return
    if means.empty:
        yield "No batch has an imbalance of norms that can be told."
    else:
        yield _imbalance_means(means, labels)
    if lost:
        holders = "One batch holds" if lost == 1 else f"{lost} batches hold"
        yield f"{holders} a sample without a gradient, whose imbalance is not counted."
    if broken:
        holders = "One batch holds" if broken == 1 else f"{broken} batches hold"
        yield (
            f"{holders} a sample whose norm is none (NaN, infinite or negative), and is not "
            "counted; see the warnings."
        )


def _imbalance_means(means: pd.DataFrame, labels: dict[str, str]) -> str:
    told = [
        with_interval(row["mean"], row["low"], row["high"])
        + f" × the smallest at {labels[row['checkpoint']]}"
        for row in means.iloc[[0, -1] if len(means) > 1 else [0]].to_dict("records")
    ]
    over = counted(int(means["count"].min()), int(means["count"].max()), "batch", "batches")
    sentence = " and ".join(told)
    narrow = means["count"].between(2, FEW - 1).any()
    caution = ", too few for an interval to lean on" if narrow else ""
    return (
        f"The largest per-sample gradient norm of a batch is {sentence} (geometric "
        f"{'mean' if len(told) == 1 else 'means'} over {over}{caution})."
    )


def imbalance_with_ef(short: Grades, samples: pd.DataFrame) -> Iterator[str]:
    """Whether EF's ratio goes with the imbalance, over checkpoints."""
    means = imbalance_means(samples).rename(columns={"mean": "imbalance"})
    ef = short.summary[
        (short.summary["method"] == "ef") & (short.summary["damping"] == short.smallest)
    ]
    both = ef[["checkpoint", "ratio"]].merge(means[["checkpoint", "imbalance"]])
    if len(both) < FEW or both[["ratio", "imbalance"]].nunique().min() < 2:
        return
    # Through the package, so that scipy.stats is loaded when needed.
    rank = float(scipy.stats.spearmanr(both["ratio"], both["imbalance"]).statistic)
    if math.isnan(rank):
        return
    what = "grows with the imbalance" if rank > 0.5 else "does not simply go with the imbalance"
    yield (
        f"EF's γ over SGD's {what}: Spearman's ρ is {rank:.2f} over the {len(both)} checkpoints at "
        f"λ = {damping_text(short.smallest)} (checkpoints of one run are not independent)."
    )


def layer_findings(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """The layer of each update that spends most above what it buys."""
    summary = layer_means(table)
    if summary is None:
        yield "No layer could be graded."
        return
    last = summary[summary["checkpoint"] == summary["checkpoint"].iloc[-1]]
    last = last[last["damping"] == smallest_positive(last["damping"])]
    ordered = last.loc[last.groupby("method", sort=False)["excess"].idxmax()]
    told = [
        f"{method_text(row['method'])} in layer {row['layer']} ({_percent(row['curvature_share'])} "
        f"of its KL for {_percent(row['decrease_share'])} of the loss it buys)"
        for row in ordered.nlargest(3, "excess").to_dict("records")
        if row["excess"] > 0.005
    ]
    if told:
        checkpoint, damping = last[["checkpoint", "damping"]].to_numpy()[0]
        where = f"{labels[checkpoint]}, λ = {damping_text(damping)}"
        yield f"Updates lose most at {where}: {'; '.join(told)}."


def training_findings(rows: pd.DataFrame) -> Iterator[str]:
    """The optimizer with the best mean, and whether the next is told from it."""
    for task, table in performance(rows).groupby("task", sort=False):
        ranked = table[table["seeds"] > 0].sort_values("rank")
        if ranked.empty:
            yield f"On {task} no tuned training came to its end."
            continue
        metric, data = str(ranked["metric"].iloc[0]), str(ranked["data"].iloc[0])
        figure = f"{data} {metric.removeprefix('test_')}"
        best, *others = ranked.to_dict("records")
        seeds = counted(best["seeds"], best["seeds"], "seed", "seeds")
        sentence = (
            f"On {task}, {best['optimizer']} has the best mean {figure}: {_mean(best, metric)}"
        )
        if others:
            second = others[0]
            apart = _apart(best, second, metric)
            verdict = "" if apart else " (their intervals overlap)"
            sentence += f", before {second['optimizer']} with {_mean(second, metric)}{verdict}"
        yield f"{sentence} ({seeds}, 95 % t-interval)."
        if edges := [row["optimizer"] for row in ranked.to_dict("records") if row["edge"]]:
            yield f"On {task} a tuned setting lies at an end of those tried for {listed(edges)}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _mean(row: dict[Any, Any], metric: str) -> str:
    values = (row[f"{metric}_{end}"] for end in ("mean", "low", "high"))
    return with_interval(*values)


def _apart(first: dict[Any, Any], second: dict[Any, Any], metric: str) -> bool:
    ends = [(row[f"{metric}_low"], row[f"{metric}_high"]) for row in (first, second)]
    return bool(ends[0][0] > ends[1][1] or ends[0][1] < ends[1][0])
