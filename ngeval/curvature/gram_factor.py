"""A Gram matrix of rows, A = LLᵀ: coordinates of rows of which only the products are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch
from torch import Tensor

from ngeval.curvature.row_svd import check_products, one_thread

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class GramFactor:
    """L with LLᵀ = A, by a Cholesky factorisation with pivoting on rows scaled to unit length.

    Attributes:
        lengths: of the rows, the square roots of A's diagonal, shape ``(n,)``.
        unit: the rows of L scaled to unit length, shape ``(n, r)``.
        pivots: the r rows of which ``unit`` is lower triangular.
        places: a number for each row, the same for equal rows of A.
    """

    lengths: Tensor
    unit: Tensor
    pivots: Tensor
    places: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> GramFactor:
        """Factor A.

        A row of which no more is left than the rounding of a product of unit rows is in the span
        of the rows before it.

        Args:
            gram: A, float64, shape ``(n, n)``.

        Raises:
            NumericalError: A has NaN or infinite entries.
        """
        check_products(gram)
        lengths = gram.diagonal().clamp_min(0).sqrt().cpu()
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
        unit = ((gram.cpu() * inverse) * inverse.unsqueeze(1)).numpy()
        size = len(unit)
        with one_thread():
            factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(
                unit, tol=4 * EPSILON * size**0.5, lower=1
            )
        lower = np.zeros((size, int(rank)))
        lower[pivots - 1] = np.tril(factor)[:, : int(rank)]
        places = torch.from_numpy(pivots[: int(rank)].astype(np.int64) - 1)
        _, equal = torch.unique(gram, dim=0, return_inverse=True)
        device = gram.device
        return cls(lengths.to(device), torch.from_numpy(lower).to(device), places.to(device), equal)

    @property
    def lower(self) -> Tensor:
        """L, shape ``(n, r)``."""
        return self.lengths.unsqueeze(1) * self.unit

    def weights(self, coordinates: Tensor) -> Tensor:
        """W with Lᵀw = y, which is 0 but at the pivots: shape ``(k, r)`` → ``(k, n)``."""
        square = self.unit[self.pivots]
        solved = torch.linalg.solve_triangular(square.T, coordinates.T, upper=True)
        weights: Tensor = coordinates.new_zeros(len(coordinates), len(self.unit))
        weights[:, self.pivots] = solved.T / self.lengths[self.pivots]
        return weights

    def perturbed(self, noise: float, generator: torch.Generator) -> GramFactor:
        """A factor of A with its entries changed relative to the lengths of their rows.

        To first order in the change N of the unit rows' products, the pivots P of L change by
        ½N_PP L_P⁻ᵀ, in the same coordinates; what other rows need is then N_OP L_P⁻ᵀ less their
        share in that.

        Args:
            noise: the relative size of the change.
            generator: of the noise; equal rows get equal noise.
        """
        unit, pivots = self.unit, self.pivots
        shape = (len(unit), len(unit))
        change = torch.randn(shape, generator=generator, dtype=unit.dtype).to(unit)
        if int(self.places.max()) + 1 < len(unit):
            change = change[self.places][:, self.places]
        change = (change + change.T)[:, pivots] * (noise / 2**0.5)
        square = unit[pivots]
        change = torch.linalg.solve_triangular(square.T, change, upper=True, left=False)
        others = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
        others[pivots] = False
        change[pivots] /= 2
        shares = torch.linalg.solve_triangular(square, unit[others], upper=False, left=False)
        change[others] -= shares @ change[pivots]
        return replace(self, unit=unit + change)
