"""The exact Fisher (= generalised Gauss-Newton) matrix as a linear operator.

F = Σ_n J_nᵀH_nJ_n, sum-reduced, never formed: a product costs one JVP and one VJP.
Source: Martens, "New insights and perspectives on the natural gradient method"
(arXiv 1412.1193), §8–9; Schraudolph, "Fast curvature matrix-vector products" (2002).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from ngeval.errors import EngineError, InputError
from ngeval.jacobians import squared_column_sums
from ngeval.model.directions import push_directions, slices
from ngeval.problem.linearized import Linearized, Sizes
from ngeval.utils.text import describe_bytes

SMALL = 2**26
"""Bytes that the columns of S may take under any budget."""

MAX_COLUMNS = 64
"""At most this many tangents are pushed at a time: more are not faster."""


class FisherOperator:
    """F of a problem, symmetric positive semi-definite, shape ``(P, P)``.

    Example:
        >>> import torch, ngeval
        >>> model = torch.nn.Linear(2, 2, bias=False).double()
        >>> x, y = torch.eye(2).double(), torch.tensor([0, 1])
        >>> F = ngeval.Problem(model, x, y, "categorical").fisher()
        >>> F.shape
        (4, 4)
        >>> bool(torch.allclose((F @ torch.eye(4).double()).diagonal(), F.diagonal()))
        True
    """

    def __init__(self, problem: Linearized) -> None:
        self.problem = problem

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self.problem.num_parameters, self.problem.num_parameters)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """F v.

        Args:
            vector: shape ``(P,)``, or ``(P, k)`` for k products.

        Returns:
            The same shape and dtype as ``vector``.

        Raises:
            InputError: the first dimension is not P.
        """
        if not isinstance(vector, Tensor) or vector.ndim not in (1, 2):
            raise InputError("F @ v takes a torch vector (P,) or matrix (P, k)")
        if not vector.is_floating_point():
            raise InputError(f"F @ v takes floating-point numbers, not {vector.dtype}")
        if vector.shape[0] != self.shape[0]:
            raise InputError(
                f"F has shape {self.shape}, so F @ v needs {self.shape[0]} rows, not "
                f"{vector.shape[0]}"
            )
        if vector.ndim == 1:
            return self._product(vector).to(vector.dtype)
        if vector.shape[1] == 0:
            return torch.zeros_like(vector)
        return torch.stack([self._product(column) for column in vector.T], 1).to(vector.dtype)

    def _product(self, vector: Tensor) -> Tensor:
        tangent = self.problem.jvp(vector)
        return self.problem.vjp(self.problem.distribution.fisher_product(tangent))

    def diagonal(self) -> Tensor:
        """Diag F, exactly: Σ_n Σ_c ((S_nᵀJ_n)_c)² entrywise, float64, shape ``(P,)``.

        Costs C backward passes per sample, or P tangents of the batch where P < C, in bounded
        memory; computed once per problem.
        """
        problem = self.problem
        if problem.fisher_diagonal is None:
            problem.fisher_diagonal = problem.shards.synchronized(lambda: _diagonal(problem))
        return problem.fisher_diagonal

    def to_scipy(self) -> LinearOperator:
        """F as a float64 `scipy.sparse.linalg.LinearOperator`, for ``eigsh``, ``cg``, …."""

        def matvec(vector: np.ndarray) -> np.ndarray:
            product = self @ torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
            return product.cpu().numpy()

        return LinearOperator(
            shape=self.shape,
            dtype=np.dtype(np.float64),
            matvec=matvec,
            rmatvec=matvec,
            matmat=matvec,
        )


def _diagonal(problem: Linearized) -> Tensor:
    if not has_few_parameters(problem.sizes):
        return squared_column_sums(problem.rows, factor_columns(problem))
    distribution = problem.distribution
    parts = [
        distribution.factor_transpose_product(columns).square().flatten(1).sum(1)
        for columns in jacobian_columns(problem)
    ]
    return torch.cat(parts)


def has_few_parameters(sizes: Sizes) -> bool:
    """Whether J has fewer columns (tangents) than a sample has rows (backward passes)."""
    return sizes.parameters < sizes.outputs


def jacobian_columns(problem: Linearized) -> Iterator[Tensor]:
    """J's columns J e_p, some at a time: float64, shape ``(k, N, *positions, C)``."""
    # A tangent beside the activations, and its copies in float64.
    size = problem.num_samples * (problem.rows.sample_bytes + 4 * 8 * problem.num_outputs)
    step = max(1, min(MAX_COLUMNS, problem.rows.memory // max(1, size)))
    for chosen in slices(problem.num_parameters, step):
        unit = torch.zeros(
            chosen.stop - chosen.start,
            problem.num_parameters,
            dtype=problem.dtype,
            device=problem.device,
        )
        unit[:, chosen].fill_diagonal_(1)
        yield problem.shards.concatenate(partial(_pushed, problem, unit)).movedim(0, 1)


def _pushed(problem: Linearized, directions: Tensor) -> Tensor:
    """The tangents at this rank's samples: float64, shape ``(n, k, *positions, C)``."""
    part = problem.function.local()
    if part.num_samples == 0:
        return problem.outputs.new_zeros(0, len(directions), *problem.outputs.shape[1:])
    return push_directions(part, directions).movedim(1, 0)


def factor_columns(problem: Linearized) -> Tensor:
    """The columns of S_n as cotangents, shape ``(N, C, *positions, C)``: J_nᵀS_n by rows.

    Raises:
        EngineError: they do not fit in the memory budget; nor would C backward passes be in reach.
    """
    needed = 4 * 8 * problem.num_samples * problem.num_outputs**2
    if needed > max(problem.rows.memory, SMALL):
        raise EngineError(
            f"the exact Fisher of {problem.num_samples} samples by its rows takes "
            f"{problem.num_outputs} backward passes and {describe_bytes(needed)}, over the memory "
            f"budget of {describe_bytes(problem.rows.memory)}; use fewer samples or positions, "
            "raise memory=, or take labels of the data or the model in place of the expectation "
            "(diag-ef for diag, kfac-sf for kfac)"
        )
    unit = unit_cotangents(problem)
    columns = problem.distribution.factor_product(unit.transpose(0, 1))
    return columns.transpose(0, 1)


def unit_cotangents(problem: Linearized) -> Tensor:
    """The unit vectors of each sample's output space, shape ``(N, C, *positions, C)``."""
    size = problem.num_outputs
    sample_shape = problem.outputs.shape[1:]
    eye = torch.eye(size, dtype=torch.float64, device=problem.device).reshape(size, *sample_shape)
    return eye.expand(problem.num_samples, size, *sample_shape)
