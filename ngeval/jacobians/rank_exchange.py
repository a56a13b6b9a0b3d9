"""Terms of rows from rank to rank: what they are made of is sent, and nothing is captured anew.

Of a layer's term the factors are sent, or its rows where these are smaller (a convolution's many
patches); of any other kind the rows, as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ngeval.jacobians.terms import AffineTerm, EmbeddingTerm, RowsTerm, Term
from ngeval.model.function import ModelFunction, Parameters
from ngeval.model.sharding import GroupShards

ALL = slice(None)
AFFINE, EMBEDDING, ROWS = "affine", "embedding", "rows"


@dataclass(frozen=True)
class SentRows(Term):
    """Rows that came from another rank.

    Attributes:
        values: by parameter, shape ``(B, Q, *parameter.shape)``.
        units: into how many pieces the first dimension of the parameters can be cut.
    """

    values: Parameters
    units: int

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """B."""
        return int(next(iter(self.values.values())).shape[0])

    @property
    def num_vectors(self) -> int:  # type: ignore[override]
        """Q."""
        return int(next(iter(self.values.values())).shape[1])

    @property
    def num_units(self) -> int:
        """As where they came from."""
        return self.units

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the values."""
        return {name: value.shape[2:] for name, value in self.values.items()}

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        """Slices of the values."""
        if self.units == 1:
            return {name: value[samples, vectors] for name, value in self.values.items()}
        return {name: value[samples, vectors, units] for name, value in self.values.items()}

    def combined(self, weights: Tensor) -> Term:
        """By way of plain rows."""
        plain = RowsTerm(
            self.num_samples,
            self.num_vectors,
            self.shapes,
            lambda samples, vectors: self.rows(samples, vectors, ALL),
        )
        return plain.combined(weights)

    def restricted(self, names: Collection[str]) -> SentRows | None:
        """Without the other values."""
        values = {name: value for name, value in self.values.items() if name in names}
        return replace(self, values=values) if values else None


@dataclass(frozen=True)
class Form:
    """A term but for the numbers in its tensors.

    Attributes:
        kind: of term.
        names: of its parameters; for an affine layer's, weight and bias, None where frozen.
        tensors: shapes and dtypes.
        weight_shape: of an affine layer's, or a table's, weight.
        transposed: of an affine layer's.
        units: of rows.
    """

    kind: str
    names: tuple[str | None, ...]
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    weight_shape: tuple[int, ...] = ()
    transposed: bool = False
    units: int = 1

    def empty(self, device: torch.device) -> list[Tensor]:
        """Tensors to be filled."""
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.tensors]

    def term(self, tensors: list[Tensor]) -> Term:
        """The term of this form with these tensors."""
        shape = torch.Size(self.weight_shape)
        if self.kind == EMBEDDING:
            return EmbeddingTerm(str(self.names[0]), shape, tensors[0], tensors[1])
        if self.kind == ROWS:
            return SentRows(dict(zip(map(str, self.names), tensors, strict=True)), self.units)
        cotangents, inputs = tensors[0], tensors[-1]
        return AffineTerm(
            *(self.names[0], self.names[1], shape),
            inputs=lambda samples: inputs[samples],
            cotangents=cotangents,
            transposed=self.transposed,
        )


def packed(term: Term) -> tuple[Form, list[Tensor]]:
    """A term's form and tensors."""
    if isinstance(term, EmbeddingTerm):
        tensors = [term.indices, term.cotangents]
        return Form(EMBEDDING, (term.weight,), _shapes(tensors), tuple(term.weight_shape)), tensors
    if isinstance(term, AffineTerm) and not _rows_are_smaller(term):
        tensors = [term.cotangents, *([term.inputs(ALL)] if term.weight else [])]
        names, shape = (term.weight, term.bias), tuple(term.weight_shape)
        return Form(AFFINE, names, _shapes(tensors), shape, term.transposed), tensors
    rows = term.rows(ALL, ALL, ALL)
    tensors = list(rows.values())
    return Form(ROWS, tuple(rows), _shapes(tensors), units=term.num_units), tensors


def _rows_are_smaller(term: AffineTerm) -> bool:
    if term.transposed:  # its bias is not cut as its weight is
        return False
    inputs = term.num_samples * term.positions * term.groups * term.fan_in if term.weight else 0
    rows = term.num_samples * term.num_vectors * term.row_size
    return rows < inputs + term.cotangents.numel()


def _shapes(tensors: list[Tensor]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def of_others(
    function: ModelFunction, rows: slice, terms: list[Term], *, once: bool, whole: bool
) -> Iterator[tuple[slice, list[Term]]]:
    """Other ranks' terms, in exchange for one's own: everybody's go round the ranks.

    Args:
        function: the model at θ, whose samples are spread over ranks.
        rows: where the rows of one's own terms are among those of the whole batch.
        terms: of some rows of one's own; none where there are no more.
        once: every two ranks meet once: only one of them gets the other's terms.
        whole: all terms of a rank together, for they are gone through several times; otherwise
            one at a time, and only one is in memory.

    Yields:
        Where the rows of some terms are among those of the whole batch, and the terms.
    """
    shards = cast(GroupShards, function.shards)
    forms = shards.synchronized(lambda: [packed(term)[0] for term in terms])
    everyone = shards.gather(((rows.start, rows.stop), forms))
    most = max(len(theirs) for _, theirs in everyone)
    for step in range(1, 1 + (shards.size // 2 if once else shards.size - 1)):
        by, to = (shards.rank + step) % shards.size, (shards.rank - step) % shards.size
        # In an even number of ranks, those that are opposite would meet twice.
        opposite = once and 2 * step == shards.size
        place, theirs = everyone[by] if not opposite or shards.rank < by else ((0, 0), [])
        own = terms if not opposite or to < shards.rank else []
        received = []
        for i in range(most):
            sent, made = shards.synchronized(partial(_prepared, own, theirs, i, function.device))
            shards.exchange(sent, to, made, by)
            if made:
                received.append(theirs[i].term(made))
            if made and not whole:
                yield slice(*place), received
                received = []
        if received:
            yield slice(*place), received


def _prepared(
    own: list[Term], theirs: list[Form], index: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of one term that are sent, and those for one that is received."""
    sent = packed(own[index])[1] if index < len(own) else []
    return sent, theirs[index].empty(device) if index < len(theirs) else []
