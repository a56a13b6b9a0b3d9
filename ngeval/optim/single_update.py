"""The update of a method at one λ from one pass through the model, for a training step.

The update is that of `ngeval.methods`. What differs is where rows come from: the pass that computes
the losses also gives the Gram matrix of the rows and their combination.
"""

from __future__ import annotations

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.row_space import MatrixFree, SpanSpace, unit_vectors
from ngeval.errors import NumericalError
from ngeval.jacobians import OnePass, PassRows
from ngeval.methods.ef import EmpiricalFisher, EmpiricalState
from ngeval.methods.sf import SampledFisher, SampledState
from ngeval.problem.problem import Problem


def empirical_update(problem: Problem, damping: float, *, improved: bool) -> Tensor:
    """Gᵀ(K + λI)⁻¹b with b = 1 (EF) or b_n = ‖u_n‖² (iEF, improved): shape ``(P,)``."""
    method = EmpiricalFisher("ief" if improved else "ef", improved)
    kernel = _step_kernel(problem, problem.residual.unsqueeze(1))
    return _descending(method.prepare(problem, kernel), method.name, damping)


def sampled_update(problem: Problem, damping: float, mc_samples: int, seed: int) -> Tensor:
    """(F̂ + λI)⁻¹g, F̂⁺g at λ = 0: shape ``(P,)``."""
    method = SampledFisher(f"sf:{mc_samples}", mc_samples)
    kernel = _step_kernel(problem, method.vectors(problem, seed))
    return _descending(method.prepare(problem, kernel, seed), method.name, damping)


def _descending(state: EmpiricalState | SampledState, name: str, damping: float) -> Tensor:
    """The update of a λ, if a step along it lowers the loss of the batch.

    Raises:
        NumericalError: dᵀg is not positive.
    """
    updates = state.updates([damping])
    slope = float(updates.decrease[0])
    if not slope > 0 and bool(updates.coordinates.any()):
        raise NumericalError(
            f"{name}: dᵀg = {slope * float(updates.sizes[0]):.3g} is not positive, so the step "
            f"would not lower the loss; raise the damping from {damping:g}"
        )
    return updates.direction(0)


def _step_kernel(problem: Problem, vectors: Tensor) -> Kernel:
    """A kernel whose only rows are J_nᵀv_nq, from the problem's one pass if that fits in memory."""
    kernel = Kernel(problem, exact=False, pushes=1)
    fits = OnePass.fits(problem.rows, problem.num_samples, vectors.shape[1])
    recorded = problem.one_pass() if fits else None
    if recorded is None or 5 * 8 * vectors.shape[:2].numel() ** 2 > problem.rows.memory:
        return kernel
    rows = recorded.rows(unit_vectors(vectors)[0])
    kernel.use_span(SpanSpace(_PassProducts(problem, rows), vectors))
    return kernel


class _PassProducts(MatrixFree):
    """The products of the rows of a recorded pass."""

    def __init__(self, problem: Problem, rows: PassRows) -> None:
        super().__init__(problem)
        self.rows = rows

    def gram(self, vectors: Tensor) -> Tensor:
        return self.rows.gram()

    def combinations(self, vectors: Tensor, weights: Tensor) -> Tensor:
        shape = vectors.shape[:2]
        return self.rows.combination(weights[0].reshape(shape)).unsqueeze(0)
