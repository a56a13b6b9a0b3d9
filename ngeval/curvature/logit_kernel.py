"""The forms of the logit kernel Θ = JJᵀ, and which of them suits a problem's sizes.

Every update of the form d = Jᵀw (sgd, ef, ief, sf, ng) has the logit tangent t = Θw, so once Θ
is known, no method and no damping needs another pass through the model. Θ is the empirical
neural tangent kernel of Jacot et al. (arXiv 1806.07572).

- `JacobianKernel`, for a small problem, keeps J itself: products of J resolve singular values down
  to ε of the largest, a Gram matrix only down to √ε.
- `GramKernel` keeps Θ, N·C × N·C, for the exact natural gradient, if that is within reach.
- `StripKernel` keeps only Θ's products with the vectors that updates are made of (N·C × N·Q).
- `MatrixFreeKernel`, for large outputs (sequences over a vocabulary), keeps the Gram matrices of
  rows only, and updates are pushed through the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ngeval.curvature.spectrum import UNSEEN, Spectrum
from ngeval.errors import EngineError
from ngeval.jacobians import CapturedRows, gram_matrix, row_matrix
from ngeval.problem.fisher import (
    has_few_parameters,
    jacobian_columns,
    unit_cotangents,
)
from ngeval.problem.linearized import Linearized, Sizes
from ngeval.utils.text import describe_bytes

EXPLICIT_ENTRIES = 2**22
"""Up to this many entries J itself is kept (32 MiB in float64)."""

DENSE_SIZE = 6000
"""Up to this N·C the natural gradient is exact, by an eigendecomposition."""

COMMON_RANK = 48
"""An estimate of how many vectors span the updates of several methods over twelve decades of λ; it
affects the form, not the numbers."""

STRIP_OUTPUTS = 256
"""Up to this many outputs of a sample, products of Θ are computed by as many backward passes."""


class LogitKernel(ABC):
    """One form of Θ."""

    def __init__(self, problem: Linearized) -> None:
        self.shape = (problem.num_samples, problem.num_outputs)
        self.row_epsilon = problem.function.row_epsilon
        self.rows = problem.rows

    @abstractmethod
    def gram(self, vectors: Tensor) -> Tensor:
        """Inner products of the rows J_nᵀv_nq, row n·Q + q: float64, shape ``(N·Q, N·Q)``.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``. v = u gives K, the columns of S SᵀΘS.
        """

    def combinations(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Σ_nq w_i,nq J_nᵀv_nq in the model's dtype, shape ``(k, P)``.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
            weights: w in float64, shape ``(k, N·Q)``.
        """
        return CapturedRows(self.rows, vectors).combinations(weights)

    def spectrum(self, vectors: Tensor, right: Tensor, unseen: float = UNSEEN) -> Spectrum:
        """The spectrum of the Gram matrix of rows J_nᵀv_nq.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
            right: the vector that it will be solved for, shape ``(N·Q,)``.
            unseen: the part of it that may be lost; see `Spectrum.of_gram`.
        """
        return Spectrum.of_gram(self.gram(vectors), self.row_epsilon, right, unseen)


class PushingKernel(LogitKernel):
    """A form that gives the tangents of updates."""

    @abstractmethod
    def push(self, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """The tangents and lengths of updates d = Σ_nq c_nq J_nᵀv_nq.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
            coefficients: c, shape ``(L, N, Q)``.

        Returns:
            t = J d, shape ``(L, N, *positions, C)``, and ‖d‖², shape ``(L,)``.
        """


class DenseKernel(PushingKernel):
    """A form with all of Θ."""

    @abstractmethod
    def push_fields(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """The tangents and lengths of updates d = Jᵀw.

        Args:
            fields: w, shape ``(L, N, *positions, C)``.

        Returns:
            t = Θw, the same shape, and ‖d‖² = wᵀΘw, shape ``(L,)``.
        """

    def push(self, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        return self.push_fields(combine(vectors, coefficients))

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """Θ, float64, shape ``(NC, NC)``; row n·C + c belongs to output c of sample n."""


class JacobianKernel(DenseKernel):
    """Θ as the product of J, shape ``(NC, P)``, and its transpose."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        if has_few_parameters(problem.sizes):
            columns = [part.flatten(1) for part in jacobian_columns(problem)]
            self.jacobian = torch.cat(columns).T.contiguous()
            return
        self.jacobian = row_matrix(problem.rows, unit_cotangents(problem))

    @property
    def matrix(self) -> Tensor:
        return self.jacobian @ self.jacobian.T

    def push_fields(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        directions = fields.flatten(1) @ self.jacobian
        tangents = (directions @ self.jacobian.T).reshape(fields.shape)
        return tangents, directions.square().sum(1)

    def gram(self, vectors: Tensor) -> Tensor:
        rows = self._rows(vectors)
        return rows @ rows.T

    def spectrum(self, vectors: Tensor, right: Tensor, unseen: float = UNSEEN) -> Spectrum:
        return Spectrum.of_rows(self._rows(vectors), self.row_epsilon)

    def _rows(self, vectors: Tensor) -> Tensor:
        return torch.bmm(vectors.flatten(2), self.jacobian.unflatten(0, self.shape)).flatten(0, 1)


class GramKernel(DenseKernel):
    """Θ itself, shape ``(NC, NC)``."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        self.theta = gram_matrix(problem.rows, unit_cotangents(problem))

    @property
    def matrix(self) -> Tensor:
        return self.theta

    def push_fields(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        tangents = (fields.flatten(1) @ self.theta).reshape(fields.shape)
        return tangents, (fields * tangents).flatten(1).sum(1)

    def gram(self, vectors: Tensor) -> Tensor:
        flat = vectors.flatten(2)
        half = torch.bmm(flat, self.theta.unflatten(0, self.shape))
        half = half.reshape(-1, *self.shape).transpose(0, 1)
        return torch.bmm(half, flat.transpose(1, 2)).transpose(0, 1).flatten(1)


class StripKernel(PushingKernel):
    """Products of Θ with the vectors that updates are made of, one strip for each of them."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        self.jacobian = CapturedRows(problem.rows, unit_cotangents(problem))
        self._strips: list[tuple[Tensor, Tensor]] = []

    def _strip(self, vectors: Tensor) -> Tensor:
        """(J_nᵀe_c)·(J_mᵀv_mq), shape ``(NC, N, Q)``; computed once for each vector."""

        def known(vector: Tensor) -> list[Tensor]:
            return [strip for other, strip in self._strips if torch.equal(other, vector)][:1]

        missing = [q for q, vector in enumerate(vectors.unbind(1)) if not known(vector)]
        if missing:
            # The vectors are their own coefficients of unit vectors.
            strips = self.jacobian.products(vectors[:, missing].flatten(2))
            split = strips.unflatten(1, (-1, len(missing)))
            self._strips += [(vectors[:, q], split[..., i]) for i, q in enumerate(missing)]
        return torch.stack([strip for vector in vectors.unbind(1) for strip in known(vector)], 2)

    def push(self, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        fields = combine(vectors, coefficients)
        strip = self._strip(vectors).flatten(1)
        tangents = (coefficients.flatten(1) @ strip.T).reshape(fields.shape)
        return tangents, (fields * tangents).flatten(1).sum(1)

    def gram(self, vectors: Tensor) -> Tensor:
        strip = self._strip(vectors).flatten(1).unflatten(0, self.shape)
        gram = torch.bmm(vectors.flatten(2), strip).flatten(0, 1)
        return (gram + gram.T) / 2


class MatrixFreeKernel(LogitKernel):
    """Gram matrices of rows, each from one capture; tangents are computed in forward mode."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        self._grams: list[tuple[Tensor, Tensor]] = []
        self._captured: CapturedRows | None = None

    def gram(self, vectors: Tensor) -> Tensor:
        for known, gram in self._grams:
            columns = columns_in(known, vectors)
            if columns is not None:
                wide = gram.unflatten(0, (-1, known.shape[1])).unflatten(2, (-1, known.shape[1]))
                part: Tensor = wide[:, columns][..., columns].flatten(2).flatten(0, 1)
                return part
        self._captured = CapturedRows(self.rows, vectors)
        self._grams.append((vectors, self._captured.gram()))
        return self._grams[-1][1]

    def combinations(self, vectors: Tensor, weights: Tensor) -> Tensor:
        # By the capture that the Gram matrix was computed from, if there is one.
        captured = self._captured
        if captured is None or captured.cotangents is not vectors:
            captured = CapturedRows(self.rows, vectors)
        self._captured = None
        return captured.combinations(weights)


def columns_in(known: Tensor, vectors: Tensor) -> list[int] | None:
    """Which of the Q known vectors of each sample these are, None if they are not among them."""
    if vectors is known:
        return list(range(known.shape[1]))
    columns = []
    for vector in vectors.unbind(1):
        same = (q for q, other in enumerate(known.unbind(1)) if torch.equal(other, vector))
        columns.append(next(same, -1))
    return None if -1 in columns else columns


def combine(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """The fields w_n = Σ_q c_nq v_nq, shape ``(L, N, *positions, C)``."""
    return torch.einsum("lnq,nq...->ln...", coefficients, vectors)


def choose_form(
    sizes: Sizes, budget: int, *, exact: bool = True, pushes: int | None = None
) -> type[LogitKernel]:
    """The form of Θ to keep.

    Args:
        sizes: of the problem.
        budget: bytes to work in.
        exact: with all of Θ, for the exact natural gradient, if it is within reach.
        pushes: how many updates will be pushed, if that is known: a few are pushed through the
            model for less than the C backward passes that products of Θ begin with.

    Raises:
        EngineError: not even the Gram matrix of the batch would fit in the memory budget.

    >>> choose_form(Sizes(samples=160, outputs=10, parameters=10_000_000), 2**33).__name__
    'GramKernel'
    """
    samples, outputs, parameters = sizes
    entries = samples * outputs * parameters
    # Beyond DENSE_SIZE, J takes more backward passes than a Krylov run takes steps.
    in_reach = samples * outputs <= DENSE_SIZE or has_few_parameters(sizes)
    # J, its scaled copy and the workspace of their factorisation.
    if in_reach and entries <= EXPLICIT_ENTRIES and 4 * 8 * entries <= budget:
        return JacobianKernel
    if exact and dense_is_feasible(sizes, budget):
        return GramKernel
    # A tangent costs about as much as a backward pass with its products.
    needed = outputs if pushes is None else min(pushes, COMMON_RANK, 2 * samples)
    # Strips for the residual and for a few draws, and the tangents of some fifty updates.
    fits = 8 * samples * outputs * (4 * samples + 100) < budget
    if outputs <= min(STRIP_OUTPUTS, 2 * needed) and fits:
        return StripKernel
    if 5 * 8 * samples**2 > budget:
        most = int((budget / 40) ** 0.5)
        raise EngineError(
            f"the Gram matrix of {samples} samples needs {describe_bytes(40 * samples**2)}, over "
            f"the memory budget of {describe_bytes(budget)}: at most {most} samples fit; use a "
            "smaller batch or raise memory="
        )
    return MatrixFreeKernel


def dense_is_feasible(sizes: Sizes, budget: int) -> bool:
    """Whether Θ, SᵀΘS, its eigenvectors and LAPACK's workspace fit, and are worth their time."""
    size = sizes.samples * sizes.outputs
    return size <= DENSE_SIZE and 5 * 8 * size**2 <= budget
