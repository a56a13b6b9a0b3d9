"""Sums of outer products of rows, the Kronecker factors, with their eigenvalues and vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.model.directions import slices
from ngeval.model.sharding import Shards

STRIP = 96
"""Columns of a symmetric product that are computed together at least."""


class SecondMoment:
    """Σ x xᵀ over rows x: the rows themselves while they are fewer than their length.

    Args:
        groups: g.
        size: length of x.
        device: of the rows.
        thin: keep rows while they are few; False makes the matrix at once.
    """

    def __init__(self, groups: int, size: int, device: torch.device, *, thin: bool) -> None:
        self.shape = (groups, size)
        self.device = device
        self.thin = thin
        self._rows: list[Tensor] = []
        self._matrix: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows, float64, shape ``(g, rows, size)``."""
        self._rows.append(rows)
        if not self.thin or self._matrix is not None or self._count() >= self.shape[1]:
            self._lower_triangle()

    def summed(self, shards: Shards) -> None:
        """Add up over ranks, each of which has added the rows of its own samples."""
        if shards.alone:
            return
        counts = shards.gather((self._count(), self._matrix is None))
        few = self.thin and all(thin for _, thin in counts)
        if few and sum(count for count, _ in counts) < self.shape[1]:
            empty = self._zeros(0)
            whole = shards.concatenate(lambda: torch.cat([empty, *self._rows], 1).transpose(0, 1))
            self._rows = [whole.transpose(0, 1)]
        else:
            self._matrix = shards.sum(self._lower_triangle)

    def _count(self) -> int:
        return sum(rows.shape[1] for rows in self._rows)

    def _zeros(self, rows: int) -> Tensor:
        groups, size = self.shape
        return torch.zeros(groups, rows, size, dtype=torch.float64, device=self.device)

    def _lower_triangle(self) -> Tensor:
        """The matrix's lower triangle, with the rows that were kept until now."""
        if self._matrix is None:
            self._matrix = self._zeros(self.shape[1])
        for rows in self._rows:
            _add_lower(self._matrix, rows)
        self._rows = []
        return self._matrix

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ≥ 0, shape ``(g, k)``, and orthonormal eigenvectors, ``(g, size, k)``.

        k < size where there are fewer rows: the vectors span them, and the eigenvalues of the
        orthogonal complement are exactly 0.
        """
        if self._matrix is not None:
            values, vectors = torch.linalg.eigh(self._matrix, UPLO="L")
        else:
            # Xᵀ = QR: eigenvectors of RRᵀ are orthonormal whatever the condition of X.
            basis, upper = torch.linalg.qr(torch.cat(self._rows, 1).mT)
            values, inner = torch.linalg.eigh(upper @ upper.mT)
            vectors = basis @ inner
        return values.clamp_min(0), vectors


class Counts:
    """Σ e eᵀ over one-hot rows e, a diagonal matrix; see `SecondMoment`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.counts = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, indices: Tensor) -> None:
        """Add the one-hot rows of some indices."""
        self.counts += indices.bincount(minlength=len(self.counts))

    def summed(self, shards: Shards) -> None:
        """Add up over ranks."""
        self.counts = shards.sum(lambda: self.counts)

    def eigenpairs(self) -> tuple[Tensor, None]:
        """The counts, shape ``(1, size)``; the eigenvectors are the identity."""
        return self.counts.unsqueeze(0), None


def _add_lower(target: Tensor, rows: Tensor) -> None:
    """Add XᵀX to the lower triangle, in strips so that most of the upper one is not computed."""
    size = target.shape[1]
    for columns in slices(size, max(STRIP, -(-size // 8))):
        strip = target[:, columns, : columns.stop]
        strip.baddbmm_(rows[..., columns].mT, rows[..., : columns.stop])
