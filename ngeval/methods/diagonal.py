"""``diag`` and ``diag-ef``: diagonal preconditioners.

``diag`` divides by the exact diagonal of the Fisher, ``diag-ef`` by that of the empirical Fisher
Σ_n g_n², raised to an exponent ρ: ρ = ½ is the square root in Adam's and FAdam's update
(Hwang, arXiv 2405.12807, §3.4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.jacobians import squared_column_sums
from ngeval.methods.base import ParameterState
from ngeval.problem import Problem


@dataclass(frozen=True)
class Diagonal:
    """d(λ) = g / (diag F + λ), with the exact diagonal."""

    name: str = "diag"

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Compute diag F: C backward passes for each sample."""
        return DiagonalState(problem, problem.fisher().diagonal(), 1.0)


@dataclass(frozen=True)
class DiagonalEmpirical:
    """d(λ) = g / (Σ_n g_n² + λ)^ρ.

    Attributes:
        exponent: ρ.
    """

    name: str
    exponent: float

    def prepare(self, problem: Problem, seed: int = 0) -> DiagonalState:
        """Sum the squared per-sample gradients."""
        squares = problem.remember(
            "empirical_diagonal",
            lambda: squared_column_sums(problem.rows, problem.residual.unsqueeze(1)),
        )
        return DiagonalState(problem, squares, self.exponent)


class DiagonalState(ParameterState):
    """g / (f + λ)^ρ for a diagonal f ≥ 0."""

    def __init__(self, problem: Problem, diagonal: Tensor, exponent: float) -> None:
        """Keep f and ρ."""
        super().__init__(problem, float(diagonal.max()))
        self.diagonal = diagonal
        self.exponent = exponent

    def direction(self, damping: float) -> Tensor:
        """The update, in float64; an entry where f + λ is exactly 0 is 0 (pseudo-inverse)."""
        gradient = self.problem.gradient().to(torch.float64)
        divisor = (self.diagonal + damping) ** self.exponent
        return torch.where(self.diagonal + damping > 0, gradient / divisor, 0.0)
