"""What the numbers say, in sentences; nothing is said that an interval does not carry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy

from ngeval.layer_summary import summarize_layers
from ngeval.performance import performance
from ngeval.report.sources import GAMMAS, LAYERS, SAMPLES, TRAINING, Topic
from ngeval.report.summaries import (
    Grades,
    at_best,
    free_of_damping,
    grades,
    imbalance_means,
    imbalances,
    paired,
)
from ngeval.report.text import (
    damping_text,
    interval_text,
    listed,
    method_text,
    number,
    with_interval,
)

FEW = 5
"""Batches below which a bootstrap interval is too narrow to lean on."""

SHOWN = 6
"""Methods that a sentence names with their numbers."""

FIRST = ("ief", "ef", "sf")
"""Methods that are named before others."""


def findings(topic: Topic, made: Grades | None = None) -> list[str]:
    """Sentences about a task, the most important first.

    Args:
        topic: the task's rows.
        made: its γ table in short, where it is there already.
    """
    labels = topic.labels
    found: list[str] = []
    if GAMMAS in topic.tables:
        short = made or grades(topic.tables[GAMMAS])
        found += list(_gammas(short, labels)) if short else ["No row could be computed."]
        if short and SAMPLES in topic.tables:
            samples = topic.tables[SAMPLES]
            found += [*_imbalance(samples, labels), *_together(short, samples)]
        found += list(_bounds(short, labels)) if short else []
    elif SAMPLES in topic.tables:
        found += list(_imbalance(topic.tables[SAMPLES], labels))
    if LAYERS in topic.tables:
        found += list(_layers(topic.tables[LAYERS], labels))
    if TRAINING in topic.tables:
        found += list(_training(topic.tables[TRAINING]))
    return found


def _gammas(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    last = short.checkpoints[-1]
    damping = short.smallest
    part = short.at(last, damping)
    part = part[part["method"] != "sgd"]
    if not part.empty:
        yield _headline(part, f"λ = {damping_text(damping)} and {labels[last]}")
        yield from _verdicts(part)
    yield from _caution(short)
    yield from _nearest(short, labels[last])
    yield from _over_training(short, labels)
    yield from _ranges(short, labels[last])
    yield from _at_an_end(short, labels[last])


def _headline(part: pd.DataFrame, where: str) -> str:
    """Each method's γ over SGD's."""
    known = [part[part["method"] == name] for name in FIRST]
    ordered = pd.concat([*known, part[~part["method"].isin(FIRST)].sort_values("ratio")])
    told = [
        f"{method_text(row['method'])} {'' if index else 'is '}{number(row['ratio'])} × "
        f"{'' if index else 'SGD '}{interval_text(row['low'], row['high'])}".rstrip()
        for index, row in enumerate(ordered.head(SHOWN).to_dict("records"))
    ]
    rest = len(ordered) - SHOWN
    more = f"; {rest} more in the table" if rest > 0 else ""
    batches = part["batches"]
    over = _count(int(batches.min()), int(batches.max()), "batch", "batches")
    means = f"geometric mean over {over}, 95 % bootstrap interval" if batches.max() > 1 else over
    return f"At {where}, {listed(told)} (γ over SGD's, {means}; smaller is better{more})."


def _verdicts(part: pd.DataFrame) -> Iterator[str]:
    """Nearer, farther, or neither: only where the interval excludes 1."""
    if part["low"].isna().all():
        yield "There is one batch, so no interval, and which of these differ from SGD is not told."
        return
    groups = {
        "nearer to the natural gradient than SGD": part["high"] < 1,
        "farther from it than SGD": part["low"] > 1,
    }
    decided = groups["nearer to the natural gradient than SGD"] | groups["farther from it than SGD"]
    told = [
        f"{what}: {listed([method_text(name) for name in part.loc[chosen, 'method']])}"
        for what, chosen in groups.items()
        if chosen.any()
    ]
    if (unknown := part.loc[~decided, "method"]).size:
        names = listed([method_text(name) for name in unknown])
        told.append(f"cannot be told from SGD with these batches: {names}")
    sentence = "; ".join(told)
    yield f"There, {sentence}."


def _caution(short: Grades) -> Iterator[str]:
    if 1 < short.batches < FEW:
        yield (
            f"Caution: intervals over {short.batches} batches are too narrow, and say little more "
            f"than the range of the batches; grade {FEW} or more."
        )


def _nearest(short: Grades, label: str) -> Iterator[str]:
    """Which method comes nearest to γ_min, at its best λ, and whether the second is told from it.

    The least γ is the natural gradient's own, so that is left out.
    """
    best = at_best(short)
    last = best[(best["checkpoint"] == short.checkpoints[-1]) & best["best"].notna()]
    last = last[last["method"] != "ng"].sort_values("best")
    if len(last) < 2:
        return
    first, second = last.to_dict("records")[:2]
    free = free_of_damping(short)
    sentence = (
        f"Nearest to the least γ there is comes {_at(first, free)} at {label}: "
        f"{with_interval(first['best'], first['best_low'], first['best_high'])} × γ_min"
    )
    ratio, low, high = paired(_rows(short, second), _rows(short, first))
    behind = f"{_at(second, free)}, {with_interval(ratio, low, high)} × that batch by batch"
    if low > 1:
        sentence += f"; the next is {behind}"
    elif not math.isnan(low):
        sentence += f", which cannot be told from {behind}"
    yield f"{sentence} (each method at the λ that is best for these batches)."


def _at(row: dict[Any, Any], free: set[str]) -> str:
    name = str(row["method"])
    if name in free:
        return method_text(name)
    return f"{method_text(name)} (λ = {damping_text(row['damping'])})"


def _rows(short: Grades, row: dict[Any, Any]) -> pd.DataFrame:
    rows = short.rows
    same = (rows[key] == row[key] for key in ("checkpoint", "method", "damping"))
    chosen = np.logical_and.reduce([mask.to_numpy() for mask in same])
    return rows[chosen]


def _over_training(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    """From the first checkpoint to the last, at one λ, on the same batches."""
    if len(short.checkpoints) < 2:
        return
    ends = (short.checkpoints[0], short.checkpoints[-1])
    at = [short.at(name, short.smallest).set_index("method") for name in ends]
    changes = []
    for method in [*FIRST, *(m for m in short.methods if m not in FIRST)]:
        if not (method in at[0].index and method in at[1].index):
            continue
        key = {"method": method, "damping": short.smallest}
        rows = [_rows(short, key | {"checkpoint": name}) for name in ends]
        values = [number(float(part["ratio"][method])) for part in at]
        times, low, high = paired(rows[1], rows[0])
        sure = low > 1 or high < 1
        change = f"× {with_interval(times, low, high)}" if sure else "no change that can be told"
        changes.append((abs(math.log(times)) if sure else 0.0, method, values, change))
    # The largest changes, in the order in which methods are named everywhere.
    largest = sorted(changes, key=lambda entry: (entry[1] not in FIRST, -entry[0]))[:5]
    told = [
        f"{method_text(method)} from {first} to {last} ({change})"
        for _, method, (first, last), change in changes
        if any(method == entry[1] for entry in largest)
    ]
    if told:
        yield (
            f"From {labels[ends[0]]} to {labels[ends[1]]}, γ over SGD's goes at λ = "
            f"{damping_text(short.smallest)}: {'; '.join(told)}."
        )


def _ranges(short: Grades, label: str) -> Iterator[str]:
    """Over which λ a method is below SGD, by its interval."""
    last = short.at(short.checkpoints[-1])
    dampings = sorted(value for value in last["damping"].unique() if value > 0)
    if len(dampings) < 3:
        return
    free = free_of_damping(short)
    told: dict[str, list[str]] = {}
    for method in [*FIRST, *(m for m in short.methods if m not in FIRST)]:
        rows = last[(last["method"] == method) & (last["damping"] > 0)].sort_values("damping")
        if method in free or rows["high"].isna().all():
            continue
        told.setdefault(_range(rows, len(dampings)), []).append(method_text(method))
    if told:
        sentence = "; ".join(f"{listed(names)} {where}" for where, names in told.items())
        ends = f"{damping_text(dampings[0])} to {damping_text(dampings[-1])}"
        yield f"Below SGD at {label}, of the {len(dampings)} λ from {ends}: {sentence}."


def _range(rows: pd.DataFrame, count: int) -> str:
    below = (rows["high"] < 1).to_numpy()
    dampings = rows["damping"].to_numpy()
    places = np.flatnonzero(below)
    if not len(places):
        return "at none"
    if len(places) == count:
        return "at all"
    ends = [damping_text(float(dampings[place])) for place in (places[0], places[-1])]
    if len(places) < places[-1] - places[0] + 1:
        return f"at {len(places)} of them between {ends[0]} and {ends[1]}"
    if places[0] == 0:
        return f"up to {ends[1]}"
    if places[-1] == len(dampings) - 1:
        return f"from {ends[0]} on"
    return f"at {ends[0]}" if len(places) == 1 else f"from {ends[0]} to {ends[1]}"


def _at_an_end(short: Grades, label: str) -> Iterator[str]:
    """Methods for which a better λ may lie beyond those that were tried."""
    last = short.checkpoints[-1]
    dampings = [value for value in short.dampings if value > 0]
    if len(dampings) < 3:
        return
    best = at_best(short)
    best = best[(best["checkpoint"] == last) & ~best["method"].isin({"ng", "sgd"})]
    best = best[~best["method"].isin(free_of_damping(short))]
    # 0 is the end of all dampings: nothing lies below it.
    ends = {dampings[-1]: "largest"} | ({} if 0 in short.dampings else {dampings[0]: "smallest"})
    told = [
        f"{listed([method_text(name) for name in names])} (the {which}, {damping_text(value)})"
        for value, which in ends.items()
        if (names := best.loc[best["damping"] == value, "method"].tolist())
    ]
    if told:
        yield (
            f"At {label} the best λ lies at an end of the range for {'; '.join(told)}: a better "
            "one may lie beyond."
        )


def _imbalance(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """Largest over smallest gradient norm, at the first and the last checkpoint."""
    means = imbalance_means(samples)
    if means.empty:
        yield "Every batch has a sample with no gradient, so the imbalance of norms is infinite."
        return
    told = [
        f"{number(row['mean'])} {interval_text(row['low'], row['high'])}".rstrip()
        + f" × the smallest at {labels[row['checkpoint']]}"
        for row in means.iloc[[0, -1] if len(means) > 1 else [0]].to_dict("records")
    ]
    over = _count(int(means["count"].min()), int(means["count"].max()), "batch", "batches")
    sentence = " and ".join(told)
    yield f"The largest per-sample gradient norm of a batch is {sentence} (means over {over})."
    lost = int((~np.isfinite(imbalances(samples)["imbalance"])).sum())
    if lost:
        holders = "One batch holds" if lost == 1 else f"{lost} batches hold"
        yield f"{holders} a sample without a gradient, whose imbalance is not counted."


def _together(short: Grades, samples: pd.DataFrame) -> Iterator[str]:
    """Whether EF's ratio goes with the imbalance, over checkpoints."""
    means = imbalance_means(samples).rename(columns={"mean": "imbalance"})
    ef = short.summary[
        (short.summary["method"] == "ef") & (short.summary["damping"] == short.smallest)
    ]
    both = ef[["checkpoint", "ratio"]].merge(means[["checkpoint", "imbalance"]])
    if len(both) < FEW:
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


def _bounds(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    """How far down γ can go."""
    last = short.stages.to_dict("records")[-1]
    least, floor, label = last["least"], last["floor"], labels[last["checkpoint"]]
    if math.isnan(floor):
        return
    if math.isnan(least):
        yield f"No update can be below the floor, {number(floor)} × SGD at {label}."
        return
    sentence = f"No update can be below γ_min, {number(least)} × SGD at {label}"
    gap = least / floor
    if gap < 1.005:
        yield f"{sentence}, which is the closed-form floor to within 0.5 %."
    else:
        yield f"{sentence}, {number(gap)} × the closed-form floor."


def _layers(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[str]:
    """The layer of each update that spends most above what it buys."""
    if (table["status"] == "failed").all():
        yield "No layer could be graded."
        return
    summary = summarize_layers(table)
    last = summary[summary["checkpoint"] == summary["checkpoint"].iloc[-1]]
    last = last[last["damping"] == last["damping"].min()]
    ordered = last.loc[last.groupby("method", sort=False)["excess"].idxmax()]
    told = [
        f"{method_text(row['method'])} in layer {row['layer']} ({_percent(row['curvature_share'])} "
        f"of its KL for {_percent(row['decrease_share'])} of the loss it buys)"
        for row in ordered.nlargest(3, "excess").to_dict("records")
        if row["excess"] > 0.005
    ]
    if told:
        where = (
            f"{labels[str(last['checkpoint'].iloc[0])]}, λ = {damping_text(last['damping'].min())}"
        )
        yield f"Updates lose most at {where}: {'; '.join(told)}."


def _training(rows: pd.DataFrame) -> Iterator[str]:
    """The optimizer with the best mean, and whether the next is told from it."""
    for task, table in performance(rows).groupby("task", sort=False):
        ranked = table[table["seeds"] > 0].sort_values("rank")
        if ranked.empty:
            yield f"On {task} no tuned training came to its end."
            continue
        metric, data = str(ranked["metric"].iloc[0]), str(ranked["data"].iloc[0])
        figure = f"{data} {metric.removeprefix('test_')}"
        best, *others = ranked.to_dict("records")
        seeds = _count(best["seeds"], best["seeds"], "seed", "seeds")
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


def _count(least: int, most: int, one: str, many: str) -> str:
    amount = f"{least}" if least == most else f"{least} to {most}"
    return f"{amount} {one if most == 1 else many}"
