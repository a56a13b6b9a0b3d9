"""Coordinates in the span of rows J_nᵀv, where all updates made of rows are computed.

With an orthonormal basis of the rows' span, J = L Q and an update is d = Qᵀy. Then ‖d‖ = ‖y‖, the
logit tangent is t = J d = L y, and a per-sample gradient has the coordinates u_n L_n: once L is
known, no method and no damping needs another pass through the model, and nothing is squared that
need not be. Θ = LLᵀ is the empirical neural tangent kernel of Jacot et al. (arXiv 1806.07572).

- `JacobianSpace`, for a small problem: an LQ factorisation of J itself.
- `GramSpace`, for the exact natural gradient of a larger one: a Cholesky factor of Θ, N·C × N·C.
- `SpanSpace`, for the rows that updates are made of alone: a Cholesky factor of their Gram matrix.
  Tangents come from products of Θ with those rows (`Strips`) or from a pass through the model
  (`MatrixFree`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ngeval.curvature.damped_inverse import RowSum
from ngeval.curvature.gram_factor import EPSILON, GramFactor
from ngeval.curvature.row_svd import check_products, row_lengths
from ngeval.errors import EngineError
from ngeval.jacobians import CapturedRows, gram_matrix, row_matrix
from ngeval.problem.fisher import has_few_parameters, jacobian_columns, unit_cotangents
from ngeval.problem.linearized import Linearized, Sizes
from ngeval.utils.text import describe_bytes

EXPLICIT_ENTRIES = 2**22
"""Up to this many entries J itself is kept (32 MiB in float64)."""

DENSE_SIZE = 6000
"""Up to this N·C the natural gradient is exact, by a factorisation."""

DENSE_MATRICES = 15
"""Θ's factor, the decomposition of SᵀL, LAPACK's workspace and the perturbed rows, each N·C × N·C,
as measured."""

COMMON_RANK = 48
"""An estimate of how many vectors span the updates of several methods over twelve decades of λ; it
affects the form, not the numbers."""

STRIP_OUTPUTS = 256
"""Up to this many outputs of a sample, products of Θ are computed by as many backward passes."""


class RowSpace(ABC):
    """The span of rows, in coordinates.

    Attributes:
        problem: the model on its batch.
        lower: the coordinates of the spanning rows, float64, shape ``(n, r)``.
    """

    problem: Linearized
    lower: Tensor

    @abstractmethod
    def rows(self, vectors: Tensor) -> Tensor:
        """The coordinates of rows J_nᵀv_nq, row n·Q + q: shape ``(N·Q, r)``.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
        """

    @abstractmethod
    def lengths(self, vectors: Tensor) -> Tensor:
        """Σ_c |v_c| ‖J_c‖ for each row, which its rounding is relative to: shape ``(N·Q,)``."""

    def gradient(self, vectors: Tensor, right: Tensor | None = None) -> RowSum:
        """The sum of the rows, and r if it is Aᵀr for the rows A of a curvature."""
        return RowSum(self.rows(vectors).sum(0), float(self.lengths(vectors).sum()), right)

    @abstractmethod
    def tangents(self, coordinates: Tensor) -> Tensor | None:
        """T = J d for updates of coordinates y: ``(L, r)`` → ``(L, N, *positions, C)``.

        None where only a pass through the model gives them.
        """

    def tangent_rounding(self, coordinates: Tensor) -> Tensor | None:
        """By how much each entry of `tangents` is known, where that is known."""
        return None

    @abstractmethod
    def directions(self, coordinates: Tensor) -> Tensor:
        """The updates d = Qᵀy in the model's dtype: shape ``(k, r)`` → ``(k, P)``."""

    @property
    def resolves_rank(self) -> bool:
        """Whether a rank is that of the rows; inner products lose half of the digits."""
        return True

    @abstractmethod
    def perturbed(self, noise: float, generator: torch.Generator) -> RowSpace:
        """The same space with its rows changed at their rounding.

        Args:
            noise: relative to the length of each row.
            generator: of the noise.
        """


class LogitSpace(RowSpace):
    """A space of all rows of J, so that L y is the tangent of any update in it."""

    def rows(self, vectors: Tensor) -> Tensor:
        samples = self.lower.unflatten(0, (self.problem.num_samples, self.problem.num_outputs))
        return torch.bmm(vectors.flatten(2), samples).flatten(0, 1)

    def lengths(self, vectors: Tensor) -> Tensor:
        norms = row_lengths(self.lower).reshape(self.problem.num_samples, -1, 1)
        return torch.bmm(vectors.flatten(2).abs(), norms).flatten()

    def tangents(self, coordinates: Tensor) -> Tensor:
        flat = coordinates @ self.lower.T
        return flat.reshape(len(coordinates), *self.problem.outputs.shape)

    def tangent_rounding(self, coordinates: Tensor) -> Tensor:
        flat: Tensor = EPSILON * coordinates.norm(dim=1, keepdim=True) * row_lengths(self.lower)
        return flat.reshape(len(coordinates), *self.problem.outputs.shape)

    @property
    def theta(self) -> Tensor:
        """Θ, float64, shape ``(NC, NC)``; row n·C + c belongs to output c of sample n."""
        return self.lower @ self.lower.T


class JacobianSpace(LogitSpace):
    """All rows of J, by an LQ factorisation; where P ≤ N·C the coordinates are the parameters."""

    def __init__(self, problem: Linearized) -> None:
        self.problem = problem
        if has_few_parameters(problem.sizes):
            columns = [part.flatten(1) for part in jacobian_columns(problem)]
            jacobian = torch.cat(columns).T.contiguous()
        else:
            jacobian = row_matrix(problem.rows, unit_cotangents(problem))
        check_products(jacobian)
        self.basis: Tensor | None = None
        self.lower = jacobian
        if len(jacobian) < jacobian.shape[1]:
            # Rows at unit size, so that the squares of tiny ones do not underflow.
            sizes = jacobian.abs().amax(1, keepdim=True)
            sizes = torch.where(sizes > 0, sizes, 1.0)
            columns_basis, upper = torch.linalg.qr((jacobian / sizes).T)
            self.basis, self.lower = columns_basis.T, sizes * upper.T

    @property
    def jacobian(self) -> Tensor:
        """J, shape ``(NC, P)``."""
        return self.lower if self.basis is None else self.lower @ self.basis

    def directions(self, coordinates: Tensor) -> Tensor:
        wide = coordinates if self.basis is None else coordinates @ self.basis
        return wide.to(self.problem.dtype)

    def perturbed(self, noise: float, generator: torch.Generator) -> JacobianSpace:
        other = object.__new__(JacobianSpace)
        other.problem, other.basis = self.problem, self.basis
        other.lower = self.lower + row_noise(self.lower, noise, generator)
        return other


class GramSpace(LogitSpace):
    """All rows of J, by a Cholesky factor of Θ."""

    def __init__(self, problem: Linearized) -> None:
        self.problem = problem
        self.factor = GramFactor.of(gram_matrix(problem.rows, unit_cotangents(problem)))
        self.lower = self.factor.lower

    @property
    def resolves_rank(self) -> bool:
        return self.factor.has_full_rank(self.problem.num_parameters)

    def directions(self, coordinates: Tensor) -> Tensor:
        weights = self.factor.weights(coordinates)
        shape = self.problem.outputs.shape
        return torch.stack([self.problem.vjp(weight.reshape(shape)) for weight in weights])

    def perturbed(self, noise: float, generator: torch.Generator) -> GramSpace:
        other = object.__new__(GramSpace)
        other.problem = self.problem
        other.factor = self.factor.perturbed(noise, generator)
        other.lower = other.factor.lower
        return other


class Products(ABC):
    """Inner products and combinations of rows J_nᵀv_nq, without all of Θ."""

    def __init__(self, problem: Linearized) -> None:
        self.problem = problem
        self.shape = (problem.num_samples, problem.num_outputs)

    @abstractmethod
    def gram(self, vectors: Tensor) -> Tensor:
        """Inner products of the rows, row n·Q + q: float64, shape ``(N·Q, N·Q)``.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
        """

    @abstractmethod
    def tangents(self, vectors: Tensor, weights: Tensor) -> Tensor | None:
        """Θ's products with Σ_nq w_nq v_nq: ``(L, N·Q)`` → ``(L, N, *positions, C)``; or None."""

    def combinations(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Σ_nq w_i,nq J_nᵀv_nq in the model's dtype, shape ``(k, P)``."""
        return CapturedRows(self.problem.rows, vectors).combinations(weights)


class Strips(Products):
    """Products of Θ with the vectors that updates are made of, one strip for each of them."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        self.jacobian = CapturedRows(problem.rows, unit_cotangents(problem))
        self._strips: list[tuple[Tensor, Tensor]] = []

    def _strip(self, vectors: Tensor) -> Tensor:
        """(J_nᵀe_c)·(J_mᵀv_mq), shape ``(NC, N·Q)``; computed once for each vector."""

        def known(vector: Tensor) -> list[Tensor]:
            return [strip for other, strip in self._strips if torch.equal(other, vector)][:1]

        missing = [q for q, vector in enumerate(vectors.unbind(1)) if not known(vector)]
        if missing:
            # The vectors are their own coefficients of unit vectors.
            strips = self.jacobian.products(vectors[:, missing].flatten(2))
            split = strips.unflatten(1, (-1, len(missing)))
            self._strips += [(vectors[:, q], split[..., i]) for i, q in enumerate(missing)]
        return torch.stack([s for vector in vectors.unbind(1) for s in known(vector)], 2).flatten(1)

    def gram(self, vectors: Tensor) -> Tensor:
        strip = self._strip(vectors).unflatten(0, self.shape)
        gram = torch.bmm(vectors.flatten(2), strip).flatten(0, 1)
        return (gram + gram.T) / 2

    def tangents(self, vectors: Tensor, weights: Tensor) -> Tensor:
        return (weights @ self._strip(vectors).T).reshape(-1, *self.problem.outputs.shape)


class MatrixFree(Products):
    """Gram matrices of rows, each from one capture, which the combinations then use again."""

    def __init__(self, problem: Linearized) -> None:
        super().__init__(problem)
        self._captured: CapturedRows | None = None

    def gram(self, vectors: Tensor) -> Tensor:
        self._captured = CapturedRows(self.problem.rows, vectors)
        return self._captured.gram()

    def tangents(self, vectors: Tensor, weights: Tensor) -> None:
        return None

    def combinations(self, vectors: Tensor, weights: Tensor) -> Tensor:
        captured, self._captured = self._captured, None
        if captured is not None and captured.cotangents is vectors:
            return captured.combinations(weights)
        return super().combinations(vectors, weights)


class SpanSpace(RowSpace):
    """The span of the rows J_nᵀv_nq of some vectors v, by a Cholesky factor of their products."""

    def __init__(self, products: Products, vectors: Tensor) -> None:
        self.problem = products.problem
        self.products = products
        self.vectors = vectors
        self.unit, self.scales = unit_vectors(vectors)
        self._use(GramFactor.of(products.gram(self.unit)))

    def _use(self, factor: GramFactor) -> None:
        self.factor, self.lower = factor, self.scales.unsqueeze(1) * factor.lower

    @property
    def resolves_rank(self) -> bool:
        return self.factor.has_full_rank(self.problem.num_parameters)

    def columns(self, vectors: Tensor) -> list[int] | None:
        """Which of the Q vectors of each sample these are, None if they are not among them."""
        places = []
        for vector in vectors.unbind(1):
            same = (q for q, other in enumerate(self.vectors.unbind(1)) if vector.equal(other))
            places.append(next(same, -1))
        return None if -1 in places else places

    def rows(self, vectors: Tensor) -> Tensor:
        columns = self.columns(vectors)
        if columns is None:
            raise EngineError("these rows are not in the span that the space was made for")
        split = self.lower.unflatten(0, (-1, self.vectors.shape[1]))
        rows: Tensor = split[:, columns].flatten(0, 1)
        return rows

    def lengths(self, vectors: Tensor) -> Tensor:
        return row_lengths(self.rows(vectors))

    def weights(self, coordinates: Tensor) -> Tensor:
        """The coefficients c of the rows of `unit` in d = Σ_nq c_nq J_nᵀv_nq: ``(L, N·Q)``."""
        return self.factor.weights(coordinates)

    def tangents(self, coordinates: Tensor) -> Tensor | None:
        return self.products.tangents(self.unit, self.weights(coordinates))

    def directions(self, coordinates: Tensor) -> Tensor:
        return self.products.combinations(self.unit, self.weights(coordinates))

    def perturbed(self, noise: float, generator: torch.Generator) -> SpanSpace:
        other = object.__new__(SpanSpace)
        other.problem, other.products, other.vectors = self.problem, self.products, self.vectors
        other.unit, other.scales = self.unit, self.scales
        other._use(self.factor.perturbed(noise, generator))
        return other


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of size 1 and their sizes, so that squares of a learnt sample's do not underflow.

    Args:
        vectors: v, shape ``(N, Q, *positions, C)``.

    Returns:
        v/max|v|, and max|v| (1 for v = 0), shape ``(N·Q,)``.
    """
    sizes = vectors.flatten(2).abs().amax(2)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return vectors / sizes.reshape(*sizes.shape, *[1] * (vectors.ndim - 2)), sizes.flatten()


def row_noise(rows: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Random changes of rows, relative to their lengths.

    Equal rows get equal noise but for the rounding of the algebra, which does not keep them equal.
    """
    _, places = torch.unique(rows, dim=0, return_inverse=True)
    change = noise * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)[places.cpu()]
    if int(places.max()) + 1 < len(rows):
        change += EPSILON * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    lengths = row_lengths(rows).unsqueeze(1)
    scaled: Tensor = change.to(rows) * lengths / float(rows.shape[1]) ** 0.5
    return scaled


def choose_form(
    sizes: Sizes, budget: int, *, exact: bool = True, pushes: int | None = None
) -> type[LogitSpace] | type[Products]:
    """What to keep of Θ.

    Args:
        sizes: of the problem.
        budget: bytes to work in.
        exact: with all of Θ, for the exact natural gradient, if it is within reach.
        pushes: how many updates will be pushed, if that is known: a few are pushed through the
            model for less than the C backward passes that products of Θ begin with.

    Raises:
        EngineError: not even the Gram matrix of the batch would fit in the memory budget.

    >>> choose_form(Sizes(samples=160, outputs=10, parameters=10_000_000), 2**33).__name__
    'GramSpace'
    """
    samples, outputs, parameters = sizes
    entries = samples * outputs * parameters
    # Beyond DENSE_SIZE, J takes more backward passes than a Krylov run takes steps.
    in_reach = samples * outputs <= DENSE_SIZE or has_few_parameters(sizes)
    # J, its scaled copy, L, Q and the workspace of their factorisation.
    if in_reach and entries <= EXPLICIT_ENTRIES and 4 * 8 * entries <= budget:
        return JacobianSpace
    if exact and dense_is_feasible(sizes, budget):
        return GramSpace
    # A tangent costs about as much as a backward pass with its products.
    needed = outputs if pushes is None else min(pushes, COMMON_RANK, 2 * samples)
    # Strips for the residual and for a few draws, and the tangents of some fifty updates.
    fits = 8 * samples * outputs * (4 * samples + 100) < budget
    if outputs <= min(STRIP_OUTPUTS, 2 * needed) and fits:
        return Strips
    if 5 * 8 * samples**2 > budget:
        most = int((budget / 40) ** 0.5)
        raise EngineError(
            f"the Gram matrix of {samples} samples needs {describe_bytes(40 * samples**2)}, over "
            f"the memory budget of {describe_bytes(budget)}: at most {most} samples fit; use a "
            "smaller batch or raise memory="
        )
    return MatrixFree


def dense_is_feasible(sizes: Sizes, budget: int) -> bool:
    """Whether what the exact natural gradient needs fits in memory."""
    return sizes.samples * sizes.outputs <= DENSE_SIZE and dense_bytes(sizes) <= budget


def dense_bytes(sizes: Sizes) -> int:
    """The memory that the exact natural gradient needs where J is not kept."""
    return DENSE_MATRICES * 8 * (sizes.samples * sizes.outputs) ** 2
