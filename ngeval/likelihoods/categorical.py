"""Softmax cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood, OutputDistribution, check_targets


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross-entropy: p(y|z) = softmax(z)_y.

    ℓ = −log p_y, u = p − e_y, H = diag(p) − ppᵀ, S = diag(√p)(I − √p√pᵀ), uᵀH⁺u = 1/p_y − 1.
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
        self.root = (0.5 * self.log_probabilities).exp() * self.mask
        # Differences to the most likely class keep the digits where its p is nearly 1.
        self.top = self.logits.argmax(-1, keepdim=True)

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

    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s = √p ⊙ (s − √p (√pᵀs)); the most likely entry as s(1 − p) − √p Σ_others √p s."""
        index = self.top.expand(*vector.shape[:-1], 1)
        others = self.root.scatter(-1, self.top, 0.0)
        inner = (others * vector).sum(-1, keepdim=True)
        top_root, top = self.root.gather(-1, self.top), vector.gather(-1, index)
        result = vector - self.root * (top_root * top + inner)
        top = top * others.square().sum(-1, keepdim=True) - top_root * inner
        return self.root * result.scatter(-1, index, top)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        return self.root * self._centred(tangent)

    def whitened_residual(self) -> Tensor:
        """R = u/√p: √p_c for other classes, −(1 − p_y)/√p_y for the label."""
        labels = self._labels(None)
        on_label = self.residual().gather(-1, labels)
        inverse_root = (-0.5 * self.log_probabilities.gather(-1, labels)).exp()
        return self.root.scatter(-1, labels, on_label * inverse_root) * self.mask

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        flat = torch.where(self.mask, self.log_probabilities.exp(), 1.0).flatten(0, -2)
        labels = torch.multinomial(flat.cpu(), draws, replacement=True, generator=generator)
        return labels.T.reshape(draws, *self.targets.shape).to(self.logits.device)
