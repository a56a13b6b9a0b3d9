"""Weighted sums Σ_nq w_nq J_nᵀv_nq of captured rows, in the model's dtype, layer by layer.

Such a sum of outer products is one product of their factors, Σ_nt (Σ_q w_nq b_nqt) a_ntᵀ, so that
it costs what a weight's gradient costs in a backward pass. Where the rows themselves were made,
for their inner products, it is a product with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.jacobians.inner_products import PIECE_ENTRIES, needs_rows
from ngeval.jacobians.terms import AffineTerm, EmbeddingTerm, RowsTerm, Term
from ngeval.model.function import Parameters

ALL = slice(None)


class KeptRows(RowsTerm):
    """Rows that were made once and are kept, in the model's dtype."""


def with_rows(term: Term) -> Term:
    """The term with its rows made, if its inner products take them and they are not too large."""
    size = term.num_samples * term.num_vectors * term.row_size
    if size > PIECE_ENTRIES or not needs_rows(term):
        return term
    rows = term.rows(ALL, ALL, ALL)
    return KeptRows(
        term.num_samples,
        term.num_vectors,
        term.shapes,
        lambda samples, vectors: {name: value[samples, vectors] for name, value in rows.items()},
    )


def can_sum(term: Term) -> bool:
    """Whether `row_sums` treats a term: rows are kept, or it has factors that are at hand."""
    if isinstance(term, AffineTerm):
        return term.groups == 1 and term.apply is None
    return isinstance(term, EmbeddingTerm | KeptRows)


def row_sums(terms: list[Term], weights: Tensor) -> Parameters:
    """Σ_nq w_nq of the terms' rows, by parameter and in its shape.

    Args:
        terms: all of a capture's, for which `can_sum`.
        weights: w, shape ``(N, Q)``.
    """
    found: Parameters = {}
    for term in terms:
        for name, value in _sums(term, weights).items():
            found[name] = found[name] + value if name in found else value
    return found


def _sums(term: Term, weights: Tensor) -> Parameters:
    if isinstance(term, AffineTerm):
        return _affine_sums(term, weights)
    if isinstance(term, EmbeddingTerm):
        gradients = _weighted(term.cotangents, weights).flatten(0, 1)
        indices, table = term.indices.reshape(-1), gradients.new_zeros(term.weight_shape)
        seen = indices >= 0
        return {term.weight: table.index_add_(0, indices[seen], gradients[seen])}
    flat = weights.reshape(1, -1)
    return {
        name: (flat.to(rows.dtype) @ rows.reshape(flat.shape[1], -1)).reshape(term.shapes[name])
        for name, rows in term.rows(ALL, ALL, ALL).items()
    }


def _affine_sums(term: AffineTerm, weights: Tensor) -> Parameters:
    gradients = _weighted(term.cotangents, weights).flatten(0, 1).flatten(1)
    found: Parameters = {}
    if term.weight:
        inputs = term.inputs(ALL).flatten(0, 1).flatten(1)
        product = inputs.T @ gradients if term.transposed else gradients.T @ inputs
        found[term.weight] = product.reshape(term.weight_shape)
    if term.bias:
        found[term.bias] = gradients.sum(0)
    return found


def _weighted(cotangents: Tensor, weights: Tensor) -> Tensor:
    """Σ_q w_nq b_nqt…: ``(n, q, t, …)`` to ``(n, t, …)``."""
    shaped = weights.to(cotangents.dtype).reshape(*weights.shape, *[1] * (cotangents.ndim - 2))
    if weights.shape[1] == 1:
        return cotangents.squeeze(1) * shaped.squeeze(1)
    return torch.mul(cotangents, shaped).sum(1)
