"""``sf``: the Fisher estimated from labels drawn from the model, k for each sample.

F̂ = (1/k) ĜᵀĜ with kN rows ĝ = J_nᵀû; d = (F̂ + λI)⁻¹g, by the Woodbury identity
(1/λ)[g − Ĝᵀ(ĜĜᵀ + kλI)⁻¹Ĝg]. Source: Wu et al. (arXiv 2406.06420), "SF".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.logit_kernel import DenseKernel, LogitKernel
from ngeval.curvature.spectrum import Spectrum
from ngeval.errors import EngineError
from ngeval.methods.base import CotangentState
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
        """Draw the labels and factor ĜĜᵀ."""
        return SampledState(problem, kernel.theta, self.vectors(problem, seed))

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


class SampledState(CotangentState):
    """d = (g − Σ_nk c_nk ĝ_nk)/λ with c = (ĜĜᵀ + kλI)⁻¹Ĝg, from `SampledFisher.vectors`."""

    def __init__(self, problem: Problem, theta: LogitKernel, vectors: Tensor) -> None:
        size = vectors.shape[1]
        self.mc_samples = size - 1
        # The inner products of every sampled gradient with the true and the sampled ones.
        products = theta.gram(vectors).unflatten(0, (-1, size))[:, 1:].unflatten(2, (-1, size))
        self.right = products[..., 0].sum(2).flatten()  # Ĝg
        if isinstance(theta, DenseKernel):
            self.spectrum = theta.spectrum(vectors[:, 1:], self.right)
        else:
            square = products[..., 1:].flatten(2).flatten(0, 1)
            self.spectrum = Spectrum.of_gram(square, problem.function.row_epsilon, self.right)
        super().__init__(problem, vectors, self.spectrum.largest / self.mc_samples)

    def coefficients(self, dampings: Tensor) -> Tensor:
        """The coefficients of g_n and of ĝ_nk; λ = 0 is the pseudo-inverse."""
        draws = self.mc_samples
        zero = dampings == 0
        scale = torch.where(zero, 1.0, dampings).reshape(-1, 1, 1)
        solved = self.spectrum.solve(self.right, draws * dampings).unflatten(1, (-1, draws))
        damped = torch.cat([torch.ones_like(solved[..., :1]), -solved], 2) / scale
        return torch.where(zero.reshape(-1, 1, 1), self._pseudo_inverse(), damped)

    def _pseudo_inverse(self) -> Tensor:
        """The coefficients of F̂⁺g = k Ĝᵀ(ĜĜᵀ)⁺²Ĝg."""
        at_zero = torch.zeros(1, dtype=torch.float64, device=self.right.device)
        once = self.spectrum.solve(self.right, at_zero)[0]
        twice = self.spectrum.solve(once, at_zero).unflatten(1, (-1, self.mc_samples))
        return self.mc_samples * torch.cat([torch.zeros_like(twice[..., :1]), twice], 2)
