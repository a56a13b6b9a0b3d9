"""Binary cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import DiagonalDistribution, single_output
from ngeval.likelihoods.scaled import OutputWise, Weights, described


@dataclass(frozen=True, repr=False)
class Bernoulli(OutputWise):
    """Binary cross-entropy on logits, one independent label per output (multi-label too).

    With q = σ(z): ℓ = −Σ y log q + (1−y) log(1−q), u = q − y, H = diag(q(1−q)),
    S = diag(√(q(1−q))), uᵀH⁺u = Σ (q−y)²/(q(1−q)). Targets have the shape of the outputs;
    soft ones in [0, 1] are allowed.

    With ``pos_weight`` a, the loss −Σ a y log q + (1−y) log(1−q) is not a likelihood. It has the
    weights c = a y + 1 − y and the soft targets y′ = a y/c, so that u = c (q − y′), and the
    Hessian H = c diag(q(1−q)) is used for the Fisher.

    Attributes:
        pos_weight: a, which broadcasts to the outputs.
        probabilities: the model returns q itself; z = log q/(1−q) is computed from it.
        mean: divide ℓ_n, u and H by the number of outputs, as ``nn.BCEWithLogitsLoss()`` does.
        ignore: targets with this value, which may be NaN, are missing.
        weights: of the outputs, in a shape that broadcasts to theirs.
    """

    pos_weight: Any = None
    probabilities: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pos_weight", Weights.of("pos_weight", self.pos_weight))

    @property
    def name(self) -> str:
        return described("bernoulli", pos_weight=self.pos_weight, **self.options)

    def arrangement(self, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor] | None:
        plain = single_output(outputs)
        if not self.probabilities:
            return plain
        if bool(((outputs < 0) | (outputs > 1)).any()):
            raise InputError(
                "BCELoss takes probabilities, but the model's outputs are not all in [0, 1]; for "
                "logits use nn.BCEWithLogitsLoss()"
            )
        if bool(((outputs == 0) | (outputs == 1)).any()):
            raise InputError(
                "some of the model's probabilities are exactly 0 or 1, so that their logits are "
                "infinite; grade the network without its sigmoid, with nn.BCEWithLogitsLoss()"
            )
        return torch.logit if plain is None else lambda outputs: torch.logit(plain(outputs))

    def weigh(self, targets: Tensor, missing: Tensor) -> tuple[Tensor, Tensor | None]:
        outside = (targets < 0) | (targets > 1)
        if bool(outside.any()):
            index = tuple(int(i) for i in outside.nonzero()[0])
            raise InputError(
                f"target {float(targets[index])} at index {index} is outside [0, 1] "
                f"({int(outside.sum())} such targets)"
            )
        if self.pos_weight is None:
            return targets, None
        positive = self.pos_weight.tensor(targets) * targets
        total = positive + (1 - targets)
        return torch.where(total > 0, positive / total, 0.0), total

    def distribution(self, logits: Tensor, labels: Tensor) -> BernoulliDistribution:
        return BernoulliDistribution(logits, labels)


class BernoulliDistribution(DiagonalDistribution):
    """Independent Bernoulli labels at given logits; see `Bernoulli` for the formulas."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        super().__init__(logits, targets)
        self.on = torch.sigmoid(self.logits)
        self.off = torch.sigmoid(-self.logits)
        # By logarithms, as q(1 − q) underflows long before its root.
        log_on, log_off = (torch.nn.functional.logsigmoid(z) for z in (self.logits, -self.logits))
        self.root = (0.5 * (log_on + log_off)).exp()

    def loss(self, targets: Tensor | None = None) -> Tensor:
        """ℓ = Σ y·softplus(−z) + (1−y)·softplus(z), summed over positions and outputs."""
        return self.loss_terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        zero = torch.zeros_like(self.logits)
        on = torch.logaddexp(-self.logits, zero)
        off = torch.logaddexp(self.logits, zero)
        return labels * on + (1 - labels) * off

    def residual(self, targets: Tensor | None = None) -> Tensor:
        """U = (1−y)q − y(1−q), which is q − y without its cancellation."""
        labels = self.targets if targets is None else targets
        return (1 - labels) * self.on - labels * self.off

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return self.on * self.off * tangent

    def whitened_residual(self) -> Tensor:
        """R = (1−y) e^(z/2) − y e^(−z/2), which is (q−y)/√(q(1−q))."""
        half = 0.5 * self.logits
        # torch.where, because 0 · ∞ would be NaN for a confident and correct prediction.
        off = torch.where(self.targets < 1, (1 - self.targets) * half.exp(), 0.0)
        on = torch.where(self.targets > 0, self.targets * (-half).exp(), 0.0)
        return off - on

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand((draws, *self.logits.shape), generator=generator, dtype=torch.float64)
        return (uniform.to(self.logits.device) < self.on).to(torch.float64)
