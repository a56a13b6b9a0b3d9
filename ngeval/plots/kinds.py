"""Pictures by kind, and the kind that fits result tables: what ``ngeval plot`` draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from ngeval.analysis.tables import GAMMAS, LAYERS, SAMPLES, TUNING_COLUMNS, name_in
from ngeval.analysis.tables import kind_of as table_kind
from ngeval.errors import InputError, nearest_name
from ngeval.plots.gamma import damping_figure
from ngeval.plots.imbalance import norms_figure
from ngeval.plots.layers import layers_figure
from ngeval.plots.ranking import kfac_figure, ranking_figure
from ngeval.plots.stages import by_task, stages_figure, tasks_of

FEW_DAMPINGS = 4
"""A table of several checkpoints with no more λ than this is drawn over stages, else over λ."""


Tables = Mapping[str, pd.DataFrame]
"""Result tables by the names of their files."""


@dataclass(frozen=True)
class Chosen:
    """The part of the tables that is drawn, and the width; for None the picture decides.

    ``relative`` has the pairs of methods of ``stages``, ``task`` the only one whose rows are drawn
    by pictures of one task; the width of the figure is in inches.
    """

    damping: float | None = None
    checkpoints: list[str] | None = None
    relative: list[tuple[str, str]] | None = None
    width: float | None = None
    methods: list[str] | None = None
    task: str | None = None


def _stages(tables: Tables, chosen: Chosen) -> Figure:
    samples = {n: t for n, t in tables.items() if "gradient_norm" in t and "gamma" not in t}
    gammas = {name: table for name, table in tables.items() if name not in samples}
    return stages_figure(
        by_task(gammas or tables),  # without γ tables, the picture reports the missing columns
        None if chosen.damping is None else [chosen.damping],
        pd.concat(samples.values(), ignore_index=True) if samples and gammas else None,
        relative=chosen.relative,
        width=chosen.width,
    )


IDENTITY = ("task", "checkpoint", "batch", "method", "damping", "layer", "sample")
"""Columns that distinguish the rows of one run."""


def _joined(tables: Tables, task: str | None) -> pd.DataFrame:
    """The rows of all tables, for a picture that would take those of two runs for more batches."""
    joined = pd.concat(list(tables.values()), ignore_index=True)
    tasks = tasks_of(joined)
    if task is not None:
        joined = joined[tasks == name_in(tasks.to_frame("task"), "task", task)]
    elif tasks.nunique() > 1:
        raise InputError(
            f"rows of the tasks {', '.join(tasks.unique())} cannot be in one picture of this kind: "
            "choose one with --task; --kind stages draws tasks side by side"
        )
    keys = [name for name in IDENTITY if name in joined]
    if len(tables) > 1 and bool(joined.duplicated(keys).any()):
        raise InputError(
            f"{' and '.join(tables)} have rows of the same {', '.join(keys)}: two runs cannot be "
            "in one picture of this kind; draw them separately"
        )
    return joined


FIGURES: dict[str, Callable[[Tables, Chosen], Figure]] = {
    "stages": _stages,
    "damping": lambda t, c: damping_figure(_joined(t, c.task), c.checkpoints, width=c.width),
    "imbalance": lambda t, c: norms_figure(_joined(t, c.task), width=c.width),
    "layers": lambda t, c: layers_figure(
        _joined(t, c.task),
        damping=c.damping,
        checkpoint=next(iter(c.checkpoints or []), None),
        width=c.width,
    ),
    "kfac": lambda t, c: kfac_figure(_joined(t, c.task), c.damping, c.methods, width=c.width),
    "ranking": lambda t, c: ranking_figure(_joined(t, c.task), c.checkpoints, width=c.width),
}
"""Pictures by ``--kind``."""

PICTURES_OF: dict[str, tuple[str, ...]] = {
    SAMPLES: ("imbalance",),
    LAYERS: ("layers",),
    GAMMAS: ("stages", "damping", "kfac", "ranking"),
}
"""The pictures of each kind of table; samples are also a part of ``stages``."""


def kind_of(tables: Tables) -> str:
    """The picture that fits: of γ tables, stages for several checkpoints and few λ, else damping.

    Raises:
        InputError: a table is not a result table, or no picture joins the kinds of the tables.
    """
    kinds = {table_kind(table, name) for name, table in tables.items()}
    if kinds == {GAMMAS, SAMPLES}:
        return "stages"
    if len(kinds) > 1:
        raise InputError(
            f"tables of {' and '.join(sorted(kinds))} cannot be in one picture; draw them "
            "separately"
        )
    (kind,) = kinds
    if kind != GAMMAS:
        return PICTURES_OF[kind][0]
    several = any("checkpoint" in t and t["checkpoint"].nunique() > 1 for t in tables.values())
    few = all(table["damping"].nunique() <= FEW_DAMPINGS for table in tables.values())
    return "stages" if several and (few or len(tables) > 1) else "damping"


def figure_of(tables: Tables, kind: str | None = None, chosen: Chosen | None = None) -> Figure:
    """The picture of result tables.

    Args:
        tables: by name, as their files are called.
        kind: a key of `FIGURES`; None takes the one that fits.
        chosen: the part of them that is drawn, and the width.

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
        if len(tables) > 1 or {*table} >= TUNING_COLUMNS:
            content = table_kind(table, name)
            if kind not in PICTURES_OF[content] and (kind, content) != ("stages", SAMPLES):
                raise InputError(
                    f"{name} holds a table of {content}, which cannot be in a picture of {kind}; "
                    f"--kind {' or '.join(PICTURES_OF[content])} draws it"
                )
    chosen = chosen or Chosen()
    if chosen.methods is not None:
        tables = _of_methods(tables, chosen.methods)
    return FIGURES[kind](tables, chosen)


def _of_methods(tables: Tables, methods: Sequence[str]) -> Tables:
    """The rows of some methods, without empty tables; samples, which have no methods, stay."""
    columns = {name: t["method"].astype(str) for name, t in tables.items() if "method" in t}
    if not columns:
        raise InputError("methods were chosen, and the tables have none: leave --methods out")
    present = pd.concat(columns.values()).to_frame("method")
    for method in methods:
        name_in(present, "method", method)
    chosen = {name: tables[name][column.isin(methods)] for name, column in columns.items()}
    return {name: table for name, table in (dict(tables) | chosen).items() if len(table)}
