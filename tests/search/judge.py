"""A row of ngeval against its right value: right, uncertain, wrong, missing, or not decidable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from flint import arb

import ngeval
from tests.search.problems import Drawn
from tests.search.right import (
    Grade,
    Right,
    Rows,
    Updates,
    gamma_min,
    perturbed,
    rows_of,
    tiny_dampings,
)

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23}
PERTURBATIONS = 2
CLAIMS = {name: f"{name}_error" for name in ("gamma_min", "gamma_over_sgd", "gamma_over_ng")}
CLAIMS |= dict.fromkeys(("decrease", "update_norm", "damping_absolute"), "update_error")
"""The column with the error of another; the others have γ's."""

STABLE = 0.2
"""A right value is stable if perturbed rows move it by less than this part of the tolerance."""


EXACT = 1e-9
"""A number this close to its right value is right, whether that is stable or not."""


@dataclass(frozen=True)
class Verdict:
    """What became of one number.

    Attributes:
        kind: ``right``, ``wrong``, ``uncertain``, ``missing`` or ``unstable``.
        what: the column.
        method: of the row.
        damping: of the row, absolute.
        got: what the table says.
        right: what it should say.
        error: the relative difference.
        claimed: the row's own estimate of it (NaN where there is none).
        text: status and reason of the row.
    """

    kind: str
    what: str
    method: str
    damping: float
    got: float
    right: float
    error: float
    claimed: float
    text: str


class Reference:
    """The right values of a problem: once as they are, and for perturbed rows."""

    def __init__(self, drawn: Drawn, problem: ngeval.Problem, dtype: str) -> None:
        self.drawn, epsilon = drawn, EPSILON[dtype]
        local = (drawn.inputs, drawn.targets)
        batches = [local] if drawn.metric is None else [local, drawn.metric]
        rows = [rows_of(drawn.model, *batch, drawn.family, drawn.variance) for batch in batches]
        generator = np.random.default_rng(1)
        noisy = [
            [perturbed(part, epsilon, generator) for part in rows] for _ in range(PERTURBATIONS)
        ]
        self._rows = [rows, *noisy]
        self._versions: dict[int, _Version] = {}
        self._grades: dict[tuple[str, float, int], Grade | None] = {}
        self._clear: dict[str, bool] = {}
        self.sampled = {
            draws: _draws(problem, draws, drawn.seed) for draws in _needed(drawn.methods)
        }

    def version(self, version: int) -> _Version:
        """The rows as they are, or changed ones."""
        if version not in self._versions:
            self._versions[version] = _Version(self._rows[version])
        return self._versions[version]

    def grade(self, method: str, damping: float, version: int = 0) -> Grade | None:
        """By the rows as they are, or changed ones; None where rank is a matter of rounding."""
        key = method, damping, version
        if key not in self._grades:
            labels = self.sampled.get(_count(method), [])
            clear = damping > 0 or method == "sgd" or self._has_clear_rank(method)
            grade = self.version(version).grade(method, damping, labels) if clear else None
            self._grades[key] = grade
        return self._grades[key]

    def _has_clear_rank(self, method: str) -> bool:
        """Whether λ = 0 means the same for every version of the rows."""
        if method not in self._clear:
            self._clear[method] = method.startswith("diag") or (
                not method.startswith("sf")  # F̂⁺g is another thing than the limit; see test_methods
                and self.version(0).right.has_clear_rank(method)
            )
        return self._clear[method]

    def largest(self, method: str) -> float:
        """The largest eigenvalue of the method's own curvature, in float64."""
        labels = self.sampled.get(_count(method), [])
        matrix = self.version(0).updates.curvature(method, labels)
        values = [[float(entry.mid()) for entry in row] for row in matrix.tolist()]
        return float(np.linalg.eigvalsh(np.array(values))[-1])

    def gamma_min(self, version: int) -> float | None:
        """γ_min by the rows as they are, or changed ones."""
        return self.version(version).gamma_min() if self._has_clear_rank("ng") else None


class _Version:
    def __init__(self, rows: list[Rows]) -> None:
        self.right = Right(rows[0])
        self.metric = Right(rows[1]) if len(rows) > 1 else self.right
        self.updates = Updates(self.right)

    def grade(self, method: str, damping: float, labels: list[np.ndarray]) -> Grade | None:
        if damping > 0 or method.startswith(("sgd", "diag")):
            return self.updates.grade(method, arb(damping), labels, self.metric)
        curvature = self.updates.curvature(method, labels)
        both = [
            self.updates.grade(method, tiny, labels, self.metric)
            for tiny in tiny_dampings(curvature, self.right.bits)
        ]
        return both[1] if _agree(both[0].gamma, both[1].gamma) else None

    def gamma_min(self) -> float | None:
        tiny = tiny_dampings(self.right.fisher, self.right.bits)
        both = [gamma_min(self.right, damping) for damping in tiny]
        return both[1] if _agree(*both) else None


def _agree(first: float, second: float) -> bool:
    return math.isfinite(second) and abs(first - second) <= 1e-9 * abs(second)


def _count(method: str) -> int:
    name, _, option = method.partition(":")
    return int(option or 1) if name in ("sf", "diag-sf") else 0


def _needed(methods: tuple[str, ...]) -> set[int]:
    return {_count(method) for method in methods} - {0}


def _draws(problem: ngeval.Problem, draws: int, seed: int) -> list[np.ndarray]:
    """The labels that a method draws with this seed: data, as far as the right value goes."""
    generator = torch.Generator().manual_seed(seed)
    labels = problem.distribution.sample(draws, generator)
    shape = (draws, problem.num_samples, -1)
    sequence = problem.outputs.ndim > 2 or problem.likelihood.name == "categorical"
    if problem.likelihood.name != "categorical":
        positions = problem.outputs.shape[1:-1].numel() if sequence else 1
        shape = (draws, problem.num_samples, positions, problem.outputs.shape[-1])
    return list(labels.reshape(shape).numpy())


def judge(drawn: Drawn) -> Iterator[Verdict]:
    """Every number of the table of a problem."""
    problem = drawn.problem()
    metric = None if drawn.metric is None else ngeval.Metric(problem, [drawn.metric])
    table = ngeval.evaluate(
        problem,
        drawn.methods,
        drawn.dampings,
        damping_scale=drawn.scale,
        seed=drawn.seed,
        metric=metric,
        natural=drawn.natural,
    )
    dtype = str(table["dtype"].iloc[0])
    reference = Reference(drawn, problem, dtype if dtype in EPSILON else "float32")
    for _, row in table.iterrows():
        yield from _judge_row(row, reference, dtype)
    if drawn.natural and drawn.metric is None:
        row = table.iloc[0]
        yield _verdict("gamma_min", row, reference.gamma_min, row["gamma_min"], dtype)
        yield from _judge_bounds(table, reference)


def _judge_row(row: pd.Series, reference: Reference, dtype: str) -> Iterator[Verdict]:
    damping, method = float(row["damping_absolute"]), str(row["method"])
    if math.isnan(damping) and method != "sgd":
        if row["status"] != "failed":
            yield _verdict("damping_absolute", row, lambda _: 1.0, damping, dtype)
        return
    if row["damping_scale"] == "relative" and method != "sgd":
        expected = reference.largest(method) * float(row["damping"])
        yield _verdict("damping_absolute", row, lambda _: expected, damping, dtype)
    solved = 0.0 if method == "sgd" else damping

    def ratio(version: int) -> float | None:
        grade = reference.grade(method, solved, version)
        plain = reference.grade("sgd", 0.0, version)
        if grade is None or plain is None:
            return None
        return grade.gamma / plain.gamma if plain.gamma else math.nan

    def value(name: str, version: int) -> float | None:
        grade = reference.grade(method, solved, version)
        return None if grade is None else float(getattr(grade, name))

    for what, name in {"gamma": "gamma", "decrease": "decrease", "update_norm": "norm"}.items():
        yield _verdict(what, row, partial(value, name), float(row[what]), dtype)
    yield _verdict("gamma_over_sgd", row, ratio, float(row["gamma_over_sgd"]), dtype)


def _judge_bounds(table: pd.DataFrame, reference: Reference) -> Iterator[Verdict]:
    """The exact γ of (F + λI)⁻¹g lies between its bounds, and no γ below γ_min."""
    rows = table.drop_duplicates("damping_absolute").dropna(subset=["damping_absolute"])
    for _, row in rows.iterrows():
        damping = float(row["damping_absolute"])
        low, high = float(row["gamma_ng_lower"]), float(row["gamma_ng_upper"])

        def exact(version: int, damping: float = damping) -> float | None:
            grade = reference.grade("ng", damping, version)
            return None if grade is None else grade.gamma

        right = exact(0)
        if right is None or math.isnan(low) or math.isnan(high):
            continue
        nearest = min(max(right, low), high)
        yield _verdict("bounds", row, exact, nearest, str(row["dtype"]))
    for _, row in table[table["status"] == "ok"].iterrows():
        ratio = float(row["gamma_over_ng"])
        if not math.isnan(ratio):
            got = max(1.0, 2.0 - ratio)
            yield _verdict("gamma_over_ng", row, lambda _: 1.0, got, str(row["dtype"]))


def _verdict(
    what: str,
    row: pd.Series,
    value_of: Callable[[int], float | None],
    got: float,
    dtype: str,
) -> Verdict:
    tolerance = TOLERANCE.get(dtype, TOLERANCE["float32"])
    right = value_of(0)
    status = str(row["status"])
    claimed = float(row.get(CLAIMS.get(what, "gamma_error"), math.nan))
    error = _difference(got, right) if right is not None else math.nan
    stable = right is not None and math.isfinite(right) and right != 0
    for version in range(1, 1 + PERTURBATIONS) if stable and not error <= EXACT else []:
        value = value_of(version)
        stable &= value is not None and _difference(value, right) <= STABLE * tolerance
    allowed = max(tolerance, 10 * (0.0 if math.isnan(claimed) else claimed))
    kind = "right" if error <= allowed else "wrong"
    if math.isnan(got) and f"no {what}:" in str(row["note"]):
        status = "undefined"
    if status in ("failed", "undefined", "uncertain"):
        kind = "uncertain" if status == "uncertain" else "missing"
    if not stable:
        kind = "unstable"
    return Verdict(
        kind,
        what,
        str(row["method"]),
        float(row["damping_absolute"]),
        got,
        math.nan if right is None else right,
        error,
        claimed,
        f"{status}; {row['reason']}",
    )


def _difference(got: float, right: float) -> float:
    if math.isnan(got) or math.isinf(got):
        return math.inf
    return abs(got - right) / max(abs(right), 1e-300)


def counts(verdicts: list[Verdict]) -> Counter[tuple[str, str]]:
    """How many of each kind, by column."""
    return Counter((v.what, v.kind) for v in verdicts)
