"""The batch that grades, where it differs from the batch that updates are made from.

An update made from N samples is graded under the Fisher and the gradient of M ≫ N others, up to
the whole data set. They are passed in chunks, so that memory does not grow with M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods import OutputDistribution
from ngeval.model.autograd import model_errors
from ngeval.model.batches import pair_of
from ngeval.model.directions import chunk_sizes, push_directions, slices
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import check_inputs, map_tensors, named_tensors
from ngeval.model.outputs import bound
from ngeval.model.sharding import PRIME, fingerprint
from ngeval.problem.problem import Problem
from ngeval.utils.memory import halving

TANGENT_BYTES = 2**29
"""Bytes of tangents that are passed through a model together; more would be slower."""

Batches = Iterable[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Some samples with their outputs.

    Attributes:
        function: the model at θ on them.
        distribution: p(·|z) with their targets.
        residual: u = ∇_z ℓ, float64.
    """

    function: ModelFunction
    distribution: OutputDistribution
    residual: Tensor


class Forms(NamedTuple):
    """Sums over all samples, for L updates d_l.

    Attributes:
        curvature: d_iᵀF d_j, float64, shape ``(L, L)``.
        decrease: d_jᵀg, float64, shape ``(L,)``.
        absolute: the sum of the sizes of the terms of d_jᵀg, by which its rounding grows.
    """

    curvature: Tensor
    decrease: Tensor
    absolute: Tensor


@dataclass(frozen=True)
class Totals:
    """The numbers of a metric batch that need no direction.

    Attributes:
        num_samples: M.
        floor: the closed-form bound (Σ uᵀH⁺u)^(−1/2) on every γ.
        gradient_norm: ‖g‖.
        loss: mean ℓ, nats.
    """

    num_samples: int
    floor: float
    gradient_norm: float
    loss: float


class Metric:
    """The Fisher and the gradient of a batch of any length, by which updates are graded.

    Args:
        problem: the model at θ, the likelihood and the memory budget.
        batches: ``(inputs, targets)`` pairs that can be iterated over more than once: a list, a
            ``DataLoader``, or a function that returns an iterable; None for the problem's own.

    Raises:
        InputError: an iterator, which can be iterated over only once.

    Example:
        >>> import torch, ngeval
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 1])
        >>> problem = ngeval.Problem(model, x, y, "categorical")
        >>> metric = ngeval.Metric(problem, [(x, y), (x + 1, y)])
        >>> metric.totals.num_samples
        6
    """

    def __init__(
        self, problem: Problem, batches: Batches | Callable[[], Batches] | None = None
    ) -> None:
        if isinstance(batches, Iterator):
            raise InputError(
                "the metric's batches are an iterator, which can be iterated over only once; give "
                "a list, a DataLoader, or a function that returns an iterable of batches"
            )
        if not (batches is None or callable(batches) or isinstance(batches, Iterable)):
            raise InputError(
                "the metric's batches are a list of (inputs, targets), a DataLoader or a function "
                f"that returns one, not {type(batches).__name__}"
            )
        self.problem = problem
        self.batches = batches
        self._seen = 0

    @cached_property
    def totals(self) -> Totals:
        """One forward and backward pass over all samples."""
        numbers, gradient = self.summed(self._totals)
        count, floor, loss = numbers.tolist()
        if count == 0:
            raise InputError("the metric has no batch")
        bound = floor**-0.5 if floor > 0 else math.inf
        return Totals(int(count), bound, float(gradient.norm()), loss / count)

    def _totals(self) -> tuple[Tensor, Tensor]:
        """M, Σ uᵀH⁺u and Σ ℓ, and g, of this rank's samples."""
        count, floor, loss = 0, 0.0, 0.0
        gradient = torch.zeros(self.problem.num_parameters, dtype=torch.float64)
        for chunk in self.chunks(1):
            count += chunk.function.num_samples
            floor += float(chunk.distribution.floor_terms().sum())
            loss += float(chunk.distribution.loss().sum())
            with model_errors():
                part = chunk.function.flatten(chunk.function.vjp(chunk.residual))
            gradient += part.to(torch.float64).cpu()
        return torch.tensor([count, floor, loss], dtype=torch.float64), gradient

    def summed(self, compute: Callable[[], T]) -> T:
        """Sums over samples, of which every rank has a part.

        Raises:
            InputError: the ranks were given different batches.
        """
        shards = self.problem.shards
        total = shards.sum(compute)
        if not shards.alone and self.batches is not None:
            shards.check_same({"the metric's batches": self._seen})
        return total

    def forms(self, directions: Tensor, coefficients: Tensor | None = None) -> Forms:
        """The Fisher's and the gradient's products with L updates d_l = Σ_j a_lj b_j.

        Only the k directions b are pushed through the model. The tangents are combined before
        they are multiplied, since products of the b would lose the digits of small d_lᵀFd_l.

        Args:
            directions: b in the model's dtype, shape ``(k, P)``.
            coefficients: a, float64, shape ``(L, k)``; None for the directions themselves.
        """
        if coefficients is None:
            coefficients = torch.eye(len(directions), dtype=torch.float64, device=directions.device)
        memory = self.problem.rows.memory
        return Forms(
            *self.summed(
                lambda: halving(lambda some: self._forms(directions, coefficients, some), memory)
            )
        )

    def _forms(
        self, directions: Tensor, coefficients: Tensor, memory: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        (updates, count), device = coefficients.shape, directions.device
        curvature = torch.zeros(updates, updates, dtype=torch.float64, device=device)
        decrease, absolute = torch.zeros(2, updates, dtype=torch.float64, device=device)
        step = chunk_sizes(1, count, self.problem.rows.sample_bytes, memory)[1]
        weights = self.problem.num_parameters * self.problem.dtype.itemsize
        for chunk in self.chunks(updates + min(count, step), memory):
            passed = chunk.function.num_samples * self.problem.rows.sample_bytes
            step = min(step, max(1, TANGENT_BYTES // max(1, passed)))
            if weights > passed:  # the tangents of weights would be copied for each direction
                step = 1
            tangents = torch.zeros(updates, *chunk.residual.shape, dtype=torch.float64)
            tangents = tangents.to(device)
            for chosen in slices(count, step):
                pushed = push_directions(chunk.function, directions[chosen])
                tangents += torch.tensordot(coefficients[:, chosen], pushed, 1)
            terms = (chunk.residual * tangents).flatten(1)
            decrease += terms.sum(1)
            absolute += terms.abs().sum(1)
            whitened = chunk.distribution.factor_transpose_product(tangents).flatten(1)
            curvature += whitened @ whitened.T
        return curvature, decrease, absolute

    def chunks(self, num_directions: int, memory: int | None = None) -> Iterator[Chunk]:
        """This rank's samples, as many at a time as fit beside that many tangents."""
        problem = self.problem
        budget = problem.rows.memory if memory is None else memory
        # A tangent, its whitened copy and the activations that it passes through.
        sample = problem.rows.sample_bytes + 24 * num_directions * problem.num_outputs
        for function, targets in self.sources():
            step = chunk_sizes(function.num_samples, num_directions, sample, budget)[0]
            local = problem.shards.local_slice(function.num_samples)
            for samples in slices(local.stop - local.start, step):
                chosen = slice(local.start + samples.start, local.start + samples.stop)
                yield self._chunk(function, targets, chosen)

    def sources(self) -> Iterator[tuple[ModelFunction, Any]]:
        """The model on each whole batch, with the batch's targets."""
        problem = self.problem
        if self.batches is None:
            yield problem.function, problem.distribution.targets
            return
        batches = self.batches() if callable(self.batches) else self.batches
        self._seen = 0
        for batch in batches:
            inputs, targets = pair_of(batch, "a batch of the metric")
            count = next((len(t) for _, t in named_tensors(targets) if t.ndim), 0)
            if problem.function.ragged is None:
                check_inputs(inputs)
                inputs = map_tensors(inputs, lambda t: t.to(problem.device))
            if not problem.shards.alone:
                tensors = [tensor for _, tensor in named_tensors(inputs)]
                tensors += [tensor for _, tensor in named_tensors(targets)]
                self._seen = (self._seen * PRIME + fingerprint(tensors)) % 2**63
            part = problem.function.on_batch(inputs, count)
            for name, tensor in named_tensors(targets, "targets"):
                if tensor.ndim == 0 or len(tensor) != part.num_samples:
                    raise InputError(
                        f"a batch of the metric has {part.num_samples} inputs and {name} of shape "
                        f"{tuple(tensor.shape)}"
                    )
            yield part, map_tensors(targets, lambda t: t.to(problem.device))

    def _chunk(self, function: ModelFunction, targets: Any, samples: slice) -> Chunk:
        problem = self.problem
        if function is problem.function and samples == slice(0, function.num_samples):
            return Chunk(function, problem.distribution, problem.residual)
        part = function.on(samples)
        if function is problem.function and not function.shards.alone:
            outputs = problem.outputs[samples]
        else:
            with torch.no_grad(), model_errors():
                outputs = part(part.parameters, fused=True)
            if not bool(torch.isfinite(outputs).all()):
                raise InputError("the model's outputs on a batch of the metric are NaN or infinite")
        labels = map_tensors(targets, itemgetter(samples))
        distribution = bound(problem.function.output, problem.likelihood, outputs, labels)
        return Chunk(part, distribution, distribution.residual())
