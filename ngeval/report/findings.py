"""What the numbers say, in sentences; none claims more than the intervals support."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy

from ngeval.analysis.best_damping import smallest_positive
from ngeval.analysis.norms import imbalance_means, imbalances
from ngeval.analysis.stages import in_order
from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES
from ngeval.report.sources import Topic
from ngeval.report.summaries import Grades, layer_means, paired
from ngeval.report.wording import (
    above_one,
    batches_text,
    below_one,
    damping_text,
    first_of,
    interval_text,
    listed,
    method_text,
    number,
    value_text,
    with_interval,
)

FEW = 5
"""Batches below which a bootstrap interval is too narrow to rely on."""

MAX_NAMED = 6
"""Methods that a sentence names with their numbers."""

FIRST = ("ief", "ef", "sf")
"""Methods that are named before others."""


def findings(topic: Topic) -> list[str]:
    """Sentences about a task, the most important first."""
    labels, short = topic.labels, topic.short
    sentences: list[str] = []
    if GAMMAS in topic.tables:
        sentences += _gammas(short, labels) if short else ["No row could be computed."]
    if SAMPLES in topic.tables and (short or GAMMAS not in topic.tables):
        samples = topic.tables[SAMPLES]
        sentences += _imbalance_findings(samples, labels)
        sentences += _imbalance_with_ef(short, samples) if short else []
    sentences += _bounds(short, labels) if short else []
    if LAYERS in topic.tables:
        sentences += _layer_findings(topic.tables[LAYERS], labels)
    return sentences


def _gammas(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    last = short.checkpoints[-1]
    damping = short.smallest
    part = short.at(last, damping)
    part = part[part["method"] != "sgd"]
    if not part.empty:
        where = f"λ = {damping_text(damping)} and {labels[last]}"
        yield _headline(part, where)
        yield _verdicts(part, where)
    yield from _caution(short)
    yield from _nearest(short, labels[last])
    yield from _over_training(short, labels)
    yield from _ranges(short, labels[last])
    yield from _at_an_end(short, labels[last])


def _in_order(methods: Sequence[str]) -> list[str]:
    return [*(name for name in FIRST if name in methods), *(m for m in methods if m not in FIRST)]


def _headline(part: pd.DataFrame, where: str) -> str:
    """Each method's γ over SGD's."""
    rows = part.sort_values("ratio").set_index("method")
    rows = rows.loc[_in_order(list(rows.index))].reset_index()
    values = []
    for index, row in enumerate(rows.head(MAX_NAMED).to_dict("records")):
        ends = (row["low"], row["high"])
        is_, sgd = ("", "") if index else ("is ", "SGD ")
        value = f"{value_text(row['ratio'], *ends)} × {sgd}{interval_text(*ends)}".rstrip()
        values.append(f"{method_text(row['method'])} {is_}{value}")
    rest = len(rows) - MAX_NAMED
    more = f"; {rest} more in the table" if rest > 0 else ""
    means = batches_text(part["batches"])
    if part["batches"].max() > 1:
        means = f"geometric mean over {means}, 95 % bootstrap interval"
    return f"At {where}, {listed(values)} (γ over SGD's, {means}; smaller is better{more})."


def _verdicts(part: pd.DataFrame, where: str) -> str:
    """Nearer, farther, or neither: only where the interval excludes 1."""
    unknown = part["low"].isna()
    if unknown.all():
        return "There is one batch, so no interval: which of these differ from SGD is unknown."
    nearer, farther = below_one(part["high"]), above_one(part["low"])
    groups = {
        "nearer to the natural gradient than SGD": nearer,
        "farther from it than SGD": farther,
        "not distinguishable from SGD with these batches": ~(nearer | farther | unknown),
        "unknown, for one batch has no interval": unknown,
    }
    verdicts = [
        f"{verdict}: {listed([method_text(name) for name in part.loc[chosen, 'method']])}"
        for verdict, chosen in groups.items()
        if chosen.any()
    ]
    return f"At {where}, {'; '.join(verdicts)}."


def _caution(short: Grades) -> Iterator[str]:
    """Which intervals rest on few batches: all of them, or those of some methods."""
    summary = short.summary[short.summary["method"] != "sgd"]
    known = summary[summary["batches"] > 1]
    few = known[known["batches"] < FEW]
    if few.empty:
        return
    names = [method_text(name) for name in few["method"].unique()]
    of = "" if len(few) == len(known) else f" of {listed(first_of(names, MAX_NAMED))}"
    over = batches_text(few["batches"])
    yield (
        f"Caution: intervals{of} over {over} are too narrow, and say little more than the "
        f"range of the batches; grade {FEW} or more."
    )


def _nearest(short: Grades, label: str) -> Iterator[str]:
    """Which method comes nearest to γ_min, and whether the second is distinguishable from it.

    The least γ is that of the natural gradient, which is therefore left out.
    """
    best = short.best
    last = best[(best["checkpoint"] == short.checkpoints[-1]) & best["best"].notna()]
    natural = last["method"] == "ng"
    last = last[~natural].sort_values("best")
    if len(last) < 2:
        return
    first, second = last.to_dict("records")[:2]
    but = f", {method_text('ng')} left out" if natural.any() else ""
    sentence = (
        f"Nearest to the least γ possible at {label}{but}: {_at(first, short.free)} with "
        f"{with_interval(first['best'], first['best_low'], first['best_high'])} × γ_min"
    )
    at = "each method at the λ that is best for these batches"
    ratio, low, high = paired(_rows(short, second), _rows(short, first))
    if math.isnan(low):
        yield f"{sentence} ({at})."
        return
    relation = "The next is" if above_one(low) else "It is not distinguishable from"
    yield (
        f"{sentence}. {relation} {_at(second, short.free)}, whose γ is "
        f"{with_interval(ratio, low, high)} × {method_text(first['method'])}'s, batch by batch "
        f"({at})."
    )


def _at(row: dict[Any, Any], free: set[str]) -> str:
    name = str(row["method"])
    where = "" if name in free else f" (λ = {damping_text(row['damping'])})"
    return method_text(name) + where


def _rows(short: Grades, row: dict[Any, Any]) -> pd.DataFrame:
    keys = ["checkpoint", "method", "damping"]
    return short.rows[(short.rows[keys] == [row[key] for key in keys]).all(axis=1)]


def _over_training(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    """From the first checkpoint to the last, at one λ, on the same batches."""
    ends = (short.checkpoints[0], short.checkpoints[-1])
    at = [short.at(name, short.smallest).set_index("method")["ratio"] for name in ends]
    methods = [name for name in short.methods if name in at[0].index and name in at[1].index]
    if len(short.checkpoints) < 2 or not methods:
        return
    changes, sizes = {}, {}
    for method in _in_order(methods):
        key = {"method": method, "damping": short.smallest}
        first, last = (_rows(short, key | {"checkpoint": name}) for name in ends)
        times, low, high = paired(last, first)
        is_sure = above_one(low) or below_one(high)
        change = "no significant change" if not math.isnan(low) else "without an interval"
        change = f"× {with_interval(times, low, high)}" if is_sure else change
        values = " to ".join(number(float(part[method])) for part in at)
        changes[method] = f"{method_text(method)} from {values} ({change})"
        sizes[method] = abs(math.log(times)) if is_sure else 0.0
    # The largest changes, in the order in which methods are named everywhere.
    largest = sorted(changes, key=lambda name: (name not in FIRST, -sizes[name]))[:5]
    shown = "; ".join(change for method, change in changes.items() if method in largest)
    yield (
        f"From {labels[ends[0]]} to {labels[ends[1]]}, γ over SGD's goes at λ = "
        f"{damping_text(short.smallest)}: {shown}."
    )


def _ranges(short: Grades, label: str) -> Iterator[str]:
    """Over which λ a method is below SGD by its interval; if at none, at how many by its mean."""
    last = short.at(short.checkpoints[-1])
    last = last[last["damping"] > 0].sort_values("damping")
    dampings = last["damping"].unique()
    if len(dampings) < 3:
        return
    groups: dict[str, list[str]] = {}
    for method in _in_order([name for name in short.methods if name not in short.free]):
        rows = last[(last["method"] == method) & last["high"].notna()]
        if len(rows):
            groups.setdefault(_range(rows, len(dampings)), []).append(method_text(method))
    if groups:
        ranges = "; ".join(f"{listed(names)} {where}" for where, names in groups.items())
        ends = f"{damping_text(dampings[0])} to {damping_text(dampings[-1])}"
        yield (
            f"Surely below SGD (95 % interval below 1) at {label}, of the {len(dampings)} λ from "
            f"{ends}: {ranges}."
        )


def _range(rows: pd.DataFrame, count: int) -> str:
    """Where a method is below SGD, of as many λ as there are."""
    below = rows.loc[below_one(rows["high"]), "damping"]
    if below.empty:
        means = int(below_one(rows["ratio"]).sum())
        return "at none" + (f", by the mean at {means}" if means else "")
    if len(below) == count:
        return "at all"
    ends = f"{damping_text(below.iloc[0])} to {damping_text(below.iloc[-1])}"
    return f"at {len(below)} from {ends}"


def _at_an_end(short: Grades, label: str) -> Iterator[str]:
    """Methods for which a better λ may lie beyond those that were tried."""
    dampings = [value for value in short.dampings if value > 0]
    if len(dampings) < 3:
        return
    best = short.best[short.best["checkpoint"] == short.checkpoints[-1]]
    best = best[~best["method"].isin({"ng", "sgd"} | short.free)]
    # 0 is the end of all dampings: nothing lies below it.
    ends = {dampings[-1]: "largest"} | ({} if 0 in short.dampings else {dampings[0]: "smallest"})
    at_ends = [
        f"{listed([method_text(name) for name in names])} (the {which}, {damping_text(value)})"
        for value, which in ends.items()
        if (names := best.loc[best["damping"] == value, "method"].tolist())
    ]
    if at_ends:
        yield (
            f"At {label} the best λ lies at an end of the range for {'; '.join(at_ends)}: a better "
            "one may lie beyond."
        )


def _bounds(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    """How far down γ can go."""
    last = short.stages.to_dict("records")[-1]
    least, floor, label = last["least"], last["floor"], labels[last["checkpoint"]]
    if math.isnan(floor):
        return
    if math.isnan(least):
        yield f"No update can be below the floor, {number(floor)} × SGD at {label}."
        return
    gap = least / floor
    relation = f"{number(gap)} × the closed-form floor"
    if gap < 1.005:
        relation = "which is the closed-form floor to within 0.5 %"
    yield f"No update can be below γ_min, {number(least)} × SGD at {label}, {relation}."


def _imbalance_findings(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """Largest over smallest gradient norm, at the first and the last checkpoint."""
    samples = in_order(samples)
    means, batches = imbalance_means(samples), imbalances(samples)
    # Batches with an invalid norm, and batches with a norm of 0 (0/0 where all are).
    invalid = int((batches["count"] < batches["size"]).sum())
    infinite = int((~np.isfinite(batches["imbalance"])).sum()) - invalid
    if infinite == len(batches):
        yield "Every batch has a sample with no gradient, so the imbalance of norms is infinite."
        return
    if means.empty:
        yield "No batch has a finite imbalance of norms."
    else:
        yield _imbalance_means(means, labels)
    for count, what in (
        (infinite, "without a gradient: the imbalance is infinite, and is not counted."),
        (invalid, "with an invalid norm (NaN, infinite or negative), not counted; see warnings."),
    ):
        if count:
            hold = "One batch holds" if count == 1 else f"{count} batches hold"
            yield f"{hold} a sample {what}"


def _imbalance_means(means: pd.DataFrame, labels: dict[str, str]) -> str:
    values = [
        with_interval(row["mean"], row["low"], row["high"])
        + f" × the smallest at {labels[row['checkpoint']]}"
        for row in means.iloc[[0, -1] if len(means) > 1 else [0]].to_dict("records")
    ]
    is_narrow = means["count"].between(2, FEW - 1).any()
    caution = ", too few to rely on the interval" if is_narrow else ""
    return (
        f"The largest per-sample gradient norm of a batch is {' and '.join(values)} (geometric "
        f"{'mean' if len(values) == 1 else 'means'} over {batches_text(means['count'])}{caution})."
    )


def _imbalance_with_ef(short: Grades, samples: pd.DataFrame) -> Iterator[str]:
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


def _layer_findings(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
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
