"""Likelihoods: everything that the methods need to know of a loss, in logit space.

A likelihood turns outputs (logits) z into a distribution p(y|z). Per sample n it provides

- the loss ℓ = −log p(y|z), summed over the sample's positions,
- the logit residual u = ∇_z ℓ,
- the Fisher of the output distribution H = E_{y~p}[u uᵀ], as products only,
- a factor S with S Sᵀ = H, and r = S⁺u, so that uᵀH⁺u = ‖r‖²,
- draws of labels from the model's own distribution.

Shapes: logits are ``(N, *positions, C)``; tangents and cotangents have that shape behind any
number of leading dimensions. Everything is computed in float64 whatever the model's dtype,
and H is never formed. Formulas: DESIGN table "Likelihoods"; H of the softmax goes back to
Martens, "New insights and perspectives on the natural gradient method" (arXiv 1412.1193), §9.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import InputError, nearest_name


class OutputDistribution(ABC):
    """p(y|z) at fixed logits z, with the observed targets.

    Attributes:
        logits: z in float64, shape ``(N, *positions, C)``.
        targets: the observed labels; their shape depends on the likelihood.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        """Bind logits (converted to float64) and checked targets."""
        self.logits = logits.detach().to(torch.float64)
        self.targets = targets

    @abstractmethod
    def loss(self, targets: Tensor | None = None) -> Tensor:
        """ℓ_n = −log p(y_n|z_n), natural log, summed over positions: shape ``(N,)``."""

    @abstractmethod
    def residual(self, targets: Tensor | None = None) -> Tensor:
        """The residual u = ∇_z ℓ for the given targets (default: the observed), like the logits.

        Targets may carry leading dimensions (draws), which the result then has too.
        """

    @abstractmethod
    def fisher_product(self, tangent: Tensor) -> Tensor:
        """H·t for tangents of shape ``(..., *logits.shape)``."""

    @abstractmethod
    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s, where S Sᵀ = H."""

    @abstractmethod
    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        """Sᵀ·t, so that tᵀHt = ‖Sᵀt‖²."""

    @abstractmethod
    def whitened_residual(self) -> Tensor:
        """The whitened residual r = S⁺u of the observed targets: u = S r and uᵀH⁺u = ‖r‖²."""

    @abstractmethod
    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Draw labels y ~ p(·|z): targets with one leading dimension of length ``draws``."""

    def floor_terms(self) -> Tensor:
        """u_nᵀH_n⁺u_n per sample, shape ``(N,)``; γ_min ≥ (Σ_n of these)^(−1/2)."""
        return self.whitened_residual().square().flatten(1).sum(1)


class Likelihood(ABC):
    """A family of output distributions; ``bind`` fixes it at given logits and targets."""

    name: str

    @abstractmethod
    def bind(self, logits: Tensor, targets: Tensor) -> OutputDistribution:
        """Check the targets against the logits and return the distribution.

        Raises:
            InputError: the targets' shape, dtype or values do not fit.
        """


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross-entropy: p(y|z) = softmax(z)_y.

    u = p − e_y, H = diag(p) − ppᵀ, S = diag(√p)(I − √p√pᵀ), uᵀH⁺u = 1/p_y − 1.

    Attributes:
        ignore_index: positions with this target (padding) do not exist: no loss, no residual,
            no Fisher.
    """

    ignore_index: int = -100

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name that ``likelihood=`` takes."""
        return "categorical"

    def bind(self, logits: Tensor, targets: Tensor) -> CategoricalDistribution:
        """Check integer class labels of shape ``(N, *positions)`` and bind."""
        _check_targets_tensor(logits, targets)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(
                f"targets have dtype {targets.dtype}; the categorical likelihood takes integer "
                "class labels (convert them with targets.long())"
            )
        if targets.shape != logits.shape[:-1]:
            raise InputError(
                f"targets have shape {tuple(targets.shape)}, but the model's outputs of shape "
                f"{tuple(logits.shape)} ask for {tuple(logits.shape[:-1])} "
                "(one class label for each position; the last dimension counts the classes)"
            )
        if logits.shape[-1] < 2:
            raise InputError(
                "the model gives one output per sample, so a softmax over classes is constant; "
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
        return CategoricalDistribution(logits, targets.detach().long(), self.ignore_index)


class CategoricalDistribution(OutputDistribution):
    """Softmax probabilities at given logits; see `Categorical` for the formulas."""

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        """Compute the probabilities once; padded positions get probability zero throughout."""
        super().__init__(logits, targets)
        self.mask = (targets != ignore_index).unsqueeze(-1)
        self.log_probabilities = torch.log_softmax(self.logits, dim=-1)
        self.probabilities = self.log_probabilities.exp() * self.mask
        self.root = (0.5 * self.log_probabilities).exp() * self.mask

    def _labels(self, targets: Tensor | None) -> Tensor:
        """The labels with a class dimension, padding replaced by class 0 (masked later)."""
        labels = self.targets if targets is None else targets
        return torch.where(self.mask.squeeze(-1), labels, 0).unsqueeze(-1)

    def loss(self, targets: Tensor | None = None) -> Tensor:
        """−log p_y = softplus(logsumexp_{c≠y}(z_c − z_y)), exact also where p_y is nearly 1."""
        labels = self._labels(targets)
        gaps = self.logits - self.logits.gather(-1, labels)
        others = gaps.scatter(-1, labels, -math.inf).logsumexp(-1, keepdim=True)
        # softplus written out: torch's own switches to the identity with a threshold.
        losses = torch.logaddexp(others, torch.zeros_like(others)) * self.mask
        return losses.flatten(1).sum(1)

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """The residual p − e_y, its y entry as −Σ_{c≠y} p_c: no digit lost when p_y is near 1."""
        labels = self._labels(targets)
        shape = torch.broadcast_shapes((*labels.shape[:-1], 1), self.probabilities.shape)
        others = self.probabilities.expand(shape).scatter(-1, labels, 0.0)
        return others.scatter(-1, labels, -others.sum(-1, keepdim=True)) * self.mask

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """H·t = p⊙t − p (pᵀt)."""
        inner = (self.probabilities * tangent).sum(-1, keepdim=True)
        return self.probabilities * (tangent - inner)

    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s = √p ⊙ (s − √p (√pᵀs))."""
        inner = (self.root * vector).sum(-1, keepdim=True)
        return self.root * (vector - self.root * inner)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        """Sᵀ·t = √p ⊙ (t − pᵀt)."""
        inner = (self.probabilities * tangent).sum(-1, keepdim=True)
        return self.root * (tangent - inner)

    def whitened_residual(self) -> Tensor:
        """The whitened residual u/√p: √p_c off the label, −(1 − p_y)/√p_y on it."""
        labels = self._labels(None)
        on_label = self.residual().gather(-1, labels)
        inverse_root = (-0.5 * self.log_probabilities.gather(-1, labels)).exp()
        return self.root.scatter(-1, labels, on_label * inverse_root) * self.mask

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Labels of shape ``(draws, N, *positions)``; padded positions stay class 0, masked."""
        flat = torch.where(self.mask, self.log_probabilities.exp(), 1.0).flatten(0, -2)
        labels = torch.multinomial(flat.cpu(), draws, replacement=True, generator=generator)
        return labels.T.reshape(draws, *self.targets.shape).to(self.logits.device)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Squared error: p(y|z) = N(y; z, σ²I).

    ℓ = ‖z−y‖²/(2σ²) + (C/2) log 2πσ², u = (z − y)/σ², H = I/σ², S = I/σ, uᵀH⁺u = ‖z−y‖²/σ².
    The loss ½‖z−y‖² is σ² = 1; the loss ‖z−y‖² is σ² = ½.

    Attributes:
        variance: σ² > 0, in squared units of the target.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a variance that is not a positive number."""
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise InputError(f"the Gaussian variance must be positive, not {self.variance}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name that ``likelihood=`` takes, with σ² after the colon."""
        return f"gaussian:{self.variance:g}"

    def bind(self, logits: Tensor, targets: Tensor) -> GaussianDistribution:
        """Check floating-point targets of the outputs' shape and bind."""
        _check_real_targets(logits, targets, "gaussian")
        return GaussianDistribution(logits, targets.detach().to(torch.float64), self.variance)


class GaussianDistribution(OutputDistribution):
    """An isotropic Gaussian around the outputs; see `Gaussian` for the formulas."""

    def __init__(self, logits: Tensor, targets: Tensor, variance: float) -> None:
        """Bind means (the logits), targets and σ²."""
        super().__init__(logits, targets)
        self.variance = variance

    def loss(self, targets: Tensor | None = None) -> Tensor:
        """‖z−y‖²/(2σ²) + (C/2) log 2πσ²."""
        labels = self.targets if targets is None else targets
        terms = (self.logits - labels).square() / (2 * self.variance)
        return (terms + 0.5 * math.log(2 * math.pi * self.variance)).flatten(1).sum(1)

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """The residual (z − y)/σ²."""
        labels = self.targets if targets is None else targets
        return (self.logits - labels) / self.variance

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """H·t = t/σ²."""
        return tangent / self.variance

    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s = s/σ."""
        return vector / math.sqrt(self.variance)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        """Sᵀ·t = t/σ."""
        return tangent / math.sqrt(self.variance)

    def whitened_residual(self) -> Tensor:
        """The whitened residual (z − y)/σ."""
        return (self.logits - self.targets) / math.sqrt(self.variance)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Targets z + σε, ε ~ N(0, I), of shape ``(draws, *logits.shape)``."""
        noise = torch.randn((draws, *self.logits.shape), generator=generator, dtype=torch.float64)
        return self.logits + math.sqrt(self.variance) * noise.to(self.logits.device)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Binary cross-entropy on logits, one independent label per output (multi-label too).

    With q = σ(z): u = q − y, H = diag(q(1−q)), S = diag(√(q(1−q))),
    uᵀH⁺u = Σ (q−y)²/(q(1−q)). Soft targets in [0, 1] are allowed.
    """

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name that ``likelihood=`` takes."""
        return "bernoulli"

    def bind(self, logits: Tensor, targets: Tensor) -> BernoulliDistribution:
        """Check targets in [0, 1] of the outputs' shape and bind."""
        _check_real_targets(logits, targets, "bernoulli")
        outside = (targets < 0) | (targets > 1)
        if bool(outside.any()):
            index = tuple(int(i) for i in outside.nonzero()[0])
            raise InputError(
                f"target {float(targets[index])} at index {index} is outside [0, 1] "
                f"({int(outside.sum())} such targets)"
            )
        return BernoulliDistribution(logits, targets.detach().to(torch.float64))


class BernoulliDistribution(OutputDistribution):
    """Independent Bernoulli labels at given logits; see `Bernoulli` for the formulas."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        """Compute q = σ(z), 1 − q = σ(−z) and √(q(1−q)) once."""
        super().__init__(logits, targets)
        self.on = torch.sigmoid(self.logits)
        self.off = torch.sigmoid(-self.logits)
        self.root = (self.on * self.off).sqrt()

    def loss(self, targets: Tensor | None = None) -> Tensor:
        """Cross-entropy y·softplus(−z) + (1−y)·softplus(z), summed over outputs."""
        labels = self.targets if targets is None else targets
        zero = torch.zeros_like(self.logits)
        on = torch.logaddexp(-self.logits, zero)
        off = torch.logaddexp(self.logits, zero)
        return (labels * on + (1 - labels) * off).flatten(1).sum(1)

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """The residual (1−y)q − y(1−q), which is q − y without its cancellation."""
        labels = self.targets if targets is None else targets
        return (1 - labels) * self.on - labels * self.off

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """H·t = q(1−q) ⊙ t."""
        return self.on * self.off * tangent

    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s = √(q(1−q)) ⊙ s."""
        return self.root * vector

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        """Sᵀ·t = √(q(1−q)) ⊙ t."""
        return self.root * tangent

    def whitened_residual(self) -> Tensor:
        """The whitened residual (1−y) e^{z/2} − y e^{−z/2}, which is (q−y)/√(q(1−q))."""
        half = 0.5 * self.logits
        # torch.where, because 0 · ∞ would be NaN for a confident and right prediction.
        off = torch.where(self.targets < 1, (1 - self.targets) * half.exp(), 0.0)
        on = torch.where(self.targets > 0, self.targets * (-half).exp(), 0.0)
        return off - on

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Labels 0 or 1 of shape ``(draws, *logits.shape)``."""
        uniform = torch.rand((draws, *self.logits.shape), generator=generator, dtype=torch.float64)
        return (uniform.to(self.logits.device) < self.on).to(torch.float64)


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Resolve a likelihood given by name.

    Args:
        likelihood: ``"categorical"``, ``"gaussian"`` (σ² = 1), ``"gaussian:0.5"`` (σ² = ½),
            ``"bernoulli"``, or a `Likelihood`, which is returned as it is.

    Raises:
        InputError: no such name, or its parameter is not a number.

    >>> get_likelihood("gaussian:0.5").variance
    0.5
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    family, _, parameter = str(likelihood).partition(":")
    if family == "gaussian":
        try:
            variance = float(parameter or 1.0)
        except ValueError as error:
            raise InputError(
                f"likelihood {likelihood!r}: write the variance as gaussian:0.5"
            ) from error
        return Gaussian(variance)
    plain: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli}
    if family not in plain or parameter:
        raise InputError(
            f"unknown likelihood {likelihood!r}; {nearest_name(family, [*plain, 'gaussian'])}"
        )
    return plain[family]()


def _check_targets_tensor(logits: Tensor, targets: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise InputError(f"targets must be a torch.Tensor, not {type(targets).__name__}")
    if targets.ndim == 0 or targets.shape[0] != logits.shape[0]:
        found = targets.shape[0] if targets.ndim else "no"
        raise InputError(
            f"targets hold {found} samples, but the model gave outputs for {logits.shape[0]}; "
            "both are batch first"
        )


def _check_real_targets(logits: Tensor, targets: Tensor, likelihood: str) -> None:
    _check_targets_tensor(logits, targets)
    if targets.shape != logits.shape:
        raise InputError(
            f"targets have shape {tuple(targets.shape)}, but the {likelihood} likelihood needs "
            f"the shape of the model's outputs, {tuple(logits.shape)}"
        )
    if targets.is_complex() or not bool(torch.isfinite(targets.to(torch.float64)).all()):
        raise InputError("targets hold NaN, infinite or complex values; remove those samples")
