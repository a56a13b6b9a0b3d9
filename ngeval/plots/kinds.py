"""Pictures by kind, and the kind that fits result tables: what ``ngeval plot`` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from ngeval.errors import InputError, nearest_name
from ngeval.plots.gamma import damping_figure
from ngeval.plots.imbalance import norms_figure
from ngeval.plots.layers import layers_figure
from ngeval.plots.ranking import kfac_figure, ranking_figure
from ngeval.plots.stages import stages_figure
from ngeval.plots.training_results import performance_figure

FEW_DAMPINGS = 4
"""A table of several checkpoints with no more λ than this is drawn over stages, else over λ."""


@dataclass(frozen=True)
class Chosen:
    """What part of the tables is drawn, and how wide.

    Attributes:
        damping: λ; None leaves it to the picture.
        checkpoints: likewise.
        relative: the pairs of methods of ``stages``; None leaves them to the picture.
        width: of the figure in inches; None leaves it to the picture.
        methods: those that are drawn (of trainings: optimizers); None draws all.
        task: whose rows are drawn, by pictures of one task.
    """

    damping: float | None = None
    checkpoints: list[str] | None = None
    relative: list[tuple[str, str]] | None = None
    width: float | None = None
    methods: list[str] | None = None
    task: str | None = None


Tables = Mapping[str, pd.DataFrame]
"""Result tables by the names of their files."""


def _stages(tables: Tables, chosen: Chosen) -> Figure:
    samples = [table for table in tables.values() if _is_samples(table)]
    gammas = {name: table for name, table in tables.items() if not _is_samples(table)}
    if not gammas:  # let the picture say which columns it wants
        gammas, samples = dict(tables), []
    return stages_figure(
        by_task(gammas),
        None if chosen.damping is None else [chosen.damping],
        pd.concat(samples, ignore_index=True) if samples else None,
        relative=chosen.relative,
        width=chosen.width,
    )


def _single(
    draw: Callable[[pd.DataFrame, Chosen], Figure],
) -> Callable[[Tables, Chosen], Figure]:
    """A picture of one table: several of the same kind are put together."""

    def figure(tables: Tables, chosen: Chosen) -> Figure:
        return draw(_of_one_run(tables, chosen.task), chosen)

    return figure


ROW = ("task", "checkpoint", "batch", "method", "damping", "layer", "sample")
"""Columns that tell the rows of one run apart."""


def _of_one_run(tables: Tables, task: str | None) -> pd.DataFrame:
    """Tables put together, for a picture that would take another run's rows for more batches.

    Raises:
        InputError: there are several tasks, or no rows of the one that was chosen, or two tables
            have the same rows of a run.
    """
    joined = pd.concat(list(tables.values()), ignore_index=True)
    told = joined["task"].fillna("").astype(str) if "task" in joined else pd.Series(dtype=str)
    names = list(dict.fromkeys(told))
    if task is not None:
        if task not in names:
            raise InputError(f"no rows of task {task!r}; {nearest_name(task, names)}")
        joined = joined[told == task]
    elif len(names) > 1:
        raise InputError(
            f"rows of the tasks {', '.join(names)} do not go into one picture of this kind: choose "
            "one with --task; --kind stages sets tasks side by side"
        )
    keys = [name for name in ROW if name in joined]
    if len(tables) > 1 and bool(joined.duplicated(keys).any()):
        raise InputError(
            f"{' and '.join(tables)} have rows of the same {', '.join(keys)}: two runs do not go "
            "into one picture of this kind; draw them apart"
        )
    return joined


FIGURES: dict[str, Callable[[Tables, Chosen], Figure]] = {
    "stages": _stages,
    "damping": _single(lambda t, c: damping_figure(t, c.checkpoints, width=c.width)),
    "imbalance": _single(lambda t, c: norms_figure(t, width=c.width)),
    "layers": _single(
        lambda t, c: layers_figure(
            t,
            damping=c.damping,
            checkpoint=next(iter(c.checkpoints or []), None),
            width=c.width,
        )
    ),
    "kfac": _single(lambda t, c: kfac_figure(t, c.damping, c.methods, width=c.width)),
    "ranking": _single(lambda t, c: ranking_figure(t, c.checkpoints, width=c.width)),
    "performance": lambda tables, c: performance_figure(
        pd.concat(list(tables.values()), ignore_index=True), width=c.width
    ),
}
"""Pictures by ``--kind``."""

KINDS_OF_TABLE = {
    "imbalance": ("imbalance",),
    "layers": ("layers",),
    "performance": ("performance",),
    "gamma": ("stages", "damping", "kfac", "ranking"),
}
"""What can be drawn of a table; samples are also a part of ``stages``."""


def table_kind(table: pd.DataFrame) -> str:
    """What a result table holds, by its columns: a key of `KINDS_OF_TABLE`.

    Raises:
        InputError: it is none of ngeval's result tables, or the rows of a study.
    """
    columns = set(table.columns)
    if "study" in columns:
        name = table["study"].iloc[0] if len(table) else "NAME"
        raise InputError(
            f"the table holds the rows of a study; `python -m studies {name} --from FILE`, in a "
            "clone, draws them"
        )
    for kind, needed in (
        ("layers", {"layer", "method", "decrease_share"}),
        ("gamma", {"method", "damping", "gamma"}),
        ("performance", {"optimizer", "phase", "train_loss"}),
        ("imbalance", {"gradient_norm"}),
    ):
        if needed <= columns:
            return kind
    shown = ", ".join(str(column) for column in list(table.columns)[:8])
    raise InputError(
        f"the table has the columns {shown}, and is of none of the kinds that can be drawn: γ "
        "tables (gamma, sweep, compare), layers, samples (imbalance), trainings (train)"
    )


def kind_of(tables: Tables) -> str:
    """The picture that fits: of γ tables, stages for several checkpoints and few λ, else damping.

    Raises:
        InputError: a table is of no kind that can be drawn, or there are tables of kinds that no
            picture joins.
    """
    found = {table_kind(table) for table in tables.values()}
    if found == {"gamma", "imbalance"}:
        return "stages"
    if len(found) > 1:
        raise InputError(
            f"tables of {' and '.join(sorted(found))} do not go into one picture; draw them apart"
        )
    (kind,) = found
    if kind != "gamma":
        return kind
    several = any(_count(table, "checkpoint") > 1 for table in tables.values())
    few = all(_count(table, "damping") <= FEW_DAMPINGS for table in tables.values())
    return "stages" if several and (few or len(tables) > 1) else "damping"


def figure_of(tables: Tables, kind: str | None = None, chosen: Chosen | None = None) -> Figure:
    """The picture of result tables.

    Args:
        tables: by name, as their files are called.
        kind: a key of `FIGURES`; None takes what fits.
        chosen: what part of them, and how wide.

    Raises:
        InputError: there is no such picture, or it cannot be drawn of these tables.
    """
    kind = kind_of(tables) if kind is None else kind
    if kind not in FIGURES:
        raise InputError(f"unknown picture {kind!r}; {nearest_name(kind, FIGURES)}")
    for name, table in tables.items():
        if not table.columns.is_unique:
            twice = table.columns[table.columns.duplicated()][0]
            raise InputError(f"{name} has the column {twice!r} twice")
    if len(tables) > 1:
        for name, table in tables.items():
            found = table_kind(table)
            joins = (*KINDS_OF_TABLE[found], *(["stages"] if found == "imbalance" else []))
            if kind not in joins:
                raise InputError(
                    f"{name} holds a table of {found}, which does not go into a picture of {kind}; "
                    f"--kind {' or '.join(KINDS_OF_TABLE[found])} draws it"
                )
    chosen = chosen or Chosen()
    if chosen.methods is not None:
        tables = of_methods(tables, chosen.methods)
    return FIGURES[kind](tables, chosen)


def of_methods(tables: Tables, methods: Sequence[str]) -> Tables:
    """The rows of some methods, or optimizers; samples have none and stay, empty tables go.

    Raises:
        InputError: a method is in none of the tables, or no table tells methods.
    """
    columns = {name: _method_column(table) for name, table in tables.items()}
    present = {
        str(method)
        for name, column in columns.items()
        if column
        for method in tables[name][column].unique()
    }
    if not present:
        raise InputError("methods were chosen, and the tables have none: leave --methods out")
    for method in methods:
        if method not in present:
            raise InputError(f"no rows for method {method!r}; {nearest_name(method, present)}")
    parts = {
        name: table[table[column].astype(str).isin(methods)] if column else table
        for (name, table), column in zip(tables.items(), columns.values(), strict=True)
    }
    return {name: part for name, part in parts.items() if len(part)}


def _method_column(table: pd.DataFrame) -> str | None:
    return next((name for name in ("method", "optimizer") if name in table), None)


def by_task(tables: Tables) -> Tables:
    """γ tables by a title for each: the task, with the file's name where files share the task.

    A single table of a single task has no need of a title.
    """
    parts = [
        (str(task), name, part) for name, table in tables.items() for task, part in _tasks(table)
    ]
    if len(parts) == 1:
        return {"": parts[0][2]}
    tasks = [task for task, _, _ in parts]
    return {
        (f"{task} ({name})" if task and tasks.count(task) > 1 else task or name): part
        for task, name, part in parts
    }


def _is_samples(table: pd.DataFrame) -> bool:
    return "gradient_norm" in table and "gamma" not in table


def _tasks(table: pd.DataFrame) -> Sequence[tuple[object, pd.DataFrame]]:
    if "task" not in table:
        return [("", table)]
    return list(table.groupby("task", sort=False))


def _count(table: pd.DataFrame, column: str) -> int:
    return int(table[column].nunique()) if column in table else 0
