"""Squared error, with an explicit variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood, OutputDistribution, check_real_targets


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Squared error: p(y|z) = N(y; z, σ²I).

    ℓ = ‖z−y‖²/(2σ²) + (C/2) log 2πσ², u = (z − y)/σ², H = I/σ², S = I/σ, uᵀH⁺u = ‖z−y‖²/σ².
    The loss ½‖z−y‖² is σ² = 1; the loss ‖z−y‖² is σ² = ½. Targets have the shape of the outputs.

    Attributes:
        variance: σ² > 0, in squared units of the target.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise InputError(
                f"likelihood gaussian: the variance must be positive, not {self.variance}"
            )

    @property
    def name(self) -> str:
        return f"gaussian:{self.variance:g}"

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> Gaussian:
        try:
            variance = float(parameter or 1.0)
        except ValueError as error:
            raise InputError(f"likelihood {name!r}: write the variance as gaussian:0.5") from error
        return cls(variance)

    def bind(self, logits: Tensor, targets: Tensor) -> GaussianDistribution:
        check_real_targets(logits, targets, "gaussian")
        return GaussianDistribution(
            logits, targets.detach().to(torch.float64).clone(), self.variance
        )


class GaussianDistribution(OutputDistribution):
    """An isotropic Gaussian around the outputs; see `Gaussian` for the formulas."""

    def __init__(self, logits: Tensor, targets: Tensor, variance: float) -> None:
        super().__init__(logits, targets)
        self.variance = variance

    def loss(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        terms = (self.logits - labels).square() / (2 * self.variance)
        return (terms + 0.5 * math.log(2 * math.pi * self.variance)).flatten(1).sum(1)

    def residual(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        return (self.logits - labels) / self.variance

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return tangent / self.variance

    def factor_product(self, vector: Tensor) -> Tensor:
        return vector / math.sqrt(self.variance)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        return tangent / math.sqrt(self.variance)

    def whitened_residual(self) -> Tensor:
        return (self.logits - self.targets) / math.sqrt(self.variance)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((draws, *self.logits.shape), generator=generator, dtype=torch.float64)
        return self.logits + math.sqrt(self.variance) * noise.to(self.logits.device)
