"""Calls of the same layer as a single term, so that products of rows take one product of terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngeval.jacobians.terms import AffineTerm, EmbeddingTerm, Term
from ngeval.model.autograd import Parameters


@dataclass(frozen=True)
class SummedTerm(Term):
    """The sum of terms of the same parameters: several calls of a norm, or of any module."""

    parts: tuple[Term, ...]

    @property
    def lead(self) -> tuple[int, int]:
        return self.parts[0].lead

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.parts[0].shapes

    def combined(self, weights: Tensor) -> SummedTerm:
        return SummedTerm(tuple(part.combined(weights) for part in self.parts))

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        total = self.parts[0].rows(samples, vectors, units)
        for part in self.parts[1:]:
            rows = part.rows(samples, vectors, units)
            total = {name: value + rows[name] for name, value in total.items()}
        return total


def merged(terms: list[Term]) -> list[Term]:
    """Calls of the same layer, or of the same parameters, as a single term.

    Products of rows of T calls would otherwise take T² products of terms.
    """
    calls: dict[tuple[type[Term], tuple[Any, ...]], list[Any]] = {}
    for term in terms:
        if isinstance(term, AffineTerm):
            calls.setdefault((AffineTerm, (term.weight, term.bias)), []).append(term)
        elif isinstance(term, EmbeddingTerm):
            calls.setdefault((EmbeddingTerm, (term.weight,)), []).append(term)
        else:
            calls.setdefault((SummedTerm, tuple(term.shapes)), []).append(term)
    return [
        group[0] if len(group) == 1 else _MERGE[kind](group) for (kind, _), group in calls.items()
    ]


def _merge_affine(calls: list[AffineTerm]) -> AffineTerm:
    present = None
    if any(call.present is not None for call in calls):
        present = torch.cat([_present(call) for call in calls], 1)
    return replace(
        calls[0],
        inputs=lambda samples: torch.cat([call.inputs(samples) for call in calls], 1),
        cotangents=torch.cat([call.cotangents for call in calls], 2),
        apply=lambda direction: torch.cat([call.applied(direction) for call in calls], 1),
        present=present,
    )


def _present(call: AffineTerm) -> Tensor:
    if call.present is not None:
        return call.present
    return call.cotangents.new_ones(call.num_samples, call.positions, dtype=torch.bool)


def _merge_lookups(calls: list[EmbeddingTerm]) -> EmbeddingTerm:
    return replace(
        calls[0],
        indices=torch.cat([call.indices for call in calls], 1),
        cotangents=torch.cat([call.cotangents for call in calls], 2),
    )


_MERGE: dict[type[Term], Callable[[list[Any]], Term]] = {
    AffineTerm: _merge_affine,
    EmbeddingTerm: _merge_lookups,
    SummedTerm: lambda parts: SummedTerm(tuple(parts)),
}
