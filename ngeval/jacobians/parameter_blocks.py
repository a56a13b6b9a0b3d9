"""Rows cut into groups of parameters: the diagonal blocks of a curvature, and sums of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngeval.jacobians.captured_rows import CapturedRows
from ngeval.jacobians.inner_products import (
    PIECE_ENTRIES,
    add_inner_products,
    add_row_combinations,
    rows_of,
)
from ngeval.jacobians.row_source import RowSource, from_lower, pairs
from ngeval.jacobians.terms import Term
from ngeval.utils.memory import halving

Groups = Mapping[str, Sequence[str]]
"""Parameter names by group."""


def group_grams(source: RowSource, cotangents: Tensor, groups: Groups) -> dict[str, Tensor]:
    """R_l R_lᵀ for the rows R_l of each group l: float64, shape ``(N·Q, N·Q)``.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        groups: parameter names by group.
    """
    size = cotangents.shape[0] * cotangents.shape[1]

    def attempt(limited: RowSource) -> dict[str, Tensor]:
        device = limited.function.device
        grams = {g: torch.zeros(size, size, dtype=torch.float64, device=device) for g in groups}
        for rows, columns, left, right in pairs(limited, cotangents):
            for group, names in groups.items():
                own, gram = _of_group(left, names), grams[group][rows, columns]
                if right is left:
                    add_inner_products(gram, own, own, symmetric=True)
                else:
                    add_inner_products(gram, own, _of_group(right, names))
        return grams

    shards = source.function.shards
    grams = halving(
        lambda memory: shards.sum(lambda: attempt(replace(source, memory=memory))), source.memory
    )
    return {group: from_lower(gram) for group, gram in grams.items()}


def group_squares(
    source: RowSource, cotangents: Tensor, groups: Groups, weights: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """R_lᵀR_l and R_lᵀw for the rows R_l of each group l.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        groups: parameter names by group.
        weights: w in float64, shape ``(N·Q,)``.

    Returns:
        By group, float64, shapes ``(P_l, P_l)`` and ``(P_l,)``.
    """
    parameters, shards = source.function.parameters, source.function.shards
    part, vectors = source.local(), shards.local(cotangents)
    own = shards.local(weights.unflatten(0, cotangents.shape[:2])).flatten()

    def attempt(limited: RowSource) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for group, names in groups.items():
            size = sum(parameters[name].numel() for name in names)
            zeros = torch.zeros(size, size + 1, dtype=torch.float64, device=source.function.device)
            found[group] = (zeros[:, :size], zeros[:, size])
        for block, terms in CapturedRows(limited, vectors).captures():
            chosen = own[block.rows].unflatten(0, (terms[0].num_samples, -1))
            for group, names in groups.items():
                part_of = _of_group(terms, names)
                _add_squares(found[group], part_of, {n: parameters[n] for n in names}, chosen)
        return found

    return shards.sum(
        lambda: halving(lambda memory: attempt(replace(part, memory=memory)), source.memory)
    )


def group_combinations(
    source: RowSource, cotangents: Tensor, groups: Groups, weights: Mapping[str, Tensor]
) -> Tensor:
    """Σ_nq w_l,nq R_l,nq for each group l, put together: shape ``(k, P)``, the model's dtype.

    Entries of parameters in no group are 0.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        groups: parameter names by group.
        weights: w by group in float64, shape ``(k, N·Q)``.
    """
    starts, total = {}, 0
    for name, parameter in source.function.parameters.items():
        starts[name], total = total, total + parameter.numel()
    count, shards = len(next(iter(weights.values()))), source.function.shards
    part, vectors = source.local(), shards.local(cotangents)
    samples = shards.local_slice(len(cotangents))
    own = slice(samples.start * cotangents.shape[1], samples.stop * cotangents.shape[1])

    def attempt(limited: RowSource) -> Tensor:
        function = limited.function
        out = torch.zeros(count, total, dtype=function.dtype, device=function.device)
        for block, terms in CapturedRows(limited, vectors).captures():
            for group, names in groups.items():
                chosen = weights[group][:, own][:, block.rows]
                add_row_combinations(out, starts, _of_group(terms, names), chosen)
        return out

    return shards.sum(
        lambda: halving(lambda memory: attempt(replace(part, memory=memory)), source.memory)
    )


def _of_group(terms: list[Term], names: Sequence[str]) -> list[Term]:
    restricted = [term.restricted(names) for term in terms]
    return [term for term in restricted if term is not None]


def _add_squares(
    target: tuple[Tensor, Tensor], terms: list[Term], parameters: dict[str, Tensor], weights: Tensor
) -> None:
    """Some samples' rows at a time, whole: a group is small where this is chosen."""
    count, vectors = weights.shape
    width = sum(parameter.numel() for parameter in parameters.values())
    step = max(1, PIECE_ENTRIES // (vectors * width))
    for start in range(0, count, step):
        samples = slice(start, min(start + step, count))
        lead = (samples.stop - samples.start, vectors)
        rows = rows_of(terms, samples, slice(None))
        wide = torch.cat(
            [
                rows[name].reshape(*lead, -1).double()
                if name in rows
                else parameter.new_zeros(*lead, parameter.numel(), dtype=torch.float64)
                for name, parameter in parameters.items()
            ],
            2,
        ).flatten(0, 1)
        target[0].addmm_(wide.T, wide)
        target[1].addmv_(wide.T, weights[samples].reshape(-1))
