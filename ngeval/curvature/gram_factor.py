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
        lower: L, shape ``(n, r)``.
        lengths: of its rows, shape ``(n,)``.
        pivots: the r rows of which it is lower triangular.
        places: a number for each row, the same for equal rows of A.
    """

    lower: Tensor
    lengths: Tensor
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
        rows = lengths.unsqueeze(1) * torch.from_numpy(lower)
        places = torch.from_numpy(pivots[: int(rank)].astype(np.int64) - 1)
        _, equal = torch.unique(gram, dim=0, return_inverse=True)
        device = gram.device
        return cls(rows.to(device), lengths.to(device), places.to(device), equal)

    def has_full_rank(self, width: int) -> bool:
        """Whether all different rows are independent, or they span their whole space.

        Args:
            width: the length of rows.
        """
        different = int(self.places[self.lengths > 0].unique().numel())
        return self.lower.shape[1] >= min(different, width)

    def weights(self, coordinates: Tensor) -> Tensor:
        """W with Lᵀw = y, which is 0 but at the pivots: shape ``(k, r)`` → ``(k, n)``."""
        square = self._unit(self.pivots)
        solved = torch.linalg.solve_triangular(square.T, coordinates.T, upper=True)
        weights: Tensor = coordinates.new_zeros(len(coordinates), len(self.lower))
        weights[:, self.pivots] = solved.T / self.lengths[self.pivots]
        return weights

    def perturbed(self, noise: float, generator: torch.Generator) -> GramFactor:
        """A factor of A with its entries changed relative to the lengths of their rows.

        To first order in the change N of the unit rows' products, the pivots P of L change by
        ½N_PP L_P⁻ᵀ, in the same coordinates; what other rows need is then N_OP L_P⁻ᵀ less their
        share in that.

        Args:
            noise: the relative size of the change.
            generator: of the noise; equal rows get equal noise but for the algebra's rounding.
        """
        pivots, size = self.pivots, len(self.lower)
        change = torch.randn((size, size), generator=generator, dtype=torch.float64)
        change = change.to(self.lower)
        some_equal = size > 0 and int(self.places.max()) + 1 < size
        if some_equal:
            change = change[self.places][:, self.places]
        change = (change + change.T)[:, pivots] * (noise / 2**0.5)
        square = self._unit(pivots)
        change = torch.linalg.solve_triangular(square.T, change, upper=True, left=False)
        others = torch.ones(size, dtype=torch.bool, device=change.device)
        others[pivots] = False
        change[pivots] /= 2
        rest = self._unit(others.nonzero().flatten())
        shares = torch.linalg.solve_triangular(square, rest, upper=False, left=False)
        change[others] -= shares @ change[pivots]
        if some_equal:
            own = torch.randn(change.shape, generator=generator, dtype=torch.float64).to(change)
            change += own * (EPSILON / own.shape[1] ** 0.5)
        return replace(self, lower=self.lower + change * self.lengths.unsqueeze(1))

    def _unit(self, rows: Tensor) -> Tensor:
        """Rows of L at unit length."""
        lengths = self.lengths[rows]
        unit: Tensor = self.lower[rows] / torch.where(lengths > 0, lengths, 1.0).unsqueeze(1)
        return unit
