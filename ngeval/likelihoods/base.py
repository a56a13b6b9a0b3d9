"""What a likelihood is, and the checks of targets that all share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ngeval.errors import InputError


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


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise unless the targets are a tensor with as many samples as the logits.

    Raises:
        InputError: they are not.
    """
    if not isinstance(targets, Tensor):
        raise InputError(f"targets must be a torch.Tensor, not {type(targets).__name__}")
    if targets.ndim == 0 or targets.shape[0] != logits.shape[0]:
        found = targets.shape[0] if targets.ndim else "no"
        raise InputError(
            f"targets hold {found} samples, but the model gave outputs for {logits.shape[0]}; "
            "both are batch first"
        )


def check_real_targets(logits: Tensor, targets: Tensor, likelihood: str) -> None:
    """Raise unless the targets are finite real numbers in the logits' shape.

    Raises:
        InputError: they are not.
    """
    check_targets(logits, targets)
    if targets.shape != logits.shape:
        raise InputError(
            f"targets have shape {tuple(targets.shape)}, but the {likelihood} likelihood needs "
            f"the shape of the model's outputs, {tuple(logits.shape)}"
        )
    if targets.is_complex() or not bool(torch.isfinite(targets.to(torch.float64)).all()):
        raise InputError("targets hold NaN, infinite or complex values; remove those samples")
