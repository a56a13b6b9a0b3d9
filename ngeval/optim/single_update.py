"""The update of a method at one λ from one pass through the model, for a training step.

The methods of `ngeval.methods` factor once for many λ. For a single λ a Cholesky factor is enough,
and the pass that computes the losses also gives the rows and the update. The numbers agree with
the methods' up to rounding; where a factor would lose digits, or rows do not fit in memory, the
method itself is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.curvature.cholesky import solve_damped
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.logit_kernel import EXPLICIT_ENTRIES
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import CotangentUpdates
from ngeval.jacobians import CapturedRows, OnePass, PassRows
from ngeval.methods.ef import EmpiricalFisher
from ngeval.methods.sf import SampledFisher
from ngeval.problem.problem import Problem


def empirical_update(problem: Problem, damping: float, *, improved: bool) -> Tensor:
    """Gᵀ(K + λI)⁻¹b with b = 1 (EF) or b_n = ‖u_n‖² (iEF, improved): shape ``(P,)``."""
    method = EmpiricalFisher("ief" if improved else "ef", improved)
    if 5 * 8 * problem.num_samples**2 > problem.rows.memory:
        # Raises the error that says which matrix is too large.
        return method.prepare(problem, Kernel(problem)).direction(damping)
    squares = problem.residual.square().flatten(1).sum(1)
    right = squares if improved else torch.ones_like(squares)
    rows = step_rows(problem, problem.residual.unsqueeze(1))
    solved = solution(problem, rows.gram(), right, damping)
    if solved is None:
        return method.prepare(problem, Kernel(problem)).direction(damping)
    return combination(problem, rows, solved.unsqueeze(1))


def sampled_update(problem: Problem, damping: float, mc_samples: int, seed: int) -> Tensor:
    """(F̂ + λI)⁻¹g = (1/λ)[g − Ĝᵀ(ĜĜᵀ + kλI)⁻¹Ĝg], F̂⁺g at λ = 0: shape ``(P,)``."""
    method = SampledFisher(f"sf:{mc_samples}", mc_samples)
    if damping == 0:
        return method.prepare(problem, Kernel(problem), seed).direction(damping)
    vectors = method.vectors(problem, seed)
    rows = step_rows(problem, vectors)
    gram = rows.gram().unflatten(1, (-1, mc_samples + 1)).unflatten(0, (-1, mc_samples + 1))
    right = gram[:, 1:, :, 0].sum(2).flatten()
    sampled = gram[:, 1:, :, 1:].flatten(2).flatten(0, 1)
    solved = solution(problem, sampled, right, mc_samples * damping)
    if solved is None:
        return method.prepare(problem, Kernel(problem), seed).direction(damping)
    split = solved.unflatten(0, (-1, mc_samples))
    weights = torch.cat([torch.ones_like(split[:, :1]), -split], 1) / damping
    return combination(problem, rows, weights)


def solution(problem: Problem, gram: Tensor, right: Tensor, damping: float) -> Tensor | None:
    """(A + λI)⁻¹b for the Gram matrix A of rows, by a Cholesky factor or by the spectrum of A.

    None if the factor loses digits and the problem is so small that its method has the rows
    themselves, which are more accurate than their products.
    """
    epsilon = problem.function.row_epsilon
    solved = solve_damped(gram, right, damping, epsilon)
    entries = problem.num_samples * problem.num_outputs * problem.num_parameters
    if solved is not None or entries <= EXPLICIT_ENTRIES:
        return solved
    return Spectrum.of_gram(gram, epsilon, right).solve(right, gram.new_tensor([damping]))[0]


def step_rows(problem: Problem, vectors: Tensor) -> CapturedRows:
    """The rows J_nᵀv_nq, from the problem's one pass if that fits in memory."""
    fits = OnePass.fits(problem.rows, problem.num_samples, vectors.shape[1])
    recorded = problem.one_pass() if fits else None
    return CapturedRows(problem.rows, vectors) if recorded is None else recorded.rows(vectors)


def combination(problem: Problem, rows: CapturedRows, weights: Tensor) -> Tensor:
    """Σ_nq w_nq J_nᵀv_nq, from the recorded pass or by a second one."""
    if isinstance(rows, PassRows):
        return rows.combination(weights)
    return CotangentUpdates(problem, rows.cotangents, weights.unsqueeze(0)).direction(0)
