"""Gradients of the training loss, with its reduction, for an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods import OutputDistribution
from ngeval.model.autograd import model_errors
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import Inputs
from ngeval.problem.metric_batch import Metric
from ngeval.problem.mistakes import unused_parameters
from ngeval.problem.problem import Problem

Batches = Iterable[tuple[Inputs, Tensor]]
Gradients = dict[str, Tensor]
"""By parameter name, float64, in the parameters' shapes; unused parameters have no entry."""


def loss_terms(distribution: OutputDistribution, reduction: str) -> float:
    """The number that the reduction divides Σ_n ℓ_n by; masking every position is an error.

    It is N for ``"mean"``, the unmasked positions for ``"token-mean"``, and 1 for ``"sum"``.
    """
    return _divisor(_count(distribution, reduction), reduction)


def _count(distribution: OutputDistribution, reduction: str) -> float:
    """The number of samples, or of unmasked positions."""
    if reduction != "token-mean":
        return float(len(distribution.logits))
    mask = distribution.mask
    return float(distribution.logits[..., 0].numel() if mask is None else mask.sum())


def _divisor(count: float, reduction: str) -> float:
    if reduction == "sum":
        return 1.0
    if count == 0:
        raise InputError("every position of a batch is masked: its mean over tokens is undefined")
    return count


def batch_gradient(problem: Problem, reduction: str) -> Gradients:
    """The gradient of the reduced loss on the problem's batch."""
    terms = loss_terms(problem.distribution, reduction)
    return _used(_split(problem, problem.gradient(), terms), problem.function)


def batch_gradients(
    problem: Problem, batches: Batches | Callable[[], Batches], reduction: str
) -> Iterator[Gradients]:
    """The gradients of the reduced loss on one or more other batches, at the problem's θ."""
    number = 0
    for batch in batches() if callable(batches) else batches:
        number += 1
        metric = Metric(problem, [batch])
        total, counts = metric.summed(partial(_summed, metric, reduction))
        function, _ = next(metric.sources())
        yield _used(_split(problem, total, _divisor(float(counts), reduction)), function)
    if number == 0:
        raise InputError("warmup holds no batch to accumulate the optimizer's state over")


def _summed(metric: Metric, reduction: str) -> tuple[Tensor, Tensor]:
    """The gradient of Σ_n ℓ_n on this rank's samples, and their share of the divisor."""
    problem = metric.problem
    total = torch.zeros(problem.num_parameters, dtype=torch.float64, device=problem.device)
    terms = 0.0
    for chunk in metric.chunks(1):
        with model_errors():
            part = chunk.function.flatten(chunk.function.vjp(chunk.residual))
        total += part.to(torch.float64)
        terms += _count(chunk.distribution, reduction)
    return total, torch.tensor(terms, dtype=torch.float64)


def _split(problem: Problem, vector: Tensor, terms: float) -> Gradients:
    """A gradient of length P divided and split by parameter; an optimizer may overwrite it."""
    parts = problem.function.views(vector)
    return {name: part.to(torch.float64, copy=True).div_(terms) for name, part in parts.items()}


def _used(gradients: Gradients, function: ModelFunction) -> Gradients:
    """The gradients of those parameters that the outputs depend on.

    In training the others have ``.grad = None`` and the optimizer skips them, whereas it may still
    decay a parameter with a gradient of zero. Which is which is tested on the first sample, and
    only if some gradient is zero.
    """
    zero = [name for name, gradient in gradients.items() if not bool(gradient.any())]
    if not zero:
        return gradients
    absent = set(unused_parameters(function, zero))
    return {name: gradient for name, gradient in gradients.items() if name not in absent}
