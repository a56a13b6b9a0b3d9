"""``diag``, ``diag-sf``, ``diag-ef``, ``diag-ief``: diagonal preconditioners.

d(λ) = g / (f + λ)^ρ with f the diagonal of Σ_nq (J_nᵀv_nq)(J_nᵀv_nq)ᵀ, where v depends on the
source of labels (see `ngeval.methods.label_sources`). ρ = ½ is the square root in the updates of
Adam and FAdam (Hwang, arXiv 2405.12807, §3.4.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import SENSITIVE, DirectionUpdates, Updates
from ngeval.errors import InputError
from ngeval.jacobians import squared_column_sums
from ngeval.methods.base import ParameterState
from ngeval.methods.label_sources import EXACT, SAMPLED, Labels, parse_draws
from ngeval.problem.problem import Problem

UNDERFLOW = 4 * 2.0**-1074
"""The rounding of squares that underflow."""


@dataclass(frozen=True)
class Diagonal:
    """d(λ) = g / (f + λ)^ρ; f depends on the labels, and ρ is the exponent."""

    name: str = "diag"
    labels: Labels = field(default_factory=lambda: Labels(EXACT))
    exponent: float = 1.0

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> Diagonal:
        """Build the method from its full name, ``diag:ρ`` or ``diag-sf:k:ρ``, and its parameter."""
        words = parameter.split(":") if parameter else []
        labels = Labels.of_method(name)
        if labels.source == SAMPLED and words:
            labels = Labels(SAMPLED, parse_draws(name, words.pop(0)))
        exponent = parse_exponent(name, words.pop(0)) if words else 1.0
        if words:
            raise InputError(f"method {name!r} has more after its colon than it takes")
        return cls(name, labels, exponent)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> DiagonalState:
        """Sum the squared rows: C backward passes for the exact diagonal, k for k draws, else 1.

        Raises:
            EngineError: the batch has too many outputs for the exact diagonal.
        """
        if self.labels.source == EXACT:
            diagonal = problem.fisher().diagonal()
        else:
            diagonal = kernel.once(_diagonal, self.labels, self.labels.relevant(seed))
        return DiagonalState(problem, diagonal, self.exponent)


def _diagonal(problem: Problem, labels: Labels, seed: int) -> Tensor:
    return squared_column_sums(problem.rows, labels.vectors(problem, seed))


class DiagonalState(ParameterState):
    """g / (f + λ)^ρ for a diagonal f ≥ 0."""

    def __init__(self, problem: Problem, diagonal: Tensor, exponent: float) -> None:
        super().__init__(problem, float(diagonal.max()))
        self.gradient = problem.gradient()
        self.diagonal = diagonal
        self.exponent = exponent

    def direction(self, damping: float) -> Tensor:
        """The update, in float64; an entry where f + λ and g are exactly 0 is 0 (pseudo-inverse).

        One where f + λ alone is 0 is infinite: f underflows.
        """
        gradient, damped = self.gradient.to(torch.float64), self.diagonal + damping
        return torch.where((damped == 0) & (gradient == 0), 0.0, gradient / damped**self.exponent)

    def updates(self, dampings: Sequence[float]) -> Updates:
        def changed(entries: Callable[[], Tensor]) -> Callable[[int], Tensor] | None:
            other = self._rounded(entries())
            least = torch.finfo(self.problem.dtype).eps ** SENSITIVE
            for damping in dampings:
                known = self.direction(damping)
                if not float((other.direction(damping) - known).norm()) <= least * known.norm():
                    return lambda i: other.direction(dampings[i])
            return None

        def make(index: int) -> Tensor:
            return self.direction(dampings[index])

        return DirectionUpdates(len(dampings), make, changed=changed)

    def _rounded(self, entries: Tensor) -> DiagonalState:
        """With f and g changed where they are no more than the rounding of rows."""
        # A backward pass knows an entry to the rounding of its whole row, but for exact zeros.
        least = torch.finfo(self.problem.dtype).eps
        entries = torch.where(self.diagonal > 0, entries.clamp_min(least), entries)
        roots, gradient = self.diagonal.sqrt(), self.gradient.to(torch.float64)
        diagonal = (roots + entries * roots.norm()).square() + UNDERFLOW * (roots > 0)
        other = DiagonalState(self.problem, diagonal, self.exponent)
        other.gradient = gradient + entries * (gradient.norm() * self.problem.num_samples**0.5)
        return other


def parse_exponent(name: str, text: str) -> float:
    """The exponent ρ in a method's name, a finite number."""
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not math.isfinite(exponent):
        raise InputError(f"method {name!r}: the exponent must be a number, as in diag-ef:0.5")
    return exponent
