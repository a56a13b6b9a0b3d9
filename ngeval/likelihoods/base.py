"""The base classes of a likelihood, and the checks of targets that several likelihoods share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError


class OutputDistribution(ABC):
    """p(y|z) at fixed logits z, with the observed targets y.

    A subclass implements the seven abstract methods below. For every sample n, with z_n the logits
    of all its positions, it defines

    - the loss ℓ_n = −log p(y_n|z_n), in nats, summed over positions and outputs,
    - the residual u_n = ∇_z ℓ_n,
    - the Fisher of the outputs H_n = E_{y~p(·|z_n)}[∇_z log p ∇_z log pᵀ], as products H·t,
    - a factor S_n with S_n S_nᵀ = H_n, as products S·s and Sᵀ·t,
    - the whitened residual r_n = S_n⁺u_n, so that u_n = S_n r_n and u_nᵀH_n⁺u_n = ‖r_n‖²,
    - labels drawn from p(·|z_n).

    Nothing is divided by N: sums over samples and means are formed elsewhere. Logits have shape
    ``(N, *positions, C)``. Tangents t and cotangents s have any number of leading dimensions before
    that shape, and the products keep them. All tensors are float64 on the logits' device, whatever
    the model's dtype.

    Attributes:
        logits: z in float64, shape ``(N, *positions, C)``, detached from any graph.
        targets: the observed labels; their shape depends on the likelihood.
        mask: True for positions that count, shape ``(N, *positions, 1)``; None if all do. Loss,
            residual and products are 0 at a position that does not count.
    """

    mask: Tensor | None = None

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.logits = logits.detach().to(torch.float64)
        self.targets = targets

    @abstractmethod
    def loss(self, targets: Tensor | None = None) -> Tensor:
        """ℓ_n = −log p(y_n|z_n) in nats, summed over positions: shape ``(N,)``.

        Args:
            targets: labels in place of the observed ones, of the same shape.
        """

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        """The terms of ℓ, which can be weighted separately where H does not couple them.

        Returns:
            Of shape ``(N,)``, ``(N, *positions, 1)`` or ``(N, *positions, C)``. By default each
            sample is a single term.
        """
        return self.loss(targets)

    @abstractmethod
    def residual(self, targets: Tensor | None = None) -> Tensor:
        """The residual u = ∇_z ℓ, in the shape of the logits.

        Args:
            targets: labels in place of the observed ones; they can have leading dimensions, as
                `sample` returns them, which the result then has too.
        """

    @abstractmethod
    def fisher_product(self, tangent: Tensor) -> Tensor:
        """H·t for tangents of shape ``(..., *logits.shape)``."""

    @abstractmethod
    def factor_product(self, vector: Tensor) -> Tensor:
        """S·s for vectors of shape ``(..., *logits.shape)``, where S Sᵀ = H."""

    @abstractmethod
    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        """Sᵀ·t for tangents of shape ``(..., *logits.shape)``, so that tᵀHt = ‖Sᵀt‖²."""

    def whitening_error(self) -> float:
        """The largest |S r − u| of a position over its |u|: 1e-15, but where a p underflows."""
        expected, whitened = self.residual(), self.whitened_residual()
        scale = whitened.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        product = scale * self.factor_product(whitened / scale)
        sizes = expected.abs().amax(-1)
        gaps = (product - expected).abs().amax(-1) / sizes
        return float(torch.where(sizes > 0, gaps, 0.0).nan_to_num(nan=math.inf).max())

    @abstractmethod
    def whitened_residual(self) -> Tensor:
        """The whitened residual r = S⁺u of the observed targets, in the shape of the logits.

        It can be as large as e^(ℓ/2); an entry that overflows is infinite, not NaN.
        """

    @abstractmethod
    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """Draw labels y ~ p(·|z).

        Args:
            draws: the number of labels for each sample.
            generator: on the CPU; the only source of randomness.

        Returns:
            Labels that `residual` takes, of shape ``(draws, *targets.shape)``.
        """

    def sampled_residual(self, draws: int, generator: torch.Generator) -> Tensor:
        """Residuals û of drawn labels, with E[û ûᵀ] = H: ``(draws, *logits.shape)``."""
        return self.residual(self.sample(draws, generator))

    def floor_terms(self) -> Tensor:
        """u_nᵀH_n⁺u_n of each sample, shape ``(N,)``; γ_min ≥ (Σ_n u_nᵀH_n⁺u_n)^(−1/2)."""
        return self.whitened_residual().square().flatten(1).sum(1)


class DiagonalDistribution(OutputDistribution):
    """A distribution of independent outputs, whose H is diagonal.

    Attributes:
        root: S = H^½, in the logits' shape.
    """

    root: Tensor

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return self.root.square() * tangent

    def factor_product(self, vector: Tensor) -> Tensor:
        return self.root * vector

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        return self.root * tangent


class Likelihood(ABC):
    """A family of output distributions, as the argument ``likelihood=`` names it.

    A subclass implements `name` and `bind`, and `parse` if its name takes a parameter. Its ``repr``
    is recorded with results, and two likelihoods that are equal are the same likelihood: a frozen
    dataclass has both.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that ``likelihood=`` takes, with its parameter after a colon."""

    @abstractmethod
    def bind(self, logits: Tensor, targets: Tensor) -> OutputDistribution:
        """Check the targets against the logits, and return p(·|z) at these logits.

        Args:
            logits: z, shape ``(N, *positions, C)``.
            targets: the observed labels, batch first; they are copied.

        Raises:
            InputError: the targets' shape, dtype or values do not fit.
        """

    @property
    def reading(self) -> Callable[[Any], Tensor] | None:
        """The outputs in what a model returns or ``output=`` chooses; None: they are a tensor."""
        return None

    def arrangement(self, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor] | None:
        """How the logits z are computed from a model's outputs, decided on the first batch.

        It is part of the model: derivatives are taken through it, and it sees batches of any
        number of samples.

        Args:
            outputs: of the first batch.
            targets: of that batch.

        Returns:
            A differentiable function; None where the outputs are the logits, as they usually are.

        Raises:
            InputError, ModelError: the outputs cannot be what this loss takes.
        """
        return None

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> Likelihood:
        """Build the likelihood from its full name and the text after the colon.

        Args:
            name: for error messages, as ``"gaussian:0.5"``.
            parameter: as ``"0.5"``; empty if there is none.

        Raises:
            InputError: the parameter cannot be read, or the likelihood takes none.
        """
        if parameter:
            raise InputError(f"likelihood {name!r}: {name.partition(':')[0]} takes no parameter")
        return cls()


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Check that the targets are a tensor with as many samples as the logits."""
    if not isinstance(targets, Tensor):
        raise InputError(f"targets must be a torch.Tensor, not {type(targets).__name__}")
    if targets.ndim == 0 or targets.shape[0] != logits.shape[0]:
        count = targets.shape[0] if targets.ndim else "no"
        raise InputError(
            f"targets hold {count} samples, but the model returned outputs for {logits.shape[0]}; "
            "both are batch first"
        )


def check_real_targets(logits: Tensor, targets: Tensor, likelihood: str) -> None:
    """Check that the targets are real numbers in the logits' shape."""
    check_targets(logits, targets)
    if targets.shape != logits.shape:
        hint = ""
        if logits.shape == (*targets.shape, 1):
            hint = (
                "; a loss would broadcast the two to each other: give targets.unsqueeze(-1), or "
                "output=lambda z: z.squeeze(-1)"
            )
        raise InputError(
            f"targets have shape {tuple(targets.shape)}, but the {likelihood} likelihood needs "
            f"the shape of the model's outputs, {tuple(logits.shape)}{hint}"
        )
    if targets.is_complex():
        raise InputError("targets are complex numbers; they must be real")


def single_output(outputs: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The arrangement of outputs of shape ``(N,)``, as of ``model(x).squeeze(-1)``, as (N, 1)."""
    return _unsqueezed if outputs.ndim == 1 else None


def _unsqueezed(outputs: Tensor) -> Tensor:
    return outputs.unsqueeze(-1)
