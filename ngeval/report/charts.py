"""The charts of a report: γ over training and damping, rankings, norms, layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.layer_summary import leading_layers, with_rest
from ngeval.analysis.norms import are_norms, imbalance_means
from ngeval.analysis.stages import in_order, three_stages
from ngeval.report import colours
from ngeval.report.colours import Look, looks_of
from ngeval.report.summaries import Grades, layer_means
from ngeval.report.traces import Chart, Line, Trace, dots, log_axis, reference, rounded, stage_axis
from ngeval.report.wording import chart_text, damping_text, with_interval

RATIO = "γ / γ<sub>SGD</sub>"
BEST = "γ / γ<sub>min</sub>"
MAX_OPTIONS = 400
"""Updates to choose from; of more, those of three checkpoints are shown."""

MAX_BANDS = 8
"""Methods whose intervals are drawn; those of more would hide the lines, and are shown on hover."""

MAX_LAYERS = 16
"""Bars of an update; the last one is the rest."""

SGD = Look(colours.INK)
FLOOR = Look(colours.GREY, "dash")
NATURAL = Look(colours.NATURAL, symbol="diamond")


def gamma_charts(short: Grades, labels: dict[str, str]) -> Iterator[Chart]:
    """γ/γ_SGD over stages and over λ, and the ranking, unless there is nothing to show."""
    looks = looks_of(short.summary)
    if len(short.checkpoints) > 1:
        yield _stages(short, labels, looks)
    if sum(value > 0 for value in short.dampings) > 1:
        yield _dampings(short, labels, looks)
    if len(short.methods) > 1:
        yield _ranking(short, labels, looks)


def _stages(short: Grades, labels: dict[str, str], looks: dict[str, Look]) -> Chart:
    x, axis = stage_axis(short.rows, short.checkpoints, labels)
    place = dict(zip(short.checkpoints, x, strict=True))
    parts = [("the best of each method", short.best)]
    parts += [
        (damping_text(value), short.summary[short.summary["damping"] == value])
        for value in short.dampings
    ]
    lines = [
        *reference("sgd", x, [1.0] * len(x), SGD, RATIO),
        *reference("floor", x, short.stages["floor"].tolist(), FLOOR, RATIO),
    ]
    options = []
    for label, part in parts:
        traces: list[Trace] = []
        for method, rows in _by_method(part, short.methods):
            where = [place[name] for name in rows["checkpoint"]]
            band = len(short.methods) <= MAX_BANDS
            traces += _mean_line(method, looks[method], where, rows, labels, band=band)
        options.append((label, traces + lines))
    return Chart(
        "γ over training",
        "γ over SGD's, geometric mean over batches with its 95 % bootstrap interval; below 1 is "
        "nearer to the natural gradient than SGD. No update is below the floor.",
        "damping λ",
        options,
        {"xaxis": axis, "yaxis": log_axis(RATIO)},
        ("method", "checkpoint", "γ/γ_SGD"),
        1 + short.dampings.index(short.smallest),
    )


def _by_method(part: pd.DataFrame, methods: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each method that has any."""
    groups = {str(name): rows for name, rows in part.groupby("method", sort=False)}
    return ((name, groups[name]) for name in methods if name in groups)


def _mean_line(
    name: str,
    look: Look,
    x: Sequence[Any],
    rows: pd.DataFrame,
    labels: dict[str, str],
    title: str = RATIO,
    *,
    markers: bool = True,
    band: bool = True,
) -> list[Trace]:
    """Means over batches, with checkpoint, λ, value and interval on hover."""
    at = [chart_text(labels[name]) for name in rows["checkpoint"]]
    if "damping" in rows:
        at = [f"{p}, λ = {damping_text(v)}" for p, v in zip(at, rows["damping"], strict=True)]
    hover = (
        "%{fullData.name}<br>%{customdata[2]}<br>"
        f"{title} = %{{customdata[3]}}<br>batches: %{{customdata[4]}}<extra></extra>"
    )
    values = rows[["ratio", "low", "high"]].to_numpy(dtype=float)
    shown = [with_interval(*row) for row in values]
    extra = (at, shown, [int(count) for count in rows["batches"]])
    ratio, low, high = values.T.tolist()
    line = Line(name, look, x, ratio, low, high, hover, extra, markers, band)
    return list(line.traces())


def _dampings(short: Grades, labels: dict[str, str], looks: dict[str, Look]) -> Chart:
    ends = rounded([short.smallest, short.dampings[-1]])
    floors = short.stages.set_index("checkpoint")["floor"]
    natural = {str(name): part for name, part in short.natural.groupby("checkpoint", sort=False)}
    options = []
    for checkpoint in short.checkpoints:
        part = short.at(checkpoint)
        part = part[part["damping"] > 0].sort_values("damping")
        traces: list[Trace] = []
        for method, rows in _by_method(part, short.methods):
            where, few = rounded(rows["damping"]), len(rows) < 8
            band = len(short.methods) <= MAX_BANDS
            traces += _mean_line(method, looks[method], where, rows, labels, markers=few, band=band)
        if "ng" not in short.methods and checkpoint in natural:
            exact = natural[checkpoint]
            exact = exact[exact["damping"] > 0].sort_values("damping")
            where, ratios = rounded(exact["damping"]), exact["ratio"].tolist()
            traces += reference("exact NG", where, ratios, NATURAL, RATIO)
        traces += [
            *reference("sgd", ends, [1.0, 1.0], SGD, RATIO),
            *reference("floor", ends, [float(floors[checkpoint])] * 2, FLOOR, RATIO),
        ]
        options.append((labels[checkpoint], traces))
    scale = short.rows["damping_scale"].iloc[0] if "damping_scale" in short.rows else "absolute"
    return Chart(
        "γ over damping",
        "γ over SGD's at every λ, with the exact natural gradient's and the floor.",
        "checkpoint",
        options,
        {"xaxis": log_axis(f"damping λ ({chart_text(str(scale))})"), "yaxis": log_axis(RATIO)},
        ("method", "λ", "γ/γ_SGD"),
        len(options) - 1,
    )


def _ranking(short: Grades, labels: dict[str, str], looks: dict[str, Look]) -> Chart:
    natural = bool(short.summary["best"].notna().any())
    value = ["best", "best_low", "best_high"] if natural else ["ratio", "low", "high"]
    title, plain = (BEST, "γ/γ_min") if natural else (RATIO, "γ/γ_SGD")
    options = []
    for checkpoint in short.checkpoints:
        rows = short.best[short.best["checkpoint"] == checkpoint]
        rows = rows[rows[value[0]].notna()]
        rows = rows.sort_values(value[0], ascending=False, kind="stable")
        names = [str(name) for name in rows["method"]]
        notes = [f"{labels[checkpoint]}, λ = {damping_text(value)}" for value in rows["damping"]]
        pairs = [looks[name].colours for name in names]
        options.append((labels[checkpoint], [dots(names, rows[value], notes, pairs, title)]))
    meaning = "γ over the least possible, 1 is the natural gradient itself" if natural else plain
    return Chart(
        "Ranking",
        f"Each method at its best λ, chosen on the same batches: {meaning}; geometric mean over "
        "batches with its 95 % bootstrap interval.",
        "checkpoint",
        options,
        {"xaxis": log_axis(title), "yaxis": {"automargin": True}, "showlegend": False},
        ("method", "at", plain),
        len(options) - 1,
        True,
    )


def sample_charts(samples: pd.DataFrame, labels: dict[str, str]) -> Iterator[Chart]:
    """Gradient norms and their imbalance over training."""
    samples = in_order(samples)
    samples = samples[are_norms(samples)]
    if samples.empty:
        return
    names = [str(name) for name in samples["checkpoint"].unique()]
    x, axis = stage_axis(samples, names, labels)
    yield _norms(samples, x, [chart_text(labels[name]) for name in names], axis)
    means = imbalance_means(samples)
    if means.empty:
        return
    place = dict(zip(names, x, strict=True))
    where = [place[name] for name in means["checkpoint"]]
    means = means.rename(columns={"mean": "ratio", "count": "batches"})
    traces = _mean_line("max/min", NATURAL, where, means, labels, "max/min")
    yield Chart(
        "Imbalance of gradient norms",
        "Largest over smallest per-sample gradient norm of a batch: geometric mean over batches "
        "with its 95 % bootstrap interval.",
        "",
        [("", traces)],
        {"xaxis": axis, "yaxis": log_axis("max ‖g‖ / min ‖g‖"), "showlegend": False},
        ("series", "checkpoint", "max/min"),
    )


def _norms(
    samples: pd.DataFrame, x: Sequence[Any], labels: Sequence[str], axis: dict[str, Any]
) -> Chart:
    """Quantiles over all samples as nested bands with the median."""
    norms = samples.groupby("checkpoint", sort=False)["gradient_norm"]
    quantiles = norms.quantile(np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])).unstack()
    hover = "%{customdata[2]}<br>%{fullData.name}: %{y:.3~g}<extra></extra>"
    traces: list[Trace] = []
    for name, low, high in (("", 0.0, 1.0), ("", 0.05, 0.95), ("median", 0.25, 0.75)):
        value = quantiles[0.5 if name else low].tolist()
        ends = (quantiles[low].tolist(), quantiles[high].tolist())
        line = Line(name, Look(colours.BAND), x, value, *ends, hover, (labels,))
        middle, *band = line.traces()
        traces += [middle, *band] if name else band
    for name, level in (("largest", 1.0), ("95 %", 0.95), ("5 %", 0.05), ("smallest", 0.0)):
        look = Look(colours.BAND, "dot" if level in (0.0, 1.0) else "dash")
        ends = ([float("nan")] * len(x),) * 2
        line = Line(name, look, x, quantiles[level].tolist(), *ends, hover, (labels,), False)
        traces += line.traces()
    return Chart(
        "Per-sample gradient norms",
        "‖g_n‖ over the samples of all batches: the median, the middle half (darkest), the middle "
        "90 % and all of them.",
        "",
        [("", traces)],
        {"xaxis": axis, "yaxis": log_axis("‖g‖ (nats)"), "showlegend": False},
        ("series", "checkpoint", "‖g‖"),
    )


def layer_charts(table: pd.DataFrame, labels: dict[str, str]) -> Iterator[Chart]:
    """The loss that each layer of an update buys and the KL that it spends."""
    summary = layer_means(table)
    if summary is None:
        return
    keys = summary[["checkpoint", "method", "damping"]].drop_duplicates().to_numpy().tolist()
    if len(keys) > MAX_OPTIONS:
        stages = three_stages(summary)
        keys = [key for key in keys if key[0] in stages][:MAX_OPTIONS]
    parts = dict(list(summary.groupby(["checkpoint", "method", "damping"])))
    leading = leading_layers(summary, MAX_LAYERS)
    options = []
    for checkpoint, method, damping in keys:
        shown = with_rest(parts[checkpoint, method, damping], leading)[::-1]
        label = f"{method}, λ = {damping_text(damping)}, {labels[checkpoint]}"
        options.append((label, list(_bars(shown))))
    yield Chart(
        "Layers",
        "Shares of the loss that each layer's part of the update buys and of the KL that it "
        "spends (means over batches); a layer that spends more than it buys raises γ.",
        "update",
        options,
        {
            "barmode": "group",
            "xaxis": {"title": {"text": "share of the whole update"}, "tickformat": ".0%"},
            "yaxis": {"automargin": True},
        },
        ("series", "layer", "share"),
        next(place for place, key in enumerate(keys) if key[0] == keys[-1][0]),
        True,
    )


def _bars(rows: pd.DataFrame) -> Iterator[Trace]:
    names = [chart_text(str(name)) for name in rows["layer"]]
    for name, column, pair in (
        ("spends", "curvature_share", colours.SPENDS),  # from the bottom up
        ("buys", "decrease_share", colours.BUYS),
    ):
        yield {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": rounded(rows[column]),
            "y": list(range(len(names))),
            "text": names,
            "textposition": "none",
            "hovertemplate": "%{text} %{fullData.name} %{x:.1%}<extra></extra>",
            "meta": {"colours": list(pair)},
        }
