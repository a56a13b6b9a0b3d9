"""``sf``: the Fisher estimated with labels drawn from the model, k draws for each sample.

F̂ = (1/k) ĜᵀĜ with kN rows ĝ = J_nᵀû; d = (F̂ + λI)⁻¹g, by the Woodbury identity
(1/λ)[g − Ĝᵀ(ĜĜᵀ + kλI)⁻¹Ĝg]. Source: Wu et al. (arXiv 2406.06420), "SF".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import EngineError
from ngeval.kernel import logit_kernel
from ngeval.methods.base import CotangentState
from ngeval.problem import Problem
from ngeval.spectrum import Spectrum


@dataclass(frozen=True)
class SampledFisher:
    """d(λ) = (F̂ + λI)⁻¹g; at λ = 0, F̂⁺g, which lives in the sampled range alone.

    The limit λ → 0 is another thing: it is ruled by the part of g outside that range.

    Attributes:
        mc_samples: k, the number of label draws for each sample.
    """

    name: str
    mc_samples: int

    def prepare(self, problem: Problem, seed: int = 0) -> SampledState:
        """Draw the labels and factor ĜĜᵀ once."""
        rows = self.mc_samples * problem.num_samples
        if 5 * 8 * rows**2 > problem.rows.memory:
            raise EngineError(
                f"{self.name} has {rows} sampled gradients, whose Gram matrix does not fit in the "
                f"memory budget of {problem.rows.memory / 2**30:.1f} GiB; take fewer draws"
            )
        generator = torch.Generator().manual_seed(seed)
        labels = problem.distribution.sample(self.mc_samples, generator)
        residuals = problem.distribution.residual(labels).transpose(0, 1)
        kernel = logit_kernel(problem)
        # Ĝg: every sampled gradient against g, as û_nkᵀ (Θu)_n.
        tangent = kernel.push(problem.residual.unsqueeze(0))[0].transpose(0, 1)
        right = (residuals * tangent).flatten(2).sum(2).flatten()
        return SampledState(problem, kernel.spectrum(residuals, right), residuals, right)


class SampledState(CotangentState):
    """w = (u − Σ_k c_k û_k)/λ with c = (ĜĜᵀ + kλI)⁻¹Ĝg."""

    def __init__(
        self, problem: Problem, spectrum: Spectrum, residuals: Tensor, right: Tensor
    ) -> None:
        """Keep the factored ĜĜᵀ, the sampled residuals ``(N, k, *positions, C)`` and Ĝg."""
        self.mc_samples = residuals.shape[1]
        super().__init__(problem, spectrum.largest / self.mc_samples)
        self.spectrum = spectrum
        self.residuals = residuals
        self.right = right

    def cotangents(self, dampings: Tensor) -> Tensor:
        """The cotangent of every λ; λ = 0 is the pseudo-inverse."""
        draws = self.mc_samples
        damped = self._combine(self.spectrum.solve(self.right, draws * dampings))
        scale = dampings.reshape(-1, *[1] * self.problem.residual.ndim)
        fields = (self.problem.residual - damped) / torch.where(scale > 0, scale, 1.0)
        if bool((dampings == 0).any()):
            fields = torch.where(scale > 0, fields, self._pseudo_inverse())
        return fields

    def _pseudo_inverse(self) -> Tensor:
        """F̂⁺g = k Ĝᵀ(ĜĜᵀ)⁺²Ĝg."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.right.device)
        once = self.spectrum.solve(self.right, zero)[0]
        return self.mc_samples * self._combine(self.spectrum.solve(once, zero))

    def _combine(self, coefficients: Tensor) -> Tensor:
        """Σ_k c_nk û_nk for coefficients ``(L, N·k)``: shape ``(L, N, *positions, C)``."""
        shaped = coefficients.reshape(-1, *self.residuals.shape[:2])
        return torch.einsum("lnk,nk...->ln...", shaped, self.residuals)
