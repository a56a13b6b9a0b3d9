"""What the numbers say, in sentences; nothing is said that an interval does not carry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ngeval.report.checked_rows import GAMMAS, LAYERS, SAMPLES, TRAINING
from ngeval.report.other_findings import (
    FEW,
    imbalance_findings,
    imbalance_with_ef,
    layer_findings,
    training_findings,
)
from ngeval.report.sources import Topic
from ngeval.report.summaries import (
    Grades,
    at_best,
    free_of_damping,
    grades,
    paired,
)
from ngeval.report.wording import (
    above_one,
    below_one,
    counted,
    damping_text,
    interval_text,
    listed,
    method_text,
    number,
    value_text,
    with_interval,
)

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
            found += [*imbalance_findings(samples, labels), *imbalance_with_ef(short, samples)]
        found += list(_bounds(short, labels)) if short else []
    elif SAMPLES in topic.tables:
        found += list(imbalance_findings(topic.tables[SAMPLES], labels))
    if LAYERS in topic.tables:
        found += list(layer_findings(topic.tables[LAYERS], labels))
    if TRAINING in topic.tables:
        found += list(training_findings(topic.tables[TRAINING]))
    return found


def _gammas(short: Grades, labels: dict[str, str]) -> Iterator[str]:
    last = short.checkpoints[-1]
    damping = short.smallest
    part = short.at(last, damping)
    part = part[part["method"] != "sgd"]
    if not part.empty:
        where = f"λ = {damping_text(damping)} and {labels[last]}"
        yield _headline(part, where)
        yield from _verdicts(part, where)
    yield from _caution(short, last)
    yield from _nearest(short, labels[last])
    yield from _over_training(short, labels)
    yield from _ranges(short, labels[last])
    yield from _at_an_end(short, labels[last])


def _headline(part: pd.DataFrame, where: str) -> str:
    """Each method's γ over SGD's."""
    known = [part[part["method"] == name] for name in FIRST]
    ordered = pd.concat([*known, part[~part["method"].isin(FIRST)].sort_values("ratio")])
    told = []
    for index, row in enumerate(ordered.head(SHOWN).to_dict("records")):
        ends = (row["low"], row["high"])
        is_, sgd = ("", "") if index else ("is ", "SGD ")
        value = f"{value_text(row['ratio'], *ends)} × {sgd}{interval_text(*ends)}".rstrip()
        told.append(f"{method_text(row['method'])} {is_}{value}")
    rest = len(ordered) - SHOWN
    more = f"; {rest} more in the table" if rest > 0 else ""
    batches = part["batches"]
    over = counted(int(batches.min()), int(batches.max()), "batch", "batches")
    means = f"geometric mean over {over}, 95 % bootstrap interval" if batches.max() > 1 else over
    return f"At {where}, {listed(told)} (γ over SGD's, {means}; smaller is better{more})."


def _verdicts(part: pd.DataFrame, where: str) -> Iterator[str]:
    """Nearer, farther, or neither: only where the interval excludes 1."""
    if part["low"].isna().all():
        yield "There is one batch, so no interval, and which of these differ from SGD is not told."
        return
    groups = {
        "nearer to the natural gradient than SGD": below_one(part["high"]),
        "farther from it than SGD": above_one(part["low"]),
    }
    groups["cannot be told from SGD with these batches"] = part["low"].notna() & ~(
        below_one(part["high"]) | above_one(part["low"])
    )
    groups["not told, for one batch has no interval"] = part["low"].isna()
    told = [
        f"{what}: {listed([method_text(name) for name in part.loc[chosen, 'method']])}"
        for what, chosen in groups.items()
        if chosen.any()
    ]
    sentence = "; ".join(told)
    yield f"At {where}, {sentence}."


def _caution(short: Grades, checkpoint: str) -> Iterator[str]:
    """Which intervals rest on few batches: all of them, or whose and where."""
    summary = short.summary[short.summary["method"] != "sgd"]
    known = summary[summary["batches"] > 1]
    few = known[known["batches"] < FEW]
    if few.empty:
        return
    batches = counted(int(few["batches"].min()), int(few["batches"].max()), "batch", "batches")
    whose = "intervals"
    if len(few) < len(known):
        names = list(dict.fromkeys(few["method"]))
        shown = [method_text(name) for name in names[:SHOWN]]
        rest = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
        everywhere = known["method"].isin(names) & (known["batches"] >= FEW)
        where = "" if not everywhere.any() else " at some checkpoints and λ"
        if where and (few["checkpoint"] == checkpoint).all():
            where = " at the last checkpoint"
        whose = f"intervals of {listed([*shown, *rest])}{where}"
    yield (
        f"Caution: {whose} over {batches} are too narrow, and say little more than the range of "
        f"the batches; grade {FEW} or more."
    )


def _nearest(short: Grades, label: str) -> Iterator[str]:
    """Which method comes nearest to γ_min, at its best λ, and whether the second is told from it.

    The least γ is the natural gradient's own, so that is left out, which the sentence says.
    """
    best = at_best(short)
    last = best[(best["checkpoint"] == short.checkpoints[-1]) & best["best"].notna()]
    natural = last["method"] == "ng"
    last = last[~natural].sort_values("best")
    if len(last) < 2:
        return
    first, second = last.to_dict("records")[:2]
    free = free_of_damping(short)
    but = f", {method_text('ng')} left out" if natural.any() else ""
    sentence = (
        f"Nearest to the least γ there is at {label}{but}: {_at(first, free)} with "
        f"{with_interval(first['best'], first['best_low'], first['best_high'])} × γ_min"
    )
    at = "each method at the λ that is best for these batches"
    ratio, low, high = paired(_rows(short, second), _rows(short, first))
    if math.isnan(low):
        yield f"{sentence} ({at})."
        return
    relation = "The next is" if above_one(low) else "It cannot be told from"
    yield (
        f"{sentence}. {relation} {_at(second, free)}, whose γ is {with_interval(ratio, low, high)} "
        f"× {method_text(first['method'])}'s, batch by batch ({at})."
    )


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
        sure = above_one(low) or below_one(high)
        change = "no change that can be told" if not math.isnan(low) else "without an interval"
        change = f"× {with_interval(times, low, high)}" if sure else change
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
    """Over which λ a method is below SGD by its interval; if at none, at how many by its mean."""
    last = short.at(short.checkpoints[-1])
    dampings = sorted(value for value in last["damping"].unique() if value > 0)
    if len(dampings) < 3:
        return
    free = free_of_damping(short)
    told: dict[tuple[str, int], list[str]] = {}
    for method in [*FIRST, *(m for m in short.methods if m not in FIRST)]:
        rows = last[(last["method"] == method) & (last["damping"] > 0)].sort_values("damping")
        rows = rows[rows["high"].notna()]
        if method in free or rows.empty:
            continue
        means = 0 if below_one(rows["high"]).any() else int(below_one(rows["ratio"]).sum())
        place = (_range(rows, len(dampings)), means)
        told.setdefault(place, []).append(method_text(method))
    if told:
        sentence = "; ".join(
            f"{listed(names)} {where}{_by_mean(len(names), means)}"
            for (where, means), names in told.items()
        )
        ends = f"{damping_text(dampings[0])} to {damping_text(dampings[-1])}"
        yield (
            f"Surely below SGD (95 % interval below 1) at {label}, of the {len(dampings)} λ from "
            f"{ends}: {sentence}."
        )


def _range(rows: pd.DataFrame, count: int) -> str:
    """Where the interval is below 1, of the λ that the method has one for."""
    own = "" if len(rows) == count else f" of the {len(rows)} that it has an interval for"
    where = _places(rows["damping"].tolist(), np.flatnonzero(below_one(rows["high"])))
    return f"{where}{own}"


def _by_mean(methods: int, means: int) -> str:
    """At how many λ the mean alone is below 1, of one or of several methods."""
    if not means:
        return ""
    return f", its mean at {means}" if methods == 1 else f", their means at {means} each"


def _places(dampings: Sequence[float], places: np.ndarray) -> str:
    if not len(places):
        return "at none"
    if len(places) == len(dampings):
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
