"""The exact Fisher's diagonal blocks F_ll, one for each group of parameters, factored.

With R_l = SᵀJ_l and r = S⁺u, F_ll = R_lᵀR_l and g_l = R_lᵀr. A group with more parameters than the
batch has outputs is solved in logit space, d_l = R_lᵀ(R_lR_lᵀ + λI)⁻¹r, others as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.logit_kernel import DENSE_SIZE
from ngeval.curvature.natural_gradient import (
    LARGE_RESIDUAL,
    LOST,
    check_gradient,
    check_residual,
    lost_to_rounding,
)
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import as_tensor
from ngeval.errors import EngineError
from ngeval.jacobians.parameter_blocks import group_combinations, group_grams, group_squares
from ngeval.model.parameter_groups import Group
from ngeval.problem.fisher import factor_columns
from ngeval.problem.gamma import gamma
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

MODERATE_RESIDUAL = 1e2
"""Up to that entry of r (a loss of 9 nats) blocks may be made in parameter space."""

WORKSPACE = 5
"""Matrices of a block's size that exist at one time while it is decomposed."""


@dataclass(frozen=True)
class Block:
    """A layer's F_ll, factored in one of two spaces.

    Attributes:
        spectrum: of F_ll, or of R_lR_lᵀ.
        right: g_l, or r.
    """

    spectrum: Spectrum
    right: Tensor


class FisherBlocks:
    """The exact Fisher's diagonal blocks for groups of parameters, factored."""

    def __init__(self, problem: Problem, groups: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Make and factor the blocks, as many at a time as there is room for.

        Args:
            problem: the model on its batch.
            groups: each group's name with those of its parameters.

        Raises:
            EngineError: they are out of reach.
            NumericalError: a label's probability is too small for r.
        """
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        check_residual(problem)
        names_of = {group: list(names) for group, names in groups}
        size = problem.num_samples * problem.num_outputs
        self.saturated = float(self.right.abs().max()) > LARGE_RESIDUAL
        # F_ll has the squares of the rows' sizes: those of improbable labels would be lost.
        spread = float(self.right.abs().max()) > MODERATE_RESIDUAL
        logits = spread and size <= DENSE_SIZE
        self.small = {
            g: names for g, names in names_of.items() if self._count(names) <= size and not logits
        }
        self.large = {g: names for g, names in names_of.items() if g not in self.small}
        self._check(size)
        self.blocks: dict[str, Block] = {}
        for part in self._batches(self.small):
            found = group_squares(problem.rows, factor_columns(problem), part, self.right)
            for group, (square, gradient) in found.items():
                self._check_gradient(group, gradient)
                self.blocks[group] = self._factored(square, gradient)
        for part in self._batches(self.large):
            grams = group_grams(problem.rows, factor_columns(problem), part)
            for group, gram in grams.items():
                self.blocks[group] = self._factored(gram, self.right)
                self._check_gradient(group, None)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(block.spectrum.largest for block in self.blocks.values())

    def least_gammas(self) -> dict[str, float]:
        """(g_lᵀF_ll⁺g_l)^(−1/2) by group: the least γ of an update of that group alone."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.problem.device)
        found = {}
        for group, block in self.blocks.items():
            if group in self.large:
                bought = block.spectrum.projected_norm(self.right)
            else:
                bought = float((block.spectrum.solve(block.right, zero)[0] @ block.right) ** 0.5)
            found[group] = 1 / bought if bought > 0 else math.inf
        return found

    def directions(self, dampings: Sequence[float]) -> Tensor:
        """(F_ll + λI)⁻¹g_l of every λ, put together: float64, shape ``(L, P)``."""
        problem, lambdas = self.problem, as_tensor(self.problem, dampings)
        solved = {g: b.spectrum.solve(b.right, lambdas) for g, b in self.blocks.items()}
        shape = (len(dampings), problem.num_parameters)
        update = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
        if self.large:
            weights = {group: solved[group] for group in self.large}
            columns = factor_columns(problem)
            update = group_combinations(problem.rows, columns, self.large, weights)
            for group in self.large if self.saturated else ():
                self._check_directions(group, update, lambdas)
        for group, names in self.small.items():
            places = self._places(names)
            sizes = [place.stop - place.start for place in places.values()]
            for place, part in zip(places.values(), solved[group].split(sizes, 1), strict=True):
                update[:, place] = part
        return update.to(torch.float64)

    def _factored(self, matrix: Tensor, right: Tensor) -> Block:
        epsilon = self.problem.function.row_epsilon
        return Block(Spectrum.of_gram(matrix, epsilon, right), right)

    def _check_directions(self, group: str, update: Tensor, dampings: Tensor) -> None:
        """That γ(d_l) is what the spectrum says it is, for every λ: one JVP for each.

        Raises:
            NumericalError: it is more than `LOST` above.
        """
        problem, spectrum = self.problem, self.blocks[group].spectrum
        squares = (spectrum.eigenvectors.T @ self.right).square()
        shares = spectrum.eigenvalues / (spectrum.eigenvalues + dampings.unsqueeze(1))
        told = (squares * shares**2).sum(1).sqrt() / (squares * shares).sum(1)
        for row, expected in zip(update, told, strict=True):
            part = torch.zeros_like(row, dtype=torch.float64)
            for place in self._places(self.large[group]).values():
                part[place] = row[place]
            if not bool(torch.isfinite(part).all()) or (
                not gamma(problem, part) <= (1 + LOST) * float(expected)
            ):
                raise lost_to_rounding(problem, f"the update of layer {group!r}")

    def _places(self, names: Sequence[str]) -> dict[str, slice]:
        """Where parameters are in a flat vector."""
        places, start = {}, 0
        for name, parameter in self.problem.function.parameters.items():
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return {name: places[name] for name in names}

    def _own_gradient(self, names: Sequence[str]) -> Tensor:
        """The parameters' part of the batch gradient, float64."""
        parts = self.problem.function.unflatten(self.problem.gradient())
        return torch.cat([parts[name].reshape(-1) for name in names]).to(torch.float64)

    def _check_gradient(self, group: str, made: Tensor | None) -> None:
        """A layer's gradient by way of r, which is made if it has not been, is its gradient."""
        own = self._own_gradient((self.small | self.large)[group])
        what = f"the gradient of layer {group!r}"
        check_gradient(self.problem, lambda: self._seen(group) if made is None else made, own, what)

    def _seen(self, group: str) -> Tensor:
        """R_lᵀr with r as the spectrum has it."""
        problem, vectors = self.problem, self.blocks[group].spectrum.eigenvectors
        weights = {group: (vectors @ (vectors.T @ self.right)).unsqueeze(0)}
        names = {group: self.large[group]}
        whole = group_combinations(problem.rows, factor_columns(problem), names, weights)[0]
        parts = problem.function.unflatten(whole)
        return torch.cat([parts[name].reshape(-1) for name in self.large[group]])

    def _count(self, names: Sequence[str]) -> int:
        return sum(self.problem.function.parameters[name].numel() for name in names)

    def _side(self, names: Sequence[str]) -> int:
        """The size of the matrix that a layer is solved by."""
        return min(self._count(names), self.problem.num_samples * self.problem.num_outputs)

    def _check(self, size: int) -> None:
        sides = {g: self._side(names) for g, names in (self.small | self.large).items()}
        group, side = max(sides.items(), key=lambda item: item[1])
        if side > DENSE_SIZE:
            raise EngineError(
                f"block-ng solves layer {group!r} by a matrix of {side} rows, the lesser of its "
                f"{self._count((self.small | self.large)[group])} parameters and the batch's "
                f"{size} outputs; over {DENSE_SIZE} is out of reach: use fewer samples"
            )
        needed = 8 * (WORKSPACE * side**2 + sum(value**2 for value in sides.values()))
        if needed > self.problem.rows.memory:
            raise EngineError(
                f"the blocks of {len(sides)} layers take {describe_bytes(needed)}, over the memory "
                f"budget of {describe_bytes(self.problem.rows.memory)}; use fewer samples or raise "
                "memory="
            )

    def _batches(self, groups: dict[str, list[str]]) -> list[dict[str, list[str]]]:
        """Groups whose matrices fit in a quarter of the memory together."""
        parts: list[dict[str, list[str]]] = []
        room = 0.0
        for group, names in groups.items():
            needed = 8 * self._side(names) ** 2
            if not parts or needed > room:
                parts.append({})
                room = self.problem.rows.memory / 4
            parts[-1][group] = names
            room -= needed
        return parts


def fisher_blocks(kernel: Kernel, groups: Sequence[Group]) -> FisherBlocks:
    """The blocks of some groups, computed once for a kernel.

    Raises:
        EngineError: they are out of reach.
        NumericalError: a label's probability is too small for r.
    """
    return kernel.once(FisherBlocks, tuple((group.name, group.parameters) for group in groups))
