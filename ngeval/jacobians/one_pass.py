"""One forward pass of a batch that everything of a training step is taken from.

The graph of the pass is kept: rows are captured by a backward pass to the watched outputs, and
Σ_n c_n g_n, once the c are known, is another one from the same outputs to the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.jacobians.capture import (
    BATCHED_ENTRIES,
    UnsupportedLayerError,
    _loop_term,
    _pull_back_singly,
    _pull_back_together,
    _terms,
    _watched,
    forward,
)
from ngeval.jacobians.captured_rows import KEPT_SHARE
from ngeval.jacobians.inner_products import add_inner_products
from ngeval.jacobians.layer_rules import RecordedCall
from ngeval.jacobians.row_source import RowSource, from_lower
from ngeval.jacobians.row_sums import can_sum, row_sums, with_rows
from ngeval.jacobians.terms import Term, merged
from ngeval.model.function import ModelFunction, Parameters, autograd_enabled, model_errors


class OnePass:
    """The recorded forward pass of a batch at θ; it is used up by `rows`.

    Attributes:
        outputs: of the model, in its own dtype, with their graph.
    """

    def __init__(self, source: RowSource) -> None:
        """Run the model, hooks in place.

        Args:
            source: of the layer engine.

        Raises:
            UnsupportedLayerError: a module was called another number of times than in the plan,
                or its output does not hold the batch's samples as it says.
        """
        if source.plan is None:
            raise ValueError("the pass of an engine without a plan cannot be recorded")
        self.source = source
        self.plan = source.plan
        function = source.function
        with autograd_enabled():
            self.leaves = {n: p.detach().requires_grad_() for n, p in function.parameters.items()}
        with model_errors():
            self.calls, self.copies, self.outputs = forward(
                function, self.plan, function.inputs, fused=True, leaves=self.leaves
            )
        _check_layouts(self.calls, function.num_samples)

    @staticmethod
    def fits(source: RowSource, num_samples: int, vectors: int = 1) -> bool:
        """Whether such a pass can be recorded, and the captures of all rows kept beside it.

        Not where samples are spread over ranks: rows are then exchanged.
        """
        if source.plan is None or not source.function.shards.alone:
            return False
        whole = num_samples * (vectors * source.captured_bytes + source.sample_bytes)
        return whole <= KEPT_SHARE * source.memory

    def rows(self, cotangents: Tensor) -> PassRows:
        """The rows J_nᵀv_nq, captured.

        Args:
            cotangents: v of shape ``(N, Q, *positions, C)``.
        """
        function, count = self.source.function, cotangents.shape[0]
        chosen = cotangents.to(function.dtype)
        targets = _watched(self.calls, self.copies)
        terms: list[Term] = []
        with model_errors():
            if targets:
                entries = chosen.shape[1] * count * self.plan.watched_scalars(function)
                if chosen.shape[1] > 1 and entries < BATCHED_ENTRIES:
                    found = _pull_back_together(self.outputs, targets, chosen)
                else:
                    found = _pull_back_singly(self.outputs, targets, chosen, retain=True)
                terms = _terms(function, self.calls, self.copies, found)
            if self.plan.looped:
                terms.append(_loop_term(function, self.plan.looped, slice(0, count), chosen))
        return PassRows(self, cotangents, merged(terms))


class PassRows:
    """Captured rows, with the pass that they came from."""

    def __init__(self, recorded: OnePass, cotangents: Tensor, terms: list[Term]) -> None:
        """Keep them; rows that their inner products are made of are made now, where they fit."""
        self.recorded = recorded
        self.cotangents = cotangents
        source = recorded.source
        room = int(KEPT_SHARE * source.memory)
        self.terms: list[Term] = []
        for term in terms:
            kept = with_rows(term) if _row_bytes(term, source.function) <= room else term
            room -= _row_bytes(term, source.function) if kept is not term else 0
            self.terms.append(kept)

    def gram(self) -> Tensor:
        """Inner products of all rows, as `ngeval.jacobians.gram_matrix` has them."""
        size = self.cotangents.shape[0] * self.cotangents.shape[1]
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.cotangents.device)
        add_inner_products(gram, self.terms, self.terms, symmetric=True)
        return from_lower(gram)

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_nq w_nq J_nᵀv_nq: shape ``(P,)``, the model's dtype.

        From the captures, with one product for each layer, or, where a layer has neither factors
        nor rows at hand, by a backward pass through the recorded graph.

        Args:
            weights: w in float64, shape ``(N, Q)``.
        """
        function = self.recorded.source.function
        scale = weights.abs().max()
        if scale == 0:
            return torch.zeros(
                function.num_parameters, dtype=function.dtype, device=function.device
            )
        unit = weights / scale
        if all(can_sum(term) for term in self.terms):
            found = row_sums(self.terms, unit)
            for name, parameter in function.parameters.items():
                if name not in found:
                    found[name] = torch.zeros_like(parameter)
        else:
            found = self._through_the_graph(unit)
        return function.flatten(found).mul_(scale.to(function.dtype))

    def _through_the_graph(self, weights: Tensor) -> Parameters:
        recorded = self.recorded
        if not recorded.outputs.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in recorded.leaves.items()}
        field = torch.einsum("nq,nq...->n...", weights, self.cotangents)
        with model_errors():
            found = torch.autograd.grad(
                recorded.outputs,
                list(recorded.leaves.values()),
                field.to(recorded.outputs.dtype),
                materialize_grads=True,
                retain_graph=True,
            )
        dense = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]
        return dict(zip(recorded.leaves, dense, strict=True))


def _check_layouts(calls: list[RecordedCall], count: int) -> None:
    """The watched outputs hold so many samples: not where others are left out, or come twice."""
    for call in calls:
        for index, tensor in call.outputs.items():
            layout, shape = call.layout.outputs[index], call.layout.shapes[index]
            if layout is None or shape is None:
                continue
            if len(shape) != tensor.ndim or tensor.shape[layout.dim] != count * layout.repeats:
                raise UnsupportedLayerError(
                    f"{call.owner.name} returns {tuple(tensor.shape)} for {count} samples"
                )


def _row_bytes(term: Term, function: ModelFunction) -> int:
    return term.num_samples * term.num_vectors * term.row_size * function.dtype.itemsize
