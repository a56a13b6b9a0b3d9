"""The files that a report is made of: what they are, which tasks they are of, what they tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ngeval.analysis.summary import SUMMARIZED
from ngeval.analysis.training_results import NUMBERS, TEXTS, WHOLE
from ngeval.errors import InputError, OutputError
from ngeval.report.checked_rows import (
    GAMMAS,
    IDENTITY,
    LAYERS,
    OF_BATCHES,
    SAMPLES,
    SETTINGS,
    TRAINING,
    checked,
    differs_within_batches,
    runs,
    single,
)
from ngeval.report.wording import checkpoint_labels, printable
from ngeval.results.manifest import read_manifest
from ngeval.results.table_files import read_results

ACCEPTED = (
    "a report takes the result files of ngeval gamma, sweep, compare (results.parquet), "
    "imbalance and layers, and training.parquet of ngeval train"
)

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


GRADED = {GAMMAS: ("gamma", "gamma_over_sgd")}
"""The numbers by which a row that stands in two files is known as the same one."""

ROUNDING = 1e-6
"""Relative difference of γ that the order of sums may make from one command to the next."""


@dataclass(frozen=True)
class Source:
    """A result file.

    Attributes:
        path: where it was read from.
        kind: of its table, a key of `NEEDED`.
        table: its rows, as they are.
        manifest: what is told beside it, None where nothing is.
        name: as much of the path's end as tells it from the other files; "" takes the file's name.
        notes: warnings about the file.
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
        return printable(self.name or self.path.name)


@dataclass(frozen=True)
class Topic:
    """A task of the report, with its rows of each kind.

    Attributes:
        name: the task, with the file's name and settings where there are different runs of it.
        tables: rows by kind.
        sources: where they come from.
        notes: warnings about the files' rows.
    """

    name: str
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    names = ends_of(paths)
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice")
        seen.add(path.resolve())
        table = read_results(path)
        kind = kind_of(table, str(path))
        notes: tuple[str, ...] = ()
        try:
            told = read_manifest(path)
        except OutputError as error:  # it costs the report nothing but what it would have told
            told, notes = None, (printable(str(error)),)
        sources.append(Source(path, kind, table, told, names[path], notes))
    return sources


def ends_of(paths: Sequence[Path]) -> dict[Path, str]:
    """As much of each path's end as tells it from the others.

    >>> list(ends_of([Path("a/g.csv"), Path("b/g.csv"), Path("b/i.csv")]).values())
    ['a/g.csv', 'b/g.csv', 'i.csv']
    """
    parts = {path: path.absolute().parts for path in paths}
    ends = dict.fromkeys(parts, 1)
    while True:
        names = {path: "/".join(parts[path][-length:]) for path, length in ends.items()}
        counts = Counter(names.values())
        longer = [p for p, name in names.items() if counts[name] > 1 and ends[p] < len(parts[p])]
        if not longer:
            return names
        ends |= {path: ends[path] + 1 for path in longer}


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
    taken together, also where they overlap in rows that agree, each of which counts once;
    different runs of a task stay apart, under the files' names, and those of one file under their
    settings as well.

    Raises:
        InputError: a column of numbers holds something else, or rows contradict each other.
    """
    found: dict[str, Topic] = {}
    heads = _heads(sources)
    for kind in (GAMMAS, SAMPLES, LAYERS, TRAINING):
        parts: dict[str, list[_Run]] = {}
        for source in (source for source in sources if source.kind == kind):
            for task, run in _runs_of(source):
                _add(parts.setdefault(task, []), run, kind)
        for task, together in parts.items():
            for run in together:
                head = task
                if len(together) > 1:
                    files = ", ".join(heads[source.shown] for source in run.sources)
                    head = f"{task} ({files}{'; ' if run.settings else ''}{run.settings})"
                while head in found and kind in found[head].tables:  # a task is called like a run
                    head += "′"
                topic = found.setdefault(head, Topic(head))
                topic.tables[kind] = run.rows.reset_index(drop=True)
                topic.sources.extend(s for s in run.sources if s not in topic.sources)
                topic.notes.extend(run.notes)
    return list(found.values())


def _heads(sources: Sequence[Source]) -> dict[str, str]:
    """The files' names in headings: without extension, where that tells them apart."""
    stems = {s.shown: s.shown.removesuffix(s.path.suffix) for s in sources}
    return stems if len(set(stems.values())) == len(stems) else {name: name for name in stems}


@dataclass
class _Run:
    """Rows of one task with one setting."""

    sources: list[Source]
    rows: pd.DataFrame
    settings: str
    notes: list[str]


def _runs_of(source: Source) -> Iterator[tuple[str, _Run]]:
    """The runs of a file, each with its task."""
    name = str(source.path)
    stem = printable(source.path.stem)
    table, twice = single(checked(source.table, source.kind, name, stem), source.kind)
    notes = []
    if twice:
        rows = "1 row stands" if twice == 1 else f"{twice:,} rows stand"
        notes.append(
            f"{source.shown}: {rows} there more than once, with all columns alike; counted once."
        )
    for task, of_task in table.groupby("task", sort=False):
        found = list(runs(of_task, source.kind, name))
        told = list(notes)
        if len(found) > 1:
            each = "; ".join(settings for settings, _ in found)
            told.append(
                f"{source.shown} holds {len(found)} runs of {task}, each with settings of its own "
                f"({each}); they are not averaged, and stand apart here."
            )
        for settings, part in found:
            yield str(task), _Run([source], part, settings, told)


def _add(together: list[_Run], run: _Run, kind: str) -> None:
    """Put rows to those of the same run in other files, or begin another."""
    for other in together:
        apart = run.sources[0] in other.sources
        if not apart and _one_run(other.rows, run.rows, kind):
            other.rows = _together(other.rows, run.rows, kind)
            other.sources += run.sources
            other.notes += [note for note in run.notes if note not in other.notes]
            other.settings = other.settings or run.settings
            return
    together.append(run)


def _one_run(first: pd.DataFrame, second: pd.DataFrame, kind: str) -> bool:
    """Whether two tables are parts of one: the same settings, and rows in both agree."""
    if kind != TRAINING:
        sizes = OF_BATCHES[:-1]
        for name in (*(SETTINGS if kind != LAYERS else SETTINGS[:-1]), *sizes):
            if name in first and name in second:
                own = first[name].where(first[name] != "")
                other = second[name].where(second[name] != "")
                values = {*own.dropna().unique(), *other.dropna().unique()}
                if len(values) > max(own.nunique(), 1):
                    return False
        if "seed" in first and "seed" in second:
            columns = ["checkpoint", "batch", "seed"]
            both = pd.concat([first[columns].astype(str), second[columns].astype(str)])
            if differs_within_batches(both, "seed"):
                return False
    keys = list(IDENTITY[kind])
    numbers = list(GRADED.get(kind, ()))
    one, two = (rows[keys + numbers].drop_duplicates() for rows in (first, second))
    one, two = _alike(one, two, keys)
    shared = one.merge(two, on=keys, suffixes=("", "_again"))
    return shared.empty or (bool(numbers) and _agree(shared, numbers))


def _alike(
    first: pd.DataFrame, second: pd.DataFrame, keys: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables with keys of the same types: one may have batches 0, 1, the other "a", "b"."""
    other = [key for key in keys if first[key].dtype != second[key].dtype]
    types = dict.fromkeys(other, "str")
    return first.astype(types), second.astype(types)


def _agree(shared: pd.DataFrame, values: Sequence[str]) -> bool:
    """Whether rows with the same keys have the same numbers, but for rounding; none is as none."""
    return all(
        np.isclose(
            shared[name].to_numpy(dtype=float),
            shared[f"{name}_again"].to_numpy(dtype=float),
            rtol=ROUNDING,
            atol=0,
            equal_nan=True,
        ).all()
        for name in values
    )


def _together(first: pd.DataFrame, second: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of two parts of a run, each once.

    Of two that agree the first stays, but where only the other has been compared with the exact
    natural gradient.
    """
    keys = list(IDENTITY[kind])
    first, second = _alike(first, second, keys)
    if kind in GRADED:
        least, others = first["gamma_over_ng"], second[second["gamma_over_ng"].notna()]
        first = first[~(least.isna() & _stands_in(others, first, keys))]
        second = second[~_stands_in(first, second, keys)]
    return pd.concat([first, second], ignore_index=True)


def _stands_in(table: pd.DataFrame, rows: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Which rows have the keys of one of a table."""
    own, others = (pd.MultiIndex.from_frame(part[list(keys)]) for part in (rows, table))
    return own.isin(others)
