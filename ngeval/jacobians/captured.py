"""Rows that several things are wanted of, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ngeval.functional import ModelFunction
from ngeval.jacobians.products import add_inner_products, add_row_combinations
from ngeval.jacobians.rows import Block, RowSource, from_lower, gram_matrix
from ngeval.jacobians.terms import Term
from ngeval.memory import halving

KEPT_SHARE = 0.25
"""The part of the memory that captures may keep: rows are made beside them."""


class CapturedRows:
    """Rows that several things are wanted of.

    Their captures are kept where they fit in `KEPT_SHARE` of the memory, and made anew otherwise.
    """

    def __init__(self, source: RowSource, cotangents: Tensor) -> None:
        """Nothing is computed yet.

        Args:
            source: the model, engine and memory budget.
            cotangents: v of shape ``(N, Q, *positions, C)``.
        """
        self.source = source
        self.cotangents = cotangents
        self._kept: list[tuple[Block, list[Term]]] | None = None

    def products(self, weights: Tensor) -> Tensor:
        """Inner products with the rows of combinations w_nr = Σ_q c_nrq v_nq of these cotangents.

        Args:
            weights: c of shape ``(N, R, Q)``.

        Returns:
            Float64, shape ``(N·Q, N·R)``: entry (n·Q+q, m·R+r) is (J_nᵀv_nq)·(J_mᵀw_mr).
        """
        (count, vectors), width = self.cotangents.shape[:2], weights.shape[1]

        def attempt(limited: RowSource) -> Tensor:
            device = limited.function.device
            out = torch.zeros(count * vectors, count * width, dtype=torch.float64, device=device)
            if self._can_be_kept(limited):
                for block, captured in self._captures(limited):
                    terms = [term.combined(weights[block.samples]) for term in captured]
                    add_inner_products(out, captured, terms)
                return out
            others = torch.einsum("nrq,nq...->nr...", weights, self.cotangents)
            for block in limited.blocks(others, share=KEPT_SHARE):
                terms = limited.capture(others, block)
                for other, captured in self._captures(limited):
                    add_inner_products(out[other.rows, block.rows], captured, terms)
            return out

        source = self.source
        return halving(lambda memory: attempt(replace(source, memory=memory)), source.memory)

    def gram(self) -> Tensor:
        """Inner products of all rows with each other; see `gram_matrix`."""
        size = self.cotangents.shape[0] * self.cotangents.shape[1]

        def attempt(limited: RowSource) -> Tensor:
            if not self._can_be_kept(limited):
                return gram_matrix(limited, self.cotangents)
            gram = torch.zeros(size, size, dtype=torch.float64, device=limited.function.device)
            for _, terms in self._captures(limited):
                add_inner_products(gram, terms, terms, symmetric=True)
            return from_lower(gram)

        source = self.source
        return halving(lambda memory: attempt(replace(source, memory=memory)), source.memory)

    def combinations(self, weights: Tensor) -> Tensor:
        """Sums of rows with weights; see `row_combinations`."""

        def attempt(limited: RowSource) -> Tensor:
            return _combined(limited.function, self._captures(limited, share=1.0), weights)

        source = self.source
        return halving(lambda memory: attempt(replace(source, memory=memory)), source.memory)

    def captures(self) -> Iterator[tuple[Block, list[Term]]]:
        """The terms of all rows, block by block."""
        yield from self._captures(self.source)

    def _can_be_kept(self, source: RowSource) -> bool:
        count, vectors = self.cotangents.shape[:2]
        whole = count * (vectors * source.captured_bytes + source.sample_bytes)
        return whole <= KEPT_SHARE * source.memory

    def _captures(
        self, source: RowSource, share: float = KEPT_SHARE
    ) -> Iterator[tuple[Block, list[Term]]]:
        """All rows, in one block if they can be kept, else in blocks of a share of the memory."""
        if self._kept is not None:
            yield from self._kept
            return
        blocks = source.blocks(self.cotangents, share)
        keep = len(blocks) == 1 and self._can_be_kept(source)
        for block in blocks:
            terms = source.capture(self.cotangents, block)
            if keep:
                self._kept = [(block, terms)]
            yield block, terms


def row_combinations(source: RowSource, cotangents: Tensor, weights: Tensor) -> Tensor:
    """Σ_{n,q} w_{i,nq} J_nᵀv_nq for k sets of weights: shape ``(k, P)``, the model's dtype.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        weights: w in float64, shape ``(k, N·Q)``.
    """
    return CapturedRows(source, cotangents).combinations(weights)


def _combined(
    function: ModelFunction, captures: Iterable[tuple[Block, list[Term]]], weights: Tensor
) -> Tensor:
    starts, total = {}, 0
    for name, parameter in function.parameters.items():
        starts[name], total = total, total + parameter.numel()
    out = torch.zeros(len(weights), total, dtype=function.dtype, device=function.device)
    for block, terms in captures:
        add_row_combinations(out, starts, terms, weights[:, block.rows])
    return out
