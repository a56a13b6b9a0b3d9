"""The terms of all ranks' rows, for the products of rows of different ranks.

The sums of a Gram matrix need every pair of rows, so the ranks send their terms to each other
instead of capturing rows of other ranks' samples. Of a layer's term the factors are sent, or its
rows where these are smaller (a convolution with many patches); of any other term the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Size, Tensor

from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, StoredTerm, Term
from ngeval.model.function import ModelFunction


def terms_of_other_ranks(
    function: ModelFunction, rows: slice, terms: list[Term], *, once: bool, whole: bool
) -> Iterator[tuple[slice, list[Term]]]:
    """Other ranks' terms in exchange for this rank's: every rank's terms visit the others.

    Args:
        function: the model at θ on the whole batch.
        rows: the numbers, in the whole batch, of the rows of this rank's terms.
        terms: of some of this rank's rows; empty where it has no more.
        once: of every two ranks, only one receives the other's terms.
        whole: receive all terms of a rank together, since they are used several times; otherwise
            one after the other, so that only one is in memory.
    """
    shards = function.shards
    if shards.alone:
        return
    places, lengths = zip(*shards.gather(((rows.start, rows.stop), len(terms))), strict=True)
    for step in range(1, 1 + (shards.size // 2 if once else shards.size - 1)):
        source = (shards.rank + step) % shards.size
        destination = (shards.rank - step) % shards.size
        # Opposite ranks would meet twice.
        sent = terms if not once or 2 * step < shards.size or destination < shards.rank else []
        received: list[Term] = []
        for i in range(max(lengths)):
            build, tensors = shards.exchange(
                partial(_pack, sent[i : i + 1]), destination, source, function.device
            )
            if build is not None:
                received.append(build(*tensors))
            if received and not whole:
                yield slice(*places[source]), received
                received = []
        if received:
            yield slice(*places[source]), received


def _pack(terms: list[Term]) -> tuple[Callable[..., Term] | None, list[Tensor]]:
    """The tensors of a term, and a function that makes it from them; None without a term."""
    if not terms:
        return None, []
    term = terms[0]
    if isinstance(term, EmbeddingTerm):
        build = partial(EmbeddingTerm, term.weight, term.weight_shape)
        return build, [term.indices, term.cotangents]
    if isinstance(term, AffineTerm) and not _rows_are_smaller(term):
        fields = (term.weight, term.bias, term.weight_shape, term.transposed)
        inputs = [term.inputs(ALL)] if term.weight else []
        return partial(_affine_term, *fields), [term.cotangents, *inputs]
    rows = term.rows(ALL, ALL, ALL)
    return partial(_stored_term, tuple(rows), term.num_units), list(rows.values())


def _affine_term(
    weight: str | None, bias: str | None, shape: Size, transposed: bool, *tensors: Tensor
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
