"""The natural gradient without Θ: one Krylov run for every λ, with two-sided bounds.

Golub–Kahan bidiagonalisation of B = SᵀJ started at r = S⁺u gives, after k steps, BV = UL with a
lower bidiagonal L, (k+1) × k, and V spanning g, Fg, …, F^(k−1)g. With μ the spectral measure of
BBᵀ at r (total mass ‖r‖²), all results are integrals against μ:

    gᵀ(F + λI)⁻¹g = ∫ x/(x + λ) dμ        d(λ)ᵀF d(λ) = ∫ x²/(x + λ)² dμ

The singular values of L squared are the nodes of the Gauss–Radau rule with a node at 0, those of
its first k rows of the Gauss rule; (x + λ)⁻¹ and (x + λ)⁻² have derivatives of one sign, so the
two rules enclose their integrals. The total mass ‖r‖² includes the floor γ ≥ ‖r‖⁻¹.
Sources: Golub and Meurant, "Matrices, Moments and Quadrature with Applications" (2010), ch. 6–8;
Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix" (1965);
one-sided reorthogonalisation: Simon and Zha, SIAM J. Sci. Comput. 21 (2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ngeval.curvature.bounds import Bounds
from ngeval.curvature.row_svd import graded_svd
from ngeval.curvature.updates import DirectionUpdates
from ngeval.problem.problem import Problem

GAP = 1e-4
"""The relative gap between the bounds on γ at which a run stops."""

MAX_ITERATIONS = 300
"""A run stops at this many iterations: each costs a JVP and a VJP."""

ROUNDING = 10
"""Entries of L below this many ε of the model's dtype, relative to the largest, are rounding and
end the run; singular values below k times that are rounding, too."""

SAFETY = 10
"""The rounding of a run may change the bounds by this many times ‖F‖ε/λ."""

LARGE = 1e-3
"""From this damping on, relative to the largest node, the rules of x² dμ are used as well."""


class KrylovRun:
    """A run that continues where it stopped, when a λ needs more iterations.

    It starts from u₁ = r/‖r‖, v₁ = g/‖g‖.

    Args:
        problem: the model on its batch.
        gap: relative, between the bounds: where to stop.
        max_iterations: where to stop at the latest.
    """

    def __init__(
        self, problem: Problem, gap: float = GAP, max_iterations: int = MAX_ITERATIONS
    ) -> None:
        self.problem = problem
        self.gap = gap
        self.max_iterations = max_iterations
        right = problem.distribution.whitened_residual()
        largest = float(right.abs().max())
        # An infinite r is that of a label whose probability underflows: u₁ has no part in F then.
        unit = right / largest if 0 < largest < math.inf else torch.zeros_like(right)
        length = float(unit.norm())
        self.left = unit / (length or 1.0)
        self.length = largest * (length or 1.0)
        self.largest_residual = largest
        self.gradient = problem.gradient().to(torch.float64)
        self.slope = float(self.gradient.norm())
        self.whitening_error = problem.distribution.whitening_error()
        self.rounding = ROUNDING * problem.function.row_epsilon
        self.diagonal: list[float] = []
        self.below: list[float] = []
        self.exhausted = self.slope == 0
        # Vectors of the smaller space are kept, for reorthogonalisation and for directions.
        self.in_parameters = problem.num_parameters <= problem.outputs.numel()
        self.basis: list[Tensor] = []
        if not self.exhausted:
            # Bᵀu₁ = g/‖r‖, from g itself: S r has lost digits of u where a label is improbable.
            self.diagonal.append(self.slope / self.length)
            self.right = self.gradient / self.slope
            self.basis.append(self.right if self.in_parameters else self.left)

    rank = math.nan
    """Not known of a run."""

    @property
    def iterations(self) -> int:
        """The number k of iterations so far."""
        return len(self.below)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left of F beyond the run.

        The row of an improbable label is as small as its entry in r is large, and may be rounding
        beside the others.
        """
        return self.exhausted and self.largest_residual * self.rounding * self.iterations < 1

    @property
    def limit(self) -> int:
        """The most iterations: ``max_iterations``, or as many as the memory has room for."""
        size = min(self.problem.num_parameters, self.problem.outputs.numel())
        return min(self.max_iterations, max(2, self.problem.rows.memory // (2 * 8 * size)))

    def run(self, dampings: Sequence[float]) -> None:
        """Iterate until the bounds for every λ are within the gap, or to the limit."""
        while not self.exhausted and self.iterations < self.limit:
            self.step()
            checked = self.iterations % max(2, self.iterations // 8) == 0
            # One rank decides: different machines might differ in the last digit.
            if checked and self.problem.shards.broadcast(self.bounds(dampings).gap <= self.gap):
                return

    def step(self) -> None:
        """One product with B and one with Bᵀ."""
        problem, alpha = self.problem, self.diagonal[-1]
        tangent = problem.jvp(self.right)
        left = problem.distribution.factor_transpose_product(tangent) - alpha * self.left
        if not self.in_parameters:
            left = self._orthogonal(left)
        beta = float(left.norm())
        self.below.append(beta)
        if problem.shards.broadcast(beta <= self.rounding * self._largest_entry):
            self.exhausted = True
            return
        self.left = left / beta
        self._next_right(beta)

    def _next_right(self, beta: float) -> None:
        problem = self.problem
        if not self.in_parameters:
            self.basis.append(self.left)
        pulled = problem.vjp(problem.distribution.factor_product(self.left)).to(torch.float64)
        right = pulled - beta * self.right
        if self.in_parameters:
            right = self._orthogonal(right)
        alpha = float(right.norm())
        vanishes = alpha <= self.rounding * self._largest_entry
        if problem.shards.broadcast(vanishes):
            self.exhausted = True
            return
        self.diagonal.append(alpha)
        self.right = right / alpha
        if self.in_parameters:
            self.basis.append(self.right)

    @property
    def _largest_entry(self) -> float:
        return max(self.diagonal + self.below)

    def _orthogonal(self, vector: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            for known in self.basis:
                vector = vector - (known * vector).sum() * known
        return vector

    def factor(self) -> np.ndarray:
        """L, shape ``(k + 1, k)``."""
        count = self.iterations
        lower = np.zeros((count + 1, count))
        lower[np.arange(count), np.arange(count)] = self.diagonal[:count]
        lower[np.arange(count) + 1, np.arange(count)] = self.below
        return lower

    @property
    def largest(self) -> float:
        """The largest eigenvalue of F, from below, by at least 20 iterations."""
        while not self.exhausted and self.iterations < min(20, self.max_iterations):
            self.step()
        return float(np.linalg.norm(self.factor(), 2) ** 2) if self.iterations else 0.0

    def gamma_min(self) -> float:
        """The γ of the run's update at λ = 0: γ_min lies between the floor and it."""
        if not self.iterations:
            self.run([0.0])
        return float(self._rules(np.zeros((1, 1)))[1][0])

    def updates(self, dampings: Sequence[float]) -> DirectionUpdates:
        """The updates of every λ, after as many iterations as their bounds need."""
        self.run(dampings)
        lambdas = list(dampings)
        return DirectionUpdates(
            len(lambdas),
            lambda i: self.direction(lambdas[i]),
            changed=lambda _: lambda i: self.other_direction(lambdas[i]),
            unresolved=self._unresolved(lambdas),
        )

    def _unresolved(self, dampings: Sequence[float]) -> list[float]:
        """‖(F + λI)d − g‖/(λ‖d‖) for every λ, which is at least the relative error of d."""
        factor = self.factor()
        if not factor.any():
            return [math.inf] * len(dampings)
        _, singular, right = _svd(factor)
        results = []
        for damping in dampings:
            weights = right @ (right[0] / (singular**2 + damping))
            rest = self.rounding * singular[0] ** 2
            if not self.exhausted:
                last = abs(weights[-1]) / np.linalg.norm(weights)
                rest += self.diagonal[-1] * self.below[-1] * last
            results.append(float(rest / damping) if damping > 0 else math.inf)
        return results

    def bounds(self, dampings: Sequence[float]) -> Bounds:
        """Bounds for every λ from the iterations so far, wider by what rounding changes of them.

        A row of B that is known to ε‖B‖ changes F by ε‖F‖, which λ hides; and what the largest
        entry of r multiplies.
        """
        lambdas = np.asarray(dampings, dtype=np.float64)[:, None]
        lower, upper = self._rules(lambdas)
        factor = self.factor()
        if not factor.any():
            return Bounds(lower, upper)
        with np.errstate(divide="ignore"):
            share = np.linalg.norm(factor, 2) ** 2 / lambdas[:, 0]
        reach = np.minimum(self.largest_residual, SAFETY * share)
        rounding = self.rounding * self.iterations * reach
        return Bounds(lower, np.maximum(upper, lower)).widened(self.whitening_error + rounding)

    def _rules(self, lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bounds on γ in exact arithmetic, for λ of shape ``(L, 1)``; ∞ where d = 0."""
        factor = self.factor()
        if not factor.any():
            infinite = np.full(len(lambdas), np.inf)
            return infinite, infinite
        nodes, weights = self._rule(factor)  # Gauss–Radau, but for its node at 0
        ratio = _ratio(nodes, lambdas)
        # A node that is only rounding may belong to the node at 0, and does at λ = 0: that is the
        # definition of the pseudo-inverse with a cut-off.
        kept = nodes > (self.rounding * len(nodes)) ** 2 * nodes.max()
        whole = np.where((lambdas > 0) | kept, weights, 0.0)
        weights = np.where(kept, weights, 0.0)
        decrease, curvature = (weights * ratio).sum(1), (weights * ratio**2).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.is_complete:
                high = (whole * ratio).sum(1), (whole * ratio**2).sum(1)
                energy = np.zeros(len(lambdas))
            else:
                high, energy = self._upper(factor, lambdas, weights, ratio)
            energy_low, energy_high = _energy_bounds(factor, self.slope, lambdas)
            large = lambdas[:, 0] >= LARGE * nodes.max()
            lowest = np.maximum(curvature - energy, np.where(large, energy_low, 0.0))
            highest = np.minimum(high[1] + energy, np.where(large, energy_high, np.inf))
            # Where ‖r‖² overflows, what depends on it is not a number.
            lower = np.fmax(np.sqrt(np.fmax(lowest, 0)) / high[0], 1 / self.length)
            upper = np.fmin(np.sqrt(highest) / decrease, decrease**-0.5)
        return lower, upper

    def _rule(self, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes σ² and weights (‖r‖U_0j)² of the measure whose Jacobi matrix is L Lᵀ, L = UΣVᵀ."""
        left, singular, right = _svd(factor)
        with np.errstate(over="ignore"):
            return singular**2, self._residual_parts(factor, left, singular, right) ** 2

    def _upper(
        self, factor: np.ndarray, lambdas: np.ndarray, weights: np.ndarray, ratio: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """The Gauss rule's two integrals, and the gap between the rules for λ²∫(x + λ)⁻²."""
        nodes, gauss = self._rule(factor[:-1])
        other = _ratio(nodes, lambdas)
        at_zero = max(self.length * self.length - weights.sum(), 0.0)
        radau = (weights * (1 - ratio) ** 2).sum(1) + at_zero
        gap = np.maximum(radau - (gauss * (1 - other) ** 2).sum(1), 0.0)
        return ((gauss * other).sum(1), (gauss * other**2).sum(1)), gap

    def direction(self, damping: float) -> Tensor:
        """The update d(λ) = Vy of the iterations so far, shape ``(P,)``.

        y = (LᵀL + λI)⁻¹ e₁ ‖g‖ by the SVD of L.
        """
        problem, count = self.problem, self.iterations
        if not count:
            return torch.zeros(problem.num_parameters, dtype=problem.dtype, device=problem.device)
        _, singular, right = _svd(self.factor())
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / (singular**2 + damping)
            if damping == 0:
                inverse[singular <= self.rounding * count * singular.max()] = 0
        weights = right @ (inverse * right[0]) * self.slope
        if self.in_parameters:
            total = torch.zeros_like(self.gradient)
            for weight, vector in zip(weights, self.basis, strict=False):
                total += float(weight) * vector
            return total.to(problem.dtype)
        # With Bᵀu_i = α_iv_i + β_iv_{i−1}, Vy = a g/‖g‖ + Bᵀ Σ_{i≥2} w_iu_i.
        field = torch.zeros_like(self.left)
        for i in range(count - 1, 0, -1):
            weight = weights[i] / self.diagonal[i]
            weights[i - 1] -= self.below[i - 1] * weight
            field += float(weight) * self.basis[i]
        pulled = problem.vjp(problem.distribution.factor_product(field)).to(torch.float64)
        return (pulled + float(weights[0]) / self.slope * self.gradient).to(problem.dtype)

    def other_direction(self, damping: float) -> Tensor:
        """The update by Bᵀz with (LLᵀ + λI)z = ‖r‖e₁, of an eighth fewer iterations.

        In exact arithmetic it is `direction` where the run has converged. Bᵀu₁ = g/‖r‖.
        """
        problem, steps = self.problem, self.iterations
        count = steps if self.exhausted else max(1, steps - max(1, steps // 8))
        if not steps:
            return self.direction(damping)
        factor = self.factor()[: count + 1, :count]
        left, singular, right = _svd(factor)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse = 1 / (singular**2 + damping)
            if damping == 0:
                inverse[singular <= self.rounding * count * singular.max()] = 0
            parts = inverse * self._residual_parts(factor, left, singular, right)
        if self.in_parameters:
            vectors, weights, total = self.basis, right @ (singular * parts), self.gradient * 0
        else:
            vectors, weights, total = self.basis[1:], (left @ parts)[1:], self.left * 0
        for weight, vector in zip(weights, vectors, strict=False):
            total = total + float(weight) * vector
        if not self.in_parameters:
            first = float((left[0] @ parts) / self.length)
            pulled = problem.vjp(problem.distribution.factor_product(total)).to(torch.float64)
            total = pulled + first * self.gradient
        return total.to(problem.dtype)

    def _residual_parts(
        self, factor: np.ndarray, left: np.ndarray, singular: np.ndarray, right: np.ndarray
    ) -> np.ndarray:
        """‖r‖U_0j, which is also ‖g‖V_0j/σ_j.

        That one is more precise where σ_j is greater than the first entry of L, and it exists
        where ‖r‖ overflows.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            by_gradient = self.slope * right[0] / singular
            by_residual = self.length * left[0]
            parts: np.ndarray = np.where(singular >= factor[0, 0], by_gradient, by_residual)
            return parts


def _svd(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ and V of a factor whose rows differ in size."""
    left, singular, right = graded_svd(torch.from_numpy(factor))
    return left.numpy(), singular.numpy(), right.numpy()


def _ratio(nodes: np.ndarray, lambdas: np.ndarray) -> np.ndarray:
    """x/(x + λ), 1 for x > 0 = λ."""
    with np.errstate(invalid="ignore"):
        return np.where(nodes > 0, nodes / (nodes + lambdas), 0.0)


def _energy_bounds(
    factor: np.ndarray, slope: float, lambdas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on ∫ (x + λ)⁻² x² dμ by the Gauss and Gauss–Radau rules of the measure x² dμ.

    Its Jacobi matrix is R Rᵀ without the last row and column, for R of L = QR. These bounds lose
    nothing to cancellation where λ is large; where it is small, the others are closer.
    """
    count = factor.shape[1]
    if count < 2:
        return np.zeros(len(lambdas)), np.full(len(lambdas), np.inf)
    # numpy's stubs have the return type of other modes.
    upper: np.ndarray = np.linalg.qr(factor, mode="r")  # type: ignore[assignment]
    jacobi = upper @ upper.T
    total = slope**2 * (factor[0, 0] ** 2 + factor[1, 0] ** 2)
    inner = jacobi[:-1, :-1]
    gauss = _rational(inner, total, lambdas)
    last = np.zeros(count - 1)
    last[-1] = jacobi[-1, -2]
    jacobi[-1, -1] = jacobi[-1, -2] * np.linalg.solve(inner, last)[-1]
    return gauss, _rational(jacobi, total, lambdas)


def _rational(jacobi: np.ndarray, total: float, lambdas: np.ndarray) -> np.ndarray:
    nodes, vectors = np.linalg.eigh(jacobi)
    values: np.ndarray = (total * vectors[0] ** 2 / (np.maximum(nodes, 0) + lambdas) ** 2).sum(1)
    return values
