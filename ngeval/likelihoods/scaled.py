"""A loss times weights, and the likelihoods whose loss is a sum over single outputs."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import (
    Likelihood,
    OutputDistribution,
    check_real_targets,
    single_output,
)


class ScaledDistribution(OutputDistribution):
    """A loss whose terms have weights: ℓ = Σ c ℓ₀, u = c u₀, H = c H₀ with c ≥ 0.

    With whole numbers c this is a data set in which a term occurs c times, and H is its Fisher.
    In general it is the generalised Gauss–Newton's H, the Hessian of the loss in z.

    Attributes:
        plain: the distribution without weights.
        scale: c, which broadcasts to the logits; it must be the same for outputs that H₀ couples.
    """

    def __init__(self, plain: OutputDistribution, scale: Tensor, targets: Any) -> None:
        """Weight a distribution; ``targets`` are those that its likelihood takes."""
        super().__init__(plain.logits, targets)
        self.plain = plain
        self.scale = scale.to(plain.logits)
        self.root = self.scale.sqrt()
        there = (self.scale > 0).expand_as(plain.logits).any(-1, keepdim=True)
        if plain.mask is not None or not bool(there.all()):
            self.mask = there if plain.mask is None else plain.mask & there

    def loss(self, targets: Tensor | None = None) -> Tensor:
        return self.loss_terms(targets).flatten(1).sum(1)

    def loss_terms(self, targets: Tensor | None = None) -> Tensor:
        terms = self.plain.loss_terms(targets)
        if terms.ndim == 1:  # the samples are single terms, so their scale is constant
            terms = terms.reshape(-1, *[1] * (self.logits.ndim - 1))
            return self.scale.expand_as(self.logits).flatten(1)[:, 0].reshape_as(terms) * terms
        return self.scale * terms

    def residual(self, targets: Tensor | None = None) -> Tensor:
        return self.scale * self.plain.residual(targets)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return self.scale * self.plain.fisher_product(tangent)

    def factor_product(self, vector: Tensor) -> Tensor:
        return self.root * self.plain.factor_product(vector)

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        return self.plain.factor_transpose_product(self.root * tangent)

    def whitened_residual(self) -> Tensor:
        # torch.where, because 0 · ∞ would be NaN.
        return torch.where(self.scale > 0, self.root * self.plain.whitened_residual(), 0.0)

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        return self.plain.sample(draws, generator)

    def sampled_residual(self, draws: int, generator: torch.Generator) -> Tensor:
        return self.root * self.plain.sampled_residual(draws, generator)


class Weights(tuple[Any, ...]):
    """A tensor of weights as nested tuples, so that likelihoods that have them can be compared."""

    __slots__ = ()

    @classmethod
    def of(cls, what: str, weights: Any) -> Weights | None:
        """Check weights, in any shape; None stays None.

        Raises:
            InputError: not numbers ≥ 0; ``what`` names them.
        """
        if weights is None or isinstance(weights, cls):
            return weights
        tensor = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise InputError(f"{what} must be finite numbers ≥ 0")
        return cls(_nested(tensor.reshape(1) if tensor.ndim == 0 else tensor))

    def tensor(self, like: Tensor) -> Tensor:
        """The weights in float64, on the device of ``like``."""
        return torch.tensor(self, dtype=torch.float64, device=like.device)

    def __repr__(self) -> str:
        """The weights, or a hash of many."""
        text = tuple.__repr__(self)
        if len(text) <= 100:
            return text
        return f"<{len(self)} weights {hashlib.sha256(text.encode()).hexdigest()[:16]}>"


def _nested(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(_nested(part) if part.ndim else float(part) for part in tensor)


def described(name: str, **options: object) -> str:
    """A likelihood's name with the options that are set: ``"gaussian:0.5,mean"``."""
    listed = [
        key if value is True else f"{key}={value}"
        for key, value in options.items()
        if value is not None and value is not False
    ]
    separator = "," if ":" in name else ":"
    return name + (separator + ",".join(listed) if listed else "")


def brief_repr(likelihood: Any, always: str) -> str:
    """The ``repr`` of a dataclass with one field, and those of the others that were set."""
    shown = {
        field.name: getattr(likelihood, field.name)
        for field in sorted(fields(likelihood), key=lambda field: field.name != always)
        if field.name == always or getattr(likelihood, field.name) != field.default
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    return f"{type(likelihood).__name__}({listed})"


@dataclass(frozen=True, kw_only=True, repr=False)
class OutputWise(Likelihood):
    """A likelihood whose loss is a sum of terms of single outputs.

    Attributes:
        mean: divide ℓ_n, and with it u and H, by the number of outputs of a sample, as the mean
            of ``nn.MSELoss()`` does.
        ignore: targets with this value, which may be NaN, are missing: their outputs have no
            loss, no residual and no Fisher.
        weights: of the outputs, in a shape that broadcasts to theirs.
    """

    mean: bool = False
    ignore: float | None = None
    weights: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Weights.of("the weights of a loss", self.weights))

    def __repr__(self) -> str:
        return brief_repr(self, "variance")

    @property
    def options(self) -> dict[str, object]:
        """What a name lists after the colon."""
        return {"mean": self.mean, "ignore": self.ignore, "weights": self.weights}

    def arrangement(self, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor] | None:
        return single_output(outputs)

    def bind(self, logits: Tensor, targets: Tensor) -> OutputDistribution:
        family = self.name.partition(":")[0]
        self.check_shapes(logits, targets, family)
        missing = self._missing(targets)
        values = torch.where(missing, 0.0, targets.detach().to(torch.float64))
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                "targets hold NaN or infinite values; remove those samples, or give a likelihood "
                f"that leaves missing labels out: ngeval.{type(self).__name__}(ignore=math.nan)"
            )
        labels, scale = self.weigh(values, missing)
        plain = self.distribution(logits, labels)
        if self.weights is not None:
            scale = _times(scale, self._output_weights(values))
        if bool(missing.any()):
            scale = _times(scale, (~missing).to(torch.float64))
        if self.mean:
            scale = _times(scale, values.new_full((1,), 1 / values[0].numel()))
        if scale is None:
            return plain
        return ScaledDistribution(plain, self.spread(scale, plain.logits), targets.detach().clone())

    def check_shapes(self, logits: Tensor, targets: Tensor, family: str) -> None:
        """Check the targets' shape against that of the logits; an InputError if they do not fit."""
        check_real_targets(logits, targets, family)

    def weigh(self, targets: Tensor, missing: Tensor) -> tuple[Tensor, Tensor | None]:
        """Check the targets' values; the labels of the plain distribution, and their weights."""
        return targets, None

    def spread(self, scale: Tensor, logits: Tensor) -> Tensor:
        """Weights of targets as weights of logits."""
        return scale

    @abstractmethod
    def distribution(self, logits: Tensor, labels: Tensor) -> OutputDistribution:
        """The distribution without weights."""

    def _missing(self, targets: Tensor) -> Tensor:
        if self.ignore is None:
            return torch.zeros_like(targets, dtype=torch.bool)
        return torch.isnan(targets) if math.isnan(self.ignore) else targets == self.ignore

    def _output_weights(self, targets: Tensor) -> Tensor:
        weights: Tensor = self.weights.tensor(targets)
        try:
            return weights.expand(targets.shape)
        except RuntimeError:
            raise InputError(
                f"the weights of the loss have shape {tuple(weights.shape)}, which does not "
                f"broadcast to that of the targets, {tuple(targets.shape)}"
            ) from None


def _times(scale: Tensor | None, factor: Tensor) -> Tensor:
    return factor if scale is None else scale * factor
