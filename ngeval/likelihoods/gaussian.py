"""Squared error, with an explicit variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import OutputDistribution
from ngeval.likelihoods.scaled import OutputWise, described


@dataclass(frozen=True, repr=False)
class Gaussian(OutputWise):
    """Squared error: p(y|z) = N(y; z, σ²I).

    ℓ = ‖z−y‖²/(2σ²) + (C/2) log 2πσ², u = (z − y)/σ², H = I/σ², S = I/σ, uᵀH⁺u = ‖z−y‖²/σ².
    The loss ½‖z−y‖² is σ² = 1; the loss ‖z−y‖² is σ² = ½. Targets have the shape of the outputs.

    Attributes:
        variance: σ² > 0, in squared units of the target.
        full: with the constant (C/2) log 2πσ², as a likelihood has it; a squared error has none.
        mean: divide ℓ_n, u and H by C, as ``nn.MSELoss()`` does.
        ignore: targets with this value, which may be NaN, are missing.
        weights: of the outputs, in a shape that broadcasts to theirs.
    """

    variance: float = 1.0
    full: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise InputError(
                f"likelihood gaussian: the variance must be positive, not {self.variance}"
            )

    @property
    def name(self) -> str:
        if self == SQUARED_ERROR:
            return "mse"
        return described(f"gaussian:{self.variance:g}", **self.options)

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> Gaussian:
        try:
            variance = float(parameter or 1.0)
        except ValueError as error:
            raise InputError(f"likelihood {name!r}: write the variance as gaussian:0.5") from error
        return cls(variance)

    def distribution(self, logits: Tensor, labels: Tensor) -> GaussianDistribution:
        return GaussianDistribution(logits, labels, self.variance, full=self.full)


SQUARED_ERROR = Gaussian(0.5, full=False, mean=True)
"""The mean of (z − y)² over a sample's outputs, which ``nn.MSELoss()`` averages over samples."""


class GaussianDistribution(OutputDistribution):
    """An isotropic Gaussian around the outputs; see `Gaussian` for the formulas."""

    def __init__(
        self, logits: Tensor, targets: Tensor, variance: float, *, full: bool = True
    ) -> None:
        super().__init__(logits, targets)
        self.variance = variance
        self.constant = 0.5 * math.log(2 * math.pi * variance) if full else 0.0

    def loss(self, targets: Tensor | None = None) -> Tensor:
        return self.loss_terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        return (self.logits - labels).square() / (2 * self.variance) + self.constant

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
