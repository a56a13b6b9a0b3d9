"""Several losses on several outputs of one model, summed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood, OutputDistribution


@dataclass(frozen=True)
class Heads(Likelihood):
    """The sum of the losses of several outputs, each with its own likelihood.

    The heads are independent given z: ℓ_n = Σ_h ℓ_nh, u_n stacks the heads' residuals, and H_n is
    block-diagonal with the heads' H. Logits and targets are dicts with an entry for each head; the
    logits of a bound distribution are those of all heads, flattened and joined: ``(N, C)``.

    Attributes:
        parts: the name or index of each output, with its likelihood.
    """

    parts: tuple[tuple[str | int, Likelihood], ...]

    @property
    def name(self) -> str:
        return " + ".join(f"{name}: {likelihood.name}" for name, likelihood in self.parts)

    def bind(self, logits: Any, targets: Any) -> OutputDistribution:
        self.check_targets(targets)
        return HeadsDistribution(
            {name: part.bind(logits[name], targets[name]) for name, part in self.parts}
        )

    def check_targets(self, targets: Any) -> None:
        """Raise unless the targets are a mapping with an entry for each head.

        Raises:
            InputError: they are not.
        """
        names = [name for name, _ in self.parts]
        if not isinstance(targets, Mapping):
            raise InputError(
                f"the targets of several heads are a dict with {', '.join(map(repr, names))}, not "
                f"a {type(targets).__name__}"
            )
        missing = [repr(name) for name in names if name not in targets]
        if missing:
            listed = ", ".join(map(repr, targets))
            raise InputError(f"there are no targets for head {missing[0]}; they have {listed}")


class HeadsDistribution(OutputDistribution):
    """The distributions of several heads as one; see `Heads`."""

    def __init__(self, parts: Mapping[str | int, OutputDistribution]) -> None:
        logits = torch.cat([part.logits.flatten(1) for part in parts.values()], 1)
        super().__init__(logits, {name: part.targets for name, part in parts.items()})  # type: ignore[arg-type]
        self.parts = parts

    def _split(self, field: Tensor) -> Iterator[tuple[OutputDistribution, Tensor]]:
        """Each head with its share of a field ``(..., N, C)``, in the shape of its logits."""
        sizes = [math.prod(part.logits.shape[1:]) for part in self.parts.values()]
        for part, share in zip(self.parts.values(), field.split(sizes, -1), strict=True):
            yield part, share.reshape(*field.shape[:-2], *part.logits.shape)

    def _join(self, shares: Iterator[tuple[OutputDistribution, Tensor]]) -> Tensor:
        flat = [share.flatten(share.ndim - part.logits.ndim + 1) for part, share in shares]
        return torch.cat(flat, -1)

    def loss(self, targets: Any = None) -> Tensor:
        of: Any = self.targets if targets is None else targets
        return torch.stack([part.loss(of[name]) for name, part in self.parts.items()]).sum(0)

    def residual(self, targets: Any = None) -> Tensor:
        if targets is None:
            return self._join((part, part.residual()) for part in self.parts.values())
        return self._join((part, part.residual(targets[name])) for name, part in self.parts.items())

    def fisher_product(self, tangent: Tensor) -> Tensor:
        return self._join((p, p.fisher_product(t)) for p, t in self._split(tangent))

    def factor_product(self, vector: Tensor) -> Tensor:
        return self._join((p, p.factor_product(v)) for p, v in self._split(vector))

    def factor_transpose_product(self, tangent: Tensor) -> Tensor:
        return self._join((p, p.factor_transpose_product(t)) for p, t in self._split(tangent))

    def whitened_residual(self) -> Tensor:
        return self._join((part, part.whitened_residual()) for part in self.parts.values())

    def whitening_error(self) -> float:
        return max(part.whitening_error() for part in self.parts.values())

    def floor_terms(self) -> Tensor:
        return torch.stack([part.floor_terms() for part in self.parts.values()]).sum(0)

    def sample(self, draws: int, generator: torch.Generator) -> Any:
        return {name: part.sample(draws, generator) for name, part in self.parts.items()}

    def sampled_residual(self, draws: int, generator: torch.Generator) -> Tensor:
        parts = self.parts.values()
        return self._join((part, part.sampled_residual(draws, generator)) for part in parts)
