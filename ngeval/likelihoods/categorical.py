"""Softmax cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood, OutputDistribution, check_targets


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross-entropy: p(y|z) = softmax(z)_y.

    ℓ = −log p_y, u = p − e_y, H = diag(p) − ppᵀ, uᵀH⁺u = 1/p_y − 1. S has K − 1 columns that are
    not 0, as H has rank K − 1: with classes in the order of falling p and q_k = Σ_{i≥k} p_i,

        (Sᵀt)_k = √(p_k q_{k+1}/q_k) (t_k − Σ_{i>k} p_i t_i / q_{k+1}),

    the choice of class k against the mean of all later ones. The symmetric factor
    diag(√p)(I − √p√pᵀ) has K columns, whose rounding looks like a further direction.
    Targets are integer class labels of shape ``(N, *positions)``.

    Attributes:
        ignore_index: positions with this target are padding: they have no loss, no residual and
            no Fisher.
    """

    ignore_index: int = -100

    @property
    def name(self) -> str:
        return "categorical"

    def bind(self, logits: Tensor, targets: Tensor) -> CategoricalDistribution:
        check_targets(logits, targets)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(
                f"targets have dtype {targets.dtype}; the categorical likelihood takes integer "
                "class labels (convert them with targets.long())"
            )
        if targets.shape != logits.shape[:-1]:
            raise InputError(
                f"targets have shape {tuple(targets.shape)}, but the model's outputs of shape "
                f"{tuple(logits.shape)} need {tuple(logits.shape[:-1])} "
                "(one class label for each position; the last dimension counts the classes)"
            )
        if logits.shape[-1] < 2:
            raise InputError(
                "the model has one output per sample, so a softmax over classes is constant; "
                "use likelihood='bernoulli' for a single logit"
            )
        num_classes = logits.shape[-1]
        outside = ((targets < 0) | (targets >= num_classes)) & (targets != self.ignore_index)
        if bool(outside.any()):
            index = tuple(int(i) for i in outside.nonzero()[0])
            value = int(targets[index])
            raise InputError(
                f"target {value} at index {index} is outside the classes 0..{num_classes - 1} "
                f"({int(outside.sum())} such targets; {self.ignore_index} marks padding)"
            )
        return CategoricalDistribution(logits, targets.detach().long().clone(), self.ignore_index)


class CategoricalDistribution(OutputDistribution):
    """Softmax probabilities at given logits; see `Categorical` for the formulas."""

    mask: Tensor

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        super().__init__(logits, targets)
        self.mask = (targets != ignore_index).unsqueeze(-1)
        self.log_probabilities = torch.log_softmax(self.logits, dim=-1)
        self.probabilities = self.log_probabilities.exp() * self.mask
        # Differences to the most likely class keep the digits where its p is nearly 1.
        self.top = self.logits.argmax(-1, keepdim=True)
        self._order = self.logits.argsort(dim=-1, descending=True, stable=True)

    def _labels(self, targets: Tensor | None) -> Tensor:
        """The labels with a class dimension; padding, which is masked later, has class 0."""
        labels = self.targets if targets is None else targets
        return torch.where(self.mask.squeeze(-1), labels, 0).unsqueeze(-1)

    def loss(self, targets: Tensor | None = None) -> Tensor:
        """ℓ = softplus(logsumexp_{c≠y}(z_c − z_y)), which is exact also where p_y is nearly 1."""
        labels = self._labels(targets)
        gaps = self.logits - self.logits.gather(-1, labels)
        others = gaps.scatter(-1, labels, -math.inf).logsumexp(-1, keepdim=True)
        # Not softplus, which torch replaces by the identity above a threshold.
        losses = torch.logaddexp(others, torch.zeros_like(others)) * self.mask
        return losses.flatten(1).sum(1)

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """U = p − e_y with its y entry as −Σ_{c≠y} p_c, which loses no digits as p_y → 1."""
        labels = self._labels(targets)
        shape = torch.broadcast_shapes((*labels.shape[:-1], 1), self.probabilities.shape)
        others = self.probabilities.expand(shape).scatter(-1, labels, 0.0)
        return others.scatter(-1, labels, -others.sum(-1, keepdim=True))

    def _centred(self, tangent: Tensor) -> Tensor:
        """The tangent minus its mean pᵀt, by differences to the most likely class."""
        index = self.top.expand(*tangent.shape[:-1], 1)
        relative = tangent - tangent.gather(-1, index)
        return relative - (self.probabilities * relative).sum(-1, keepdim=True)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return self.probabilities * self._centred(tangent)

    @cached_property
    def _sticks(self) -> _Sticks:
        return _Sticks(self.log_probabilities.gather(-1, self._order), self.mask)

    def factor_product(self, vector: Tensor) -> Tensor:
        order, sticks = self._order.expand(vector.shape), self._sticks
        earlier = (vector * sticks.over_later).cumsum(-1)
        before = torch.cat([torch.zeros_like(earlier[..., :1]), earlier[..., :-1]], -1)
        result = vector * sticks.root - sticks.probabilities * before
        return torch.empty_like(result).scatter_(-1, order, result)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        order, sticks = self._order.expand(tangent.shape), self._sticks
        ordered = tangent.gather(-1, order)
        relative = ordered - ordered[..., :1]
        return sticks.root * relative - sticks.over_later * _later(sticks.probabilities * relative)

    def whitened_residual(self) -> Tensor:
        """R_k = −√(q_{k+1}/(p_k q_k)) at the label, √(p_k/(q_k q_{k+1})) before it, 0 after it."""
        place = (self._order == self._labels(None)).long().argmax(-1, keepdim=True)
        index = torch.arange(self.logits.shape[-1], device=self.logits.device)
        sticks = self._sticks
        before = torch.where(index < place, sticks.over_later, 0.0)
        at_label = torch.where(index == place, -sticks.at_label, before)
        return torch.where(self.mask, at_label, 0.0)

    def floor_terms(self) -> Tensor:
        """1/p_y − 1 at each position."""
        on_label = self.residual().gather(-1, self._labels(None))
        inverse = (-self.log_probabilities.gather(-1, self._labels(None))).exp()
        return torch.where(self.mask, -on_label * inverse, 0.0).flatten(1).sum(1)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        flat = torch.where(self.mask, self.log_probabilities.exp(), 1.0).flatten(0, -2)
        labels = torch.multinomial(flat.cpu(), draws, replacement=True, generator=generator)
        return labels.T.reshape(draws, *self.targets.shape).to(self.logits.device)


class _Sticks:
    """The numbers of the factor S, for classes in the order of falling p, from logarithms.

    Attributes:
        probabilities: p_k.
        root: √(p_k q_{k+1}/q_k), 0 for the last class.
        over_later: √(p_k/(q_k q_{k+1})), 0 for the last class and where q_{k+1} underflows.
        at_label: √(q_{k+1}/(p_k q_k)).
    """

    def __init__(self, log_probabilities: Tensor, mask: Tensor) -> None:
        log_p = log_probabilities
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
        end = torch.full_like(log_q[..., :1], -math.inf)
        log_later = torch.cat([log_q[..., 1:], end], -1)
        self.probabilities = log_p.exp() * mask
        self.root = (0.5 * (log_p + log_later - log_q)).exp() * mask
        over = (0.5 * (log_p - log_later - log_q)).exp()
        self.over_later = torch.where(log_later.exp() > 0, over, 0.0) * mask
        self.at_label = (0.5 * (log_later - log_p - log_q)).exp()


def _later(terms: Tensor) -> Tensor:
    """Σ_{i>k} of terms, from the last class, whose terms are the smallest, to the first."""
    sums = terms.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums[..., 1:], torch.zeros_like(sums[..., :1])], -1)
