"""What was measured and how, and what could not be: facts of a report that are no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ngeval.report.checked_rows import GAMMAS, LAYERS, SAMPLES, TRAINING
from ngeval.report.sources import Source, Topic
from ngeval.report.wording import checkpoint_labels, damping_text, listed, shortened
from ngeval.utils.memory import describe_bytes

SCALES = {
    "absolute": "absolute: λ is added to the sum-reduced curvature",
    "mean": "mean: λ is for a mean-reduced loss and Fisher, λ_abs = Nλ",
    "relative": "relative: λ times the largest eigenvalue of each method's own curvature",
}
LIKELIHOODS = {
    "categorical": "softmax cross-entropy, in nats",
    "gaussian": "squared error over 2σ²; the number behind the colon is σ²",
    "bernoulli": "binary cross-entropy on logits, in nats",
}
CONVENTIONS = (
    (
        "γ(d)",
        "√(dᵀFd) / |dᵀg|: the root of the KL that a step along d spends, over the loss that "
        "it buys; smaller is better, and the scale of d cancels",
    ),
    ("γ_min", "the least γ of any update, (gᵀF⁺g)^(−1/2): that of the natural gradient"),
    ("sums", "losses, gradients and Fisher are sums over the batch; the model runs in eval mode"),
    (
        "intervals",
        "geometric means over batches with 95 % percentile bootstrap intervals (2,000 "
        "resamples), as ngeval.summarize has them",
    ),
)
"""What holds for every γ table."""

NOT_RECORDED = "not recorded"
GRADED = (GAMMAS, LAYERS, SAMPLES)
"""Kinds of tables whose rows are of checkpoints and batches."""

OWN = {"the model's": "its own (no other was asked for)"}
"""What a manifest says of a model's dtype, behind that name."""

MANY = 12
"""Names in a list before the rest is counted."""

LONG = 2_000
"""Characters of a manifest's entry that are shown."""

MOST_MEMORY = 2**60
"""Bytes of memory that no machine has."""


@dataclass(frozen=True)
class Trouble:
    """Rows with the same reason.

    Attributes:
        task: theirs.
        status: of them, as ``failed``, or ``ok`` for remarks.
        reason: why, as the row says.
        count: of rows.
        where: which methods, λ and checkpoints.
    """

    task: str
    status: str
    reason: str
    count: int
    where: list[tuple[str, str]]


def facts(topic: Topic) -> list[tuple[str, str]]:
    """What was measured on a task, and how, as pairs of a name and its value."""
    graded = [topic.tables[kind] for kind in GRADED if kind in topic.tables]
    told: list[tuple[str, str]] = [("files", listed([source.shown for source in topic.sources]))]
    if graded:
        told += _checkpoints(graded)
        told += _batches(graded, topic)
    for kind in (GAMMAS, LAYERS):
        if kind in topic.tables:
            name = "methods" if kind == GAMMAS else "layers of"
            told += _methods(topic.tables[kind], name, _told(topic, "damping_scale", kind))
    if graded:
        told += _settings(graded, topic)
    if TRAINING in topic.tables:
        told += _trainings(topic.tables[TRAINING])
    return told


def _checkpoints(tables: Sequence[pd.DataFrame]) -> list[tuple[str, str]]:
    labels = list(checkpoint_labels(tables).values())
    count = len(labels)
    shown = labels if count <= 3 else [labels[0], "…", labels[-1]]
    return [("checkpoints", f"{count}: {', '.join(shown)}")]


def _batches(tables: Sequence[pd.DataFrame], topic: Topic) -> list[tuple[str, str]]:
    first = tables[0]
    batches = first.groupby("checkpoint")["batch"].nunique()
    sizes = _values(tables, "num_samples")
    if not sizes and "sample" in first:
        sizes = [str(first.groupby(["checkpoint", "batch"]).size().max())]
    sizes = sizes or _told(topic, "batch_size")
    size = f"N = {', '.join(sizes)} samples each" if sizes else f"N {NOT_RECORDED}"
    told = [("batches", f"{batches.max()} for each checkpoint, {size}")]
    metric = _values(tables, "metric_samples")
    if metric and metric != sizes:
        told.append(("graded by", f"the Fisher and gradient of {', '.join(metric)} samples"))
    return told


def _methods(table: pd.DataFrame, name: str, scales: Sequence[str]) -> list[tuple[str, str]]:
    methods = [str(name) for name in table["method"].unique()]
    dampings = sorted(table["damping"].dropna().unique())
    shown = ", ".join(damping_text(value) for value in dampings)
    if len(dampings) > 6:
        zero = "0 and " if 0 in dampings else ""
        others = [value for value in dampings if value != 0]
        ends = f"{damping_text(others[0])} to {damping_text(others[-1])}"
        shown = f"{zero}{len(others)} values from {ends}"
    scale = _values([table], "damping_scale") or scales
    words = "; ".join(SCALES.get(value, value) for value in scale) or f"scale {NOT_RECORDED}"
    return [(name, ", ".join(methods)), ("damping λ", f"{shown} ({words})")]


def _settings(tables: Sequence[pd.DataFrame], topic: Topic) -> list[tuple[str, str]]:
    told = []
    likelihoods = _values(tables, "likelihood")
    words = [
        f"{name} ({LIKELIHOODS[name.partition(':')[0]]})"
        if name.partition(":")[0] in LIKELIHOODS
        else name
        for name in likelihoods
    ]
    words = words or [_likelihood(value) for value in _told(topic, "likelihood")]
    told.append(("likelihood", "; ".join(words) or NOT_RECORDED))
    for label, column in (
        ("parameters", "num_parameters"),
        ("model's dtype", "dtype"),
        ("Jacobian engine", "engine"),
        ("seed", "seed"),
    ):
        source = [table for table in tables if "layer" not in table] or list(tables)
        values = _values(source, column)
        if column == "num_parameters" and values:
            values = [f"{float(value):,.0f}" for value in values]
        if column == "seed" and len(values) > 1 and _run_of(values):
            values = [f"{values[0]} (batch b draws its labels with seed {values[0]} + b)"]
        values = values or [OWN.get(value, value) for value in _told(topic, column)]
        told.append((label, _some(values) or NOT_RECORDED))
    return told


def _told(topic: Topic, name: str, kind: str | None = None) -> list[str]:
    """What the manifests of graded files (of a kind) tell of a setting that no table has."""
    found: dict[str, None] = {}
    for source in topic.sources:
        if source.manifest is not None and source.kind in ((kind,) if kind else GRADED):
            settings = _mapping(source.manifest, "options") | _mapping(source.manifest, "run")
            found[_text(settings.get(name))] = None
    return [value for value in found if value]


def _likelihood(shown: str) -> str:
    """A likelihood as a manifest has it, ``Categorical(ignore_index=-100)``, with its meaning."""
    meaning = LIKELIHOODS.get(shown.partition("(")[0].lower(), "")
    return f"{shown}: {meaning.partition(';')[0]}" if meaning else shown


def _run_of(values: Sequence[str]) -> bool:
    """Whether seeds follow each other, as those of a run's batches do."""
    first = int(values[0]) if values[0].removeprefix("-").isdecimal() else None
    return first is not None and values == [str(first + i) for i in range(len(values))]


def _trainings(rows: pd.DataFrame) -> list[tuple[str, str]]:
    final = rows[rows["phase"] == "final"].drop_duplicates(["optimizer", "seed"])
    search = rows[rows["phase"] == "search"].drop_duplicates(["optimizer", "trial"])
    told = [("optimizers", _some([str(name) for name in rows["optimizer"].unique()]))]
    told.append(("trainings", f"{len(search)} of a search, {len(final)} with the tuned settings"))
    told.append(("chosen by", _some(_values([rows], "monitor"))))
    return told


def run_facts(source: Source) -> list[tuple[str, str]]:
    """What a manifest tells of a file's run; empty where there is none."""
    told = source.manifest
    if told is None:
        return []
    versions, machine = _mapping(told, "versions"), _mapping(told, "machine")
    found = [
        ("command", _text(told.get("command", NOT_RECORDED))),
        ("created", _text(told.get("created", NOT_RECORDED))),
        ("versions", ", ".join(f"{k} {_text(v)}" for k, v in versions.items()) or NOT_RECORDED),
        ("machine", _machine(machine) or NOT_RECORDED),
    ]
    run, options = _mapping(told, "run"), _mapping(told, "options")
    known = [(name, _text(value)) for name, value in (options | run).items()]
    return found + [(name.replace("_", " "), value) for name, value in known if value]


def _machine(told: dict[str, Any]) -> str:
    if not told:
        return ""
    parts = [_text(told.get("cpu"))]
    parts += [f"{_text(told[name])} {name}" for name in ("cores", "threads") if name in told]
    memory = told.get("memory")
    if isinstance(memory, int) and 0 < memory < MOST_MEMORY:
        parts.append(describe_bytes(memory))
    gpus = told.get("gpus") or ["no GPU"]
    parts += [_text(name) for name in (gpus if isinstance(gpus, list) else [gpus])]
    return ", ".join(part for part in [*parts, _text(told.get("platform"))] if part)


def troubles(topic: Topic) -> list[Trouble]:
    """Rows that could not be computed, and remarks on those that could, by reason."""
    found = []
    for table in topic.tables.values():
        if "status" not in table or "reason" not in table:
            continue
        reasons = table["reason"].astype(object).fillna("").astype(str)
        marked = table[(table["status"] != "ok") | (reasons != "")].assign(reason=reasons)
        for (status, reason), rows in marked.groupby(["status", "reason"], sort=False):
            shown = str(reason) or "no reason is told"
            found.append(Trouble(topic.name, str(status), shown, len(rows), _where(rows)))
    return sorted(found, key=lambda entry: (entry.status == "ok", -entry.count))


def _where(rows: pd.DataFrame) -> list[tuple[str, str]]:
    told = []
    for name, column in (("methods", "method"), ("optimizers", "optimizer"), ("layers", "layer")):
        if column in rows:
            told.append((name, _some([str(value) for value in rows[column].unique()])))
    if "damping" in rows and rows["damping"].notna().any():
        values = sorted(rows["damping"].dropna().unique())
        told.append(("λ", _some([damping_text(value) for value in values])))
    if "checkpoint" in rows:
        told.append(("checkpoints", _some(list(checkpoint_labels([rows]).values()))))
    return told


def _some(values: Sequence[str]) -> str:
    """A list, the rest of a long one counted."""
    rest = len(values) - MANY
    more = [f"and {rest} more"] if rest > 0 else []
    return ", ".join([*map(str, values[:MANY]), *more])


def _values(tables: Iterable[pd.DataFrame], column: str) -> list[str]:
    """The different values of a column, as text."""
    found: dict[str, None] = {}
    for table in tables:
        if column in table:
            for value in table[column].dropna().unique():
                whole = isinstance(value, float) and value.is_integer()
                found[str(int(value)) if whole else str(value)] = None
    return [value for value in found if value]


def _mapping(told: dict[str, Any], name: str) -> dict[str, Any]:
    value = told.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return _some([_text(entry) for entry in value[: MANY + 1]]) + (
            f" and {len(value) - MANY - 1} more" if len(value) > MANY + 1 else ""
        )
    try:
        return "" if value is None else shortened(str(value), LONG)
    except RecursionError:
        return "(nested too deep to be shown)"
