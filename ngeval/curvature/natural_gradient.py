"""The exact natural gradient of a problem, by an eigendecomposition or a Krylov run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import GAP, MAX_ITERATIONS, Bounds, KrylovRun
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import FieldUpdates, SolvedUpdates, Updates, as_tensor
from ngeval.errors import NumericalError
from ngeval.problem.problem import Problem

LOST = 1e-2
"""An exact natural gradient whose γ exceeds its closed form by this part is lost to rounding."""

LARGE_RESIDUAL = 1e6
"""An entry of r = S⁺u as large as this (a loss of 28 nats) may cost the digits of the others."""


class NaturalGradientSolver(ABC):
    """(F + λI)⁻¹g for every λ, with bounds on its γ."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest eigenvalue of F."""

    @property
    @abstractmethod
    def iterations(self) -> int:
        """Krylov iterations so far; 0 for a factorisation."""

    @abstractmethod
    def gamma_min(self) -> float:
        """γ_min = (gᵀF⁺g)^(−1/2), from above where it is not exact; ∞ where g = 0."""

    @abstractmethod
    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """Bounds on γ(λ) for every λ, from the iterations so far."""

    @abstractmethod
    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ."""


class DenseSolver(NaturalGradientSolver):
    """By the eigendecomposition of SᵀΘS: (F + λI)⁻¹g = JᵀS (SᵀΘS + λI)⁻¹ r with r = S⁺u."""

    iterations = 0

    def __init__(self, problem: Problem, spectrum: Spectrum) -> None:
        """Check that S and r give the gradient.

        Args:
            problem: the model on its batch.
            spectrum: of SᵀΘS.

        Raises:
            NumericalError: a label's probability is too small for r.
        """
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        self.spectrum = spectrum
        if is_saturated(problem):
            gradient = problem.gradient().to(torch.float64)
            check_gradient(problem, self._projected_gradient(), gradient, "the batch's gradient")

    def _projected_gradient(self) -> Tensor:
        """JᵀS r with r as the spectrum has it."""
        problem, vectors = self.problem, self.spectrum.eigenvectors
        projected = (vectors @ (vectors.T @ self.right)).reshape(problem.outputs.shape)
        return problem.vjp(problem.distribution.factor_product(projected))

    @property
    def largest(self) -> float:
        return self.spectrum.largest

    def gamma_min(self) -> float:
        # The projection of r on the range is not longer than r, whatever the rounding.
        norm = min(self.spectrum.projected_norm(self.right), float(self.right.norm()))
        return 1 / norm if norm > 0 else float("inf")

    def bounds(self, dampings: Sequence[float]) -> Bounds:
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
        problem = self.problem
        solved = self.spectrum.solve(self.right, as_tensor(problem, dampings))
        fields = solved.reshape(len(dampings), *problem.outputs.shape)
        return FieldUpdates(problem, problem.distribution.factor_product(fields))


@dataclass
class KrylovSolver(NaturalGradientSolver):
    """By one Krylov run, which continues until the bounds are within the gap.

    Attributes:
        run: the run, which continues where it stopped.
        gap: relative, between the bounds.
        max_iterations: where to stop at the latest.
    """

    run: KrylovRun
    gap: float = GAP
    max_iterations: int = MAX_ITERATIONS

    @property
    def largest(self) -> float:
        """The largest Ritz value of at least 20 iterations."""
        while not self.run.exhausted and self.run.iterations < min(20, self.max_iterations):
            self.run.step()
        return self.run.largest()

    @property
    def iterations(self) -> int:
        return self.run.iterations

    def gamma_min(self) -> float:
        """The γ of the run's update at λ = 0: γ_min lies between the floor and it."""
        if not self.run.iterations:
            self.run.run([0.0], self.gap, self.max_iterations)
        return float(self.run.bounds([0.0]).upper[0])

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        return self.run.bounds(dampings)

    def updates(self, dampings: Sequence[float]) -> Updates:
        self.run.run(dampings, self.gap, self.max_iterations)
        run, lambdas, bounds = self.run, list(dampings), self.run.bounds(dampings)
        forms = [
            torch.from_numpy(form).to(run.problem.device)
            for form in (bounds.curvature, bounds.decrease, bounds.squared_norms)
        ]
        return SolvedUpdates(len(lambdas), lambda i: run.direction(lambdas[i]), *forms)


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
    if kernel.dense_is_feasible:
        return problem.shards.synchronized(lambda: DenseSolver(problem, kernel.fisher_spectrum))
    return KrylovSolver(kernel.once(KrylovRun), gap, max_iterations)


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
    """Check that what is made of S and r = S⁺u instead of u is the gradient, but for rounding.

    Args:
        problem: the model on its batch.
        through_r: the gradient by way of r.
        gradient: g, or a layer's part of it, float64.
        what: whose, for the message.

    Raises:
        NumericalError: they differ.
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
    """Raise where r overflows.

    Raises:
        NumericalError: a label's probability underflows, so r is infinite.
    """
    if not bool(torch.isfinite(problem.distribution.whitened_residual()).all()):
        raise NumericalError(
            "a label has probability below 1e-308 under the model, so uᵀH⁺u overflows"
        )
