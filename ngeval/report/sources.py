"""The files that a report is made of: what they are, which tasks they are of, what they tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from ngeval.manifest import read_manifest
from ngeval.performance import NUMBERS, TEXTS, WHOLE, checked_rows
from ngeval.report.text import checkpoint_labels
from ngeval.results import read_results
from ngeval.summary import SUMMARIZED

ACCEPTED = (
    "a report takes the result files of ngeval gamma, sweep, compare (results.parquet), "
    "imbalance and layers, and training.parquet of ngeval train"
)

GAMMAS, SAMPLES, LAYERS, TRAINING = "gammas", "samples", "layers", "training"

NEEDED: dict[str, tuple[str, ...]] = {
    TRAINING: (*TEXTS, *WHOLE, *NUMBERS),
    SAMPLES: ("sample", "gradient_norm"),
    LAYERS: (
        *("method", "damping", "layer", "num_parameters"),
        *("decrease_share", "curvature_share", "excess", "status"),
    ),
    GAMMAS: ("method", "damping", "status", *SUMMARIZED),
}
"""The columns that tell a kind of table, the first that fits."""

NUMERIC = (
    *("gradient_norm", "damping", "decrease_share", "curvature_share", "excess"),
    *("num_parameters", "gamma_ng_lower", "gamma_ng_upper", "gamma_min", "epoch", "step"),
    *("loss", *SUMMARIZED),
)
"""Columns of numbers, where a table has them."""

IDENTITY: dict[str, tuple[str, ...]] = {
    GAMMAS: ("checkpoint", "batch", "method", "damping"),
    SAMPLES: ("checkpoint", "batch", "sample"),
    LAYERS: ("checkpoint", "batch", "method", "damping", "layer"),
    TRAINING: ("optimizer", "phase", "trial", "seed", "epoch"),
}
"""What tells one row of a kind from the next, within a task."""

SETTINGS = (
    *("damping_scale", "likelihood", "dtype", "num_samples", "metric_samples", "num_parameters"),
)
"""What rows must share to be means of one run."""


@dataclass(frozen=True)
class Source:
    """A result file.

    Attributes:
        path: where it was read from.
        kind: of its table, a key of `NEEDED`.
        table: its rows, as they are.
        manifest: what is told beside it, None where nothing is.
    """

    path: Path
    kind: str
    table: pd.DataFrame
    manifest: dict[str, Any] | None = None


@dataclass(frozen=True)
class Topic:
    """A task of the report, with its rows of each kind.

    Attributes:
        name: the task, with the file's name where several files have different runs of it.
        tables: rows by kind.
        sources: where they come from.
    """

    name: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """A short label for each checkpoint."""
        graded = [table for kind, table in self.tables.items() if kind != TRAINING]
        return checkpoint_labels(graded) if graded else {}


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read result files, each with its manifest.

    Raises:
        InputError: a file is given twice, or its table is of no kind that a report is made of.
        OutputError: a file cannot be read.
    """
    seen: set[Path] = set()
    sources = []
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice")
        seen.add(path.resolve())
        table = read_results(path)
        sources.append(Source(path, kind_of(table, str(path)), table, read_manifest(path)))
    return sources


def kind_of(table: pd.DataFrame, name: str) -> str:
    """Which kind of result a table is, told by its columns.

    Raises:
        InputError: none that a report is made of.
    """
    kind = next((k for k, needed in NEEDED.items() if set(needed) <= set(table)), None)
    if kind is not None and (kind == TRAINING or "study" not in table):
        return kind
    if "study" in table:
        raise InputError(f"{name} holds the rows of a study, which has its own page; {ACCEPTED}")
    shown = ", ".join(map(str, table.columns[:8])) + (", …" if len(table.columns) > 8 else "")
    raise InputError(f"{name} is a table of another kind (its columns: {shown}); {ACCEPTED}")


def topics(sources: Sequence[Source]) -> list[Topic]:
    """The tasks of some files, in order of appearance.

    Files with parts of one run (other checkpoints, methods or dampings, the same settings) are
    taken together; different runs of a task stay apart under the files' names.

    Raises:
        InputError: a column of numbers holds something else.
    """
    found: dict[str, Topic] = {}
    for kind in (GAMMAS, SAMPLES, LAYERS, TRAINING):
        parts: dict[str, list[tuple[list[Source], pd.DataFrame]]] = {}
        for source in sources:
            if source.kind != kind:
                continue
            for task, rows in _checked(source).groupby("task", sort=False):
                _add(parts.setdefault(str(task), []), source, rows, kind)
        for task, runs in parts.items():
            for origins, rows in runs:
                stems = ", ".join(source.path.stem for source in origins)
                name = task if len(runs) == 1 else f"{task} ({stems})"
                topic = found.setdefault(name, Topic(name))
                topic.tables[kind] = rows.reset_index(drop=True)
                topic.sources.extend(s for s in origins if s not in topic.sources)
    return list(found.values())


def _add(
    runs: list[tuple[list[Source], pd.DataFrame]], source: Source, rows: pd.DataFrame, kind: str
) -> None:
    """Put rows to those of the same run, or begin another."""
    for index, (origins, others) in enumerate(runs):
        if _one_run(others, rows, kind):
            runs[index] = ([*origins, source], pd.concat([others, rows], ignore_index=True))
            return
    runs.append(([source], rows))


def _one_run(first: pd.DataFrame, second: pd.DataFrame, kind: str) -> bool:
    """Whether two tables are parts of one: no row in both, and the same settings."""
    for name in SETTINGS if kind != LAYERS else SETTINGS[:-1]:
        if name in first and name in second:
            values = pd.concat([first[name], second[name]]).dropna()
            if values.nunique() > max(first[name].nunique(), 1):
                return False
    keys = list(IDENTITY[kind])
    both = first[keys].drop_duplicates().merge(second[keys].drop_duplicates(), on=keys)
    return both.empty


def _checked(source: Source) -> pd.DataFrame:
    """A table whose columns are what they are taken for; what a single table has not is filled."""
    table, name = source.table, str(source.path)
    if source.kind == TRAINING:
        return checked_rows(table, name)
    columns: dict[str, Any] = {}
    for column in (column for column in NUMERIC if column in table):
        columns[column] = _numbers(table[column], column, name)
    for column, default in (("task", source.path.stem), ("checkpoint", ""), ("reason", "")):
        given = table[column] if column in table else pd.Series(default, index=table.index)
        columns[column] = given.astype(object).where(given.notna(), default).astype(str)
    for column in ("method", "status", "layer", "damping_scale"):
        if column in table:
            columns[column] = table[column].astype(object).fillna("").astype(str)
    if "batch" not in table:
        columns["batch"] = 0
    return table.assign(**columns)


def _numbers(column: pd.Series, label: str, name: str) -> np.ndarray:
    values = pd.to_numeric(column, errors="coerce")
    wrong = column[values.isna() & column.notna()]
    if not wrong.empty:
        raise InputError(
            f"{name}: column {label} holds {wrong.iloc[0]!r} in row {wrong.index[0]}, which is no "
            "number"
        )
    return values.to_numpy(dtype=float)
