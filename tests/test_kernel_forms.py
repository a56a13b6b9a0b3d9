"""What of Θ is kept changes nothing: strips, no Θ at all, another batch that grades."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ngeval
from ngeval.curvature import row_space as kernel
from ngeval.curvature.kernel import Kernel
from ngeval.grading import evaluate as evaluation
from ngeval.grading import grade as grading
from ngeval.grading.grade import grade
from ngeval.model.directions import push_directions
from tests import problems, reference

METHODS = ["sgd", "ef", "ief", "sf", "sf:3", "diag", "ng"]
DAMPINGS = [0.0, 1e-4, 1e-2, 1.0, 100.0]
NAMES = ["categorical-sequence-float64", "bernoulli-conv-float64", "gaussian-tied-float64"]
COLUMNS = ["gamma", "gamma_over_sgd", "decrease", "curvature", "update_norm", "cosine_sgd"]


def force(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Make every problem keep what only a problem of other sizes would."""
    monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", 0)
    if form != "gram":
        monkeypatch.setattr(kernel, "DENSE_SIZE", 0)
    if form == "free":
        monkeypatch.setattr(kernel, "STRIP_OUTPUTS", 0)


@pytest.mark.parametrize("form", ["gram", "strip", "free"])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_same_grades(monkeypatch, name, form):
    options = {"seed": 3, "gap": 1e-13}
    expected = ngeval.evaluate(problems.case(name).problem(), METHODS, DAMPINGS, **options)
    force(monkeypatch, form)
    problem = problems.case(name).problem()
    result = ngeval.evaluate(problem, METHODS, DAMPINGS, **options)
    kinds = {
        "gram": kernel.GramSpace,
        "strip": kernel.Strips,
        "free": kernel.MatrixFree,
    }
    pushes = len(METHODS) * len(DAMPINGS)
    assert ngeval.Kernel(problem, pushes=pushes).form is kinds[form]
    # A Gram matrix resolves half the digits of J, so λ = 0 and small λ may be uncertain.
    damped = (expected["damping"] > 1e-3).to_numpy()
    for column in COLUMNS:
        assert result[column][damped].to_numpy() == pytest.approx(
            expected[column][damped].to_numpy(), rel=1e-6
        ), column
    assert (result["status"][damped] == "ok").all()


@pytest.mark.parametrize("metric", [False, True])
def test_no_room_for_a_basis_changes_nothing(monkeypatch, metric):
    monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", 0)
    force(monkeypatch, "free")
    tables = []
    for room in (True, False):
        monkeypatch.setattr(grading, "_has_room", lambda *_, room=room: room)
        case = problems.case("categorical-sequence-float64")
        problem = case.problem()
        other = ngeval.Metric(problem, [(case.inputs, case.targets)] * 2) if metric else None
        tables.append(
            ngeval.evaluate(
                problem, ["sgd", "ef", "ief", "sf:2", "diag"], [1e-2, 1.0], metric=other,
                natural=False,
            )
        )  # fmt: skip
    for column in COLUMNS:
        values = [table[column].to_numpy() for table in tables]
        assert values[0] == pytest.approx(values[1], rel=1e-8), column
    assert (tables[1]["status"] == "ok").all()


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_directions_of_any_size_are_pushed(scale):
    problem = problems.case("categorical-sequence-float64").problem()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, problem.num_parameters, generator=generator, dtype=torch.float64)
    result = push_directions(problem.function, directions * scale)
    expected = torch.stack([problem.jvp(direction) for direction in directions])
    assert torch.allclose(result / scale, expected, rtol=1e-12, atol=1e-12)


def test_few_updates_are_pushed_and_many_are_not(monkeypatch):
    monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", 0)
    model, inputs = nn.Linear(4, 20).double(), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.arange(6)
    tables, built = [], []
    monkeypatch.setattr(
        evaluation, "Kernel", lambda *a, **k: built.append(Kernel(*a, **k)) or built[-1]
    )
    for dampings in ([1.0], [10.0**i for i in range(-2, 12)]):
        problem = ngeval.Problem(model, inputs, targets, "categorical")
        tables.append(ngeval.evaluate(problem, ["ef", "ief"], dampings, natural=False))
        expected = kernel.Strips if len(dampings) > 1 else kernel.MatrixFree
        assert built[-1].form is expected
    few, many = (table[table["damping"] == 1.0]["gamma"].tolist() for table in tables)
    assert few == pytest.approx(many, rel=1e-9)


def test_without_the_natural_gradient():
    problem = problems.case("categorical-mlp-float64").problem()
    table = ngeval.evaluate(problem, ["sgd", "ef"], [1.0], natural=False)
    assert table[["gamma_min", "gamma_over_ng", "gamma_ng_lower"]].isna().all(axis=None)
    assert (table["reason"] == "").all()
    whole = ngeval.evaluate(problem, ["sgd", "ef"], [1.0])
    assert whole["gamma"].tolist() == pytest.approx(table["gamma"].tolist(), rel=1e-12)
    assert (whole["gamma_over_ng"] >= 1).all()


def test_bounds_of_a_factorisation_are_the_value_itself():
    problem = problems.case("categorical-mlp-float64").problem()
    table = ngeval.evaluate(problem, ["sgd", "ng"], DAMPINGS)
    rows = table[table["method"] == "ng"]
    for column in ("gamma_ng_lower", "gamma_ng_upper"):
        assert rows[column].tolist() == pytest.approx(rows["gamma"].tolist(), rel=1e-9)
    assert (table["iterations"] == 0).all()


class TestMetric:
    def halves(self, case: problems.Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(case.inputs[:4], case.targets[:4]), (case.inputs[4:], case.targets[4:])]

    @pytest.mark.parametrize("name", NAMES)
    def test_the_own_batch_in_parts_is_the_own_batch(self, name):
        case = problems.case(name)
        problem = case.problem()
        expected = ngeval.evaluate(problem, METHODS, DAMPINGS, seed=3, natural=False)
        metric = ngeval.Metric(problem, self.halves(case))
        result = ngeval.evaluate(problem, METHODS, DAMPINGS, seed=3, metric=metric)
        for column in [*COLUMNS, "gamma_floor"]:
            values = result[column].to_numpy(float)
            assert values == pytest.approx(expected[column].to_numpy(float), rel=1e-6), column
        assert (result["metric_samples"] == result["num_samples"]).all()
        assert result["gamma_min"].isna().all()
        assert result["note"].str.contains("metric").all()

    @pytest.mark.parametrize("as_function", [False, True])
    def test_updates_of_one_batch_under_the_fisher_of_another(self, as_function):
        local, other = (
            problems.make("categorical-mlp-float64", num_samples=count) for count in (7, 23)
        )
        large = problems.Case("", local.model, other.inputs, other.targets, local.family)
        dense, truth = local.reference(), large.reference()
        problem = local.problem()
        batches = [(other.inputs[i : i + 5], other.targets[i : i + 5]) for i in range(0, 23, 5)]
        metric = ngeval.Metric(problem, (lambda: iter(batches)) if as_function else batches)
        methods = [*METHODS[:3], "diag", "ng"]
        table = ngeval.evaluate(problem, methods, [1e-2, 1.0], metric=metric)
        plain = reference.gamma(truth, reference.gradient(dense))
        for row in table.itertuples():
            update = reference.update(dense, row.method, row.damping)
            assert row.gamma == pytest.approx(reference.gamma(truth, update), rel=1e-7)
            assert row.gamma_over_sgd == pytest.approx(row.gamma / plain, rel=1e-9)
            assert row.decrease == pytest.approx(
                float(update @ reference.gradient(truth)), rel=1e-6
            )
            assert row.metric_samples == 23
            assert row.gamma_floor == pytest.approx(reference.floor(truth), rel=1e-9)
        assert metric.totals.loss == pytest.approx(float(large.problem().loss.mean()))

    def test_memory_does_not_grow_with_the_batch(self, monkeypatch):
        case = problems.make("categorical-mlp-float64", num_samples=40)
        problem = case.problem(memory=6_000)
        sizes = []
        metric = ngeval.Metric(problem)
        forms = metric.forms(problem.gradient().unsqueeze(0))
        sizes = [chunk.function.num_samples for chunk in metric.chunks(1)]
        assert max(sizes) < 40
        assert sum(sizes) == 40
        gradient = problem.gradient()
        assert float(forms.decrease[0]) == pytest.approx(float(gradient @ gradient))
        product = problem.fisher() @ gradient
        assert float(forms.curvature[0, 0]) == pytest.approx(float(gradient @ product))

    def test_an_iterator_is_refused(self):
        case = problems.case("categorical-mlp-float64")
        with pytest.raises(ngeval.InputError, match="only once"):
            ngeval.Metric(case.problem(), iter(self.halves(case)))

    def test_no_batch_and_a_bad_batch(self):
        case = problems.case("categorical-mlp-float64")
        problem = case.problem()
        with pytest.raises(ngeval.InputError, match="no batch"):
            _ = ngeval.Metric(problem, []).totals
        bad = [(case.inputs, torch.full_like(case.targets, 99))]
        with pytest.raises(ngeval.InputError, match="target 99"):
            ngeval.evaluate(problem, ["sgd"], [1.0], metric=ngeval.Metric(problem, bad))


@pytest.mark.parametrize("form", ["jacobian", "free"])
def test_methods_share_the_span_of_their_rows(monkeypatch, form):
    if form == "free":
        force(monkeypatch, "free")
    problem = problems.case("categorical-mlp-float64").problem()
    kernel_of = Kernel(problem, exact=False)
    updates = [
        ngeval.get_method(name).prepare(problem, kernel_of, 0).updates([1.0, 2.0])
        for name in ("sf", "ef", "ief", "diag")
    ]
    assert updates[0].space is updates[1].space is updates[2].space
    grades = grade(kernel_of, updates, ngeval.Metric(problem))
    assert all(math.isfinite(float(value)) for each in grades for value in each.gammas)
