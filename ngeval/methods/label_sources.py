"""The sources of labels in a curvature.

Every curvature of ngeval is Σ_nq (J_nᵀv_nq)(J_nᵀv_nq)ᵀ, and the source of labels determines v:

============ ============================== =========================================
``exact``    the columns of S_n, S Sᵀ = H   the Fisher F, an expectation over labels
``sampled``  û_nk/√k, k labels ~ p(·|z_n)   F̂, unbiased for F (type-2 factors of KFAC)
``data``     u_n                            the empirical Fisher Σ g gᵀ
``improved`` u_n/‖u_n‖                      iEF's: Σ g gᵀ/s_n with s_n = ‖u_n‖²
============ ============================== =========================================

Source of the last row: Wu et al., "An improved empirical Fisher approximation for natural gradient
descent" (arXiv 2406.06420).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.row_space import unit_vectors
from ngeval.errors import EngineError, InputError
from ngeval.problem.fisher import SMALL, factor_columns
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

EXACT, SAMPLED, DATA, IMPROVED = "exact", "sampled", "data", "improved"

SUFFIXES = {"-sf": SAMPLED, "-ef": DATA, "-ief": IMPROVED}
"""Endings of methods' names, each with its source of labels; a name without one is exact."""

MAX_DIGITS = 9
"""A longer number of draws is taken for a typing error."""

FIELDS = 4
"""Tensors of the size of all draws that exist at once: labels, residuals, copies."""


@dataclass(frozen=True)
class Labels:
    """A source of labels; of sampled ones ``mc_samples`` are drawn for each sample."""

    source: str
    mc_samples: int = 1

    @classmethod
    def of_method(cls, name: str) -> Labels:
        """The labels that a method's name ends in, with one draw: ``"diag-ef:0.5"`` → data."""
        _, hyphen, ending = name.partition(":")[0].rpartition("-")
        return cls(SUFFIXES[hyphen + ending] if hyphen else EXACT)

    def relevant(self, seed: int) -> int:
        """The seed if labels are drawn by it, else 0: curvatures of equal labels are shared."""
        return seed if self.source == SAMPLED else 0

    def vectors(self, problem: Problem, seed: int) -> Tensor:
        """The v of the curvature, float64 ``(N, Q, *positions, C)``; an error if too large."""
        if self.source == EXACT:
            return factor_columns(problem)
        residual = problem.residual.unsqueeze(1)
        if self.source == DATA:
            return residual
        if self.source == IMPROVED:
            lengths = _safe(problem).reshape(-1, *[1] * (residual.ndim - 1))
            return residual / lengths
        needed = FIELDS * 8 * self.mc_samples * problem.residual.numel()
        if needed > max(problem.rows.memory, SMALL):
            raise EngineError(
                f"{self.mc_samples} label draws for each sample take {describe_bytes(needed)}, "
                f"over the memory budget of {describe_bytes(problem.rows.memory)}; take fewer"
            )
        return sampled_residuals(problem, self.mc_samples, seed) / math.sqrt(self.mc_samples)

    def with_residual(self, problem: Problem, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The v of the curvature, extended so that u_n is a combination of them.

        The first v is nonzero at every unmasked position: it is the residual, or random numbers if
        the residual vanishes somewhere.

        Returns:
            v of shape ``(N, Q, *positions, C)``; 1 for each of the Q that belongs to the curvature
            and 0 for the others, shape ``(Q,)``; c with u_n = Σ_q c_nq v_nq, shape ``(N, Q)``.
        """
        probe, curvature = _probe(problem), self.vectors(problem, seed)
        parts = [curvature] if probe is None else [probe.unsqueeze(1), curvature]
        if self.source not in (DATA, IMPROVED):
            parts.insert(-1, problem.residual.unsqueeze(1))
        vectors = torch.cat(parts, 1)
        share = vectors.new_zeros(vectors.shape[1])
        share[-curvature.shape[1] :] = 1
        gradient = vectors.new_zeros(vectors.shape[:2])
        scale = _safe(problem) if self.source == IMPROVED else 1.0
        gradient[:, 0 if probe is None else 1] = scale  # the residual, or its multiple
        return vectors, share, gradient


def sampled_residuals(problem: Problem, mc_samples: int, seed: int) -> Tensor:
    """The residuals û of k labels ~ p(·|z_n) for each sample: ``(N, k, *positions, C)``."""
    generator = torch.Generator().manual_seed(seed)
    return problem.distribution.sampled_residual(mc_samples, generator).transpose(0, 1)


def parse_draws(name: str, text: str) -> int:
    """The number of draws k in a method's name, a whole number ≥ 1."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS) or int(text) < 1:
        raise InputError(f"method {name[:80]!r}: the number of draws must be a whole number ≥ 1")
    return int(text)


def _probe(problem: Problem) -> Tensor | None:
    """Random numbers at all unmasked outputs; None if the residual is nonzero at all of them."""
    residual = problem.residual
    mask = problem.distribution.mask
    there = torch.ones_like(residual[..., :1], dtype=torch.bool) if mask is None else mask
    least = 1e10 * torch.finfo(problem.dtype).tiny  # products of it do not underflow
    seen = residual.abs().amax(-1, keepdim=True) > least
    if bool((seen | ~there).all()):
        return None
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(residual.shape, generator=generator, dtype=torch.float64)
    return random.to(residual.device) * there


def _safe(problem: Problem) -> Tensor:
    """‖u_n‖, and 1 where it is 0, because only a residual of 0 is divided by it."""
    unit, sizes = unit_vectors(problem.residual.unsqueeze(1))
    norms = sizes * unit.flatten(1).norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)
