"""The exact Fisher's diagonal blocks F_ll, one for each group of parameters, factored.

With A_l = SᵀJ_l, F_ll = A_lᵀA_l, and g_l = A_lᵀr for r = S⁺u. Where J is kept, A_l itself is
factored. Otherwise a group with more parameters than the batch has outputs is solved by A_lA_lᵀ,
others by F_ll.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel, fisher_rows
from ngeval.curvature.row_space import (
    DENSE_SIZE,
    JacobianSpace,
    cholesky_rows,
    combination_weights,
)
from ngeval.curvature.row_svd import RowSvd, Solution, unit_vector
from ngeval.errors import EngineError
from ngeval.jacobians import CapturedRows
from ngeval.jacobians.captured_rows import group_grams, group_squares
from ngeval.model.parameter_groups import Group
from ngeval.problem.fisher import factor_columns
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

WORKSPACE = 5
"""Matrices of a block's size that exist at the same time while it is decomposed."""


@dataclass(frozen=True)
class Block:
    """A group's A_l, factored in coordinates of its rows or of the parameters.

    Attributes:
        group: the group of parameters.
        svd: of A_l.
        gradients: the rows whose sum is g_l, in the same coordinates.
        right: r, or None where rows of A_l are not rows of SᵀJ_l.
        weights: from coordinates to the coefficients of the rows of SᵀJ_l; None if the
            coordinates are parameters.
    """

    group: Group
    svd: RowSvd
    gradients: Tensor
    right: Tensor | None
    weights: Callable[[Tensor], Tensor] | None

    def solve(self, damping: float) -> Solution:
        """(F_ll + λI)⁻¹g_l."""
        return self.svd.damped(self._coefficients(self.svd.at(damping)), damping)

    def least_gamma(self) -> float:
        """(g_lᵀF_ll⁺g_l)^(−1/2), ∞ where g_l = 0."""
        svd = self.svd.at_zero
        parts = self._coefficients(svd) / svd.singular / svd.scale
        return 1 / unit_vector(parts)[1] if bool(parts.any()) else math.inf

    def _coefficients(self, svd: RowSvd) -> Tensor:
        return svd.gradient_coefficients(self.gradients, self.right)


class FisherBlocks:
    """The exact Fisher's diagonal blocks for groups of parameters, factored.

    Args:
        problem: the model on its batch.
        groups: of parameters, one for each block.
        space: J, if it is kept.

    Raises:
        EngineError: they are out of reach.
    """

    def __init__(
        self, problem: Problem, groups: Sequence[Group], space: JacobianSpace | None = None
    ) -> None:
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        self.blocks: dict[str, Block] = {}
        if space is not None:
            self._factor_rows(groups, space)
            return
        _check_sizes(problem, groups)
        size = problem.num_samples * problem.num_outputs
        gradient = problem.gradient().to(torch.float64)
        small = [g for g in groups if g.num_parameters <= size]
        for part in _batches(problem, small):
            squares = group_squares(problem.rows, factor_columns(problem), _names(part))
            for group in part:
                lower, _ = cholesky_rows(squares[group.name])
                svd = RowSvd.of(lower.T)
                slope = _part_of(gradient, group).unsqueeze(0)
                self.blocks[group.name] = Block(group, svd, slope, None, None)
        for part in _batches(problem, [g for g in groups if g not in small]):
            grams = group_grams(problem.rows, factor_columns(problem), _names(part))
            for group in part:
                self.blocks[group.name] = self._by_gram(group, grams[group.name], gradient)

    def _factor_rows(self, groups: Sequence[Group], space: JacobianSpace) -> None:
        jacobian = space.jacobian
        gradients = space.rows(self.problem.residual.unsqueeze(1))
        if space.basis is not None:
            gradients = gradients @ space.basis
        for group in groups:
            places = torch.cat([torch.arange(p.start, p.stop) for p in group.places])
            svd = RowSvd.of(*fisher_rows(self.problem, jacobian[:, places]))
            self.blocks[group.name] = Block(group, svd, gradients[:, places], self.right, None)

    def _by_gram(self, group: Group, gram: Tensor, gradient: Tensor) -> Block:
        lower, pivots = cholesky_rows(gram)
        # The coordinates y of g_l, from A_lg_l = Ly.
        part = torch.zeros_like(gradient)
        for place in group.places:
            part[place] = gradient[place]
        problem = self.problem
        products = problem.distribution.factor_transpose_product(problem.jvp(part)).flatten()
        square = lower[pivots]
        sizes = square.norm(dim=1, keepdim=True)
        slope = torch.linalg.solve_triangular(
            square / sizes, products[pivots].unsqueeze(1) / sizes, upper=False
        )
        weights = partial(combination_weights, lower, pivots)
        return Block(group, RowSvd.of(lower), slope.T, self.right, weights)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(block.svd.largest for block in self.blocks.values())

    @property
    def rank(self) -> int:
        """The rank of all blocks at λ = 0."""
        return sum(block.svd.at_zero.rank for block in self.blocks.values())

    def least_gammas(self) -> dict[str, float]:
        """(g_lᵀF_ll⁺g_l)^(−1/2) by group: the least γ of an update of that group alone."""
        return {name: block.least_gamma() for name, block in self.blocks.items()}

    def directions(self, dampings: Sequence[float]) -> Tensor:
        """(F_ll + λI)⁻¹g_l of every λ, concatenated: float64, shape ``(L, P)``."""
        problem = self.problem
        shape = (len(dampings), problem.num_parameters)
        update = torch.zeros(shape, dtype=torch.float64, device=problem.device)
        by_rows: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            solutions = [block.solve(damping) for damping in dampings]
            solved = torch.stack([solution.vector * solution.size for solution in solutions])
            if block.weights is not None:
                by_rows[name] = block.weights(solved)
                continue
            places = block.group.places
            sizes = [place.stop - place.start for place in places]
            for place, part in zip(places, solved.split(sizes, 1), strict=True):
                update[:, place] = part
        if by_rows:
            names = _names([self.blocks[name].group for name in by_rows])
            rows = CapturedRows(problem.rows, factor_columns(problem))
            update += rows.group_combinations(names, by_rows)
        return update


def fisher_blocks(kernel: Kernel, groups: Sequence[Group]) -> FisherBlocks:
    """The blocks of a kernel's problem, factored at most once."""
    explicit = kernel.form is JacobianSpace
    space = kernel.logits if explicit and isinstance(kernel.logits, JacobianSpace) else None
    return kernel.once(FisherBlocks, tuple(groups), space)


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
