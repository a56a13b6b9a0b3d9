"""``sf``: the Fisher estimated from labels drawn from the model, k for each sample.

F̂ = (1/k) ĜᵀĜ with kN rows ĝ = J_nᵀû; d = (F̂ + λI)⁻¹g, by the Woodbury identity
(1/λ)[g − Ĝᵀ(ĜĜᵀ + kλI)⁻¹Ĝg]. Source: Wu et al. (arXiv 2406.06420), "SF".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.damped_inverse import DampedInverse
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.row_space import RowSpace
from ngeval.curvature.updates import SpaceUpdates
from ngeval.errors import EngineError
from ngeval.methods.base import State
from ngeval.methods.label_sources import parse_draws, sampled_residuals
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes


@dataclass(frozen=True)
class SampledFisher:
    """d(λ) = (F̂ + λI)⁻¹g; at λ = 0, F̂⁺g, which is in the range of F̂.

    The limit λ → 0 is different: the part of g outside that range dominates it. ``mc_samples`` is
    k, the number of labels drawn for each sample.
    """

    name: str
    mc_samples: int

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> SampledFisher:
        """Build the method from its full name and the text after the colon, k."""
        return cls(name, parse_draws(name, parameter or "1"))

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> SampledState:
        """Draw the labels and factor Ĝ."""
        vectors = self.vectors(problem, seed)
        space = kernel.space(vectors)
        gradient = space.gradient(vectors[:, :1])
        drawn, root = vectors[:, 1:], self.mc_samples**0.5
        rows, lengths = space.rows(drawn) / root, space.lengths(drawn) / root
        sampled = kernel.factor((self, seed), rows, lengths)
        return SampledState(space, DampedInverse(sampled, gradient))

    def vectors(self, problem: Problem, seed: int) -> Tensor:
        """The residuals u and the k sampled ones, shape ``(N, 1 + k, *positions, C)``.

        Raises:
            EngineError: the Gram matrix of the sampled gradients does not fit in memory.
        """
        rows = self.mc_samples * problem.num_samples
        if 5 * 8 * rows**2 > problem.rows.memory:
            raise EngineError(
                f"{self.name} has {rows} sampled gradients, whose Gram matrix does not fit in the "
                f"memory budget of {describe_bytes(problem.rows.memory)}; take fewer draws"
            )
        sampled = sampled_residuals(problem, self.mc_samples, seed)
        return torch.cat([problem.residual.unsqueeze(1), sampled], 1)


class SampledState(State):
    """d = (ĜᵀĜ/k + λI)⁻¹g in the coordinates of a space."""

    def __init__(self, space: RowSpace, inverse: DampedInverse) -> None:
        self.space = space
        self.inverse = inverse

    @property
    def largest_curvature(self) -> float:
        return self.inverse.rows.largest

    @property
    def rank(self) -> int:
        """The rank at λ = 0."""
        return self.inverse.rows.at_zero.rank

    def updates(self, dampings: Sequence[float]) -> SpaceUpdates:
        return SpaceUpdates.of(self.space, map(self.inverse.solve, dampings))
