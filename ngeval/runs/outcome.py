"""The result of a run: its table, and which rows and units could not be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ngeval.errors import InputError
from ngeval.results.journal import Key

DOUBTFUL = ("uncertain", "ascent")
"""The statuses of rows that have numbers, and should not be used as they are."""


def units_by_reason(failures: Mapping[Key, str], names: Sequence[str]) -> list[list[Key]]:
    """Failed units in groups of one reason each, which may name the checkpoint itself."""
    groups: dict[str, list[Key]] = {}
    for key, reason in failures.items():
        groups.setdefault(reason.replace(names[key[0]], "…"), []).append(key)
    return list(groups.values())


@dataclass(frozen=True)
class Outcome:
    """The rows of the units of a run that were computed, ``num_done`` of ``num_units``.

    The ``failures`` are the reasons, by key, why units, or some methods of them, have to be
    computed again; the ``names`` are the checkpoints'.
    """

    table: pd.DataFrame
    failures: Mapping[Key, str]
    num_units: int
    num_done: int
    names: Sequence[str]

    def lost_rows(self) -> str:
        """How many rows are lost, and why; empty if none is, an `InputError` if all are."""
        table = self.table
        if "status" in table:
            lost, subject = table[~table["status"].isin(("ok", *DOUBTFUL))], "{} of {} rows"
        elif "reason" in table:  # of samples, where each method has a column
            lost, subject = table[table["reason"] != ""], "loss changes of {} of {} samples"
        else:
            return ""
        all_lost = "status" in table and len(lost) == len(table)
        lost = lost if all_lost else self._not_reported(lost)
        if lost.empty:
            return ""
        reasons = "; ".join(dict.fromkeys(lost["reason"]))
        text = f"{subject.format(len(lost), len(table))} could not be computed: {reasons}"
        if all_lost:
            raise InputError(text)
        return text

    def doubtful_rows(self) -> str:
        """How many rows are not ok although they have numbers, and why; empty if none is."""
        table = self.table
        counts = {}
        for status in DOUBTFUL if "status" in table else ():
            rows = table[table["status"] == status]
            if len(rows):
                counts[f"{len(rows)} of {len(table)} rows are {status}"] = rows["reason"].unique()
        return "; ".join(f"{count}: {'; '.join(reasons)}" for count, reasons in counts.items())

    def missing_units(self) -> str:
        """Which units are missing, or graded in part, and why; empty if none is."""
        if not self.failures:
            return ""
        lines = [
            f"\n  {self.names[stage]} batch {batch}"
            f"{f' and {len(others)} more' * bool(others)}: {self.failures[stage, batch]}"
            for (stage, batch), *others in units_by_reason(self.failures, self.names)
        ]
        return (
            f"{len(self.failures)} of {self.num_units} units (checkpoint × batch) could not be "
            f"graded{self._in_part()}, the others are done:{''.join(lines)}\nOnce that is fixed, "
            "the same command with --resume computes what is missing"
        )

    def _not_reported(self, lost: pd.DataFrame) -> pd.DataFrame:
        """The rows whose reason is not that of a missing unit."""
        keys = zip(lost["stage"], lost["batch"], strict=True)
        pairs = zip(keys, lost["reason"], strict=True)
        reported = [reason in self.failures.get(key, "") for key, reason in pairs]
        return lost[~np.array(reported, dtype=bool)]

    def _in_part(self) -> str:
        """An addition where units that count as missing have good rows."""
        rows = self.table
        if "status" in rows:
            rows = rows[rows["status"] == "ok"]
        elif "reason" not in rows:
            return ""
        graded = set(zip(rows["stage"], rows["batch"], strict=True))
        return ", or not by every method" if graded & self.failures.keys() else ""
