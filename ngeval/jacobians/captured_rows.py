"""Rows that several things are wanted of, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ngeval.jacobians.inner_products import add_inner_products, add_row_combinations
from ngeval.jacobians.rank_exchange import of_others
from ngeval.jacobians.row_source import Block, RowSource, from_lower, gram_matrix, pairs_over_ranks
from ngeval.jacobians.terms import Term
from ngeval.model.function import ModelFunction
from ngeval.utils.memory import halving

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
        self.shards = source.function.shards
        self._part = source.local()
        self._own = self.shards.local(cotangents)
        self._kept: list[tuple[Block, list[Term]]] | None = None

    def products(self, weights: Tensor) -> Tensor:
        """Inner products with the rows of combinations w_nr = Σ_q c_nrq v_nq of these cotangents.

        Args:
            weights: c of shape ``(N, R, Q)``.

        Returns:
            Float64, shape ``(N·Q, N·R)``: entry (n·Q+q, m·R+r) is (J_nᵀv_nq)·(J_mᵀw_mr).
        """
        (count, vectors), width = self.cotangents.shape[:2], weights.shape[1]
        if not self.shards.alone:
            return self._products_over_ranks(weights)

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
            if not self.shards.alone:
                return self._gram_over_ranks(limited)
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
        vectors = self.cotangents.shape[1]
        samples = self.shards.local_slice(len(self.cotangents))
        own = weights[:, samples.start * vectors : samples.stop * vectors]

        def attempt(limited: RowSource) -> Tensor:
            return _combined(limited.function, self._captures(limited, share=1.0), own)

        part = self._part
        return self.shards.sum(
            lambda: halving(lambda memory: attempt(replace(part, memory=memory)), part.memory)
        )

    def captures(self) -> Iterator[tuple[Block, list[Term]]]:
        """The terms of all rows of this rank's samples, block by block."""
        yield from self._captures(self._part)

    def _gram_over_ranks(self, limited: RowSource) -> Tensor:
        size = self.cotangents.shape[0] * self.cotangents.shape[1]
        part = replace(self._part, memory=limited.memory)

        def own_share() -> Tensor:
            kept = list(self._captures(part)) if self._can_be_kept(part) else []
            gram = torch.zeros(size, size, dtype=torch.float64, device=part.function.device)
            for rows, columns, left, right in pairs_over_ranks(limited, self.cotangents, kept):
                add_inner_products(gram[rows, columns], left, right, symmetric=left is right)
            return gram

        return from_lower(self.shards.sum(own_share))

    def _products_over_ranks(self, weights: Tensor) -> Tensor:
        """The rows of one's own samples against everybody's, which are sent round."""
        (count, vectors), width = self.cotangents.shape[:2], weights.shape[1]
        start = self.shards.local_slice(count).start
        own, function = self.shards.local(weights), self.source.function
        others = torch.einsum("nrq,nq...->nr...", own, self._own)

        def attempt(limited: RowSource) -> Tensor:
            device = limited.function.device
            size = (len(self._own) * vectors, count * width)
            out = torch.zeros(size, dtype=torch.float64, device=device)
            blocks = limited.blocks(others, share=KEPT_SHARE)
            for i in range(max(self.shards.gather(len(blocks)))):
                sent, terms, rows = blocks[i : i + 1], list[Term](), slice(0, 0)
                for block in sent:
                    first = start * width
                    rows = slice(first + block.rows.start, first + block.rows.stop)
                    terms = limited.capture(others, block)
                    self._add(out[:, rows], limited, terms)
                for columns, foreign in of_others(function, rows, terms, once=False, whole=True):
                    self._add(out[:, columns], limited, foreign)
            return out

        part = self._part
        return halving(
            lambda memory: self.shards.concatenate(lambda: attempt(replace(part, memory=memory))),
            part.memory,
        )

    def _add(self, out: Tensor, source: RowSource, terms: list[Term]) -> None:
        """Add the products of this rank's rows with those of some terms."""
        for block, captured in self._captures(source):
            add_inner_products(out[block.rows], captured, terms)

    def _can_be_kept(self, source: RowSource) -> bool:
        count, vectors = self._own.shape[:2]
        whole = count * (vectors * source.captured_bytes + source.sample_bytes)
        return whole <= KEPT_SHARE * source.memory

    def _captures(
        self, source: RowSource, share: float = KEPT_SHARE
    ) -> Iterator[tuple[Block, list[Term]]]:
        """All rows, in one block if they can be kept, else in blocks of a share of the memory."""
        if self._kept is not None:
            yield from self._kept
            return
        blocks = source.blocks(self._own, share)
        keep = len(blocks) == 1 and self._can_be_kept(source)
        for block in blocks:
            terms = source.capture(self._own, block)
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
