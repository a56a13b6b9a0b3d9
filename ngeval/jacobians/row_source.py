"""Rows of the Jacobian in bounded memory, and the reductions over them.

Row n·Q + q of a problem is J_nᵀv_nq, for sample n and its cotangent q. The batch is captured in
blocks of rows that fit the memory budget; a Gram matrix is assembled from pairs of blocks.

Where the samples are spread over ranks, each captures rows of its own samples; what needs pairs of
rows receives the terms of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ngeval.errors import EngineError
from ngeval.jacobians.capture import Use, capture, stream
from ngeval.jacobians.capture_plan import CapturePlan
from ngeval.jacobians.inner_products import (
    add_inner_products,
    add_squared_column_sums,
    complete_rows,
)
from ngeval.jacobians.rank_exchange import terms_of_other_ranks
from ngeval.jacobians.terms import ALL, Block, Term, split_rows, whole_block
from ngeval.jacobians.vjp_rows import loop_rows, vmap_rows, whole_model_term
from ngeval.model.autograd import Parameters, model_errors
from ngeval.model.function import ModelFunction
from ngeval.model.sharding import Shards
from ngeval.utils.memory import halving
from ngeval.utils.text import describe_bytes

STREAM_MEMORY = 2**26
"""Bytes of rows that are only iterated over: larger blocks are slower, as they miss every cache."""

TILE = 256
"""Rows and columns of a matrix that are transposed at a time."""

ENGINES = ("layers", "vmap", "loop")

T = TypeVar("T")

Pair = tuple[slice, slice, list[Term], list[Term]]
"""Rows and columns of a Gram matrix, and the terms of both."""


@dataclass(frozen=True)
class RowSource:
    """The source of rows: a model at θ on its batch, the engine, and a memory budget.

    Attributes:
        engine_name: ``"layers"``, ``"vmap"`` or ``"loop"``.
        memory: bytes that captures and rows may occupy at a time.
        plan: of the layer engine; None for the others.
        sample_bytes: size of one sample's activations in a forward pass.
    """

    function: ModelFunction
    engine_name: str
    memory: int
    plan: CapturePlan | None = None
    sample_bytes: int = 0

    @property
    def shards(self) -> Shards:
        """This process's part of the samples."""
        return self.function.shards

    @property
    def row_bytes(self) -> int:
        """Bytes of a whole row in the model's dtype and of its float64 copy."""
        return self.function.num_parameters * (self.function.dtype.itemsize + 8)

    @property
    def captured_bytes(self) -> int:
        """Bytes held for a row between its capture and its use."""
        return self.row_bytes if self.plan is None else self.plan.captured_bytes(self.function)

    def fits(self, num_samples: int, num_vectors: int, share: float) -> bool:
        """Whether captures of all rows of N samples with Q cotangents fit in a share of the memory.

        False for no samples, of which nothing can be captured.
        """
        size = num_samples * (num_vectors * self.captured_bytes + self.sample_bytes)
        return 0 < size <= share * self.memory

    def capture(self, cotangents: Tensor, block: Block) -> list[Term]:
        """The terms of the rows of one block."""
        chosen = cotangents[block.samples, block.vectors].to(self.function.dtype)
        with model_errors():
            if self.plan is not None:
                return capture(self.function, self.plan, block.samples, chosen)
            return [self._whole_model_term(block.samples, chosen)]

    def stream(self, cotangents: Tensor, block: Block, use: Use) -> None:
        """Use the terms of one block's rows as soon as they are complete; see `capture.stream`."""
        chosen = cotangents[block.samples, block.vectors].to(self.function.dtype)
        with model_errors():
            if self.plan is not None:
                stream(self.function, self.plan, block.samples, chosen, use)
            else:
                use([self._whole_model_term(block.samples, chosen)], vectors=ALL)

    def _whole_model_term(self, samples: slice, cotangents: Tensor) -> Term:
        rows = vmap_rows if self.engine_name == "vmap" else loop_rows
        return whole_model_term(rows, self.function, samples, cotangents)

    def blocks(self, cotangents: Tensor, share: float = 1.0) -> list[Block]:
        """Blocks of at most a share of the memory, one if all rows fit; an error if none fits."""
        count, vectors = cotangents.shape[:2]
        single = self.captured_bytes + self.sample_bytes
        budget = int(self.memory * share)
        if single > budget:
            raise EngineError(
                f"one row of the Jacobian takes {describe_bytes(single)}, and the memory budget "
                f"of {describe_bytes(self.memory)} leaves {describe_bytes(budget)} for it: not "
                f"even one sample fits; raise memory= to {describe_bytes(single / share * 1.1)}"
            )
        whole = vectors * self.captured_bytes + self.sample_bytes
        if whole <= budget:
            limit = budget // whole * vectors
        else:
            limit = (budget - self.sample_bytes) // self.captured_bytes
        return split_rows(count, vectors, max(1, limit))

    def captures(
        self, cotangents: Tensor, share: float = 1.0
    ) -> Iterator[tuple[Block, list[Term]]]:
        """The terms of all rows, block by block; see `blocks`."""
        for block in self.blocks(cotangents, share):
            yield block, self.capture(cotangents, block)

    def iterate(self, cotangents: Tensor) -> Iterator[tuple[Block, Parameters]]:
        """All rows J_nᵀv_nq, block by block, by parameter, each of shape ``(rows, numel)``."""
        limit = max(1, min(self.memory, STREAM_MEMORY) // self.row_bytes)
        for block in split_rows(cotangents.shape[0], cotangents.shape[1], limit):
            rows = self.rows(cotangents, block)
            yield block, {name: rows[name].reshape(block.size, -1) for name in rows}

    def rows(self, cotangents: Tensor, block: Block) -> Parameters:
        """Rows of every parameter, shape ``(samples, Q, *parameter.shape)``."""
        lead = (block.samples.stop - block.samples.start, block.vectors.stop - block.vectors.start)
        return complete_rows(self.capture(cotangents, block), self.function.parameters, ALL, lead)

    def retry(self, attempt: Callable[[RowSource], T]) -> T:
        """Call ``attempt(source)``, with half the memory after every out-of-memory error."""
        return halving(lambda memory: attempt(replace(self, memory=memory)), self.memory)

    def local(self, field: Tensor) -> tuple[RowSource, Tensor]:
        """This process's samples: the source of their rows, and their entries of a tensor."""
        return replace(self, function=self.function.local()), self.shards.local(field)

    def sum_over_samples(self, compute: Callable[..., T], *fields: Tensor) -> T:
        """A sum over samples, as tensors of which ``compute(source, *fields)`` gives a new part.

        It sums over the samples of the source; the fields are per-sample tensors, samples first.
        """
        return self._over_samples(self.shards.sum, compute, fields)

    def concatenate_over_samples(self, compute: Callable[..., T], *fields: Tensor) -> T:
        """Like `sum_over_samples`, for tensors with one entry per sample, or Q of them."""
        return self._over_samples(self.shards.concatenate, compute, fields)

    def _over_samples(
        self,
        combine: Callable[[Callable[[], T]], T],
        compute: Callable[..., T],
        fields: tuple[Tensor, ...],
    ) -> T:
        part, local_fields = self.function.local(), [self.shards.local(field) for field in fields]

        # An error of one rank is raised on all, so that all of them try again together.
        return self.retry(
            lambda source: combine(lambda: compute(replace(source, function=part), *local_fields))
        )

    def sum_over_pairs(self, compute: Callable[[RowSource], T]) -> T:
        """A sum over `pairs`, as tensors of which ``compute(source)`` gives a new part."""
        return self.retry(lambda source: self.shards.sum(lambda: compute(source)))

    def pairs(self, cotangents: Tensor, kept: list[Term] | None = None) -> Iterator[Pair]:
        """Pairs of blocks whose inner products make up the lower triangle of a Gram matrix.

        Where samples are spread over ranks, this rank's rows are paired with each other and with
        those of half of the other ranks, such that every pair is computed once. ``kept`` are the
        terms of all of this process's rows, if they are captured already.

        Yields:
            Rows and columns of the whole matrix and the terms of both, the same list on the
            diagonal.
        """
        shards, (part, vectors) = self.shards, self.local(cotangents)
        start = self._first_row(cotangents)

        def split(share: float) -> list[Block]:
            return part.blocks(vectors, share) if kept is None else [whole_block(vectors)]

        def captured(block: Block) -> list[Term]:
            return part.capture(vectors, block) if kept is None else kept

        blocks = split(1.0)
        if several := max(shards.gather(len(blocks))) > 1:
            # This block, another of this rank's, and one that is received.
            blocks = split(1 / 2 if shards.alone else 1 / 3)
        for i in range(max(shards.gather(len(blocks)))):
            rows, terms = slice(0, 0), list[Term]()
            if i < len(blocks):
                rows, terms = _shifted(blocks[i].rows, start), captured(blocks[i])
                yield rows, rows, terms, terms
            for other in blocks[i + 1 :]:
                yield _shifted(other.rows, start), rows, captured(other), terms
            others = terms_of_other_ranks(self.function, rows, terms, once=True, whole=several)
            for columns, received in others:
                for j, other in enumerate(blocks):
                    local = _shifted(other.rows, start)
                    local_terms = terms if i == j else captured(other)
                    if local.start > columns.start:
                        yield local, columns, local_terms, received
                    else:
                        yield columns, local, received, local_terms

    def all_blocks(
        self, captures: Iterator[tuple[Block, list[Term]]], cotangents: Tensor
    ) -> Iterator[tuple[slice, list[Term]]]:
        """The rows and terms of every block of the batch, those of other ranks included.

        Given blocks of this process's samples with their terms, and the whole batch's cotangents.
        """
        start = self._first_row(cotangents)
        local = next(captures, None)
        while any(self.shards.gather(local is not None)):
            rows, terms = slice(0, 0), list[Term]()
            if local is not None:
                rows, terms = _shifted(local[0].rows, start), local[1]
                yield rows, terms
            yield from terms_of_other_ranks(self.function, rows, terms, once=False, whole=True)
            local = next(captures, None)

    def _first_row(self, cotangents: Tensor) -> int:
        """The number of this rank's first row in the whole batch."""
        return int(self.shards.local_slice(len(cotangents)).start * cotangents.shape[1])


def _shifted(rows: slice, start: int) -> slice:
    return slice(start + rows.start, start + rows.stop)


def gram_matrix(
    source: RowSource,
    cotangents: Tensor,
    keep: Callable[[RowSource], list[Term] | None] = lambda _: None,
) -> Tensor:
    """Inner products of all rows: entry (n·Q+q, m·Q+p) is (J_nᵀv_nq)·(J_mᵀv_mp).

    Accumulated in float64, layer by layer: the matrix of gradients reaches condition numbers
    beyond what float32 sums resolve, and only one layer's rows exist at a time. ``keep`` gives the
    terms of all of this process's rows, if they are kept.
    """
    size = cotangents.shape[0] * cotangents.shape[1]

    def compute(source: RowSource) -> Tensor:
        gram = torch.zeros(size, size, dtype=torch.float64, device=source.function.device)
        kept = keep(source)
        single = kept is None and source.shards.alone and cotangents.shape[1] == 1
        if single and len(source.blocks(cotangents)) == 1:
            source.stream(
                cotangents,
                whole_block(cotangents),
                lambda terms, vectors: add_inner_products(gram, terms, terms, symmetric=True),
            )
            return gram
        for rows, columns, left, right in source.pairs(cotangents, kept):
            add_inner_products(gram[rows, columns], left, right, symmetric=left is right)
        return gram

    return from_lower(source.sum_over_pairs(compute))


def from_lower(matrix: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle, in place."""
    size = len(matrix)
    # In tiles, since a transposed matrix is read against the order of memory.
    tiles = [slice(i, min(i + TILE, size)) for i in range(0, size, TILE)]
    for i, rows in enumerate(tiles):
        diagonal = torch.tril(matrix[rows, rows])
        matrix[rows, rows] = diagonal + torch.tril(diagonal, -1).T
        for columns in tiles[:i]:
            matrix[columns, rows] = matrix[rows, columns].T
    return matrix


def squared_column_sums(source: RowSource, cotangents: Tensor) -> Tensor:
    """Σ_{n,q} (J_nᵀv_nq)² entrywise: a float64 vector of length P.

    With v the columns of S this is diag F; with v = u it is the diagonal of the empirical Fisher.
    """
    sums = squared_sums(source, cotangents, list(source.function.parameters))
    return torch.cat(list(sums.values()))


def squared_sums(source: RowSource, cotangents: Tensor, names: Sequence[str]) -> Parameters:
    """Σ_{n,q} (J_nᵀv_nq)² of some parameters: flat float64 vectors by name.

    The names are all of a layer's, or none of them.
    """

    def compute(source: RowSource, vectors: Tensor) -> Parameters:
        parameters = source.function.parameters
        sums = {
            name: parameters[name].new_zeros(parameters[name].numel(), dtype=torch.float64)
            for name in names
        }
        for _, terms in source.captures(vectors):
            add_squared_column_sums(sums, [t for t in terms if t.shapes.keys() <= sums.keys()])
        return sums

    return source.sum_over_samples(compute, cotangents)


def row_matrix(source: RowSource, cotangents: Tensor) -> Tensor:
    """All rows J_nᵀv_nq as a matrix: float64, shape ``(N·Q, P)``."""

    def compute(source: RowSource, vectors: Tensor) -> Tensor:
        blocks = [torch.cat(list(rows.values()), 1).double() for _, rows in source.iterate(vectors)]
        return torch.cat([*blocks, vectors.new_zeros(0, source.function.num_parameters)])

    return source.concatenate_over_samples(compute, cotangents)


def squared_norms(source: RowSource, cotangents: Tensor) -> Tensor:
    """‖J_nᵀv_nq‖² of every row: float64, shape ``(N·Q,)``."""

    def compute(source: RowSource, vectors: Tensor) -> Tensor:
        norms = vectors.new_zeros(vectors.shape[0] * vectors.shape[1])
        for block, rows in source.iterate(vectors):
            for row in rows.values():
                norms[block.rows] += row.to(torch.float64).square().sum(1)
        return norms

    return source.concatenate_over_samples(compute, cotangents)
