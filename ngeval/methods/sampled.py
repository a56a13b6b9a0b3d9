"""``sf``: the Fisher estimated with labels drawn from the model, k draws for each sample.

F̂ = (1/k) ĜᵀĜ with kN rows ĝ = J_nᵀû; d = (F̂ + λI)⁻¹g, by the Woodbury identity
(1/λ)[g − Ĝᵀ(ĜĜᵀ + kλI)⁻¹Ĝg]. Source: Wu et al. (arXiv 2406.06420), "SF".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.kernel import Spectrum, gradient_products
from ngeval.methods.base import CotangentState
from ngeval.problem import Problem


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
        generator = torch.Generator().manual_seed(seed)
        labels = problem.distribution.sample(self.mc_samples, generator)
        residuals = problem.distribution.residual(labels)
        spectrum = Spectrum.of(gradient_products(problem, residuals, residuals), problem.dtype)
        return SampledState(problem, spectrum, residuals)


class SampledState(CotangentState):
    """w = (u − Σ_k c_k û_k)/λ with c = (ĜĜᵀ + kλI)⁻¹Ĝg."""

    def __init__(self, problem: Problem, spectrum: Spectrum, residuals: Tensor) -> None:
        """Keep the factored Gram matrix and the sampled residuals ``(k, N, *positions, C)``."""
        self.mc_samples = residuals.shape[0]
        super().__init__(problem, spectrum.largest / self.mc_samples)
        self.spectrum = spectrum
        self.residuals = residuals
        observed = problem.residual.unsqueeze(0)
        # Ĝg: every sampled gradient against the sum of the observed ones.
        self.right = gradient_products(problem, residuals, observed).sum(1)

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
        """Σ_k c_kn û_kn for coefficients ``(L, kN)``: shape ``(L, N, *positions, C)``."""
        shaped = coefficients.reshape(-1, *self.residuals.shape[:2])
        return torch.einsum("lkn,kn...->ln...", shaped, self.residuals)
