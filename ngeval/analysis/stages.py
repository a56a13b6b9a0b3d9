"""Checkpoints as the stages of a training run: their order and their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ngeval.analysis.tables import numbers
from ngeval.utils.text import whole_or_short

STAGES = ("early", "middle", "late")
"""Names of the checkpoints of `three_stages`."""


def stage_column(table: pd.DataFrame) -> str | None:
    """``epoch``, or else ``step``, if every checkpoint has a different finite one; else None.

    Raises:
        InputError: an epoch or a step is text.
    """
    single = numbers(table.drop_duplicates("checkpoint"), "epoch", "step")
    columns = (name for name in ("epoch", "step") if name in single)
    return next(
        (name for name in columns if np.isfinite(single[name]).all() and single[name].is_unique),
        None,
    )


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by epoch or step where these are known, for parts of a run come in any order."""
    single = table.drop_duplicates("checkpoint")
    column = next(
        (name for name in ("epoch", "step") if name in table and single[name].notna().all()), None
    )
    return table if column is None else table.sort_values(column, kind="stable")


def checkpoint_labels(*tables: pd.DataFrame) -> dict[str, str]:
    """A short label for each checkpoint: epoch or step, or else as much of its name as is needed.

    >>> table = pd.DataFrame({"checkpoint": ["a/1.pt", "a/2.pt"], "epoch": [1.0, 2.0]})
    >>> checkpoint_labels(table), checkpoint_labels(table.drop(columns="epoch"))
    ({'a/1.pt': 'epoch 1', 'a/2.pt': 'epoch 2'}, {'a/1.pt': '1.pt', 'a/2.pt': '2.pt'})
    """
    columns = ["checkpoint", "epoch", "step"]
    rows = pd.concat(
        [table.drop_duplicates("checkpoint").reindex(columns=columns) for table in tables]
    )
    rows = rows.drop_duplicates("checkpoint")
    names = [str(name) for name in rows["checkpoint"]]
    if (column := stage_column(rows)) is not None:
        labels = [f"{column} {value}" for value in _whole_texts(rows[column].tolist())]
    else:
        ends = [name.rstrip("/").rpartition("/")[2] for name in names]
        labels = ends if len(set(ends)) == len(names) else names
        labels = [label or "the checkpoint" for label in labels]
    return dict(zip(names, labels, strict=True))


def _whole_texts(values: Sequence[float]) -> list[str]:
    """Epochs or steps as text: whole numbers in full, and different values differently."""
    short = [whole_or_short(value) for value in values]
    return short if len(set(short)) == len(short) else [repr(float(value)) for value in values]


def evenly(count: int, most: int) -> list[int]:
    """Places from the first to the last of a list, all of them or as many as there may be.

    >>> evenly(3, 4), evenly(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def three_stages(table: pd.DataFrame) -> list[str]:
    """The first, the middle and the last checkpoint of a table."""
    names = list(dict.fromkeys(table["checkpoint"]))
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
