"""The exact Fisher's diagonal blocks F_ll, one for each group of parameters, factored.

With A_l = SᵀJ_l, F_ll = A_lᵀA_l, and g_l = A_lᵀr for r = S⁺u. Where J is kept, A_l itself is
factored. Otherwise a group with more parameters than the batch has outputs is solved by the
products of its rows of SᵀJ_l and of the per-sample gradients, others by F_ll.
"""

from __future__ import annotations

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
    noisy_gram,
    unit_vectors,
)
from ngeval.curvature.row_svd import DampedInverse, RowSum, RowSvd
from ngeval.curvature.updates import KnownForms
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
    """A group's A_l, factored in coordinates of rows or of the parameters.

    Attributes:
        group: the group of parameters.
        inverse: (A_lᵀA_l + λI)⁻¹g_l.
        weights: from coordinates to the coefficients of the rows of SᵀJ_l and of g_l; None if the
            coordinates are parameters.
    """

    group: Group
    inverse: DampedInverse
    weights: Callable[[Tensor], Tensor] | None


class FisherBlocks:
    """The exact Fisher's diagonal blocks for groups of parameters, factored.

    Args:
        problem: the model on its batch.
        groups: of parameters, one for each block.
        space: J, if it is kept.

        noise: by which everything is changed, relative; see `Kernel.perturbed`.
        seed: of the noise.

    Raises:
        EngineError: they are out of reach.
    """

    def __init__(
        self,
        problem: Problem,
        groups: Sequence[Group],
        space: JacobianSpace | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.problem = problem
        self.right = problem.distribution.whitened_residual().flatten()
        vectors = torch.cat([factor_columns(problem), problem.residual.unsqueeze(1)], 1)
        self.vectors, self.scales = unit_vectors(vectors)
        self.blocks: dict[str, Block] = {}
        if space is not None:
            self._factor_rows(groups, space)
            return
        _check_sizes(problem, groups)
        generator = torch.Generator().manual_seed(seed)
        size = problem.num_samples * problem.num_outputs
        gradient = problem.gradient().to(torch.float64)
        small = [g for g in groups if g.num_parameters <= size]
        for part in _batches(problem, small):
            squares = group_squares(problem.rows, factor_columns(problem), _names(part))
            for group in part:
                lower, _ = cholesky_rows(noisy_gram(squares[group.name], noise, generator))
                slope = _part_of(gradient, group)
                total = RowSum(slope, float(slope.norm()))
                inverse = DampedInverse(RowSvd.of(lower.T), total)
                self.blocks[group.name] = Block(group, inverse, None)
        for part in _batches(problem, [g for g in groups if g not in small]):
            grams = group_grams(problem.rows, self.vectors, _names(part))
            for group in part:
                gram = noisy_gram(grams[group.name], noise, generator)
                self.blocks[group.name] = self._by_gram(group, gram)

    def _factor_rows(self, groups: Sequence[Group], space: JacobianSpace) -> None:
        problem, jacobian = self.problem, space.jacobian
        residual = problem.residual.flatten(1)
        for group in groups:
            places = torch.cat([torch.arange(p.start, p.stop) for p in group.places])
            part = jacobian[:, places]
            samples = part.unflatten(0, (problem.num_samples, -1))
            gradients = torch.bmm(residual.unsqueeze(1), samples).squeeze(1)
            length = float((residual.abs() * samples.norm(dim=2)).sum())
            total = RowSum(gradients.sum(0), length, self.right)
            inverse = DampedInverse(RowSvd.of(*fisher_rows(problem, part)), total)
            self.blocks[group.name] = Block(group, inverse, None)

    def _by_gram(self, group: Group, gram: Tensor) -> Block:
        lower, pivots = cholesky_rows(gram)
        samples = (self.scales.unsqueeze(1) * lower).unflatten(0, self.vectors.shape[:2])
        gradients = samples[:, -1]
        total = RowSum(gradients.sum(0), float(gradients.norm(dim=1).sum()), self.right)
        inverse = DampedInverse(RowSvd.of(samples[:, :-1].flatten(0, 1)), total)
        return Block(group, inverse, partial(combination_weights, lower, pivots))

    @property
    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(block.inverse.rows.largest for block in self.blocks.values())

    @property
    def rank(self) -> int:
        """The rank of all blocks at λ = 0."""
        return sum(block.inverse.rows.at_zero.rank for block in self.blocks.values())

    def least_gammas(self) -> dict[str, float]:
        """(g_lᵀF_ll⁺g_l)^(−1/2) by group: the least γ of an update of that group alone."""
        return {name: block.inverse.least_gamma() for name, block in self.blocks.items()}

    def forms(self, dampings: Sequence[float]) -> KnownForms | None:
        """‖SᵀJd‖, gᵀd and ‖d‖ of every λ, without rounding in parameter space.

        None where a block is not known by rows of SᵀJ_l.
        """
        if any(block.inverse.gradient.right is None for block in self.blocks.values()):
            return None
        parts = [[b.inverse.solve(damping) for b in self.blocks.values()] for damping in dampings]
        return KnownForms.stack([KnownForms.of_sum(solutions) for solutions in parts])

    def directions(self, dampings: Sequence[float]) -> Tensor:
        """(F_ll + λI)⁻¹g_l of every λ, concatenated: float64, shape ``(L, P)``."""
        problem = self.problem
        shape = (len(dampings), problem.num_parameters)
        update = torch.zeros(shape, dtype=torch.float64, device=problem.device)
        by_rows: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            solutions = [block.inverse.solve(damping) for damping in dampings]
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
            update += CapturedRows(problem.rows, self.vectors).group_combinations(names, by_rows)
        return update


def fisher_blocks(kernel: Kernel, groups: Sequence[Group]) -> FisherBlocks:
    """The blocks of a kernel's problem, factored at most once."""
    explicit = kernel.form is JacobianSpace
    space = kernel.logits if explicit and isinstance(kernel.logits, JacobianSpace) else None
    return kernel.once(FisherBlocks, tuple(groups), space, kernel.noise, kernel.seed)


def _names(groups: Sequence[Group]) -> dict[str, list[str]]:
    return {group.name: list(group.parameters) for group in groups}


def _part_of(vector: Tensor, group: Group) -> Tensor:
    return torch.cat([vector[place] for place in group.places])


def _side(problem: Problem, group: Group) -> int:
    """The size of the matrix that a group is solved by."""
    if group.num_parameters <= problem.num_samples * problem.num_outputs:
        return group.num_parameters
    return problem.num_samples * (problem.num_outputs + 1)


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
