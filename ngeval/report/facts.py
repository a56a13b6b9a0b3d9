"""What was measured and how, and what could not be: facts of a report that are not numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ngeval.analysis.stages import checkpoint_labels
from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES
from ngeval.report.sources import Source, Topic
from ngeval.report.wording import damping_text, first_of, listed, plain
from ngeval.utils.text import describe_bytes

SCALES = {
    "absolute": "absolute: λ is added to the sum-reduced curvature",
    "mean": "mean: λ is for a mean-reduced loss and Fisher, λ_abs = Nλ",
    "relative": "relative: λ times the largest eigenvalue of each method's own curvature",
}
LIKELIHOODS = {
    "categorical": "softmax cross-entropy, in nats",
    "gaussian": "squared error over 2σ²; σ² is 1, or the number that is named",
    "bernoulli": "binary cross-entropy on logits, in nats",
    "poisson": "Poisson loss of counts, in nats",
    "gaussian-nll": "negative log-likelihood of a Gaussian with its variance as an output, in nats",
    "mse": "squared error, the mean over a sample's outputs",
}

NOT_RECORDED = "not recorded"

MODELS_DTYPE = {"the model's": "unchanged (--dtype was not given)"}
"""Dtypes in a manifest that are not names of types."""

MAX_NAMES = 12
"""Names in a list; further ones are counted."""

MAX_CHARACTERS = 2_000
"""Of a manifest's entry."""

MAX_MEMORY = 2**60
"""Bytes of memory that no machine has."""


@dataclass(frozen=True)
class Trouble:
    """Rows of a task with the same status and reason: how many, and of which methods, λ, …."""

    task: str
    status: str
    reason: str
    count: int
    where: list[tuple[str, str]]


def facts(topic: Topic) -> list[tuple[str, str]]:
    """What was measured on a task, and how, as pairs of a name and its value."""
    tables = [topic.tables[kind] for kind in (GAMMAS, LAYERS, SAMPLES) if kind in topic.tables]
    files = listed([source.shown for source in topic.sources])
    labels = list(checkpoint_labels(*tables).values())
    shown = labels if len(labels) <= 3 else [labels[0], "…", labels[-1]]
    checkpoints = f"{len(labels)}: {', '.join(shown)}"
    pairs = [("files", files), ("checkpoints", checkpoints), *_batches(tables, topic)]
    for kind, name in ((GAMMAS, "methods"), (LAYERS, "layers of")):
        if kind in topic.tables:
            scales = _recorded(topic, "damping_scale", kind)
            pairs += _methods(topic.tables[kind], name, scales)
    return pairs + _settings(tables, topic)


def _batches(tables: Sequence[pd.DataFrame], topic: Topic) -> list[tuple[str, str]]:
    first = tables[0]
    batches = first.groupby("checkpoint")["batch"].nunique()
    sizes = _values(tables, "num_samples")
    if not sizes and "sample" in first:
        sizes = [str(first.groupby(["checkpoint", "batch"]).size().max())]
    sizes = sizes or _recorded(topic, "batch_size")
    size = f"N = {', '.join(sizes)} samples each" if sizes else f"N {NOT_RECORDED}"
    pairs = [("batches", f"{batches.max()} for each checkpoint, {size}")]
    metric = _values(tables, "metric_samples")
    if metric and metric != sizes:
        pairs.append(("graded by", f"the Fisher and gradient of {', '.join(metric)} samples"))
    return pairs


def _methods(table: pd.DataFrame, name: str, scales: Sequence[str]) -> list[tuple[str, str]]:
    methods = [str(name) for name in table["method"].unique()]
    dampings = sorted(table["damping"].dropna().unique())
    shown = ", ".join(damping_text(value) for value in dampings)
    if len(dampings) > 6:
        zero = "0 and " if 0 in dampings else ""
        others = [value for value in dampings if value != 0]
        ends = f"{damping_text(others[0])} to {damping_text(others[-1])}"
        shown = f"{zero}{len(others)} values from {ends}"
    scales = _values([table], "damping_scale") or scales
    meaning = "; ".join(SCALES.get(value, value) for value in scales) or f"scale {NOT_RECORDED}"
    return [(name, ", ".join(methods)), ("damping λ", f"{shown} ({meaning})")]


def _settings(tables: Sequence[pd.DataFrame], topic: Topic) -> list[tuple[str, str]]:
    # The layers' numbers of parameters are not the model's.
    whole = [table for table in tables if "layer" not in table] or list(tables)
    likelihoods = _values(tables, "likelihood") or _recorded(topic, "likelihood")
    pairs = [("likelihood", "; ".join(map(_likelihood, likelihoods)) or NOT_RECORDED)]
    for label, column in (
        ("parameters", "num_parameters"),
        ("model's dtype", "dtype"),
        ("Jacobian engine", "engine"),
        ("seed", "seed"),
    ):
        values = _values(whole, column)
        if column == "num_parameters":
            values = [f"{float(value):,.0f}" for value in values]
        if column == "seed" and len(values) > 1 and _are_consecutive(values):
            values = [f"{values[0]} (batch b draws its labels with seed {values[0]} + b)"]
        values = values or [MODELS_DTYPE.get(value, value) for value in _recorded(topic, column)]
        pairs.append((label, _some(values) or NOT_RECORDED))
    return pairs


def _likelihood(text: str) -> str:
    """``gaussian:0.5`` of a table or ``Gaussian(variance=0.5)`` of a manifest, with its meaning."""
    meaning = LIKELIHOODS.get(re.split("[:(]", text)[0].lower())
    return f"{text} ({meaning})" if meaning else text


def _recorded(topic: Topic, name: str, kind: str | None = None) -> list[str]:
    """The values of a setting in the manifests of all files, or of those of one kind."""
    values = [
        _text(_options(source.manifest).get(name))
        for source in topic.sources
        if source.manifest is not None and kind in (None, source.kind)
    ]
    return [value for value in dict.fromkeys(values) if value]


def _are_consecutive(seeds: Sequence[str]) -> bool:
    """Whether seeds follow each other, as those of a run's batches do."""
    first = int(seeds[0]) if seeds[0].removeprefix("-").isdecimal() else None
    return first is not None and seeds == [str(first + i) for i in range(len(seeds))]


def run_facts(source: Source) -> list[tuple[str, str]]:
    """The contents of a file's manifest; empty if there is none."""
    manifest = source.manifest
    if manifest is None:
        return []
    versions = _mapping(manifest, "versions")
    settings = _options(manifest).items()
    return [
        ("command", _text(manifest.get("command", NOT_RECORDED))),
        ("created", _text(manifest.get("created", NOT_RECORDED))),
        ("versions", ", ".join(f"{k} {_text(v)}" for k, v in versions.items()) or NOT_RECORDED),
        ("machine", _machine(_mapping(manifest, "machine")) or NOT_RECORDED),
        *((name.replace("_", " "), text) for name, value in settings if (text := _text(value))),
    ]


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    parts = [_text(machine.get("cpu"))]
    parts += [f"{_text(machine[name])} {name}" for name in ("cores", "threads") if name in machine]
    memory = machine.get("memory")
    if isinstance(memory, int) and 0 < memory < MAX_MEMORY:
        parts.append(describe_bytes(memory))
    parts += [_text(machine.get("gpus") or "no GPU"), _text(machine.get("platform"))]
    return ", ".join(part for part in parts if part)


def troubles(topic: Topic) -> list[Trouble]:
    """Rows that could not be computed, and remarks on those that could, by reason."""
    result = []
    for table in topic.tables.values():
        for (status, reason), rows in table.groupby(["status", "reason"], sort=False):
            shown = str(reason) or "no reason is recorded"
            if status != "ok":
                result.append(Trouble(topic.name, str(status), shown, len(rows), _where(rows)))
        for note, rows in table[table["note"] != ""].groupby("note", sort=False):
            result.append(Trouble(topic.name, "ok", str(note), len(rows), _where(rows)))
    return sorted(result, key=lambda entry: (entry.status == "ok", -entry.count))


def _where(rows: pd.DataFrame) -> list[tuple[str, str]]:
    pairs = []
    for name, column in (("methods", "method"), ("layers", "layer")):
        if column in rows:
            pairs.append((name, _some([str(value) for value in rows[column].unique()])))
    if "damping" in rows and rows["damping"].notna().any():
        values = sorted(rows["damping"].dropna().unique())
        pairs.append(("λ", _some([damping_text(value) for value in values])))
    if "checkpoint" in rows:
        pairs.append(("checkpoints", _some(list(checkpoint_labels(rows).values()))))
    return pairs


def _some(values: Sequence[str]) -> str:
    return ", ".join(first_of(values, MAX_NAMES))


def _values(tables: Iterable[pd.DataFrame], column: str) -> list[str]:
    """The different values of a column, as text."""
    columns = [table[column].dropna().unique() for table in tables if column in table]
    values = [plain(value) for different in columns for value in different]
    return [value for value in dict.fromkeys(values) if value]


def _options(manifest: dict[str, Any]) -> dict[str, Any]:
    """The options of a command, and what they resulted in."""
    return _mapping(manifest, "options") | _mapping(manifest, "run")


def _mapping(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a manifest, which may hold anything."""
    value = manifest.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return _some([_text(entry) for entry in value])
    try:
        text = "" if value is None else str(value)
    except RecursionError:
        return "(nested too deeply to be shown)"
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
