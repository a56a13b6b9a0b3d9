"""Rows that several quantities are computed from; products and sums of rows by parameter group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ngeval.jacobians.inner_products import (
    PIECE_ENTRIES,
    add_inner_products,
    add_row_combinations,
    complete_rows,
)
from ngeval.jacobians.row_source import RowSource, from_lower, gram_matrix
from ngeval.jacobians.terms import Block, Term, whole_block
from ngeval.model.directions import slices

Groups = Mapping[str, Sequence[str]]
"""Parameter names by group."""

KEPT_SHARE = 0.25
"""The share of the memory that kept captures may occupy: rows are computed beside them."""


class CapturedRows:
    """Rows J_nᵀv_nq whose captures are kept where they fit in `KEPT_SHARE` of the memory.

    Where they do not fit, every quantity captures them again, block by block.
    """

    def __init__(self, source: RowSource, cotangents: Tensor) -> None:
        self.source = source
        self.cotangents = cotangents
        self._kept: list[Term] | None = None

    def products(self, weights: Tensor) -> Tensor:
        """Inner products with the rows of combinations w_nr = Σ_q c_nrq v_nq of these cotangents.

        The weights are c, ``(N, R, Q)``. Float64, shape ``(N·Q, N·R)``: entry (n·Q+q, m·R+r) is
        (J_nᵀv_nq)·(J_mᵀw_mr).
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
        """Σ_nq w_inq J_nᵀv_nq for w of shape ``(k, N·Q)``: ``(k, P)``, the model's dtype."""
        names = list(self.source.function.parameters)
        return self.group_combinations({"": names}, {"": weights}, share=1.0)

    def group_combinations(
        self, groups: Groups, weights: Mapping[str, Tensor], share: float = KEPT_SHARE
    ) -> Tensor:
        """Σ_nq w_l,nq R_l,nq for each group l of parameters, side by side; 0 for all others.

        The weights are float64, ``(k, N·Q)``; the result is ``(k, P)`` in the model's dtype. The
        ``share`` is of the memory, for captures that are not kept.
        """
        count = len(next(iter(weights.values())))

        def compute(source: RowSource, vectors: Tensor, *local_weights: Tensor) -> Tensor:
            function = source.function
            out = torch.zeros(
                count, function.num_parameters, dtype=function.dtype, device=function.device
            )
            flat = [w.flatten(0, 1).T for w in local_weights]
            for block, terms in self._captures(source, vectors, share):
                by_name = {
                    name: group_weights[:, block.rows]
                    for names, group_weights in zip(groups.values(), flat, strict=True)
                    for name in names
                }
                add_row_combinations(out, function.offsets, terms, by_name)
            return out

        by_sample = [weights[group].T.unflatten(0, self.cotangents.shape[:2]) for group in groups]
        return self.source.sum_over_samples(compute, self.cotangents, *by_sample)

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


def group_grams(source: RowSource, cotangents: Tensor, groups: Groups) -> dict[str, Tensor]:
    """R_l R_lᵀ for the rows R_l of each group l: float64, shape ``(N·Q, N·Q)``."""
    size = cotangents.shape[0] * cotangents.shape[1]

    def compute(source: RowSource) -> dict[str, Tensor]:
        device = source.function.device
        grams = {g: torch.zeros(size, size, dtype=torch.float64, device=device) for g in groups}
        for rows, columns, left, right in source.pairs(cotangents):
            for group, names in groups.items():
                gram = grams[group][rows, columns]
                add_inner_products(gram, left, right, symmetric=right is left, names=names)
        return grams

    return {group: from_lower(gram) for group, gram in source.sum_over_pairs(compute).items()}


def group_squares(source: RowSource, cotangents: Tensor, groups: Groups) -> dict[str, Tensor]:
    """R_lᵀR_l for the rows R_l of each group l: float64, shape ``(P_l, P_l)``."""
    parameters = source.function.parameters

    def compute(source: RowSource, vectors: Tensor) -> dict[str, Tensor]:
        squares = {}
        for group, names in groups.items():
            size = sum(parameters[name].numel() for name in names)
            squares[group] = torch.zeros(
                size, size, dtype=torch.float64, device=source.function.device
            )
        for block, terms in source.captures(vectors, KEPT_SHARE):
            for group, names in groups.items():
                members = {name: parameters[name] for name in names}
                shared = [term for term in terms if term.shapes.keys() & members.keys()]
                count = block.samples.stop - block.samples.start
                width = block.vectors.stop - block.vectors.start
                # A few samples' whole rows at a time: this form is chosen for small groups.
                step = max(1, PIECE_ENTRIES // (width * len(squares[group])))
                for samples in slices(count, step):
                    lead = (samples.stop - samples.start, width)
                    rows = complete_rows(shared, members, samples, lead)
                    parts = [row.reshape(*lead, -1).double() for row in rows.values()]
                    wide = torch.cat(parts, 2).flatten(0, 1)
                    squares[group].addmm_(wide.T, wide)
        return squares

    return source.sum_over_samples(compute, cotangents)
