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

from ngeval.curvature.logit_kernel import DENSE_SIZE
from ngeval.curvature.natural_gradient import (
    LOST,
    check_gradient,
    check_residual,
    is_saturated,
    lost_to_rounding,
)
from ngeval.curvature.spectrum import Spectrum
from ngeval.curvature.updates import as_tensor
from ngeval.errors import EngineError
from ngeval.jacobians import CapturedRows
from ngeval.jacobians.captured_rows import group_grams, group_squares
from ngeval.model.parameter_groups import Group
from ngeval.problem.fisher import factor_columns
from ngeval.problem.gamma import gamma
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

MODERATE_RESIDUAL = 1e2
"""Up to this entry of r (a loss of 9 nats) blocks may be solved in parameter space."""

WORKSPACE = 5
"""Matrices of a block's size that exist at the same time while it is decomposed."""


@dataclass(frozen=True)
class Block:
    """A group's F_ll, factored in one of two spaces.

    Attributes:
        group: the group of parameters.
        spectrum: of R_lR_lᵀ if ``in_logits``, else of F_ll.
        right: r if ``in_logits``, else g_l.
        in_logits: whether the block is solved in logit space.
    """

    group: Group
    spectrum: Spectrum
    right: Tensor
    in_logits: bool


class FisherBlocks:
    """The exact Fisher's diagonal blocks for groups of parameters, factored."""

    def __init__(self, problem: Problem, groups: Sequence[Group]) -> None:
        """Compute and factor the blocks, as many at a time as there is room for.

        Raises:
            EngineError: they are out of reach.
            NumericalError: a label's probability is too small for r.
        """
        check_residual(problem)
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        self.saturated = is_saturated(problem)
        size = problem.num_samples * problem.num_outputs
        _check_sizes(problem, groups)
        # F_ll has the squares of the rows' sizes: those of improbable labels would be lost.
        spread = float(self.right.abs().max()) > MODERATE_RESIDUAL
        all_in_logits = spread and size <= DENSE_SIZE
        large = [g for g in groups if all_in_logits or g.num_parameters > size]
        small = [g for g in groups if g not in large]
        self.blocks: dict[str, Block] = {}
        for part in _batches(problem, small):
            squares = group_squares(problem.rows, factor_columns(problem), _names(part), self.right)
            for group in part:
                self._add(group, *squares[group.name], in_logits=False)
        for part in _batches(problem, large):
            grams = group_grams(problem.rows, factor_columns(problem), _names(part))
            for group in part:
                self._add(group, grams[group.name], self.right, in_logits=True)

    def _add(self, group: Group, matrix: Tensor, right: Tensor, *, in_logits: bool) -> None:
        spectrum = Spectrum.of_gram(matrix, self.problem.function.row_epsilon, right)
        block = Block(group, spectrum, right, in_logits)
        if self.saturated:
            through_r = self._projected_gradient(block) if in_logits else right
            gradient = _part_of(self.problem.gradient(), group).to(torch.float64)
            what = f"the gradient of layer {group.name!r}"
            check_gradient(self.problem, through_r, gradient, what)
        self.blocks[group.name] = block

    @property
    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(block.spectrum.largest for block in self.blocks.values())

    def least_gammas(self) -> dict[str, float]:
        """(g_lᵀF_ll⁺g_l)^(−1/2) by group: the least γ of an update of that group alone."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.problem.device)
        least = {}
        for name, block in self.blocks.items():
            if block.in_logits:
                norm = block.spectrum.projected_norm(self.right)
            else:
                norm = float((block.spectrum.solve(block.right, zero)[0] @ block.right) ** 0.5)
            least[name] = 1 / norm if norm > 0 else math.inf
        return least

    def directions(self, dampings: Sequence[float]) -> Tensor:
        """(F_ll + λI)⁻¹g_l of every λ, concatenated: float64, shape ``(L, P)``."""
        problem, lambdas = self.problem, as_tensor(self.problem, dampings)
        solved = {g: b.spectrum.solve(b.right, lambdas) for g, b in self.blocks.items()}
        large = [block for block in self.blocks.values() if block.in_logits]
        if large:
            names = _names([block.group for block in large])
            weights = {name: solved[name] for name in names}
            rows = CapturedRows(problem.rows, factor_columns(problem))
            update = rows.group_combinations(names, weights)
            for block in large if self.saturated else ():
                self._check_directions(block, update, lambdas)
        else:
            shape = (len(dampings), problem.num_parameters)
            update = torch.zeros(shape, dtype=problem.dtype, device=problem.device)
        for name, block in self.blocks.items():
            if not block.in_logits:
                places = block.group.places
                sizes = [place.stop - place.start for place in places]
                for place, part in zip(places, solved[name].split(sizes, 1), strict=True):
                    update[:, place] = part
        return update.to(torch.float64)

    def _check_directions(self, block: Block, update: Tensor, dampings: Tensor) -> None:
        """Raise if γ(d_l) is more than `LOST` above the spectrum's, for any λ: one JVP for each."""
        problem, spectrum = self.problem, block.spectrum
        squares = (spectrum.eigenvectors.T @ self.right).square()
        shares = spectrum.eigenvalues / (spectrum.eigenvalues + dampings.unsqueeze(1))
        gammas = (squares * shares**2).sum(1).sqrt() / (squares * shares).sum(1)
        for row, expected in zip(update, gammas, strict=True):
            part = torch.zeros_like(row, dtype=torch.float64)
            for place in block.group.places:
                part[place] = row[place]
            if not bool(torch.isfinite(part).all()) or (
                not gamma(problem, part) <= (1 + LOST) * float(expected)
            ):
                raise lost_to_rounding(problem, f"the update of layer {block.group.name!r}")

    def _projected_gradient(self, block: Block) -> Tensor:
        """R_lᵀr with r as the spectrum has it."""
        problem, vectors = self.problem, block.spectrum.eigenvectors
        weights = {block.group.name: (vectors @ (vectors.T @ self.right)).unsqueeze(0)}
        rows = CapturedRows(problem.rows, factor_columns(problem))
        combined = rows.group_combinations(_names([block.group]), weights)
        return _part_of(combined[0], block.group)


def _names(groups: Sequence[Group]) -> dict[str, list[str]]:
    return {group.name: list(group.parameters) for group in groups}


def _part_of(vector: Tensor, group: Group) -> Tensor:
    return torch.cat([vector[place] for place in group.places])


def _side(problem: Problem, group: Group) -> int:
    """The size of the matrix that a group is solved by."""
    return min(group.num_parameters, problem.num_samples * problem.num_outputs)


def _check_sizes(problem: Problem, groups: Sequence[Group]) -> None:
    largest = max(groups, key=lambda group: _side(problem, group))
    side = _side(problem, largest)
    if side > DENSE_SIZE:
        raise EngineError(
            f"block-ng solves layer {largest.name!r} by a matrix of {side} rows, the lesser of its "
            f"{largest.num_parameters} parameters and the batch's "
            f"{problem.num_samples * problem.num_outputs} outputs; over {DENSE_SIZE} is out of "
            "reach: use fewer samples"
        )
    needed = 8 * (WORKSPACE * side**2 + sum(_side(problem, group) ** 2 for group in groups))
    if needed > problem.rows.memory:
        raise EngineError(
            f"the blocks of {len(groups)} layers take {describe_bytes(needed)}, over the memory "
            f"budget of {describe_bytes(problem.rows.memory)}; use fewer samples or raise memory="
        )


def _batches(problem: Problem, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose matrices together fit in a quarter of the memory."""
    batches: list[list[Group]] = []
    room = 0.0
    for group in groups:
        needed = 8 * _side(problem, group) ** 2
        if not batches or needed > room:
            batches.append([])
            room = problem.rows.memory / 4
        batches[-1].append(group)
        room -= needed
    return batches
