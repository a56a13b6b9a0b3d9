"""The files that a report is made of, and the tasks whose rows they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.stages import checkpoint_labels
from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES, kind_of
from ngeval.errors import InputError, OutputError
from ngeval.report.checked_rows import (
    IDENTITY,
    SETTINGS,
    clean,
    differs_within_batches,
    runs,
    single,
)
from ngeval.report.summaries import Grades, grades
from ngeval.results.manifest import read_manifest
from ngeval.results.table_files import read_results
from ngeval.utils.text import encodable

ROUNDING = 1e-6
"""Relative difference of γ that the order of sums may make from one command to the next."""


@dataclass(frozen=True)
class Source:
    """A result file, with warnings about it.

    Attributes:
        kind: of its table, a key of `ngeval.analysis.tables.KINDS`.
        table: its rows, as they were read.
        name: as much of the path's end as distinguishes it from the other files; "" takes the
            file's name.
    """

    path: Path
    kind: str
    table: pd.DataFrame
    manifest: dict[str, Any] | None = None
    name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """Its name on the page."""
        return encodable(self.name or self.path.name)


@dataclass(frozen=True)
class Topic:
    """A task of the report, with its rows by kind, the files of these, and warnings about the rows.

    The name includes the file's name and settings if there are different runs of the task.
    """

    name: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def labels(self) -> dict[str, str]:
        """A short label for each checkpoint."""
        return checkpoint_labels(*self.tables.values())

    @cached_property
    def short(self) -> Grades | None:
        """Its γ table in short; None if there is none, or no row of it could be computed."""
        return grades(self.tables[GAMMAS]) if GAMMAS in self.tables else None


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read result files, each with its manifest.

    Raises:
        InputError: a file is named twice, or its table is not a result table.
        OutputError: a file cannot be read.
    """
    seen: set[Path] = set()
    sources = []
    names = ends_of(paths)
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice")
        seen.add(path.resolve())
        table = read_results(path)
        kind = kind_of(table, str(path))
        manifest: dict[str, Any] | None = None
        notes: tuple[str, ...] = ()
        try:
            manifest = read_manifest(path)
        except OutputError as error:  # the report can do without
            notes = (encodable(str(error)),)
        sources.append(Source(path, kind, table, manifest, names[path], notes))
    return sources


def ends_of(paths: Sequence[Path]) -> dict[Path, str]:
    """As much of each path's end as distinguishes it from the others.

    >>> list(ends_of([Path("a/g.csv"), Path("b/g.csv"), Path("b/i.csv")]).values())
    ['a/g.csv', 'b/g.csv', 'i.csv']
    """
    parts = {path: path.absolute().parts for path in paths}
    ends = {}
    for path, names in parts.items():
        others = [other for key, other in parts.items() if key != path]
        lengths = (n for n in range(1, len(names)) if all(names[-n:] != o[-n:] for o in others))
        ends[path] = "/".join(names[-next(lengths, len(names)) :])
    return ends


@dataclass
class _Run:
    """Rows of one task with one setting."""

    sources: list[Source]
    rows: pd.DataFrame
    settings: str
    notes: list[str]


def topics(sources: Sequence[Source]) -> list[Topic]:
    """The tasks of some files, in order of appearance.

    Files with parts of one run (different checkpoints, methods or dampings, the same settings) are
    joined, also where they overlap in rows that agree, each of which counts once; rows that
    contradict each other are refused. Different runs of a task are separate topics, under the
    files' names, and those of one file under their settings as well.
    """
    result: dict[str, Topic] = {}
    stems = _stems(sources)
    for kind in (GAMMAS, SAMPLES, LAYERS):
        parts: dict[str, list[_Run]] = {}
        for source in (source for source in sources if source.kind == kind):
            for task, run in _runs_of(source):
                _add(parts.setdefault(task, []), run, kind)
        for task, task_runs in parts.items():
            for run in task_runs:
                name = task
                if len(task_runs) > 1:
                    files = ", ".join(stems[source.shown] for source in run.sources)
                    name = f"{task} ({files}{'; ' if run.settings else ''}{run.settings})"
                while name in result and kind in result[name].tables:  # a task called like a run
                    name += "′"
                topic = result.setdefault(name, Topic(name))
                topic.tables[kind] = run.rows.reset_index(drop=True)
                topic.sources.extend(s for s in run.sources if s not in topic.sources)
                topic.notes.extend(run.notes)
    return list(result.values())


def _stems(sources: Sequence[Source]) -> dict[str, str]:
    """The files' names in headings: without extension, if they still differ."""
    stems = {s.shown: s.shown.removesuffix(s.path.suffix) for s in sources}
    return stems if len(set(stems.values())) == len(stems) else {name: name for name in stems}


def _runs_of(source: Source) -> Iterator[tuple[str, _Run]]:
    """The runs of a file, each with its task."""
    path = str(source.path)
    table = clean(source.table, source.kind, path, encodable(source.path.stem))
    table, twice = single(table, source.kind)
    notes = []
    if twice:
        rows = "1 row is" if twice == 1 else f"{twice:,} rows are"
        notes.append(f"{source.shown}: {rows} there more than once, and counted once.")
    for task, rows_of_task in table.groupby("task", sort=False):
        parts = list(runs(rows_of_task, source.kind, path))
        separate = []
        if len(parts) > 1:
            settings = "; ".join(settings for settings, _ in parts)
            separate.append(
                f"{source.shown} holds {len(parts)} runs of {task} with different settings "
                f"({settings}); they are shown separately, not averaged."
            )
        for settings, part in parts:
            yield str(task), _Run([source], part, settings, notes + separate)


def _add(task_runs: list[_Run], run: _Run, kind: str) -> None:
    """Join rows to those of the same run in other files, or add a run."""
    for other in task_runs:
        same_file = run.sources[0] in other.sources  # whose runs differ
        rows = None if same_file else _joined(other.rows, run.rows, kind)
        if rows is not None:
            other.rows = rows
            other.sources += run.sources
            other.notes += [note for note in run.notes if note not in other.notes]
            other.settings = other.settings or run.settings
            return
    task_runs.append(run)


def _joined(first: pd.DataFrame, second: pd.DataFrame, kind: str) -> pd.DataFrame | None:
    """The rows of two parts of a run, each once; None if they are not parts of one run.

    Parts have the same settings, and γ rows that both hold agree. Of two rows that agree, the first
    is taken, unless only the second has been compared with the exact natural gradient.
    """
    settings = (*SETTINGS[kind], "num_samples", "metric_samples")
    if not all(_may_agree(first, second, name) for name in settings):
        return None
    both = pd.concat([first, second], ignore_index=True)
    if "seed" in first and "seed" in second and differs_within_batches(both, "seed"):
        return None
    keys = list(IDENTITY[kind])
    # One file may have batches 0, 1, the other "a", "b".
    both = both.astype({key: "str" for key in keys if first[key].dtype != second[key].dtype})
    file = both.assign(file=np.arange(len(both)) < len(first)).groupby(keys, dropna=False)["file"]
    in_both = file.transform("nunique") > 1
    if not in_both.any():
        return both
    if kind != GAMMAS or not _agree(both[in_both], keys):
        return None
    compared = both.sort_values("gamma_over_ng", key=pd.isna, kind="stable")
    again = compared.duplicated(keys).reindex(both.index)
    return both[~(in_both & again)]


def _may_agree(first: pd.DataFrame, second: pd.DataFrame, name: str) -> bool:
    """Whether a setting has no value in one table that the other one does not have."""
    if name not in first or name not in second:
        return True
    known = [{*table[name][table[name] != ""].dropna().unique()} for table in (first, second)]
    return len(known[0] | known[1]) <= max(len(known[0]), 1)


def _agree(rows: pd.DataFrame, keys: Sequence[str]) -> bool:
    """Whether rows with the same keys have the same γ up to rounding; NaN equals NaN."""
    gammas = rows.groupby(list(keys), dropna=False)[["gamma", "gamma_over_sgd"]]
    known = gammas.count().to_numpy()
    in_all = (known == 0) | (known == gammas.size().to_numpy()[:, None])
    least, most = gammas.min().to_numpy(float), gammas.max().to_numpy(float)
    return bool(in_all.all()) and np.allclose(least, most, rtol=ROUNDING, atol=0, equal_nan=True)
