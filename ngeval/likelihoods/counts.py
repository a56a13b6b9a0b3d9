"""The Poisson loss of counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import DiagonalDistribution
from ngeval.likelihoods.scaled import OutputWise, described


@dataclass(frozen=True, repr=False)
class Poisson(OutputWise):
    """Counts y with rate ρ: p(y|z) = ρ^y e^(−ρ)/y!, with ρ = e^z or ρ = z.

    ℓ = Σ ρ − y log ρ + log y!. With ρ = e^z: u = ρ − y, H = diag(ρ). With ρ = z: u = 1 − y/ρ,
    H = diag(1/ρ). In both, uᵀH⁺u = Σ (ρ − y)²/ρ. Targets y ≥ 0 have the shape of the outputs.

    Attributes:
        log_rate: z is log ρ; otherwise it is ρ.
        full: with log y!.
        offset: added to ρ = z, as ``eps`` of ``nn.PoissonNLLLoss(log_input=False)``.
        mean: divide ℓ_n, u and H by the number of outputs, as ``nn.PoissonNLLLoss()`` does.
        ignore: targets with this value, which may be NaN, are missing.
        weights: of the outputs, in a shape that broadcasts to theirs.
    """

    log_rate: bool = True
    full: bool = True
    offset: float = 0.0

    @property
    def name(self) -> str:
        return described("poisson", rate=not self.log_rate, **self.options)

    def weigh(self, targets: Tensor, missing: Tensor) -> tuple[Tensor, Tensor | None]:
        if bool((targets < 0).any()):
            raise InputError(f"target {float(targets.min())} is negative; counts are ≥ 0")
        return targets, None

    def distribution(self, logits: Tensor, labels: Tensor) -> PoissonDistribution:
        if not self.log_rate and not bool((logits + self.offset > 0).all()):
            raise InputError("rates must be positive, but the model's outputs are not all > 0")
        return PoissonDistribution(
            logits, labels, log_rate=self.log_rate, full=self.full, offset=self.offset
        )


class PoissonDistribution(DiagonalDistribution):
    """Independent counts at given logits; see `Poisson` for the formulas."""

    def __init__(
        self, logits: Tensor, targets: Tensor, *, log_rate: bool, full: bool, offset: float
    ) -> None:
        super().__init__(logits, targets)
        self.full, self.offset = full, offset
        self.log_rate = self.logits if log_rate else (self.logits + offset).log()
        self.rate = self.log_rate.exp() if log_rate else self.logits + offset
        half = (0.5 * self.log_rate).exp()
        self.root = half if log_rate else 1 / half
        self.slope = torch.ones_like(half) if log_rate else 1 / self.rate

    def loss(self, targets: Tensor | None = None) -> Tensor:
        return self.loss_terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        terms = self.rate - self.offset - labels * self.log_rate
        return terms + torch.lgamma(labels + 1) if self.full else terms

    def residual(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        return self.slope * (self.rate - labels)

    def whitened_residual(self) -> Tensor:
        """R = √ρ − y/√ρ."""
        half = 0.5 * self.log_rate
        # torch.where, because 0 · ∞ would be NaN.
        return half.exp() - torch.where(self.targets > 0, self.targets * (-half).exp(), 0.0)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        rates = self.rate.cpu().expand(draws, *self.rate.shape)
        return torch.poisson(rates, generator).to(self.rate.device)
