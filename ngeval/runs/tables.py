"""What is made of each unit of a run: a table of γ, of layers, or of samples.

A `Work` is plain values, which a manifest can keep and ``ngeval verify`` can do again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ngeval.curvature.krylov import GAP
from ngeval.errors import InputError, nearest_name
from ngeval.grading.evaluate import Progress
from ngeval.runs.run import Grading, Run

DESCRIPTIONS = {
    "gamma": "grading updates",
    "layers": "grading layers",
    "imbalance": "gradient norms",
}
"""What is said of each kind of work while it is done."""


@dataclass(frozen=True)
class Work:
    """What is made of each unit.

    Attributes:
        kind: ``"gamma"``, ``"layers"`` or ``"imbalance"``.
        options: what its numbers depend on besides the unit: ``methods`` (names), ``dampings``,
            ``damping_scale``, …; plain values.
    """

    kind: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse an unknown kind.

        Raises:
            InputError: it is.
        """
        if self.kind not in DESCRIPTIONS:
            raise InputError(
                f"unknown kind of work {self.kind!r}; {nearest_name(self.kind, DESCRIPTIONS)}"
            )

    @property
    def description(self) -> str:
        """For a progress bar."""
        return DESCRIPTIONS[self.kind]

    @property
    def steps(self) -> list[str]:
        """The methods that are told of in each unit; none where a unit is one step."""
        return [] if self.kind == "imbalance" else list(self.options["methods"])

    def tables(self, run: Run, on_step: Progress | None = None) -> Iterator[pd.DataFrame]:
        """A table for each unit of a run; see `Run.gammas`, `Run.layers` and `Run.imbalances`.

        Raises:
            NgevalError: see there.
        """
        told = self.options
        if self.kind == "imbalance":
            return run.imbalances(told["methods"], told["damping"])
        scale = told.get("damping_scale", "absolute")
        grading = Grading(told.get("metric_batches"), told["natural"], told.get("gap", GAP))
        if self.kind == "layers":
            return run.layers(
                told["methods"], told["dampings"], told["groups"], scale, grading, on_step
            )
        return run.gammas(told["methods"], told["dampings"], scale, grading, on_step)
