"""The Krylov run and its bounds, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ngeval
from ngeval.curvature import row_space
from ngeval.curvature.krylov import KrylovRun
from tests import problems, reference

DAMPINGS = [0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e6, 1e10]
CASES = ["categorical-mlp-float64", "gaussian-sequence-float64", "bernoulli-conv-float64"]


def exact(dense: reference.Dense, damping: float) -> tuple[float, float, float]:
    """γ(λ), dᵀg and ‖d‖² of the natural gradient."""
    direction = reference.update(dense, "ng", damping, None)
    return (
        reference.gamma(dense, direction),
        float(direction @ reference.gradient(dense)),
        float(direction @ direction),
    )


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=["parameters", "logits"])
def run(name, request):
    """A run that keeps vectors of either space."""
    problem = problems.case(name).problem()
    result = KrylovRun(problem)
    if result.in_parameters != (request.param == "parameters"):
        result.in_parameters = not result.in_parameters
        result.basis = [result.right] if result.in_parameters else [result.left]
    return result


def test_the_bounds_enclose_the_truth_at_every_iteration(run, name):
    dense = problems.reference_of(name)
    truth = np.array([exact(dense, damping)[0] for damping in DAMPINGS])
    gaps = []
    while not run.exhausted and run.iterations < 60:
        run.step()
        bounds = run.bounds(DAMPINGS)
        assert (bounds.lower <= truth * (1 + 1e-8)).all(), (run.iterations, bounds.lower / truth)
        assert (bounds.upper >= truth * (1 - 1e-8)).all(), (run.iterations, bounds.upper / truth)
        gaps.append(bounds.gap)
    assert gaps[-1] < 1e-6
    assert gaps[1] > 1e-3


def test_a_finished_run_is_the_natural_gradient(run, name):
    dense = problems.reference_of(name)
    while not run.exhausted and run.iterations < 60:
        run.step()
    bounds = run.bounds(DAMPINGS)
    for i, damping in enumerate(DAMPINGS[2:], start=2):
        gamma, decrease, norm = exact(dense, damping)
        assert bounds.lower[i] == pytest.approx(gamma, rel=1e-8)
        assert bounds.upper[i] == pytest.approx(gamma, rel=1e-8)
        direction = run.direction(damping)
        slope = float(direction @ reference.gradient(dense))
        assert slope == pytest.approx(decrease, rel=1e-8)
        assert float(direction @ direction) == pytest.approx(norm, rel=1e-6)
        assert reference.gamma(dense, direction) == pytest.approx(gamma, rel=1e-6)
    assert run.largest == pytest.approx(
        float(torch.linalg.eigvalsh(reference.fisher(dense))[-1]), rel=1e-8
    )


def test_an_unfinished_run_gives_the_update_of_its_krylov_space(name):
    problem, dense = problems.case(name).problem(), problems.reference_of(name)
    result = KrylovRun(problem)
    for _ in range(4):
        result.step()
    # The update is the natural gradient of F and g restricted to the span of g, Fg, F²g and F³g.
    fisher, gradient = reference.fisher(dense), reference.gradient(dense)
    powers = [gradient / gradient.norm()]
    for _ in range(3):
        power = fisher @ powers[-1]
        for _ in range(2):
            for other in powers:
                power = power - (power @ other) * other
        powers.append(power / power.norm())
    span = torch.stack(powers)
    inner, slope = span @ fisher @ span.T, span @ gradient
    for damping in DAMPINGS:
        solved = torch.linalg.solve(inner + damping * torch.eye(4, dtype=torch.float64), slope)
        update = result.direction(damping)
        gap = (update - span.T @ solved).norm() / update.norm()
        assert float(gap) < 1e-8


def test_a_run_stops_at_the_gap_asked_for_and_says_when_it_could_not(monkeypatch):
    monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
    case = problems.case("categorical-sequence-float64")
    dampings = [0.3, 1.0]
    wide = ngeval.evaluate(case.problem(), ["sgd", "ng"], dampings, gap=10.0)
    close = ngeval.evaluate(case.problem(), ["sgd", "ng"], dampings, gap=1e-10)
    for table, gap in ((wide, 10.0), (close, 1e-10)):
        assert (table["gamma_ng_upper"] / table["gamma_ng_lower"] - 1).max() <= gap
        assert (table["note"] == "").all()
    assert (close["status"] == "ok").all()
    assert 0 < wide["iterations"].iloc[0] < close["iterations"].iloc[0]
    short = ngeval.evaluate(case.problem(), ["sgd", "ng"], dampings, gap=1e-10, max_iterations=2)
    assert (short["iterations"] == 2).all()
    assert short["note"].str.contains("γ_min is known to lie between .* after 2 iterations").all()
    assert set(short["status"][short["method"] == "ng"]) == {"uncertain"}
    assert short["reason"][short["method"] == "ng"].str.contains("max_iterations").all()
    assert (short["status"][short["method"] == "sgd"] == "ok").all()
    truth = ngeval.evaluate(case.problem(), ["ng"], dampings)
    for i, damping in enumerate(dampings):
        rows = short[short["damping"] == damping]
        assert (rows["gamma_ng_lower"] <= truth["gamma"][i] * (1 + 1e-9)).all()
        assert (rows["gamma_ng_upper"] >= truth["gamma"][i] * (1 - 1e-9)).all()


def test_relative_damping_without_the_kernel(monkeypatch):
    case = problems.case("gaussian-mlp-float64")
    expected = ngeval.evaluate(case.problem(), ["ng"], [1e-2, 1.0], damping_scale="relative")
    monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
    result = ngeval.evaluate(case.problem(), ["ng"], [1e-2, 1.0], damping_scale="relative")
    for column in ("damping_absolute", "gamma"):
        assert result[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-6)


def test_zero_residual_and_zero_gradient():
    model = nn.Linear(2, 2).double()
    inputs = torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        targets = model(inputs)
    flat = KrylovRun(ngeval.Problem(model, inputs, targets, "gaussian"))
    assert flat.exhausted
    assert (flat.bounds([1.0]).lower == np.inf).all()
    with torch.no_grad():
        same = torch.tensor([[0.3, 0.7], [0.3, 0.7]]).double()
        cancelled = model(same) + torch.tensor([[1.0], [-1.0]]).double()
    run = KrylovRun(ngeval.Problem(model, same, cancelled, "gaussian"))
    run.run([1.0])
    assert run.bounds([1.0]).lower[0] > 1e6


def test_another_batch_does_not_hide_that_a_run_ended_early(monkeypatch):
    monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
    case = problems.case("categorical-sequence-float64")
    for iterations, status in ((2, "uncertain"), (300, "ok")):
        problem = case.problem()
        metric = ngeval.Metric(problem, [(case.inputs, case.targets)])
        table = ngeval.evaluate(problem, ["ng"], [0.3], metric=metric, max_iterations=iterations)
        assert table["status"].item() == status


@pytest.mark.parametrize("family", ["gaussian", "categorical"])
def test_a_gradient_of_zero_has_no_run(monkeypatch, family):
    monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
    model, inputs = nn.Linear(2, 2).double(), torch.eye(2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([2000.0, -2000.0]))
    targets = model(inputs).detach() if family == "gaussian" else torch.tensor([0, 0])
    problem = ngeval.Problem(model, inputs, targets, family)
    table = ngeval.evaluate(problem, ["sgd", "ng"], [0.0, 1.0])
    assert (table["status"] == "undefined").all()
    assert np.isinf(table["gamma_min"]).all()
