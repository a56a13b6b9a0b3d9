"""One forward pass of a batch from which everything of a training step is computed.

The graph of the pass is kept: rows are captured by a backward pass to the hooked outputs, and
Σ_n c_n g_n, once the c_n are known, by another one from the same outputs to the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.jacobians.capture import UnsupportedLayerError, forward
from ngeval.jacobians.capture_plan import RecordedCall
from ngeval.jacobians.captured_rows import KEPT_SHARE, CapturedRows
from ngeval.jacobians.inner_products import PIECE_ENTRIES, needs_rows
from ngeval.jacobians.layouts import RAGGED
from ngeval.jacobians.row_source import RowSource
from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, StoredTerm, Term
from ngeval.model.autograd import Parameters, model_errors, pull_back


class OnePass:
    """The recorded forward pass of a batch at θ, with its graph.

    Attributes:
        outputs: of the model, in its own dtype, with their graph.
    """

    def __init__(self, source: RowSource) -> None:
        """Run the model with hooks.

        Raises:
            UnsupportedLayerError: a module was called more or fewer times than in the plan, or its
                output does not hold the batch's samples as the plan says.
        """
        if source.plan is None:
            raise ValueError("the pass of an engine without a plan cannot be recorded")
        self.source, function = source, source.function
        with model_errors():
            self.recorded = forward(function, source.plan, function.inputs, fused=True)
        self.outputs = self.recorded.outputs
        _check_layouts(self.recorded.recorder.calls, function.num_samples)

    @staticmethod
    def fits(source: RowSource, num_samples: int, vectors: int = 1) -> bool:
        """Whether such a pass can be recorded, and the captures of all rows kept beside it."""
        recordable = source.plan is not None and source.shards.alone
        return recordable and source.fits(num_samples, vectors, KEPT_SHARE)

    def rows(self, cotangents: Tensor) -> PassRows:
        """The rows J_nᵀv_nq, captured."""
        return PassRows(self, cotangents)


class PassRows(CapturedRows):
    """Captured rows, with the pass that they came from."""

    def __init__(self, one_pass: OnePass, cotangents: Tensor) -> None:
        """Keep the terms; rows that inner products need are computed now, where they fit."""
        super().__init__(one_pass.source, cotangents)
        self.one_pass = one_pass
        chosen = cotangents.to(self.source.function.dtype)
        with model_errors():
            terms = one_pass.recorded.capture(slice(0, len(chosen)), chosen, retain=True)
        room = int(KEPT_SHARE * self.source.memory)
        self.terms: list[Term] = []
        for term in terms:
            size = term.num_samples * term.num_vectors * term.row_size
            num_bytes = size * self.source.function.dtype.itemsize
            stored = size <= PIECE_ENTRIES and num_bytes <= room and needs_rows(term)
            room -= num_bytes if stored else 0
            self.terms.append(StoredTerm(term.rows(ALL, ALL, ALL)) if stored else term)
        self._kept = self.terms

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_nq w_nq J_nᵀv_nq: shape ``(P,)``, the model's dtype.

        From the captures, with one product for each layer; if a layer has neither its factors nor
        its rows in memory, by a backward pass through the recorded graph.
        """
        function = self.source.function
        scale = weights.abs().max()
        if scale == 0:
            return torch.zeros(
                function.num_parameters, dtype=function.dtype, device=function.device
            )
        unit = weights / scale
        if all(_can_sum(term) for term in self.terms):
            sums = _row_sums(self.terms, unit)
            for name in function.parameters.keys() - sums.keys():
                sums[name] = torch.zeros_like(function.parameters[name])
        else:
            sums = self._through_the_graph(unit)
        return function.flatten(sums).mul_(scale.to(function.dtype))

    def _through_the_graph(self, weights: Tensor) -> Parameters:
        outputs, leaves = self.one_pass.outputs, self.one_pass.recorded.leaves
        if not outputs.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        field = torch.einsum("nq,nq...->n...", weights, self.cotangents)
        with model_errors():
            return pull_back([outputs], leaves, [field], retain_graph=True)


def _check_layouts(calls: list[RecordedCall], count: int) -> None:
    """The hooked outputs hold all samples once; a model may drop or repeat some by their values."""
    for call in calls:
        for index, tensor in call.outputs.items():
            layout, shape = call.layout.outputs[index], call.layout.shapes[index]
            if layout is None or shape is None or layout == RAGGED:
                continue
            if len(shape) != tensor.ndim or tensor.shape[layout.dim] != count * layout.repeats:
                raise UnsupportedLayerError(
                    f"{call.hooked.name} returns {tuple(tensor.shape)} for {count} samples"
                )


def _can_sum(term: Term) -> bool:
    """Whether the rows of a term or its factors are in memory."""
    if isinstance(term, AffineTerm):
        return term.groups == 1 and term.apply is None
    return isinstance(term, EmbeddingTerm | StoredTerm)


def _row_sums(terms: list[Term], weights: Tensor) -> Parameters:
    """Σ_nq w_nq of the terms' rows, by parameter and in its shape.

    A sum of outer products is a single product of their factors, Σ_nt (Σ_q w_nq b_nqt) a_ntᵀ, and
    costs as much as the weight's gradient in a backward pass.
    """
    sums: Parameters = {}
    for term in terms:
        for name, value in _sums(term, weights).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _sums(term: Term, weights: Tensor) -> Parameters:
    if isinstance(term, AffineTerm):
        gradients = _weighted(term.cotangents, weights).flatten(0, 1).flatten(1)
        sums: Parameters = {}
        if term.weight:
            inputs = term.inputs(ALL).flatten(0, 1).flatten(1)
            product = inputs.T @ gradients if term.transposed else gradients.T @ inputs
            sums[term.weight] = product.reshape(term.weight_shape)
        if term.bias:
            sums[term.bias] = gradients.sum(0)
        return sums
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


def _weighted(cotangents: Tensor, weights: Tensor) -> Tensor:
    """Σ_q w_nq b_nqt…: ``(n, q, t, …)`` to ``(n, t, …)``."""
    shaped = weights.to(cotangents.dtype).reshape(*weights.shape, *[1] * (cotangents.ndim - 2))
    if weights.shape[1] == 1:
        return cotangents.squeeze(1) * shaped.squeeze(1)
    return torch.mul(cotangents, shaped).sum(1)
