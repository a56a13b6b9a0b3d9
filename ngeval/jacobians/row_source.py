"""Rows of the Jacobian in bounded memory, and the reductions made of them.

Rows are numbered n·Q + q for sample n and its cotangent q. The batch is captured in blocks that
fit the memory budget; a Gram matrix is then assembled from pairs of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngeval.errors import EngineError
from ngeval.jacobians.capture import Use, capture, stream
from ngeval.jacobians.capture_plan import CapturePlan
from ngeval.jacobians.inner_products import (
    add_inner_products,
    add_squared_column_sums,
    rows_of,
)
from ngeval.jacobians.rank_exchange import of_others
from ngeval.jacobians.terms import RowsTerm, Term
from ngeval.jacobians.whole_model import loop_rows, vmap_rows
from ngeval.model.function import ModelFunction, Parameters, model_errors
from ngeval.utils.memory import describe_bytes, halving

STREAM_MEMORY = 2**26
"""Bytes of rows that are only passed over: more is slower, since it misses every cache."""

TILE = 256
"""Rows and columns of a matrix that are transposed at one time."""

ENGINES = ("layers", "vmap", "loop")

Pair = tuple[slice, slice, list[Term], list[Term]]
"""Rows and columns of a Gram matrix, and the terms of both."""


@dataclass(frozen=True)
class Block:
    """Some samples, and some of the Q cotangents of each."""

    samples: slice
    vectors: slice
    rows: slice

    @property
    def size(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class RowSource:
    """Where rows come from: a model at θ, the engine, and the memory that it may use.

    Attributes:
        function: the model at θ on its batch.
        engine_name: ``"layers"``, ``"vmap"`` or ``"loop"``.
        memory: bytes that captures and rows may take at one time.
        plan: of the layer engine.
        sample_bytes: what a sample's activations take in a forward pass.
    """

    function: ModelFunction
    engine_name: str
    memory: int
    plan: CapturePlan | None = None
    sample_bytes: int = 0

    def local(self) -> RowSource:
        """The rows of this rank's samples: all of them, for a process by itself."""
        return replace(self, function=self.function.local())

    @property
    def row_bytes(self) -> int:
        """Bytes of a whole row in the model's dtype and of its float64 copy."""
        return self.function.num_parameters * (self.function.dtype.itemsize + 8)

    @property
    def captured_bytes(self) -> int:
        """Bytes of what stands for a row between its capture and its use."""
        return self.row_bytes if self.plan is None else self.plan.captured_bytes(self.function)

    def capture(self, cotangents: Tensor, block: Block) -> list[Term]:
        """The terms of the rows of one block.

        Args:
            cotangents: v of shape ``(N, Q, *positions, C)``, of the whole batch.
            block: which of them.
        """
        chosen = cotangents[block.samples, block.vectors].to(self.function.dtype)
        with model_errors():
            if self.plan is not None:
                return capture(self.function, self.plan, block.samples, chosen)
            return [self._whole_model(block.samples, chosen)]

    def stream(self, cotangents: Tensor, block: Block, use: Use) -> None:
        """Use the terms of one block's rows as soon as they are there; see `capture.stream`.

        Args:
            cotangents: v of shape ``(N, Q, *positions, C)``, of the whole batch.
            block: which of them.
            use: called with terms and the slice of the block's cotangents that they belong to.
        """
        chosen = cotangents[block.samples, block.vectors].to(self.function.dtype)
        with model_errors():
            if self.plan is not None:
                stream(self.function, self.plan, block.samples, chosen, use)
            else:
                use([self._whole_model(block.samples, chosen)], vectors=slice(None))

    def _whole_model(self, samples: slice, cotangents: Tensor) -> Term:
        compute = vmap_rows if self.engine_name == "vmap" else loop_rows

        def rows(chosen: slice, vectors: slice) -> Parameters:
            first, last, _ = chosen.indices(len(cotangents))
            inside = slice(samples.start + first, samples.start + last)
            return compute(self.function, inside, cotangents[chosen, vectors])

        shapes = {name: p.shape for name, p in self.function.parameters.items()}
        return RowsTerm(cotangents.shape[0], cotangents.shape[1], shapes, rows)

    def blocks(self, cotangents: Tensor, share: float = 1.0) -> list[Block]:
        """Blocks of which each takes no more than a share of the memory; one if all fit.

        Raises:
            EngineError: not even a single row fits.
        """
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

    def iterate(self, cotangents: Tensor) -> Iterator[tuple[Block, Parameters]]:
        """All rows J_nᵀv_nq, block by block, by parameter, each of shape ``(rows, numel)``.

        Args:
            cotangents: v of shape ``(N, Q, *positions, C)``.
        """
        limit = max(1, min(self.memory, STREAM_MEMORY) // self.row_bytes)
        for block in split_rows(cotangents.shape[0], cotangents.shape[1], limit):
            rows = self.rows(cotangents, block)
            yield block, {name: rows[name].reshape(block.size, -1) for name in rows}

    def rows(self, cotangents: Tensor, block: Block) -> Parameters:
        """Rows of every parameter, shape ``(samples, Q, *parameter.shape)``."""
        terms = self.capture(cotangents, block)
        every = slice(None)
        found = rows_of(terms, every, every)
        lead = (block.samples.stop - block.samples.start, block.vectors.stop - block.vectors.start)
        return {
            name: found[name] if name in found else p.new_zeros(*lead, *p.shape)
            for name, p in self.function.parameters.items()
        }


def gram_matrix(source: RowSource, cotangents: Tensor) -> Tensor:
    """Inner products of all rows: entry (n·Q+q, m·Q+p) is (J_nᵀv_nq)·(J_mᵀv_mp).

    Accumulated in float64, layer by layer: the matrix of gradients reaches condition numbers
    beyond what float32 sums resolve, and no more rows exist at one time than a layer has.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.

    Returns:
        A symmetric float64 matrix of shape ``(N·Q, N·Q)``.

    Raises:
        EngineError: not even two single rows fit in the memory budget.
    """
    size = cotangents.shape[0] * cotangents.shape[1]
    shards = source.function.shards

    def attempt(limited: RowSource) -> Tensor:
        gram = torch.zeros(size, size, dtype=torch.float64, device=source.function.device)
        blocks = limited.blocks(cotangents)
        if shards.alone and len(blocks) == 1 and cotangents.shape[1] == 1:
            limited.stream(
                cotangents,
                blocks[0],
                lambda terms, vectors: add_inner_products(gram, terms, terms, symmetric=True),
            )
            return gram
        for rows, columns, left, right in pairs(limited, cotangents):
            add_inner_products(gram[rows, columns], left, right, symmetric=left is right)
        return gram

    # An error of one rank is raised on all, so that all try again together.
    gram = halving(
        lambda memory: shards.sum(lambda: attempt(replace(source, memory=memory))), source.memory
    )
    return from_lower(gram)


def pairs(source: RowSource, cotangents: Tensor) -> Iterator[Pair]:
    """All that the lower triangle of a Gram matrix is made of: its rows, its columns, their terms.

    On the diagonal both lists of terms are the same one. Where samples are spread over ranks, each
    has its part of these: see `pairs_over_ranks`.
    """
    if not source.function.shards.alone:
        yield from pairs_over_ranks(source, cotangents)
        return
    blocks = source.blocks(cotangents)
    if len(blocks) > 1:
        blocks = source.blocks(cotangents, share=0.5)
    for i, block in enumerate(blocks):
        terms = source.capture(cotangents, block)
        yield block.rows, block.rows, terms, terms
        for other in blocks[i + 1 :]:
            yield other.rows, block.rows, source.capture(cotangents, other), terms


def pairs_over_ranks(
    source: RowSource, cotangents: Tensor, kept: Sequence[tuple[Block, list[Term]]] = ()
) -> Iterator[Pair]:
    """The pairs of this rank's rows with each other, and with those of half of the other ranks.

    Everybody's terms are sent round, so that every pair of ranks is computed once. Rows are
    numbered as in the whole batch.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``, of the whole batch.
        kept: captures of all of this rank's rows, where there are any.
    """
    shards, part = source.function.shards, source.local()
    own, vectors = shards.local_slice(len(cotangents)), shards.local(cotangents)
    blocks = [block for block, _ in kept] or part.blocks(vectors)
    if several := max(shards.gather(len(blocks))) > 1:
        # Beside the block that is sent round, another one's and another of one's own.
        blocks = [block for block, _ in kept] or part.blocks(vectors, share=1 / 3)

    def captured(block: Block) -> list[Term]:
        known = [terms for other, terms in kept if other is block]
        return known[0] if known else part.capture(vectors, block)

    def place(block: Block) -> slice:
        first = own.start * cotangents.shape[1]
        return slice(first + block.rows.start, first + block.rows.stop)

    for i in range(max(shards.gather(len(blocks)))):
        sent = blocks[i : i + 1]
        terms = captured(sent[0]) if sent else []
        rows = place(sent[0]) if sent else slice(0, 0)
        if sent:
            yield rows, rows, terms, terms
        for other in blocks[i + 1 :]:
            yield place(other), rows, captured(other), terms
        for theirs, foreign in of_others(source.function, rows, terms, once=True, whole=several):
            for other in blocks:
                mine, left = place(other), terms if other in sent else captured(other)
                if mine.start > theirs.start:
                    yield mine, theirs, left, foreign
                else:
                    yield theirs, mine, foreign, left


def from_lower(matrix: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle; it takes the place of the other."""
    size = len(matrix)
    # By tiles, since a transposed matrix is read against the grain of memory.
    tiles = [slice(i, min(i + TILE, size)) for i in range(0, size, TILE)]
    for i, rows in enumerate(tiles):
        own = torch.tril(matrix[rows, rows])
        matrix[rows, rows] = own + torch.tril(own, -1).T
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

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        names: which parameters; with one of a layer's, all of that layer's.
    """
    shards, part = source.function.shards, source.local()
    vectors = shards.local(cotangents)

    def attempt(limited: RowSource) -> Parameters:
        parameters = source.function.parameters
        sums = {
            name: torch.zeros(
                parameters[name].numel(), dtype=torch.float64, device=parameters[name].device
            )
            for name in names
        }
        for block in limited.blocks(vectors):
            terms = limited.capture(vectors, block)
            add_squared_column_sums(sums, [t for t in terms if t.shapes.keys() <= sums.keys()])
        return sums

    return shards.sum(
        lambda: halving(lambda memory: attempt(replace(part, memory=memory)), source.memory)
    )


def row_matrix(source: RowSource, cotangents: Tensor) -> Tensor:
    """All rows J_nᵀv_nq as a matrix: float64, shape ``(N·Q, P)``.

    Args:
        source: the model and engine.
        cotangents: v of shape ``(N, Q, *positions, C)``.
    """
    shards, part = source.function.shards, source.local()
    vectors = shards.local(cotangents)

    def made() -> Tensor:
        blocks = [torch.cat(list(rows.values()), 1).double() for _, rows in part.iterate(vectors)]
        nothing = vectors.new_zeros(0, source.function.num_parameters)
        return torch.cat(blocks) if blocks else nothing

    return shards.concatenate(made)


def squared_norms(source: RowSource, cotangents: Tensor) -> Tensor:
    """‖J_nᵀv_nq‖² of every row: float64, shape ``(N·Q,)``.

    Args:
        source: the model and engine.
        cotangents: v of shape ``(N, Q, *positions, C)``.
    """
    shards, part = source.function.shards, source.local()
    vectors = shards.local(cotangents)

    def made() -> Tensor:
        norms = vectors.new_zeros(vectors.shape[0] * vectors.shape[1])
        for block, rows in part.iterate(vectors):
            for row in rows.values():
                norms[block.rows] += row.to(torch.float64).square().sum(1)
        return norms

    return shards.concatenate(made)


def split_rows(num_samples: int, num_vectors: int, limit: int) -> list[Block]:
    """Split N samples with Q cotangents each into blocks of at most ``limit`` rows.

    Whole samples where they fit, parts of one sample's cotangents otherwise.
    """
    if limit >= num_vectors:
        step, width = limit // num_vectors, num_vectors
    else:
        step, width = 1, limit
    blocks = []
    for n in range(0, num_samples, step):
        last = min(n + step, num_samples)
        for q in range(0, num_vectors, width):
            stop = min(q + width, num_vectors)
            rows = slice(n * num_vectors + q, (last - 1) * num_vectors + stop)
            blocks.append(Block(slice(n, last), slice(q, stop), rows))
    return blocks
