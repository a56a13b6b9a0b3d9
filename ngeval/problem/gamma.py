"""γ, its bounds, and the change of single samples' losses by an update.

γ(d) = √(dᵀFd) / |dᵀg| is the square root of the KL that an update spends, over the loss that
it buys; smaller is better, and the scale of d cancels. Source: Wu et al. (arXiv 2406.06420),
"approximation quality indicator". Everything is computed from the logit tangent t = J d:
dᵀFd = Σ_n t_nᵀH_nt_n and dᵀg = Σ_n u_nᵀt_n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ngeval.errors import NumericalError
from ngeval.model.directions import Direction
from ngeval.problem.linearized import Linearized


def root_forms(problem: Linearized, tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖Sᵀt‖, uᵀt, and the sum of the sizes of its terms, from logit tangents: shape ``(L,)`` each.

    ‖Sᵀt‖ = (dᵀFd)^½ exists where its square underflows, as that of a confident network does.
    """
    size = torch.linalg.vector_norm(tangents.flatten(1), math.inf, dim=1)
    shape = (-1, *[1] * (tangents.ndim - 1))
    unit = tangents / torch.where(size > 0, size, 1.0).reshape(shape)
    whitened = problem.distribution.factor_transpose_product(unit).flatten(1)
    largest = torch.linalg.vector_norm(whitened, math.inf, dim=1, keepdim=True)
    scaled = whitened / torch.where(largest > 0, largest, 1.0)
    roots = torch.linalg.vector_norm(scaled, dim=1) * largest.squeeze(1)
    terms = (problem.residual * unit).flatten(1)
    return roots * size, terms.sum(1) * size, terms.abs().sum(1) * size


def gamma(problem: Linearized, direction: Direction) -> float:
    """γ(d) = √(dᵀFd) / |dᵀg| of any update, for one JVP.

    Args:
        problem: the problem whose exact Fisher and gradient grade.
        direction: d, a vector of length P or a dict by parameter name; sign and scale do not
            matter.

    Raises:
        InputError: the direction does not fit.
        NumericalError: dᵀg = 0, so the update buys no loss and γ is not defined.

    Example:
        >>> import torch, ngeval
        >>> model, inputs = torch.nn.Linear(4, 3).double(), torch.eye(4).double()
        >>> problem = ngeval.Problem(model, inputs, torch.arange(4) % 3, "categorical")
        >>> kernel = ngeval.Kernel(problem)
        >>> natural = ngeval.get_method("ng").prepare(problem, kernel).direction(0.0)
        >>> bool(abs(ngeval.gamma(problem, natural) / ngeval.gamma_min(problem) - 1) < 1e-6)
        True
        >>> bool(abs(problem.gamma(-3 * natural) / problem.gamma(natural) - 1) < 1e-12)
        True
    """
    tangent = problem.jvp(direction).unsqueeze(0)
    root, decrease, absolute = (float(value) for value in root_forms(problem, tangent))
    if not abs(decrease) > torch.finfo(torch.float64).eps * absolute:
        raise NumericalError("dᵀg = 0 to rounding: the update changes no loss, so γ is undefined")
    return root / abs(decrease)


def gamma_floor(problem: Linearized) -> float:
    """The closed-form floor (Σ_n u_nᵀH_n⁺u_n)^(−1/2) ≤ γ_min; ∞ where every residual is 0.

    It needs only the outputs, no Jacobian. γ_min equals it when r = S⁺u lies in the range of
    SᵀJ, as it does when J has full row rank.
    """
    total = float(problem.distribution.floor_terms().sum())
    return total**-0.5 if total > 0 else math.inf


def loss_change(problem: Linearized, direction: Direction) -> Tensor:
    """First-order change of every sample's loss for the unit step −d: −u_nᵀt_n, shape ``(N,)``.

    EF at λ → 0 changes all equally, iEF in proportion to ‖u_n‖² (Wu et al., arXiv 2406.06420).
    Float64, in nats per unit learning rate.

    Example:
        >>> import torch, ngeval
        >>> model, inputs = torch.nn.Linear(5, 3).double(), torch.eye(5).double()
        >>> problem = ngeval.Problem(model, inputs, torch.arange(5) % 3, "categorical")
        >>> kernel = ngeval.Kernel(problem)
        >>> ef = ngeval.get_method("ef").prepare(problem, kernel).direction(0.0)
        >>> bool(torch.allclose(ngeval.loss_change(problem, ef), -torch.ones(5).double()))
        True
    """
    return -(problem.residual * problem.jvp(direction)).flatten(1).sum(1)
