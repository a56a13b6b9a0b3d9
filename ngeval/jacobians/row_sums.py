"""Weighted sums Σ_nq w_nq J_nᵀv_nq of captured rows, in the model's dtype, layer by layer.

Such a sum of outer products is a single product of their factors, Σ_nt (Σ_q w_nq b_nqt) a_ntᵀ, and
costs as much as the weight's gradient in a backward pass. Where the rows themselves were computed
for their inner products, it is a product with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.jacobians.inner_products import PIECE_ENTRIES, needs_rows
from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, StoredTerm, Term
from ngeval.model.function import Parameters


def with_rows(term: Term) -> Term:
    """The term with its rows in memory, if its inner products need them and they are few."""
    size = term.num_samples * term.num_vectors * term.row_size
    if size > PIECE_ENTRIES or not needs_rows(term):
        return term
    return StoredTerm(term.rows(ALL, ALL, ALL))


def can_sum(term: Term) -> bool:
    """Whether `row_sums` applies to a term: its rows or its factors are in memory."""
    if isinstance(term, AffineTerm):
        return term.groups == 1 and term.apply is None
    return isinstance(term, EmbeddingTerm | StoredTerm)


def row_sums(terms: list[Term], weights: Tensor) -> Parameters:
    """Σ_nq w_nq of the terms' rows, by parameter and in its shape.

    Args:
        terms: all terms of a capture, where `can_sum` holds for each.
        weights: w, shape ``(N, Q)``.
    """
    sums: Parameters = {}
    for term in terms:
        for name, value in _sums(term, weights).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _sums(term: Term, weights: Tensor) -> Parameters:
    if isinstance(term, AffineTerm):
        return _affine_sums(term, weights)
    if isinstance(term, EmbeddingTerm):
        gradients = _weighted(term.cotangents, weights).flatten(0, 1)
        indices, table = term.indices.reshape(-1), gradients.new_zeros(term.weight_shape)
        valid = indices >= 0
        return {term.weight: table.index_add_(0, indices[valid], gradients[valid])}
    flat = weights.reshape(1, -1)
    return {
        name: (flat.to(rows.dtype) @ rows.reshape(flat.shape[1], -1)).reshape(term.shapes[name])
        for name, rows in term.rows(ALL, ALL, ALL).items()
    }


def _affine_sums(term: AffineTerm, weights: Tensor) -> Parameters:
    gradients = _weighted(term.cotangents, weights).flatten(0, 1).flatten(1)
    sums: Parameters = {}
    if term.weight:
        inputs = term.inputs(ALL).flatten(0, 1).flatten(1)
        product = inputs.T @ gradients if term.transposed else gradients.T @ inputs
        sums[term.weight] = product.reshape(term.weight_shape)
    if term.bias:
        sums[term.bias] = gradients.sum(0)
    return sums


def _weighted(cotangents: Tensor, weights: Tensor) -> Tensor:
    """Σ_q w_nq b_nqt…: ``(n, q, t, …)`` to ``(n, t, …)``."""
    shaped = weights.to(cotangents.dtype).reshape(*weights.shape, *[1] * (cotangents.ndim - 2))
    if weights.shape[1] == 1:
        return cotangents.squeeze(1) * shaped.squeeze(1)
    return torch.mul(cotangents, shaped).sum(1)
