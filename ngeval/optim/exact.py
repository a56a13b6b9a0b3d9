"""`EF`, `iEF`, `SF` and `NG`: the exact updates of `ngeval.methods` on every batch, as optimizers.

Everything is sum-reduced: with g_n the gradient of sample n's loss (no mean over the batch),
G their rows and K = GGᵀ, the step is −η d with d

====== ============================================== =========================================
`EF`   Gᵀ(K + λI)⁻¹1 = (GᵀG + λI)⁻¹g                  every sample's loss falls by η
`iEF`  Gᵀ(K + λI)⁻¹s with s_n = ‖u_n‖²                sample n's loss falls by η s_n
`SF`   (F̂ + λI)⁻¹g, F̂ from k labels ~ p(·|z)          η = 1 is a full (sampled) natural gradient
`NG`   (F + λI)⁻¹g                                    η = 1 is a full natural gradient step
====== ============================================== =========================================

(first-order statements, at λ → 0 with K invertible). λ is absolute.
Source: Wu et al., "An improved empirical Fisher approximation for natural gradient descent"
(arXiv 2406.06420).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.krylov import KrylovRun
from ngeval.errors import NumericalError
from ngeval.methods.ng import NaturalGradient
from ngeval.optim.base import ExactOptimizer
from ngeval.optim.single_update import empirical_update, sampled_update
from ngeval.problem.problem import Problem

STEP_GAP = 1e-3
"""`NG` takes an update if the relative gap between the bounds on its γ is at most this."""


class EF(ExactOptimizer):
    """The empirical Fisher's update d = (Σ_n g_n g_nᵀ + λI)⁻¹ Σ_n g_n.

    The learning rate is in nats: a step lowers every sample's loss by η to first order. See
    `ExactOptimizer` for the arguments.
    """

    default_damping = 1e-7
    improved = False

    def direction(self, problem: Problem, damping: float) -> Tensor:
        return empirical_update(problem, damping, improved=self.improved)


class iEF(EF):  # noqa: N801  (the method's name)
    """The improved empirical Fisher's update d = Gᵀ(K + λI)⁻¹s with s_n = ‖u_n‖².

    A step lowers the loss of sample n by η‖u_n‖² to first order. See `ExactOptimizer` for the
    arguments.

    Example:
        >>> import torch, ngeval
        >>> model, inputs = torch.nn.Linear(5, 3).double(), torch.eye(5).double()
        >>> problem = ngeval.Problem(model, inputs, torch.arange(5) % 3, "categorical")
        >>> optimizer = ngeval.optim.iEF(model.parameters(), lr=0.1)
        >>> before = optimizer.step(problem)  # the mean loss before the step, in nats
        >>> problem = problem.with_batch(inputs, torch.arange(5) % 3)
        >>> bool(problem.loss.mean() < before)
        True
    """

    improved = True


class SF(ExactOptimizer):
    """The update d = (F̂ + λI)⁻¹g of a Fisher sampled with labels from the model itself.

    A learning rate of 1 is the whole damped natural gradient step. The labels of a step are drawn
    from ``seed`` and the number of the step only, so that a run resumed from its ``state_dict``
    draws the same labels as an uninterrupted one. ``mc_samples`` is k, the labels drawn for each
    sample; see `ExactOptimizer` for the other arguments.
    """

    default_damping = 10.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        mc_samples: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        drawing = {"mc_samples": mc_samples, "seed": seed}
        super().__init__(params, lr, others=drawing, **settings)

    def direction(self, problem: Problem, damping: float) -> Tensor:
        seed = draw_seed(int(self.shared("seed")), self.steps)
        return sampled_update(problem, damping, int(self.shared("mc_samples")), seed)


class NG(ExactOptimizer):
    """The exact damped natural gradient d = (F + λI)⁻¹g.

    A learning rate of 1 is the whole natural gradient step. See `ExactOptimizer` for the arguments.
    If N times the number of outputs is too large for an eigendecomposition, d comes from a Krylov
    run, which must know γ of the update within `STEP_GAP`.
    """

    default_damping = 1.0

    def direction(self, problem: Problem, damping: float) -> Tensor:
        """(F + λI)⁻¹g.

        Raises:
            NumericalError: a Krylov run stopped before its bounds on γ were within `STEP_GAP`.
        """
        state = NaturalGradient().prepare(problem, Kernel(problem))
        update = state.direction(damping)
        gap = state.solver.bounds([damping]).gap if isinstance(state.solver, KrylovRun) else 0.0
        if not gap <= STEP_GAP:
            raise NumericalError(
                f"NG: after {state.solver.iterations} Krylov iterations the natural gradient is "
                f"not accurate enough for a step: γ is known only within {gap:.1e}, and "
                f"{STEP_GAP:g} is required; raise memory= of the Problem, take a smaller batch, "
                f"or raise the damping from {damping:g}"
            )
        return update


def draw_seed(seed: int, step: int) -> int:
    """The seed of the labels of one step, different for every pair of numbers."""
    return (seed * 1_000_003 + step) % 2**63
