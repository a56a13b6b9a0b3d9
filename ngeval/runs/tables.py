"""The kinds of tables that a run computes for each unit: γ, layers, or samples.

Each kind is one class in `KINDS`: its options, which a manifest keeps and ``ngeval verify`` reads
back, and the rows that it makes of a unit.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from torch.optim import Optimizer

from ngeval.curvature.krylov import GAP
from ngeval.dampings import MAX_COUNT, check_dampings, check_scale
from ngeval.errors import InputError, TaskError
from ngeval.grading.evaluate import COLUMNS, evaluate
from ngeval.grading.gradient_norms import sample_table
from ngeval.grading.layer_table import COLUMNS as LAYER_COLUMNS
from ngeval.grading.layer_table import layer_table
from ngeval.grading.prepare import Progress as OnMethod
from ngeval.grading.prepare import add_note, failure_reason, lost_memory
from ngeval.methods import Method, get_methods
from ngeval.methods.ng import NaturalGradient
from ngeval.problem.metric_batch import Metric
from ngeval.results.journal import Entry, Key, table_of
from ngeval.results.manifest import first_problem
from ngeval.runs.estimate import memory_note
from ngeval.runs.run import Run
from ngeval.runs.units import Unit, Units, labelled
from ngeval.utils.memory import OUT_OF_MEMORY

MAX_METHODS = 1_000

Damping = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dampings = Annotated[list[Damping], Field(min_length=1, max_length=MAX_COUNT)]
Methods = Annotated[list[str], Field(min_length=1, max_length=MAX_METHODS)]
Scale = Literal["absolute", "mean", "relative"]
MetricBatches = Annotated[int, Field(ge=1)] | Literal["all"] | None


class Work(BaseModel, ABC):
    """What is computed for each unit of a run: one ``kind`` of table with its options."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: ClassVar[str]
    description: ClassVar[str]
    methods: list[str]
    _resolved: list[Method] | None = PrivateAttr(None)

    @classmethod
    def of(cls, methods: str | Iterable[str | Method | Optimizer], **options: Any) -> Self:
        """The work of some methods, as `ngeval.evaluate` takes them, with the fields as options.

        Raises:
            InputError: an unknown method, or an option that cannot be used.
        """
        resolved = get_methods(methods) if methods else []
        if "dampings" in options:
            options["dampings"] = check_dampings(options["dampings"])
        if "damping" in options:
            (options["damping"],) = check_dampings([options["damping"]])
        if "damping_scale" in options:
            check_scale(options["damping_scale"])
        try:
            work = cls(methods=[method.name for method in resolved], **options)
        except ValidationError as error:
            raise InputError(first_problem(error)) from error
        work._resolved = resolved
        return work

    @property
    def resolved(self) -> list[Method]:
        """The methods; resolving a name may import the module that it names."""
        if self._resolved is None:
            self._resolved = get_methods(self.methods) if self.methods else []
        return self._resolved

    @property
    def options(self) -> dict[str, Any]:
        """The fields as plain values, without the kind."""
        return self.model_dump(mode="json")

    @property
    def exact(self) -> bool:
        """Whether the exact natural gradient is computed, for which all of Θ is kept if it fits."""
        return True

    @property
    def num_dampings(self) -> int:
        """The number of dampings at which each method is graded."""
        return len(self.options.get("dampings", ()))

    def table(self, run: Run) -> pd.DataFrame:
        """The rows of all units of a run, computed in this process and written to no file.

        Raises:
            NgevalError: as `Units` and `unit_tables`.
        """
        units = Units(run, self.resolved)
        return table_of(entry for _, entry in unit_tables(units, self, run.keys))

    @abstractmethod
    def rows(self, run: Run, unit: Unit, on_method: OnMethod | None) -> pd.DataFrame:
        """The table of a unit; ``on_method`` is called with the name of each method once done."""

    @abstractmethod
    def failed_rows(self, reason: str, seed: int) -> pd.DataFrame:
        """The rows of a unit that cannot be graded."""


class GradingWork(Work):
    """The work of grading methods at dampings."""

    methods: Methods
    dampings: Dampings
    damping_scale: Scale = "absolute"
    metric_batches: MetricBatches = None
    natural: bool = True

    def failed_rows(self, reason: str, seed: int) -> pd.DataFrame:
        """A row for each method and damping of a unit that cannot be graded; its counts are 0."""
        pairs = itertools.product(self.methods, map(float, self.dampings))
        rows = pd.DataFrame(pairs, columns=["method", "damping"])
        return rows.assign(
            damping_scale=self.damping_scale,
            status="failed",
            reason=reason,
            num_samples=0,
            metric_samples=0,
            num_parameters=0,
            seed=seed,
        )

    def settings(self, run: Run, unit: Unit, on_method: OnMethod | None) -> dict[str, Any]:
        """The arguments of a grading; the batches that grade are the same for every unit."""
        count, metric = self.metric_batches, None
        if count is not None:
            metric = Metric(unit.problem, lambda: run.metric_batches(count))
        return {
            "damping_scale": self.damping_scale,
            "seed": run.seed_of(unit.key),
            "metric": metric,
            "natural": self.natural,
            "on_step": on_method,
        }


class GammaTable(GradingWork):
    """`ngeval.evaluate` on every unit."""

    kind: ClassVar[str] = "gamma"
    description: ClassVar[str] = "grading updates"
    gap: Annotated[float, Field(gt=0, allow_inf_nan=False)] = GAP

    @property
    def exact(self) -> bool:
        asked = self.natural or any(isinstance(m, NaturalGradient) for m in self.resolved)
        return asked and self.metric_batches is None

    def rows(self, run: Run, unit: Unit, on_method: OnMethod | None) -> pd.DataFrame:
        options = {"gap": self.gap} | self.settings(run, unit, on_method)
        return evaluate(unit.problem, unit.methods, self.dampings, **options)

    def failed_rows(self, reason: str, seed: int) -> pd.DataFrame:
        rows = super().failed_rows(reason, seed)
        if self.natural and self.metric_batches is None:
            rows["iterations"] = 0
        return rows.reindex(columns=COLUMNS)


class LayerTable(GradingWork):
    """`ngeval.layer_table` on every unit."""

    kind: ClassVar[str] = "layers"
    description: ClassVar[str] = "grading layers"
    groups: Annotated[int, Field(ge=1)] | Literal["layer", "parameter"] = "layer"

    def rows(self, run: Run, unit: Unit, on_method: OnMethod | None) -> pd.DataFrame:
        options = {"groups": self.groups} | self.settings(run, unit, on_method)
        return layer_table(unit.problem, unit.methods, self.dampings, **options)

    def failed_rows(self, reason: str, seed: int) -> pd.DataFrame:
        rows = super().failed_rows(reason, seed).assign(layer="")
        return rows.reindex(columns=LAYER_COLUMNS)


class SampleTable(Work):
    """`ngeval.gradient_norms` on every unit, one row for each sample.

    For each method a column ``loss_change_<method>``: the first-order change of that sample's loss
    for the unit step −d(λ), in nats; NaN where the method fails, and ``reason`` says why. A unit
    that cannot be graded has no rows.
    """

    kind: ClassVar[str] = "imbalance"
    description: ClassVar[str] = "gradient norms"
    methods: Annotated[list[str], Field(max_length=MAX_METHODS)] = []
    damping: Damping = 0.0

    def rows(self, run: Run, unit: Unit, on_method: OnMethod | None) -> pd.DataFrame:
        return sample_table(
            unit.problem, unit.methods, self.damping, run.seed_of(unit.key), on_method
        )

    def failed_rows(self, reason: str, seed: int) -> pd.DataFrame:
        return pd.DataFrame()


KINDS: dict[str, type[Work]] = {work.kind: work for work in (GammaTable, LayerTable, SampleTable)}
"""The kinds of work by name."""


def unit_tables(
    units: Units, work: Work, keys: Iterable[Key], on_method: OnMethod | None = None
) -> Iterator[tuple[Key, Entry]]:
    """The tables of units, with the columns that identify them in front.

    A unit that cannot be graded (an unreadable checkpoint, NaN weights) has failed rows. One that
    failed as a whole, or by a lack of memory in part, has a ``failure``: it is worth another try.
    ``on_method`` is called with the name of each method that is done.

    Raises:
        TaskError: the task has no such batch.
    """
    run = units.run
    for key in keys:
        try:  # in a function, whose end frees the unit's memory before the next one begins
            table = _rows(units, work, key, on_method)
            failure = _lost_memory(table)
        except TaskError:  # every checkpoint would fail with it
            raise
        except Exception as error:  # a model may be anybody's code; its failure is data
            failure = failure_reason(error)
            table = work.failed_rows(failure, run.seed_of(key))
        rows = labelled(table, run.columns(key))
        rows.attrs = {}
        yield key, Entry(rows, failure)


def _rows(units: Units, work: Work, key: Key, on_method: OnMethod | None) -> pd.DataFrame:
    unit = units.unit(key)
    if work.methods and units.count == 1:
        problem, pushes = unit.problem, len(work.methods) * max(1, work.num_dampings)
        note = memory_note(problem.sizes, problem.rows.memory, exact=work.exact, pushes=pushes)
        units.progress.note(note)
    rows = work.rows(units.run, unit, on_method)
    return add_note(rows, "; ".join(unit.remarks)) if "note" in rows else rows


def _lost_memory(table: pd.DataFrame) -> str:
    """Which methods lacked memory, of a table of any kind."""
    if "method" in table:
        return lost_memory(table)
    reason = str(table["reason"].iloc[0])
    return reason if OUT_OF_MEMORY in reason else ""
