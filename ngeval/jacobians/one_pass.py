"""One forward pass of a batch from which everything of a training step is computed.

The graph of the pass is kept: rows are captured by a backward pass to the hooked outputs, and
Σ_n c_n g_n, once the c_n are known, by another one from the same outputs to the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.jacobians.capture import UnsupportedLayerError, forward, is_batched
from ngeval.jacobians.captured_rows import KEPT_SHARE
from ngeval.jacobians.inner_products import add_inner_products
from ngeval.jacobians.layer_rules import RecordedCall
from ngeval.jacobians.row_source import RowSource, from_lower
from ngeval.jacobians.row_sums import can_sum, row_sums, with_rows
from ngeval.jacobians.terms import Term
from ngeval.model.function import (
    ModelFunction,
    Parameters,
    autograd_enabled,
    model_errors,
    pull_back,
)


class OnePass:
    """The recorded forward pass of a batch at θ, with its graph.

    Attributes:
        outputs: of the model, in its own dtype, with their graph.
    """

    def __init__(self, source: RowSource) -> None:
        """Run the model with hooks.

        Args:
            source: of the layer engine.

        Raises:
            UnsupportedLayerError: a module was called more or fewer times than in the plan, or its
                output does not hold the batch's samples as the plan says.
        """
        if source.plan is None:
            raise ValueError("the pass of an engine without a plan cannot be recorded")
        self.source = source
        function = source.function
        with autograd_enabled():
            self.leaves = {n: p.detach().requires_grad_() for n, p in function.parameters.items()}
        with model_errors():
            self.recorded = forward(
                function, source.plan, function.inputs, fused=True, leaves=self.leaves
            )
        self.outputs = self.recorded.outputs
        _check_layouts(self.recorded.calls, function.num_samples)

    @staticmethod
    def fits(source: RowSource, num_samples: int, vectors: int = 1) -> bool:
        """Whether such a pass can be recorded, and the captures of all rows kept beside it."""
        return source.can_record() and source.fits(num_samples, vectors, KEPT_SHARE)

    def rows(self, cotangents: Tensor) -> PassRows:
        """The rows J_nᵀv_nq, captured."""
        recorded, chosen = self.recorded, cotangents.to(self.source.function.dtype)
        batched = is_batched(recorded.function, recorded.plan, chosen)
        with model_errors():
            terms = recorded.capture(slice(0, len(chosen)), chosen, batched=batched, retain=True)
        return PassRows(self, cotangents, terms)


class PassRows:
    """Captured rows, with the pass that they came from."""

    def __init__(self, one_pass: OnePass, cotangents: Tensor, terms: list[Term]) -> None:
        """Keep the terms; rows that inner products need are computed now, where they fit."""
        self.one_pass = one_pass
        self.cotangents = cotangents
        source = one_pass.source
        room = int(KEPT_SHARE * source.memory)
        self.terms: list[Term] = []
        for term in terms:
            size = _row_bytes(term, source.function)
            kept = with_rows(term) if size <= room else term
            room -= size if kept is not term else 0
            self.terms.append(kept)

    def gram(self) -> Tensor:
        """Inner products of all rows; see `ngeval.jacobians.gram_matrix`."""
        size = self.cotangents.shape[0] * self.cotangents.shape[1]
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.cotangents.device)
        add_inner_products(gram, self.terms, self.terms, symmetric=True)
        return from_lower(gram)

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_nq w_nq J_nᵀv_nq: shape ``(P,)``, the model's dtype.

        From the captures, with one product for each layer; if a layer has neither its factors nor
        its rows in memory, by a backward pass through the recorded graph.

        Args:
            weights: w in float64, shape ``(N, Q)``.
        """
        function = self.one_pass.source.function
        scale = weights.abs().max()
        if scale == 0:
            return torch.zeros(
                function.num_parameters, dtype=function.dtype, device=function.device
            )
        unit = weights / scale
        if all(can_sum(term) for term in self.terms):
            sums = row_sums(self.terms, unit)
            for name in function.parameters.keys() - sums.keys():
                sums[name] = torch.zeros_like(function.parameters[name])
        else:
            sums = self._through_the_graph(unit)
        return function.flatten(sums).mul_(scale.to(function.dtype))

    def _through_the_graph(self, weights: Tensor) -> Parameters:
        outputs, leaves = self.one_pass.outputs, self.one_pass.leaves
        if not outputs.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        field = torch.einsum("nq,nq...->n...", weights, self.cotangents)
        with model_errors():
            return pull_back(outputs, leaves, field, retain_graph=True)


def _check_layouts(calls: list[RecordedCall], count: int) -> None:
    """The hooked outputs hold all samples once; a model may drop or repeat some by their values."""
    for call in calls:
        for index, tensor in call.outputs.items():
            layout, shape = call.layout.outputs[index], call.layout.shapes[index]
            if layout is None or shape is None:
                continue
            if len(shape) != tensor.ndim or tensor.shape[layout.dim] != count * layout.repeats:
                raise UnsupportedLayerError(
                    f"{call.hooked.name} returns {tuple(tensor.shape)} for {count} samples"
                )


def _row_bytes(term: Term, function: ModelFunction) -> int:
    return term.num_samples * term.num_vectors * term.row_size * function.dtype.itemsize
