"""Blocks of Jacobian rows in bounded memory, and the two reductions made of them.

Rows are numbered n·Q + q for sample n and its cotangent q. No more rows exist at one time than
the memory budget allows: a Gram matrix is then assembled from pairs of blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ngeval.errors import EngineError
from ngeval.functional import ModelFunction, Parameters, model_errors
from ngeval.jacobians.engines import ENGINES, Engine
from ngeval.jacobians.layers import AffineCapture, capture_layers

DEFAULT_MEMORY = 4 * 2**30
"""Bytes that rows of the Jacobian may take at one time, unless the caller says otherwise."""

STREAM_MEMORY = 2**26
"""Bytes of rows that are only passed over: more is slower, since it misses every cache."""


@dataclass(frozen=True)
class Block:
    """Some samples, and some of the Q cotangents of each."""

    samples: slice
    vectors: slice
    rows: slice


@dataclass(frozen=True)
class RowSource:
    """Where rows come from: a model at θ, the engine, and the memory that it may use.

    Attributes:
        function: the model at θ on its batch.
        engine_name: ``"layers"``, ``"vmap"`` or ``"loop"``.
        memory: bytes for the rows that are held at one time.
    """

    function: ModelFunction
    engine_name: str
    memory: int = DEFAULT_MEMORY

    @property
    def engine(self) -> Engine:
        """The engine itself."""
        return ENGINES[self.engine_name]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the model's dtype and of its float64 copy, made for products."""
        return self.function.num_parameters * (self.function.dtype.itemsize + 8)

    def paired_blocks(self, cotangents: Tensor) -> list[Block]:
        """One block if all N·Q rows fit in memory, else blocks of which two fit together.

        Raises:
            EngineError: not even two single rows fit.
        """
        count = cotangents.shape[0] * cotangents.shape[1]
        limit = self.memory // self.row_bytes
        if count > limit:
            limit //= 2
        if limit < 1:
            raise EngineError(
                f"one row of the Jacobian takes {self.row_bytes / 2**20:.0f} MiB and two are "
                f"needed, but the memory budget is {self.memory / 2**20:.0f} MiB; raise memory="
            )
        return split_rows(cotangents.shape[0], cotangents.shape[1], limit)

    def compute(self, cotangents: Tensor, block: Block) -> Parameters:
        """The rows of one block, by parameter, each of shape ``(rows, parameter.numel())``."""
        chosen = cotangents[block.samples, block.vectors].to(self.function.dtype)
        with model_errors():
            rows = self.engine(self.function, block.samples, chosen)
        count = block.rows.stop - block.rows.start
        return {name: tensor.reshape(count, -1) for name, tensor in rows.items()}

    def iterate(self, cotangents: Tensor) -> Iterator[tuple[Block, Parameters]]:
        """All rows J_nᵀv_nq, block by block.

        Args:
            cotangents: v of shape ``(N, Q, *positions, C)``.
        """
        limit = max(1, min(self.memory, STREAM_MEMORY) // self.row_bytes)
        for block in split_rows(cotangents.shape[0], cotangents.shape[1], limit):
            yield block, self.compute(cotangents, block)


def gram_matrix(source: RowSource, cotangents: Tensor) -> Tensor:
    """Inner products of all rows: entry (n·Q+q, m·Q+p) is (J_nᵀv_nq)·(J_mᵀv_mp).

    Accumulated in float64, one parameter at a time: the matrix of gradients reaches condition
    numbers beyond what float32 sums resolve.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.

    Returns:
        A symmetric float64 matrix of shape ``(N·Q, N·Q)``.
    """
    size = cotangents.shape[0] * cotangents.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=source.function.device)
    if source.engine_name != "layers":
        blocks = source.paired_blocks(cotangents)
        _accumulate_gram(gram, blocks, lambda block: source.compute(cotangents, block))
    else:
        for capture in _captured(source, cotangents):
            if capture.positions == 1:
                gram += capture.gram()
                continue
            limit = max(1, source.memory // (2 * 12 * capture.row_size))
            blocks = split_rows(cotangents.shape[0], cotangents.shape[1], limit)
            _accumulate_gram(gram, blocks, partial(_flat_rows, capture))
    lower = torch.tril(gram, -1)
    return torch.diag(gram.diagonal()) + lower + lower.T


def squared_column_sums(source: RowSource, cotangents: Tensor) -> Tensor:
    """Σ_{n,q} (J_nᵀv_nq)² entrywise: a float64 vector of length P.

    With v the columns of S this is diag F; with v = u it is the diagonal of the empirical Fisher.
    """
    sums = {
        name: torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
        for name, p in source.function.parameters.items()
    }
    if source.engine_name != "layers":
        for _, rows in source.iterate(cotangents):
            _add_squares(sums, rows)
    else:
        for capture in _captured(source, cotangents):
            if capture.positions == 1:
                for name, squares in capture.squared_sums().items():
                    sums[name] += squares.reshape(-1)
                continue
            limit = max(1, STREAM_MEMORY // (12 * capture.row_size))
            for block in split_rows(cotangents.shape[0], cotangents.shape[1], limit):
                _add_squares(sums, _flat_rows(capture, block))
    return torch.cat(list(sums.values()))


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


def _add_own_products(target: Tensor, rows: Parameters, strips: int = 4) -> None:
    """Add R Rᵀ to the lower triangle of ``target``, in strips so that half is not computed."""
    size = target.shape[0]
    bounds = [size * i // strips for i in range(strips + 1)]
    for tensor in rows.values():
        wide = tensor.to(torch.float64)
        for start, stop in itertools.pairwise(bounds):
            target[start:stop, :stop].addmm_(wide[start:stop], wide[:stop].T)


def _add_cross_products(target: Tensor, left: Parameters, right: Parameters) -> None:
    for name, tensor in left.items():
        target.addmm_(tensor.to(torch.float64), right[name].to(torch.float64).T)


def _captured(source: RowSource, cotangents: Tensor) -> list[AffineCapture]:
    """The layers' inputs and output gradients for the whole batch."""
    whole = slice(0, cotangents.shape[0])
    with model_errors():
        return capture_layers(source.function, whole, cotangents)


def _flat_rows(capture: AffineCapture, block: Block) -> Parameters:
    rows = capture.rows(block.samples, block.vectors)
    return {name: tensor.flatten(0, 1).flatten(1) for name, tensor in rows.items()}


def _add_squares(sums: Parameters, rows: Parameters) -> None:
    for name, tensor in rows.items():
        sums[name] += tensor.to(torch.float64).square().sum(0)


def _accumulate_gram(
    gram: Tensor, blocks: list[Block], compute: Callable[[Block], Parameters]
) -> None:
    """Add R Rᵀ to the lower triangle of ``gram``, from pairs of blocks of rows."""
    for i, block in enumerate(blocks):
        rows = compute(block)
        _add_own_products(gram[block.rows, block.rows], rows)
        for other in blocks[i + 1 :]:
            _add_cross_products(gram[other.rows, block.rows], compute(other), rows)
