"""The exact natural gradient of a problem, by an eigendecomposition or a Krylov run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS, Bounds, KrylovRun
from ngeval.curvature.logit_kernel import dense_is_feasible
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import FieldUpdates, Updates, as_tensor
from ngeval.errors import NumericalError
from ngeval.problem.problem import Problem

LOST = 1e-2
"""An exact natural gradient whose γ exceeds its closed form by this part is lost to rounding."""

LARGE_RESIDUAL = 1e6
"""An entry of r = S⁺u as large as this (a loss of 28 nats) may cost the digits of the others."""


class DenseSolver:
    """By the eigendecomposition of SᵀΘS: (F + λI)⁻¹g = JᵀS (SᵀΘS + λI)⁻¹ r with r = S⁺u."""

    iterations = 0

    def __init__(self, problem: Problem, spectrum: Spectrum) -> None:
        """Check that S and r give the gradient.

        Raises:
            NumericalError: a label's probability is too small for r.
        """
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        self.spectrum = spectrum
        if is_saturated(problem):
            # JᵀS r with r as the spectrum has it.
            projected = spectrum.eigenvectors @ (spectrum.eigenvectors.T @ self.right)
            field = problem.distribution.factor_product(projected.reshape(problem.outputs.shape))
            gradient = problem.gradient().to(torch.float64)
            check_gradient(problem, problem.vjp(field), gradient, "the batch's gradient")

    @property
    def largest(self) -> float:
        """The largest eigenvalue of F."""
        return self.spectrum.largest

    def gamma_min(self) -> float:
        """γ_min = (gᵀF⁺g)^(−1/2); ∞ where g = 0."""
        # The projection of r on the range is not longer than r, whatever the rounding.
        norm = min(self.spectrum.projected_norm(self.right), float(self.right.norm()))
        return 1 / norm if norm > 0 else float("inf")

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """Bounds on γ(λ) for every λ."""
        # The part of r outside the eigenvectors could lie just below the cut-off. At λ = 0 it does
        # not count: that is the definition of the pseudo-inverse with a cut-off.
        lambdas = as_tensor(self.problem, dampings).unsqueeze(1)
        spectrum = self.spectrum
        squares = (spectrum.eigenvectors.T @ self.right).square()
        shares = spectrum.eigenvalues / (spectrum.eigenvalues + lambdas)
        decrease, curvature = (squares * shares).sum(1), (squares * shares**2).sum(1)
        norms = (squares * shares**2 / spectrum.eigenvalues).sum(1)
        hidden = (self.right.square().sum() - squares.sum()).clamp_min(0)
        share = torch.where(
            lambdas[:, 0] > 0, spectrum.cutoff / (spectrum.cutoff + lambdas[:, 0]), 0.0
        )
        low = curvature.sqrt() / (decrease + hidden * share)
        low = torch.maximum(low, self.right.norm().clamp_min(1e-300) ** -1)
        high = (curvature + hidden * share.square()).sqrt() / decrease
        high = torch.maximum(high, low)
        return Bounds(*(part.cpu().numpy() for part in (low, high, curvature, decrease, norms)))

    def updates(self, dampings: Sequence[float]) -> Updates:
        """(F + λI)⁻¹g for every λ."""
        problem = self.problem
        solved = self.spectrum.solve(self.right, as_tensor(problem, dampings))
        fields = solved.reshape(len(dampings), *problem.outputs.shape)
        return FieldUpdates(problem, problem.distribution.factor_product(fields))


NaturalGradientSolver = DenseSolver | KrylovRun


def natural_solver(
    kernel: Kernel, gap: float = GAP, max_iterations: int = MAX_ITERATIONS
) -> NaturalGradientSolver:
    """The exact solver where Θ is within reach, a Krylov run otherwise.

    Both share the costly part, a factorisation or the run so far, with other calls for the kernel.

    Raises:
        NumericalError: a label's probability underflows, so r is infinite.
    """
    problem = kernel.problem
    check_residual(problem)
    if dense_is_feasible(problem.sizes, problem.rows.memory):
        return problem.shards.synchronized(lambda: DenseSolver(problem, kernel.fisher_spectrum))
    return kernel.once(KrylovRun, gap, max_iterations)


def gamma_min(problem: Problem) -> float:
    """γ_min = (gᵀF⁺g)^(−1/2), the least γ that any update has: that of the natural gradient.

    With r = S⁺u, gᵀF⁺g is the squared norm of the projection of r on the range of SᵀJ. Where the
    logit kernel is out of reach, this is the γ of a Krylov run's update, and γ_min lies between
    `gamma_floor` and it. Returns ∞ where g = 0.

    Raises:
        NumericalError: a label's probability underflows, so r is infinite.
    """
    return natural_solver(Kernel(problem)).gamma_min()


def is_saturated(problem: Problem) -> bool:
    """Whether an entry of r is so large that combinations of it may lose the others' digits.

    With a label of probability e⁻¹⁰⁰, r has an entry of e⁵⁰.
    """
    return not float(problem.distribution.whitened_residual().abs().max()) < LARGE_RESIDUAL


def check_gradient(problem: Problem, through_r: Tensor, gradient: Tensor, what: str) -> None:
    """Raise if what is made of S and r = S⁺u instead of u is not the gradient, but for rounding.

    Args:
        problem: the model on its batch.
        through_r: the gradient by way of r.
        gradient: g, or a layer's part of it, float64.
        what: whose, for the message.
    """
    gap = float((through_r.to(torch.float64) - gradient).norm())
    whole = float(problem.gradient().to(torch.float64).norm())
    allowed = max(1e-3, 100 * problem.function.row_epsilon)
    if not gap <= allowed * max(float(gradient.norm()), 1e-3 * whole):
        raise lost_to_rounding(problem, what)


def lost_to_rounding(problem: Problem, what: str) -> NumericalError:
    """The error of an update that has lost its digits to a label's small probability."""
    hint = "" if problem.dtype == torch.float64 else "; try dtype=torch.float64"
    return NumericalError(
        f"{what} is lost to rounding where it is made of S and S⁺u: the largest loss of a sample "
        f"is {float(problem.loss.max()):.3g} nats, and beyond about 30 its label's probability may "
        f"be too small for that, the more so the smaller λ is{hint}"
    )


def check_residual(problem: Problem) -> None:
    """Raise if a label's probability underflows, so that r is infinite."""
    if not bool(torch.isfinite(problem.distribution.whitened_residual()).all()):
        raise NumericalError(
            "a label has probability below 1e-308 under the model, so uᵀH⁺u overflows"
        )
