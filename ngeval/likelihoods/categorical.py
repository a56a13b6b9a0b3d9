"""Softmax cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError, ModelError
from ngeval.likelihoods.base import Likelihood, OutputDistribution, check_targets
from ngeval.likelihoods.scaled import ScaledDistribution, Weights, brief_repr, described

LARGEST = 700.0
"""A logarithm whose exponential does not overflow."""

SCALES = (600.0, 1200.0)
"""Logarithms of factors for probabilities that underflow."""

UNIT_SUM = 1e-3
"""Outputs whose probabilities sum to 1 to within this are taken for normalised."""


@dataclass(frozen=True, repr=False)
class Categorical(Likelihood):
    """Softmax cross-entropy: p(y|z) = softmax(z)_y.

    ℓ = −log p_y, u = p − e_y, H = diag(p) − ppᵀ, uᵀH⁺u = 1/p_y − 1. S has K − 1 columns that are
    not 0, as H has rank K − 1: with classes in the order of falling p and q_k = Σ_{i≥k} p_i,

        (Sᵀt)_k = √(p_k q_{k+1}/q_k) (t_k − Σ_{i>k} p_i t_i / q_{k+1}),

    the choice of class k against the mean of all later ones. The symmetric factor
    diag(√p)(I − √p√pᵀ) has K columns, whose rounding looks like a further direction.
    Targets are integer class labels of shape ``(N, *positions)``, or probabilities of the classes
    in the logits' shape (soft targets q).

    In general the loss is −Σ_k w_k q_k log p_k, with the weights w of classes and q the soft
    target or the smoothed label, (1−ε) e_y + ε/K. With c = Σ_k w_k q_k and q′_k = w_k q_k/c it has
    u = c (p − q′). It is not a likelihood where c ≠ 1 or q′ is not a label; its Hessian
    H = c (diag(p) − ppᵀ) is used for the Fisher, which it is if c counts how often a sample occurs.

    Attributes:
        ignore_index: positions with this target are padding: they have no loss, no residual and
            no Fisher.
        class_weights: w, one number ≥ 0 for each class.
        label_smoothing: ε in [0, 1].
        class_dim: the dimension of the model's outputs that holds the classes: the last, or 1,
            as in ``nn.CrossEntropyLoss``; z always has it last.
        log_probabilities: the model returns log p, as ``nn.NLLLoss`` takes it. They are logits:
            their softmax is p.
    """

    ignore_index: int = -100
    class_weights: Any = None
    label_smoothing: float = 0.0
    class_dim: int = -1
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        weights = Weights.of("class weights", self.class_weights)
        object.__setattr__(self, "class_weights", weights)
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(f"label smoothing must be from 0 to 1, not {self.label_smoothing}")
        if self.class_dim not in (1, -1):
            raise InputError(f"class_dim is 1 or −1 (the last), not {self.class_dim}")

    def __repr__(self) -> str:
        return brief_repr(self, "ignore_index")

    @property
    def name(self) -> str:
        smoothing, weights = self.label_smoothing or None, self.class_weights
        return described("categorical", label_smoothing=smoothing, class_weights=weights)

    def arrangement(self, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor] | None:
        shape = tuple(getattr(targets, "shape", ()))[1:]
        # Training loops flatten outputs (N, positions, C), which torch takes in no other way.
        only_last = shape == outputs.shape[1:-1] and shape != outputs.shape[2:]
        move = self.class_dim == 1 and outputs.ndim > 2 and not only_last
        if move:
            outputs = outputs.movedim(1, -1)
        self._check_normalised(outputs)
        return _classes_last if move else None

    def _check_normalised(self, outputs: Tensor) -> None:
        """Raise if outputs are probabilities, or should be their logarithms and are not."""
        if outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.is_floating_point():
            return
        if self.log_probabilities:
            if not bool((outputs.logsumexp(-1).abs() < UNIT_SUM).all()):
                raise ModelError(
                    "NLLLoss takes log-probabilities, but the exponentials of the model's outputs "
                    "do not sum to 1; for logits use nn.CrossEntropyLoss(), and for probabilities "
                    "output=torch.log"
                )
        elif bool((outputs >= 0).all() & ((outputs.sum(-1) - 1).abs() < UNIT_SUM).all()):
            raise ModelError(
                "the model's outputs are probabilities (they are ≥ 0 and sum to 1), as of a "
                "softmax, but a cross-entropy takes logits: give output=torch.log (logarithms of "
                "probabilities are logits), or output= for the tensor before the softmax"
            )

    def bind(self, logits: Tensor, targets: Tensor) -> OutputDistribution:
        check_targets(logits, targets)
        is_soft = targets.is_floating_point() and targets.ndim == logits.ndim
        soft = targets.movedim(1, -1) if is_soft and self.class_dim == 1 else targets
        if is_soft and soft.shape == logits.shape:
            return self._bind_soft(logits, soft, targets)
        self._check_labels(logits, targets)
        hard = CategoricalDistribution(logits, targets.detach().long().clone(), self.ignore_index)
        if self.label_smoothing:
            labels = torch.where(hard.mask, hard.targets.unsqueeze(-1), 0)
            one_hot = torch.zeros_like(hard.logits).scatter_(-1, labels, 1.0) * hard.mask
            return self._weighted(hard.logits, one_hot, hard.targets, hard.mask)
        if self.class_weights is None:
            return hard
        weights = self._class_weights(logits)[torch.where(hard.mask.squeeze(-1), hard.targets, 0)]
        return ScaledDistribution(hard, weights.unsqueeze(-1) * hard.mask, hard.targets)

    def _bind_soft(self, logits: Tensor, soft: Tensor, targets: Tensor) -> OutputDistribution:
        values = soft.detach().to(torch.float64)
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise InputError("soft targets must be finite probabilities ≥ 0")
        mask = torch.ones_like(values[..., :1], dtype=torch.bool)
        return self._weighted(logits, values, targets.detach().clone(), mask)

    def _weighted(
        self, logits: Tensor, soft: Tensor, targets: Tensor, mask: Tensor
    ) -> ScaledDistribution:
        """The distribution of soft targets, weighted; ``targets`` are those that were given."""
        smoothing = self.label_smoothing
        masses = (1 - smoothing) * soft + smoothing / soft.shape[-1]
        if self.class_weights is not None:
            masses = masses * self._class_weights(logits)
        masses = masses * mask
        scale = masses.sum(-1, keepdim=True)
        labels = torch.where(scale > 0, masses / scale, 0.0)
        return ScaledDistribution(SoftDistribution(logits, labels, mask), scale, targets)

    def _class_weights(self, logits: Tensor) -> Tensor:
        weights: Tensor = self.class_weights.tensor(logits)
        if weights.shape != logits.shape[-1:]:
            raise InputError(
                f"there are {len(self.class_weights)} class weights for {logits.shape[-1]} classes"
            )
        return weights

    def _check_labels(self, logits: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(
                f"targets have dtype {targets.dtype}; the categorical likelihood takes integer "
                "class labels (convert them with targets.long()), or probabilities of the classes "
                "in the shape of the outputs"
            )
        if targets.shape != logits.shape[:-1]:
            hint = _shape_hint(logits, targets)
            raise InputError(
                f"targets have shape {tuple(targets.shape)}, but the model's outputs of shape "
                f"{tuple(logits.shape)} need {tuple(logits.shape[:-1])} "
                f"(one class label for each position; the last dimension counts the classes){hint}"
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


def _shape_hint(logits: Tensor, targets: Tensor) -> str:
    """What to do about targets whose shape is that of a common mistake."""
    if targets.shape == logits.shape:
        return "; for one-hot targets or probabilities give targets.float()"
    if targets.shape == (*logits.shape[:-1], 1):
        return "; give targets.squeeze(-1)"
    if logits.ndim > 2 and targets.shape[1:] == logits.shape[2:]:
        return (
            "; outputs with the classes in dimension 1 are those of nn.CrossEntropyLoss(): give "
            "that as the loss, or output=lambda z: z.movedim(1, -1)"
        )
    return ""


def _classes_last(outputs: Tensor) -> Tensor:
    return outputs.movedim(1, -1)


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
        return self.loss_terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        labels = self._labels(targets)
        gaps = self.logits - self.logits.gather(-1, labels)
        others = gaps.scatter(-1, labels, -math.inf).logsumexp(-1, keepdim=True)
        # Not softplus, which torch replaces by the identity above a threshold.
        return torch.logaddexp(others, torch.zeros_like(others)) * self.mask

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
        result = vector * sticks.root - sticks.earlier(vector)
        return torch.empty_like(result).scatter_(-1, order, result)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        order, sticks = self._order.expand(tangent.shape), self._sticks
        ordered = tangent.gather(-1, order)
        relative = ordered - ordered[..., :1]
        return sticks.root * relative - sticks.later(relative)

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
        return labels.T.reshape(draws, *self.logits.shape[:-1]).to(self.logits.device)


class SoftDistribution(CategoricalDistribution):
    """Softmax probabilities, with targets that are probabilities of the classes.

    They are mixtures of labels, and so are the loss, u and r: ℓ = Σ_y q_y ℓ(y) and so on.
    """

    def __init__(self, logits: Tensor, targets: Tensor, mask: Tensor) -> None:
        super().__init__(logits, torch.zeros_like(targets[..., 0], dtype=torch.long), -100)
        self.targets = targets
        self.mask = mask
        self.probabilities = self.probabilities * mask

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        """ℓ = −Σ q_k log p_k, with log p of the most likely class from the others."""
        if targets is not None and not targets.is_floating_point():
            return super().loss_terms(targets)
        soft = self.targets if targets is None else targets
        gaps = self.logits - self.logits.gather(-1, self.top)
        others = gaps.scatter(-1, self.top, -math.inf).logsumexp(-1, keepdim=True)
        log_top = torch.logaddexp(others, torch.zeros_like(others))
        losses = (-self.log_probabilities).scatter(-1, self.top, log_top)
        return torch.where(soft > 0, soft * losses, 0.0).sum(-1, keepdim=True) * self.mask

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """U_k = p_k Σ_{c≠k} q_c − q_k Σ_{c≠k} p_c, which is p_k − q_k."""
        if targets is not None and not targets.is_floating_point():
            return super().residual(targets)
        soft = self.targets if targets is None else targets
        rest = self.probabilities.scatter(-1, self.top, 0.0).sum(-1, keepdim=True)
        others = (1 - self.probabilities).scatter(-1, self.top, rest)
        return (self.probabilities * (1 - soft) - soft * others) * self.mask

    def whitened_residual(self) -> Tensor:
        ordered, sticks = self.targets.gather(-1, self._order), self._sticks
        at_label = torch.where(ordered > 0, -sticks.at_label * ordered, 0.0)
        later = _later(ordered)
        before = torch.where(later > 0, sticks.over_later * later, 0.0)
        return torch.where(self.mask, at_label + before, 0.0)

    def floor_terms(self) -> Tensor:
        return OutputDistribution.floor_terms(self)


def class_labels(distribution: OutputDistribution) -> Tensor | None:
    """The targets that are labels of classes; None where there are none."""
    while isinstance(distribution, ScaledDistribution):
        plain = distribution.plain
        if isinstance(plain, CategoricalDistribution):
            labels = distribution.targets
            return None if labels.is_floating_point() else labels
        distribution = plain
    is_hard = isinstance(distribution, CategoricalDistribution)
    return distribution.targets if is_hard else None


class _Sticks:
    """The numbers of the factor S, for classes in the order of falling p, from logarithms.

    S has entries of e^−700, which p of e^−1400 make: p and 1/q are therefore multiplied at a scale
    where neither underflows.

    Attributes:
        root: √(p_k q_{k+1}/q_k), 0 for the last class.
        over_later: √(p_k/(q_k q_{k+1})), 0 for the last class and where it overflows.
        at_label: √(q_{k+1}/(p_k q_k)).
    """

    def __init__(self, log_probabilities: Tensor, mask: Tensor) -> None:
        self.log_p = log_p = log_probabilities.masked_fill(~mask, -math.inf)
        log_q = log_probabilities.flip(-1).logcumsumexp(-1).flip(-1)
        end = torch.full_like(log_q[..., :1], -math.inf)
        self.log_later = log_later = torch.cat([log_q[..., 1:], end], -1)
        self.root = (0.5 * (log_p + log_later - log_q)).exp()
        self.log_over = torch.where(
            log_later > -math.inf, 0.5 * (log_p - log_later - log_q), -math.inf
        )
        over = self.log_over.exp()
        self.over_later = torch.where(torch.isfinite(over), over, 0.0)
        self.at_label = (0.5 * (log_later - log_probabilities - log_q)).exp()

    def later(self, terms: Tensor) -> Tensor:
        """√(p_k/(q_k q_{k+1})) Σ_{i>k} p_i t_i."""
        return self._by_scale(
            self.log_later,
            lambda scale: self._over(scale) * _later((self.log_p + scale).exp() * terms),
        )

    def earlier(self, terms: Tensor) -> Tensor:
        """P_k Σ_{i<k} √(p_i/(q_i q_{i+1})) t_i."""

        def at(scale: float) -> Tensor:
            sums = (terms * self._over(scale)).cumsum(-1)
            before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
            return (self.log_p + scale).exp() * before

        return self._by_scale(self.log_p, at)

    def _over(self, scale: float) -> Tensor:
        # Beyond the last scale, what it is multiplied with is 0.
        return (self.log_over - scale).clamp_max(LARGEST).exp()

    def _by_scale(self, logarithms: Tensor, compute: Callable[[float], Tensor]) -> Tensor:
        """Each entry as it is computed at the scale that its logarithm asks for."""
        result = compute(0.0)
        for scale in SCALES:
            small = (logarithms < -scale) & (logarithms > -math.inf)
            if bool(small.any()):
                result = torch.where(small, compute(scale), result)
        return result


def _later(terms: Tensor) -> Tensor:
    """Σ_{i>k} of terms, from the last class, whose terms are the smallest, to the first."""
    sums = terms.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums[..., 1:], torch.zeros_like(sums[..., :1])], -1)
