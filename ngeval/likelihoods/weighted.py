"""A likelihood with a weight for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood, OutputDistribution
from ngeval.likelihoods.scaled import ScaledDistribution

TARGETS, WEIGHTS = "targets", "weights"
"""The entries of the targets of a `Weighted` likelihood."""


@dataclass(frozen=True)
class Weighted(Likelihood):
    """Weights w_n ≥ 0 of samples: ℓ_n, u_n and H_n are w_n times those of a likelihood.

    F = Σ_n w_n J_nᵀH_nJ_n is the Fisher of a batch in which sample n occurs w_n times. The
    targets are a dict with the entries ``"targets"`` and ``"weights"``.

    Attributes:
        plain: the likelihood without weights.
    """

    plain: Likelihood

    @property
    def name(self) -> str:
        return f"{self.plain.name} (weighted samples)"

    def bind(self, logits: Tensor, targets: Any) -> OutputDistribution:
        return self.scaled(self.plain.bind(logits, targets[TARGETS]), targets[WEIGHTS])

    def scaled(self, plain: OutputDistribution, weights: Tensor) -> OutputDistribution:
        """A distribution with weights of its samples.

        Raises:
            InputError: not one number ≥ 0 for each sample, or only zeros.
        """
        count = len(plain.logits)
        if not (isinstance(weights, Tensor) and weights.shape == (count,)):
            raise InputError(
                f"weights must be a tensor with one number for each of the {count} samples, not "
                f"of shape {tuple(getattr(weights, 'shape', ()))}"
            )
        values = weights.detach().to(torch.float64)
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise InputError("weights of samples must be finite numbers ≥ 0")
        kept = {TARGETS: plain.targets, WEIGHTS: values}
        return ScaledDistribution(plain, values.reshape(-1, *[1] * (plain.logits.ndim - 1)), kept)


def weighted(likelihood: Likelihood, targets: Any, weights: Tensor) -> tuple[Likelihood, Any]:
    """A likelihood with weights of samples, and the targets that it takes."""
    if isinstance(targets, Mapping) and set(targets) == {TARGETS, WEIGHTS}:
        raise InputError("the targets have weights already")
    return Weighted(likelihood), {TARGETS: targets, WEIGHTS: weights}
