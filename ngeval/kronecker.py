"""Kronecker-factored blocks: eigendecomposed once, solved for every λ.

A layer's block of the curvature is F̃ = (1/M) A ⊗ B in the sense that F̃ vec(D) = vec(B D A)/M for
D of the weight's shape. With A = U_A diag(a) U_Aᵀ and B = U_B diag(b) U_Bᵀ every damped inverse is

    D(λ) = U_B (U_Bᵀ G U_A ⊘ s(λ)) U_Aᵀ,

and only the entrywise divisor s depends on λ and on the kind of damping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.errors import NumericalError
from ngeval.jacobians.factors import Factors, Layer

EXACT, FACTORED, PI = "exact", "factored", "pi"
DAMPINGS = (EXACT, FACTORED, PI)
"""How λ enters; see `KroneckerBlock.divisor`."""


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's block in its eigenbasis; all tensors float64, by group of the layer.

    Attributes:
        layer: whose.
        input_values: a, shape ``(g, i)``.
        input_vectors: U_A, shape ``(g, i, i)``.
        output_values: b, shape ``(g, o)``.
        output_vectors: U_B, shape ``(g, o, o)``.
        gradient: U_Bᵀ G U_A, shape ``(g, o, i)``.
        count: M.
        num_samples: N, by which λ of the sum is that of the mean.
        cutoff: eigenvalues below this part of the largest of their factor count as 0.
        corrected: the eigenvalues of EKFAC, in place of a ⊗ b/M; shape ``(g, o, i)``.
    """

    layer: Layer
    input_values: Tensor
    input_vectors: Tensor
    output_values: Tensor
    output_vectors: Tensor
    gradient: Tensor
    count: float
    num_samples: int
    cutoff: float
    corrected: Tensor | None = None

    @classmethod
    def of(cls, factors: Factors, num_samples: int, row_epsilon: float) -> KroneckerBlock:
        """Factor A and B.

        Args:
            factors: of the layer.
            num_samples: N.
            row_epsilon: the rounding of the numbers that A and B are made of.

        Raises:
            NumericalError: they are not finite.
        """
        for factor in (factors.inputs, factors.outputs, factors.gradient):
            if not bool(torch.isfinite(factor).all()):
                raise NumericalError(
                    f"the Kronecker factors of {factors.layer.name or 'the model'} overflow at "
                    "these weights; try dtype=torch.float64"
                )
        input_values, input_vectors = torch.linalg.eigh(factors.inputs)
        output_values, output_vectors = torch.linalg.eigh(factors.outputs)
        size = max(input_values.shape[1], output_values.shape[1])
        epsilon = torch.finfo(torch.float64).eps
        return cls(
            factors.layer,
            input_values.clamp_min(0),
            input_vectors,
            output_values.clamp_min(0),
            output_vectors,
            output_vectors.mT @ factors.gradient @ input_vectors,
            max(factors.count, 1.0),
            num_samples,
            min(1e-2, size * max(100 * epsilon, 10 * row_epsilon**2)),
        )

    @property
    def values(self) -> Tensor:
        """The block's eigenvalues, shape ``(g, o, i)``: a ⊗ b/M, or the corrected ones."""
        if self.corrected is not None:
            return self.corrected
        return self.output_values.unsqueeze(2) * self.input_values.unsqueeze(1) / self.count

    def divisor(self, damping: float, kind: str) -> Tensor:
        """What entries of the rotated gradient are divided by, shape ``(g, o, i)``.

        - ``"exact"``: a b/M + λ, of (F̃ + λI)⁻¹;
        - ``"factored"``: (√N a/M + √λ)(b/√N + √λ): with the factors A/M and B/N of the
          mean-reduced block and its λ/N, √(λ/N) is added to each;
        - ``"pi"``: (√N a/M + π√λ)(b/√N + √λ/π), π² = (tr A/(M dim A)) / (tr B/(N dim B)) (Martens
          and Grosse, arXiv 1503.05671, section 6.3).
        """
        if kind == EXACT or self.corrected is not None:
            return self.values + damping
        root, samples = math.sqrt(damping), math.sqrt(self.num_samples)
        inputs = self.input_values * (samples / self.count)
        outputs = self.output_values / samples
        balance = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
        if kind == PI:
            means = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
            usable = (means[0] > 0) & (means[1] > 0)
            balance = torch.where(usable, means[0] / means[1], 1.0).sqrt()
        return (outputs + root / balance).unsqueeze(2) * (inputs + root * balance).unsqueeze(1)

    def solve(self, damping: float, kind: str) -> Tensor:
        """D(λ), shape ``(g, o, i)``; λ = 0 gives the pseudo-inverse."""
        divisor = self.divisor(damping, kind)
        if damping == 0:
            rotated = torch.where(self._range(), self.gradient / divisor, 0.0)
        else:
            rotated = self.gradient / divisor
        return self.output_vectors @ rotated @ self.input_vectors.mT

    def _range(self) -> Tensor:
        """Where the block's eigenvalues are more than rounding, shape ``(g, o, i)``."""
        inputs = self.input_values > self.cutoff * self.input_values.amax(1, keepdim=True)
        outputs = self.output_values > self.cutoff * self.output_values.amax(1, keepdim=True)
        kept = outputs.unsqueeze(2) & inputs.unsqueeze(1)
        if self.corrected is None:
            return kept
        return kept & (self.corrected > self.cutoff * self.corrected.amax())
