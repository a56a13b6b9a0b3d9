"""The distributed case: rows and probes of a batch whose samples are spread over ranks.

Everything else in this package reads as for a single process; the two subclasses here override what
differs. The sums of a Gram matrix need every pair of rows, so the ranks send their terms to each
other instead of capturing rows of other ranks' samples. Of a layer's term the factors are sent, or
its rows where these are smaller (a convolution with many patches); of any other term the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from ngeval.jacobians.probe import Probe
from ngeval.jacobians.row_source import Block, Pair, RowSource, whole_block
from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, StoredTerm, Term
from ngeval.model.function import ModelFunction, Parameters
from ngeval.model.sharding import GroupShards

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedRowSource(RowSource):
    """The rows of a batch whose samples are spread over the ranks of a group."""

    @property
    def shards(self) -> GroupShards:
        return cast(GroupShards, self.function.shards)

    def local(self, field: Tensor) -> tuple[RowSource, Tensor]:
        fields = vars(self) | {"function": self.function.local()}
        return RowSource(**fields), self.shards.local(field)

    def _over_samples(
        self,
        reduce: Callable[[Callable[[], T]], T],
        compute: Callable[..., T],
        fields: tuple[Tensor, ...],
    ) -> T:
        part, _ = self.local(fields[0])
        local_fields = [self.shards.local(field) for field in fields]

        def attempt(source: RowSource) -> T:
            limited = replace(part, memory=source.memory)
            return reduce(lambda: compute(limited, *local_fields))

        # An error of one rank is raised on all, so that all of them try again together.
        return self.retry(attempt)

    def sum_over_samples(self, compute: Callable[..., T], *fields: Tensor) -> T:
        return self._over_samples(self.shards.sum, compute, fields)

    def concatenate_over_samples(self, compute: Callable[..., T], *fields: Tensor) -> T:
        return self._over_samples(self.shards.concatenate, compute, fields)

    def sum_over_pairs(self, compute: Callable[[RowSource], T]) -> T:
        return self.retry(lambda source: self.shards.sum(lambda: compute(source)))

    def pairs(self, cotangents: Tensor, kept: list[Term] | None = None) -> Iterator[Pair]:
        """The pairs of this rank's rows with each other and with those of half of the other ranks.

        Rows are numbered as in the whole batch. Terms are sent from rank to rank such that every
        pair is computed once.
        """
        part, vectors = self.local(cotangents)
        start = self._first_row(cotangents)

        def split(share: float) -> list[Block]:
            return part.blocks(vectors, share) if kept is None else [whole_block(vectors)]

        def captured(block: Block) -> list[Term]:
            return part.capture(vectors, block) if kept is None else kept

        blocks = split(1.0)
        if several := max(self.shards.gather(len(blocks))) > 1:
            # Three blocks at a time: this one, another of this rank's, and a received one.
            blocks = split(1 / 3)
        for i in range(max(self.shards.gather(len(blocks)))):
            rows, terms = slice(0, 0), list[Term]()
            if i < len(blocks):
                rows, terms = _shifted(blocks[i].rows, start), captured(blocks[i])
                yield rows, rows, terms, terms
            for other in blocks[i + 1 :]:
                yield _shifted(other.rows, start), rows, captured(other), terms
            for columns, received in self._exchange(rows, terms, once=True, whole=several):
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
        start = self._first_row(cotangents)
        local = next(captures, None)
        while any(self.shards.gather(local is not None)):
            rows, terms = slice(0, 0), list[Term]()
            if local is not None:
                rows, terms = _shifted(local[0].rows, start), local[1]
                yield rows, terms
            yield from self._exchange(rows, terms, once=False, whole=True)
            local = next(captures, None)

    def can_stream(self, cotangents: Tensor) -> bool:
        return False

    def can_record(self) -> bool:
        return False

    def _first_row(self, cotangents: Tensor) -> int:
        """The number of this rank's first row in the whole batch."""
        return int(self.shards.local_slice(len(cotangents)).start * cotangents.shape[1])

    def _exchange(
        self, rows: slice, terms: list[Term], *, once: bool, whole: bool
    ) -> Iterator[tuple[slice, list[Term]]]:
        """Other ranks' terms in exchange for this rank's: every rank's terms visit the others.

        Args:
            rows: the numbers, in the whole batch, of the rows of this rank's terms.
            terms: of some of this rank's rows; empty where it has no more.
            once: of every two ranks, only one receives the other's terms.
            whole: receive all terms of a rank together, since they are used several times;
                otherwise one by one, so that only one is in memory.

        Yields:
            The numbers of some rows, and their terms.
        """
        shards = self.shards
        headers = shards.synchronized(lambda: [pack(term)[0] for term in terms])
        gathered = shards.gather(((rows.start, rows.stop), headers))
        most = max(len(theirs) for _, theirs in gathered)
        for step in range(1, 1 + (shards.size // 2 if once else shards.size - 1)):
            source = (shards.rank + step) % shards.size
            destination = (shards.rank - step) % shards.size
            (place, theirs), sent_terms = gathered[source], terms
            if once and 2 * step == shards.size:  # opposite ranks would meet twice
                theirs = theirs if shards.rank < source else []
                sent_terms = terms if destination < shards.rank else []
            received_terms = []
            for i in range(most):
                sent, received = shards.synchronized(
                    partial(_buffers, sent_terms, theirs, i, self.function.device)
                )
                shards.exchange(sent, destination, received, source)
                if received:
                    received_terms.append(theirs[i].build(*received))
                    if not whole:
                        yield slice(*place), received_terms
                        received_terms = []
            if received_terms:
                yield slice(*place), received_terms


def probe_of(function: ModelFunction, outputs: Tensor, residual: Tensor) -> Probe:
    """The probe of a batch, which also creates the sources of its rows; see `Probe`."""
    shards = function.shards
    if isinstance(shards, GroupShards):
        return shards.synchronized(lambda: ShardedProbe(function, outputs, residual))
    return Probe(function, outputs, residual)


class ShardedProbe(Probe):
    """A probe of this rank's samples, or of one of another rank's if it has none.

    All ranks come to the same decisions: what is wrong on one is wrong.
    """

    source_class = ShardedRowSource

    def __init__(self, function: ModelFunction, outputs: Tensor, residual: Tensor) -> None:
        self.local_slice = function.shards.local_slice(function.num_samples, at_least=1)
        super().__init__(function, outputs, residual, self.local_slice)
        self.shards = function.shards

    def in_double(self) -> Probe:
        return self.shards.synchronized(super().in_double)

    def try_engine(self, name: str, memory: int) -> tuple[RowSource, Parameters]:
        return self.shards.synchronized(partial(super().try_engine, name, memory))

    def row_products(self, source: RowSource) -> Parameters:
        return self.shards.synchronized(partial(super().row_products, source))

    def wrong_parameters(self, products: Parameters) -> set[str]:
        return set().union(*self.shards.gather(super().wrong_parameters(products)))

    def agrees_with_tangent(self, products: Parameters, forward_mode: bool) -> bool:
        return all(self.shards.gather(super().agrees_with_tangent(products, forward_mode)))

    def of_all_samples(self, products: Parameters) -> Parameters:
        local = self.shards.local_slice(self.function.num_samples)
        count = local.stop - local.start
        return self.shards.concatenate(lambda: {n: part[:count] for n, part in products.items()})


def _shifted(rows: slice, start: int) -> slice:
    return slice(start + rows.start, start + rows.stop)


@dataclass(frozen=True)
class Header:
    """A term without the values of its tensors.

    Attributes:
        build: makes the term from its tensors.
        tensors: their shapes and dtypes.
    """

    build: Callable[..., Term]
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]


def pack(term: Term) -> tuple[Header, list[Tensor]]:
    """A term's header and tensors."""
    build: Callable[..., Term]
    if isinstance(term, EmbeddingTerm):
        build = partial(EmbeddingTerm, term.weight, term.weight_shape)
        tensors = [term.indices, term.cotangents]
    elif isinstance(term, AffineTerm) and not _rows_are_smaller(term):
        build = partial(_affine_term, term.weight, term.bias, term.weight_shape, term.transposed)
        tensors = [term.cotangents, *([term.inputs(ALL)] if term.weight else [])]
    else:
        rows = term.rows(ALL, ALL, ALL)
        build, tensors = partial(_stored_term, tuple(rows), term.num_units), list(rows.values())
    return Header(build, tuple((t.shape, t.dtype) for t in tensors)), tensors


def _affine_term(
    weight: str | None, bias: str | None, shape: torch.Size, transposed: bool, *tensors: Tensor
) -> AffineTerm:
    cotangents, inputs = tensors[0], tensors[-1]
    return AffineTerm(weight, bias, shape, inputs.__getitem__, cotangents, transposed=transposed)


def _stored_term(names: tuple[str, ...], units: int, *tensors: Tensor) -> StoredTerm:
    return StoredTerm(dict(zip(names, tensors, strict=True)), units)


def _rows_are_smaller(term: AffineTerm) -> bool:
    if term.transposed:  # its bias is not cut into units as its weight is
        return False
    inputs = term.num_samples * term.positions * term.groups * term.fan_in if term.weight else 0
    rows = term.num_samples * term.num_vectors * term.row_size
    return rows < inputs + term.cotangents.numel()


def _buffers(
    terms: list[Term], theirs: list[Header], index: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of one term to send, and empty ones for one term to receive."""
    sent = pack(terms[index])[1] if index < len(terms) else []
    expected = theirs[index].tensors if index < len(theirs) else ()
    return sent, [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in expected]
