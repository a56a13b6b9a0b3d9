"""A Gaussian whose variance is an output, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError, ModelError
from ngeval.likelihoods.base import DiagonalDistribution, OutputDistribution, check_targets
from ngeval.likelihoods.scaled import OutputWise, described


@dataclass(frozen=True, repr=False)
class GaussianNLL(OutputWise):
    """Means μ and variances v as outputs: p(y|z) = N(y; μ, diag v), with z = (μ, v).

    ℓ = ½ Σ log v + (y−μ)²/v + log 2π, u = ((μ−y)/v, ½(1/v − (y−μ)²/v²)), H = diag(1/v, 1/(2v²)).
    The last dimension of z has the means and then the variances, 2C in all; a model may return
    the pair (means, variances). Targets have the shape of the means.

    Attributes:
        full: with the constant (C/2) log 2π.
        eps: the least variance; smaller ones count as eps, as in ``nn.GaussianNLLLoss``.
        mean: divide ℓ_n, u and H by C, as ``nn.GaussianNLLLoss()`` does.
        ignore: targets with this value, which may be NaN, are missing.
        weights: of the outputs, in a shape that broadcasts to that of the targets.
    """

    full: bool = True
    eps: float = 1e-6

    @property
    def name(self) -> str:
        return described("gaussian-nll", **self.options)

    @property
    def reading(self) -> Callable[[Any], Tensor] | None:
        return _joined

    def arrangement(self, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor] | None:
        return None

    def bind(self, logits: Tensor, targets: Tensor) -> OutputDistribution:
        if isinstance(targets, Tensor) and targets.ndim == 1 and logits[0].numel() == 2:
            targets = targets.reshape(-1, *[1] * (logits.ndim - 1))
        return super().bind(logits, targets)

    def check_shapes(self, logits: Tensor, targets: Tensor, family: str) -> None:
        check_targets(logits, targets)
        wanted = (*logits.shape[:-1], logits.shape[-1] // 2)
        if logits.shape[-1] % 2 or targets.shape != wanted or targets.is_complex():
            raise InputError(
                f"the outputs have shape {tuple(logits.shape)} and the targets "
                f"{tuple(targets.shape)}; the gaussian-nll likelihood needs a mean and a variance "
                "for each target: (N, …, 2C) for targets (N, …, C), or a pair (means, variances)"
            )
        if bool((logits.tensor_split(2, -1)[1] < 0).any()):
            raise InputError(
                "some variances among the model's outputs are negative; the second half of the "
                "outputs must be variances, not their logarithms (softplus or exp makes them)"
            )

    def spread(self, scale: Tensor, logits: Tensor) -> Tensor:
        count = logits.shape[-1] // 2
        wide = scale.expand(torch.broadcast_shapes(scale.shape, (count,)))
        return torch.cat([wide, wide], -1)

    def distribution(self, logits: Tensor, labels: Tensor) -> GaussianNLLDistribution:
        return GaussianNLLDistribution(logits, labels, self.eps, full=self.full)


class GaussianNLLDistribution(DiagonalDistribution):
    """Independent Gaussians with given means and variances; see `GaussianNLL`."""

    def __init__(self, logits: Tensor, targets: Tensor, eps: float, *, full: bool) -> None:
        super().__init__(logits, targets)
        self.means, variances = self.logits.tensor_split(2, -1)
        self.variances = variances.clamp_min(eps)
        self.constant = 0.5 * math.log(2 * math.pi) if full else 0.0
        self.root = torch.cat(
            [self.variances.rsqrt(), math.sqrt(0.5) / self.variances], -1
        )  # H is diagonal

    def loss(self, targets: Tensor | None = None) -> Tensor:
        return self._terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        """The term of each target, half of it at its mean and half at its variance."""
        half = 0.5 * self._terms(targets)
        return torch.cat([half, half], -1)

    def _terms(self, targets: Tensor | None) -> Tensor:
        labels = self.targets if targets is None else targets
        squares = (labels - self.means).square() / self.variances
        return 0.5 * (self.variances.log() + squares) + self.constant

    def residual(self, targets: Tensor | None = None) -> Tensor:
        labels = self.targets if targets is None else targets
        scaled = (self.means - labels) / self.variances
        slope = 0.5 * (1 / self.variances - scaled.square())
        return torch.cat([scaled, slope], -1)

    def whitened_residual(self) -> Tensor:
        return self.residual() / self.root

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((draws, *self.means.shape), generator=generator, dtype=torch.float64)
        return self.means + self.variances.sqrt() * noise.to(self.means.device)


def _joined(raw: Any) -> Tensor:
    """The means and variances in one tensor, variances (N,) or (N, …, 1) for all of a sample."""
    if isinstance(raw, Tensor):
        return raw
    if not (isinstance(raw, tuple | list) and len(raw) == 2):
        raise ModelError(
            "a Gaussian negative log-likelihood takes means and variances: a tensor (N, …, 2C), or "
            f"a pair, but the model returned a {type(raw).__name__}; output= chooses"
        )
    means, variances = raw
    if means.ndim == 1:
        means = means.unsqueeze(-1)
    if variances.ndim < means.ndim:
        variances = variances.unsqueeze(-1)
    return torch.cat([means, variances.expand_as(means)], -1)
