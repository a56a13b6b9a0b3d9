"""Sentences on gradient norms and layers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy

from ngeval.analysis.best_damping import smallest_positive
from ngeval.analysis.norms import imbalance_means, imbalances
from ngeval.analysis.stages import in_order
from ngeval.report.summaries import Grades, layer_means
from ngeval.report.wording import counted, damping_text, method_text, with_interval

FEW = 5
"""Batches below which a bootstrap interval is too narrow to rely on."""


def imbalance_findings(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """Largest over smallest gradient norm, at the first and the last checkpoint."""
    samples = in_order(samples)
    means, batches = imbalance_means(samples), imbalances(samples)
    # Batches with an invalid norm, and batches with a norm of 0 (0/0 where all are).
    invalid = int((batches["count"] < batches["size"]).sum())
    infinite = int((~np.isfinite(batches["imbalance"])).sum()) - invalid
    if means.empty and infinite == len(batches):
        yield "Every batch has a sample with no gradient, so the imbalance of norms is infinite."
        return
    if means.empty:
        yield "No batch has a finite imbalance of norms."
    else:
        yield _imbalance_means(means, labels)
    if infinite:
        hold = "One batch holds" if infinite == 1 else f"{infinite} batches hold"
        yield f"{hold} a sample without a gradient, whose imbalance is not counted."
    if invalid:
        hold = "One batch holds" if invalid == 1 else f"{invalid} batches hold"
        yield (
            f"{hold} a sample with an invalid norm (NaN, infinite or negative), and is not "
            "counted; see the warnings."
        )


def _imbalance_means(means: pd.DataFrame, labels: dict[str, str]) -> str:
    values = [
        with_interval(row["mean"], row["low"], row["high"])
        + f" × the smallest at {labels[row['checkpoint']]}"
        for row in means.iloc[[0, -1] if len(means) > 1 else [0]].to_dict("records")
    ]
    over = counted(int(means["count"].min()), int(means["count"].max()), "batch", "batches")
    is_narrow = means["count"].between(2, FEW - 1).any()
    caution = ", too few to rely on the interval" if is_narrow else ""
    return (
        f"The largest per-sample gradient norm of a batch is {' and '.join(values)} (geometric "
        f"{'mean' if len(values) == 1 else 'means'} over {over}{caution})."
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
    # Through the package: scipy.stats takes a second to import.
    rank = float(scipy.stats.spearmanr(both["ratio"], both["imbalance"]).statistic)
    if math.isnan(rank):
        return
    trend = "grows with the imbalance" if rank > 0.5 else "does not simply go with the imbalance"
    yield (
        f"EF's γ over SGD's {trend}: Spearman's ρ is {rank:.2f} over the {len(both)} checkpoints "
        f"at λ = {damping_text(short.smallest)} (checkpoints of one run are not independent)."
    )


def layer_findings(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """The layer of each update that spends most above what it buys."""
    summary = layer_means(table)
    if summary is None:
        yield "No layer could be graded."
        return
    last = summary[summary["checkpoint"] == summary["checkpoint"].iloc[-1]]
    last = last[last["damping"] == smallest_positive(last["damping"])]
    worst = last.loc[last.groupby("method", sort=False)["excess"].idxmax()]
    losses = [
        f"{method_text(row['method'])} in layer {row['layer']} ({_percent(row['curvature_share'])} "
        f"of its KL for {_percent(row['decrease_share'])} of the loss it buys)"
        for row in worst.nlargest(3, "excess").to_dict("records")
        if row["excess"] > 0.005
    ]
    if losses:
        checkpoint, damping = last[["checkpoint", "damping"]].to_numpy()[0]
        where = f"{labels[checkpoint]}, λ = {damping_text(damping)}"
        yield f"Updates lose most at {where}: {'; '.join(losses)}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
