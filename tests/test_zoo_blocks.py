"""Methods that go layer by layer, on every architecture of the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ngeval
from ngeval.curvature.kronecker_layers import kronecker_layers
from ngeval.model.parameter_groups import make_groups
from ngeval.problem.fisher import factor_columns
from tests import zoo
from tests.problems import prepared, relative_gap
from tests.test_zoo import CANNOT, pytestmark, truth_of  # noqa: F401  torch's warnings are expected here too
from tests.test_zoo import problem_of as made_problem

names = pytest.mark.parametrize("name", list(zoo.ENTRIES))


def problem_of(name: str) -> ngeval.Problem:
    return made_problem(name, "auto")


def fisher_rows(name: str, problem: ngeval.Problem) -> Tensor:
    """SᵀJ as one matrix, with J of plain autograd."""
    return torch.cat(list(truth_of(name).rows(factor_columns(problem)).values()), 1)


@names
def test_exact_blocks(name):
    problem = problem_of(name)
    update = prepared("block-ng", problem).direction(1e-2)
    rows = fisher_rows(name, problem)
    right = problem.distribution.whitened_residual().flatten()
    sizes = {n: p.numel() for n, p in problem.function.parameters.items()}
    for group in make_groups(sizes, "layer"):
        places = torch.cat([torch.arange(p.start, p.stop) for p in group.places])
        local = rows[:, places]
        block = local.T @ local + 1e-2 * torch.eye(len(places), dtype=torch.float64)
        expected = torch.linalg.solve(block, local.T @ right)
        if float(expected.norm()) > 1e-12:
            # Gram matrices resolve half the digits of their rows.
            assert relative_gap(update[places], expected) < 1e-5, group.name
        else:
            assert float(update[places].norm()) < 1e-10, group.name


@names
def test_kronecker_blocks_hold_the_whole_layer(name):
    """The trace of a corrected block is that of the exact one, whatever the basis; and for large λ
    the update is the gradient, in its place."""
    problem = problem_of(name)
    plan = problem.rows.plan
    if plan is None or not kronecker_layers(plan):
        with pytest.raises(ngeval.EngineError, match=r"KFAC covers no layer|engine='layers'"):
            prepared("ekfac", problem)
        return
    state = prepared("ekfac:gradient", problem)
    squares = fisher_rows(name, problem).square().sum(0)
    sizes = {n: p.numel() for n, p in problem.function.parameters.items()}
    diagonal = dict(zip(sizes, squares.split(list(sizes.values())), strict=True))
    for block in state.blocks:
        expected = sum(float(diagonal[n].sum()) for n in block.layer.parameters)
        result = float(block.values.sum())
        assert result == pytest.approx(expected, rel=1e-9, abs=1e-20), block.layer.name
    gradient = problem.gradient()
    update = problem.function.unflatten(state.direction(1e12))
    plain = problem.function.unflatten(gradient)
    scale = float(gradient.norm())
    for part, expected in plain.items():
        factor = 1.0 if part in state.rest else 1e12
        assert float((factor * update[part] - expected).norm()) < 1e-8 * scale, part
