"""One forward pass of a batch that everything of a training step is taken from.

The graph of the pass is kept: rows are captured by a backward pass to the watched outputs, and
Σ_n c_n g_n, once the c are known, is another one from the same outputs to the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngeval.functional import ModelFunction, Parameters, autograd_enabled, model_errors
from ngeval.jacobians.capture import (
    BATCHED_ENTRIES,
    _loop_term,
    _pull_back_singly,
    _pull_back_together,
    _terms,
    _watched,
    forward,
)
from ngeval.jacobians.captured import KEPT_SHARE
from ngeval.jacobians.products import add_inner_products
from ngeval.jacobians.rows import RowSource, from_lower
from ngeval.jacobians.terms import AffineTerm, Term, merged


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
            UnsupportedLayerError: a module was called another number of times than in the plan.
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

    @staticmethod
    def fits(source: RowSource, num_samples: int, vectors: int = 1) -> bool:
        """Whether such a pass can be recorded, and the captures of all rows kept beside it."""
        if source.plan is None:
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
        """Keep them."""
        self.recorded = recorded
        self.cotangents = cotangents
        self.terms = terms

    def gram(self) -> Tensor:
        """Inner products of all rows, as `ngeval.jacobians.gram_matrix` has them."""
        size = self.cotangents.shape[0] * self.cotangents.shape[1]
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.cotangents.device)
        add_inner_products(gram, self.terms, self.terms, symmetric=True)
        return from_lower(gram)

    def combination(self, weights: Tensor) -> Tensor:
        """Σ_nq w_nq J_nᵀv_nq: shape ``(P,)``, the model's dtype.

        From the captures where every row is an outer product, which is one matrix product for
        each layer; otherwise by a backward pass through the recorded graph.

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
        if all(_is_product(term) for term in self.terms):
            found = _from_captures(function, self.terms, unit)
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


def _is_product(term: Term) -> bool:
    """Whether a term's weighted sum is a single product of its two factors."""
    return isinstance(term, AffineTerm) and term.groups == 1 and term.apply is None


def _from_captures(function: ModelFunction, terms: list[Term], weights: Tensor) -> Parameters:
    """Σ_nt (Σ_q w_nq b_nqt) a_ntᵀ for each layer."""
    found = {name: torch.zeros_like(p) for name, p in function.parameters.items()}
    for term in terms:
        mixed = term.combined(weights.unsqueeze(1))
        if not isinstance(mixed, AffineTerm):
            raise TypeError("only a sum of outer products is made of its factors")
        gradients = mixed.cotangents.flatten(0, 2).flatten(1)
        if mixed.weight:
            inputs = mixed.inputs(slice(None)).flatten(0, 1).flatten(1)
            product = inputs.T @ gradients if mixed.transposed else gradients.T @ inputs
            found[mixed.weight] += product.reshape(mixed.weight_shape)
        if mixed.bias:
            found[mixed.bias] += gradients.sum(0)
    return found
