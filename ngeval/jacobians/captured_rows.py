"""Rows that several quantities are computed from, and sums of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ngeval.jacobians.inner_products import add_inner_products, add_row_combinations
from ngeval.jacobians.row_source import Block, RowSource, gram_matrix, whole_block
from ngeval.jacobians.terms import Term

KEPT_SHARE = 0.25
"""The share of the memory that kept captures may occupy: rows are computed beside them."""


class CapturedRows:
    """Rows J_nᵀv_nq whose captures are kept where they fit in `KEPT_SHARE` of the memory.

    Where they do not fit, every quantity captures them again, block by block.
    """

    def __init__(self, source: RowSource, cotangents: Tensor) -> None:
        """Nothing is computed yet."""
        self.source = source
        self.cotangents = cotangents
        self._kept: list[Term] | None = None

    def products(self, weights: Tensor) -> Tensor:
        """Inner products with the rows of combinations w_nr = Σ_q c_nrq v_nq of these cotangents.

        Args:
            weights: c of shape ``(N, R, Q)``.

        Returns:
            Float64, shape ``(N·Q, N·R)``: entry (n·Q+q, m·R+r) is (J_nᵀv_nq)·(J_mᵀw_mr).
        """

        def compute(source: RowSource, vectors: Tensor, local_weights: Tensor) -> Tensor:
            size = (vectors.shape[0] * vectors.shape[1], weights.shape[0] * weights.shape[1])
            out = torch.zeros(size, dtype=torch.float64, device=source.function.device)
            combined = self._combined(source, vectors, local_weights)
            for columns, terms in self.source.all_blocks(combined, weights):
                for block, captured in self._captures(source, vectors):
                    add_inner_products(out[block.rows, columns], captured, terms)
            return out

        return self.source.concatenate_over_samples(compute, self.cotangents, weights)

    def gram(self) -> Tensor:
        """Inner products of all rows with each other; see `gram_matrix`."""
        return gram_matrix(
            self.source, self.cotangents, lambda source: self._keep(*source.local(self.cotangents))
        )

    def combinations(self, weights: Tensor) -> Tensor:
        """Sums of rows with weights; see `row_combinations`."""

        def compute(source: RowSource, vectors: Tensor, local_weights: Tensor) -> Tensor:
            function, flat = source.function, local_weights.flatten(0, 1).T
            starts = function.offsets
            out = torch.zeros(
                len(weights), function.num_parameters, dtype=function.dtype, device=function.device
            )
            for block, terms in self._captures(source, vectors, share=1.0):
                add_row_combinations(out, starts, terms, flat[:, block.rows])
            return out

        by_sample = weights.T.unflatten(0, self.cotangents.shape[:2])
        return self.source.sum_over_samples(compute, self.cotangents, by_sample)

    def captures(self) -> Iterator[tuple[Block, list[Term]]]:
        """The terms of all rows of this process's samples, block by block."""
        yield from self._captures(*self.source.local(self.cotangents))

    def _captures(
        self, source: RowSource, vectors: Tensor, share: float = KEPT_SHARE
    ) -> Iterator[tuple[Block, list[Term]]]:
        """All rows, in one block if they are kept, else in blocks of a share of the memory."""
        kept = self._keep(source, vectors)
        if kept is None:
            yield from source.captures(vectors, share)
        else:
            yield whole_block(vectors), kept

    def _combined(
        self, source: RowSource, vectors: Tensor, weights: Tensor
    ) -> Iterator[tuple[Block, list[Term]]]:
        """The terms of combinations of the rows' cotangents, block by block."""
        kept = self._keep(source, vectors)
        if kept is None:
            others = torch.einsum("nrq,nq...->nr...", weights, vectors)
            yield from source.captures(others, KEPT_SHARE)
        else:
            yield whole_block(weights), [term.combined(weights) for term in kept]

    def _keep(self, source: RowSource, vectors: Tensor) -> list[Term] | None:
        """The terms of all rows, captured once; None if they do not fit."""
        if not source.fits(vectors.shape[0], vectors.shape[1], KEPT_SHARE):
            return None
        if self._kept is None:
            self._kept = source.capture(vectors, whole_block(vectors))
        return self._kept


def row_combinations(source: RowSource, cotangents: Tensor, weights: Tensor) -> Tensor:
    """Σ_{n,q} w_{i,nq} J_nᵀv_nq for k sets of weights: shape ``(k, P)``, the model's dtype.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        weights: w in float64, shape ``(k, N·Q)``.
    """
    return CapturedRows(source, cotangents).combinations(weights)
