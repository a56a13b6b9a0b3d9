"""Rows restricted to groups of parameters: the diagonal blocks of a curvature, and sums of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ngeval.jacobians.captured_rows import KEPT_SHARE
from ngeval.jacobians.inner_products import (
    PIECE_ENTRIES,
    add_inner_products,
    add_row_combinations,
    rows_of,
)
from ngeval.jacobians.row_source import RowSource, from_lower
from ngeval.jacobians.terms import ALL, Term

Groups = Mapping[str, Sequence[str]]
"""Parameter names by group."""


def group_grams(source: RowSource, cotangents: Tensor, groups: Groups) -> dict[str, Tensor]:
    """R_l R_lᵀ for the rows R_l of each group l: float64, shape ``(N·Q, N·Q)``."""
    size = cotangents.shape[0] * cotangents.shape[1]

    def compute(source: RowSource) -> dict[str, Tensor]:
        device = source.function.device
        grams = {g: torch.zeros(size, size, dtype=torch.float64, device=device) for g in groups}
        for rows, columns, left, right in source.pairs(cotangents):
            for group, names in groups.items():
                first = _restricted(left, names)
                second = first if right is left else _restricted(right, names)
                add_inner_products(
                    grams[group][rows, columns], first, second, symmetric=right is left
                )
        return grams

    return {group: from_lower(gram) for group, gram in source.sum_over_pairs(compute).items()}


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
    parameters = source.function.parameters

    def compute(
        source: RowSource, vectors: Tensor, local_weights: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        sums = {}
        for group, names in groups.items():
            size = sum(parameters[name].numel() for name in names)
            zeros = torch.zeros(size, size + 1, dtype=torch.float64, device=source.function.device)
            sums[group] = (zeros[:, :size], zeros[:, size])
        for block, terms in source.captures(vectors, KEPT_SHARE):
            chosen = local_weights[block.samples, block.vectors]
            for group, names in groups.items():
                members = {name: parameters[name] for name in names}
                _add_squares(sums[group], _restricted(terms, names), members, chosen)
        return sums

    by_sample = weights.unflatten(0, cotangents.shape[:2])
    return source.sum_over_samples(compute, cotangents, by_sample)


def group_combinations(
    source: RowSource, cotangents: Tensor, groups: Groups, weights: Mapping[str, Tensor]
) -> Tensor:
    """Σ_nq w_l,nq R_l,nq for each group l, side by side: shape ``(k, P)``, the model's dtype.

    Entries of parameters in no group are 0.

    Args:
        source: the model, engine and memory budget.
        cotangents: v of shape ``(N, Q, *positions, C)``.
        groups: parameter names by group.
        weights: w by group in float64, shape ``(k, N·Q)``.
    """
    count = len(next(iter(weights.values())))

    def compute(source: RowSource, vectors: Tensor, *local_weights: Tensor) -> Tensor:
        function = source.function
        out = torch.zeros(
            count, function.num_parameters, dtype=function.dtype, device=function.device
        )
        flat = [w.flatten(0, 1).T for w in local_weights]
        for block, terms in source.captures(vectors, KEPT_SHARE):
            for names, group_weights in zip(groups.values(), flat, strict=True):
                restricted = _restricted(terms, names)
                add_row_combinations(
                    out, function.offsets, restricted, group_weights[:, block.rows]
                )
        return out

    by_sample = [weights[group].T.unflatten(0, cotangents.shape[:2]) for group in groups]
    return source.sum_over_samples(compute, cotangents, *by_sample)


def _restricted(terms: list[Term], names: Sequence[str]) -> list[Term]:
    restricted = [term.restricted(names) for term in terms]
    return [term for term in restricted if term is not None]


def _add_squares(
    target: tuple[Tensor, Tensor], terms: list[Term], parameters: dict[str, Tensor], weights: Tensor
) -> None:
    """A few samples' whole rows at a time: this form is chosen for small groups."""
    count, vectors = weights.shape
    width = sum(parameter.numel() for parameter in parameters.values())
    step = max(1, PIECE_ENTRIES // (vectors * width))
    for start in range(0, count, step):
        samples = slice(start, min(start + step, count))
        lead = (samples.stop - samples.start, vectors)
        rows = rows_of(terms, samples, ALL)
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
