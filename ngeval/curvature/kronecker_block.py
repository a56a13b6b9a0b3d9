"""Kronecker-factored blocks: eigendecomposed once, solved for every λ.

A layer's block of the curvature is F̃ = (1/M) A ⊗ B in the sense that F̃ vec(D) = vec(B D A)/M for
D of the weight's shape. With A = U_A diag(a) U_Aᵀ and B = U_B diag(b) U_Bᵀ every damped inverse is

    D(λ) = U_B (U_Bᵀ G U_A ⊘ s(λ)) U_Aᵀ,

and only the entrywise divisor s depends on λ and on the kind of damping. Where A or B is a sum of
fewer rows than its side (and positions are expanded), U spans only those rows: G lies in the rows
of A, and the part of it outside those of B, which sampled labels may leave, has b = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kronecker_factors import Factors
from ngeval.curvature.kronecker_layers import Layer
from ngeval.errors import NumericalError

EXACT, FACTORED, PI = "exact", "factored", "pi"
DAMPINGS = (EXACT, FACTORED, PI)
"""How λ enters; see `KroneckerBlock.divisor`."""


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's block in its eigenbasis; all tensors float64, by group of the layer.

    Attributes:
        layer: the layer.
        input_values: a, shape ``(g, k)``.
        input_vectors: U_A, shape ``(g, i, k)``; None for the identity.
        output_values: b, shape ``(g, m)``.
        output_vectors: U_B, shape ``(g, o, m)``.
        gradient: U_Bᵀ G U_A, shape ``(g, m, k)``.
        outside: (I − U_BU_Bᵀ) G U_A, shape ``(g, o, k)``; None where U_B is a whole basis.
        count: M.
        num_samples: N, which relates the λ of the sum to that of the mean.
        cutoff: eigenvalues below this part of the largest of their factor count as 0.
        corrected: the eigenvalues of EKFAC, instead of a ⊗ b/M; shape ``(g, m, k)``.
    """

    layer: Layer
    input_values: Tensor
    input_vectors: Tensor | None
    output_values: Tensor
    output_vectors: Tensor
    gradient: Tensor
    outside: Tensor | None
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
            row_epsilon: the rounding of the numbers that A and B are computed from.

        Raises:
            NumericalError: they are not finite.
        """
        try:
            input_values, input_vectors = factors.inputs.eigenpairs()
            output_values, output_vectors = factors.outputs.eigenpairs()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in the stubs
            raise NumericalError(_overflow(factors.layer)) from error
        half = factors.gradient if input_vectors is None else factors.gradient @ input_vectors
        gradient = output_vectors.mT @ half
        if not all(bool(torch.isfinite(t).all()) for t in (input_values, output_values, gradient)):
            raise NumericalError(_overflow(factors.layer))
        whole = output_vectors.shape[1] == output_vectors.shape[2]
        size = max(input_values.shape[1], output_values.shape[1])
        epsilon = torch.finfo(torch.float64).eps
        return cls(
            layer=factors.layer,
            input_values=input_values,
            input_vectors=input_vectors,
            output_values=output_values,
            output_vectors=output_vectors,
            gradient=gradient,
            outside=None if whole else half - output_vectors @ gradient,
            count=max(factors.count, 1.0),
            num_samples=num_samples,
            cutoff=min(1e-2, size * max(100 * epsilon, 10 * row_epsilon**2)),
        )

    @property
    def values(self) -> Tensor:
        """The block's eigenvalues, shape ``(g, m, k)``: a ⊗ b/M, or the corrected ones."""
        if self.corrected is not None:
            return self.corrected
        return self.output_values.unsqueeze(2) * self.input_values.unsqueeze(1) / self.count

    def divisors(self, damping: float, kind: str) -> tuple[Tensor, Tensor]:
        """The divisors of the rotated gradient's entries, and of those outside the basis.

        - ``"exact"``: a b/M + λ, of (F̃ + λI)⁻¹;
        - ``"factored"``: (√N a/M + √λ)(b/√N + √λ): with the factors A/M and B/N of the
          mean-reduced block and its λ/N, √(λ/N) is added to each;
        - ``"pi"``: (√N a/M + π√λ)(b/√N + √λ/π), π² = (tr A/(M dim A)) / (tr B/(N dim B)) (Martens
          and Grosse, arXiv 1503.05671, section 6.3).

        Returns:
            Shapes ``(g, m, k)`` and ``(g, 1, k)``, the latter that of b = 0.
        """
        if kind == EXACT or self.corrected is not None:
            return self.values + damping, torch.full_like(self.gradient[:, :1], damping)
        root, samples = math.sqrt(damping), math.sqrt(self.num_samples)
        inputs = self.input_values * (samples / self.count)
        outputs = self.output_values / samples
        balance = inputs.new_ones(len(inputs), 1)
        if kind == PI:
            size = inputs.shape[1] if self.input_vectors is None else self.input_vectors.shape[1]
            input_mean = inputs.sum(1, keepdim=True) / size
            output_mean = outputs.sum(1, keepdim=True) / self.output_vectors.shape[1]
            usable = (input_mean > 0) & (output_mean > 0)
            balance = torch.where(usable, input_mean / output_mean, 1.0).sqrt()
        damped, outside = (inputs + root * balance).unsqueeze(1), (root / balance).unsqueeze(2)
        return (outputs.unsqueeze(2) + outside) * damped, outside * damped

    def solve(self, damping: float, kind: str) -> Tensor:
        """D(λ), shape ``(g, o, i)``; λ = 0 gives the pseudo-inverse."""
        inside, outside = self.divisors(damping, kind)
        rotated = self.gradient / inside
        if damping == 0:
            rotated = torch.where(self._range(), rotated, 0.0)
        half = self.output_vectors @ rotated
        if self.outside is not None and damping > 0:
            half += self.outside / outside
        return half if self.input_vectors is None else half @ self.input_vectors.mT

    def _range(self) -> Tensor:
        """Where the block's eigenvalues are more than rounding, shape ``(g, m, k)``."""
        inputs = self.input_values > self.cutoff * self.input_values.amax(1, keepdim=True)
        outputs = self.output_values > self.cutoff * self.output_values.amax(1, keepdim=True)
        kept = outputs.unsqueeze(2) & inputs.unsqueeze(1)
        if self.corrected is None:
            return kept
        return kept & (self.corrected > self.cutoff * self.corrected.amax())


def _overflow(layer: Layer) -> str:
    return (
        f"the Kronecker factors of {layer.name or 'the model'} overflow at these weights; try "
        "dtype=torch.float64"
    )
