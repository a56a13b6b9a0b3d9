"""The terms of all ranks' rows, for the products of rows of different ranks.

The sums of a Gram matrix need every pair of rows, so the ranks send their terms to each other
instead of capturing rows of other ranks' samples. Of a layer's term the factors are sent, or its
rows where these are smaller (a convolution with many patches); of any other term the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, StoredTerm, Term
from ngeval.model.sharding import Shards


def terms_of_other_ranks(
    shards: Shards, device: torch.device, rows: slice, terms: list[Term], *, once: bool, whole: bool
) -> Iterator[tuple[slice, list[Term]]]:
    """Other ranks' terms in exchange for this rank's: every rank's terms visit the others.

    Args:
        shards: this rank's part of the samples.
        device: of the tensors.
        rows: the numbers, in the whole batch, of the rows of this rank's terms.
        terms: of some of this rank's rows; empty where it has no more.
        once: of every two ranks, only one receives the other's terms.
        whole: receive all terms of a rank together, since they are used several times; otherwise
            one after the other, so that only one is in memory.

    Yields:
        The numbers of some rows, and their terms.
    """
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
            sent, received = shards.synchronized(partial(_buffers, sent_terms, theirs, i, device))
            shards.exchange(sent, destination, received, source)
            if received:
                received_terms.append(theirs[i].build(*received))
            if received_terms and not whole:
                yield slice(*place), received_terms
                received_terms = []
        if received_terms:
            yield slice(*place), received_terms


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
