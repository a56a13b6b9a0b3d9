"""What a run came to, and what is said of what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import typer

from ngeval.cli import console
from ngeval.errors import InputError
from ngeval.results.journal import Key

INCOMPLETE = 3
"""The exit code of a run that left units out."""


@dataclass(frozen=True)
class Collected:
    """What a run came to.

    Attributes:
        table: the rows of all units.
        failures: why units, or parts of them, are missing, by key.
        num_units: how many there are in all.
        names: of checkpoints, by their place.
    """

    table: pd.DataFrame
    failures: Mapping[Key, str]
    num_units: int
    names: Sequence[str]

    def report_failures(self) -> None:
        """Say how many rows of graded units could not be computed, and why.

        Raises:
            InputError: none could.
        """
        lost = self.table[self.table["status"] != "ok"]
        if len(lost) == len(self.table):
            raise InputError(_lost(lost, self.table))
        keys = pd.Series(list(zip(lost["stage"], lost["batch"], strict=True)), index=lost.index)
        pairs = zip(keys, lost["reason"], strict=True)
        known = [reason in self.failures.get(key, "") for key, reason in pairs]
        lost = lost[~np.array(known, dtype=bool)]
        if not lost.empty:
            console.complain(_lost(lost, self.table))

    def finish(self) -> None:
        """Say which units are missing.

        Raises:
            typer.Exit: with code 3, if one is.
        """
        if not self.failures:
            return
        reasons: dict[str, list[str]] = {}
        for (stage, batch), reason in self.failures.items():
            reasons.setdefault(reason, []).append(f"{self.names[stage]} batch {batch}")
        lines = [
            f"\n  {units[0]}{f' and {len(units) - 1} more' * (len(units) > 1)}: {reason}"
            for reason, units in reasons.items()
        ]
        console.complain(
            f"{len(self.failures)} of {self.num_units} units (checkpoint × batch) could not be "
            f"graded{self._in_part}, the others are done:{''.join(lines)}\nOnce that is mended, "
            "the same command with --resume does what is missing"
        )
        raise typer.Exit(INCOMPLETE)

    @property
    def _in_part(self) -> str:
        """What is to be added where rows of units that are missing are good."""
        if "status" not in self.table:
            return ""
        rows = self.table[self.table["status"] == "ok"]
        there = set(zip(rows["stage"], rows["batch"], strict=True))
        return ", or not by every method" if there & self.failures.keys() else ""


def _lost(lost: pd.DataFrame, table: pd.DataFrame) -> str:
    reasons = "; ".join(dict.fromkeys(lost["reason"]))
    return f"{len(lost)} of {len(table)} rows could not be computed: {reasons}"
