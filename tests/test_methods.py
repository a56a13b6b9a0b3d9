"""Identities of the updates: dense = logit-space, limits, scales, and what they do to samples."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn

import ngeval
from ngeval.curvature.kernel import Kernel
from ngeval.grading.grade import grade
from ngeval.jacobians import gram_matrix
from ngeval.problem.gamma import root_forms
from tests import problems, reference
from tests.problems import EXACT_NAMES, METHODS, prepared, relative_gap

DAMPINGS = (0.0, 1e-6, 1e-3, 1.0, 1e3)

# EF's rows are independent in these, so that K is invertible.
INVERTIBLE = [n for n in EXACT_NAMES if n != "categorical-sequence-float64"]

# More parameters than outputs in the batch, and J of full row rank.
FULL_ROW_RANK = [n for n in EXACT_NAMES if "mlp" in n or "conv" in n]


def state_of(name: str, method: str):
    return prepared(method, problems.problem_of(name), seed=0)


@functools.cache
def update_of(name: str, method: str, damping: float) -> Tensor:
    """The reference's update, with the labels that ngeval draws where it draws any."""
    labels = problems.labels_of(problems.problem_of(name), method)
    return reference.update(problems.reference_of(name), method, damping, labels)


@functools.cache
def tolerance_of(name: str, method: str, damping: float) -> float:
    """max(1e-8, 10 ε × the reference's condition number); never so large as to mean nothing."""
    problem, dense = problems.problem_of(name), problems.reference_of(name)
    labels = problems.labels_of(problem, method)
    condition = reference.condition(dense, method, damping, labels)
    tolerance = max(1e-8, 10 * reference.EPS * condition)
    assert tolerance < 1e-2, f"{name} {method} {damping}: condition {condition:.1e}"
    return tolerance


class TestDenseIsLogitSpace:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_directions(self, name, method):
        state = state_of(name, method)
        for damping in DAMPINGS:
            gap = relative_gap(state.direction(damping), update_of(name, method, damping))
            assert gap < tolerance_of(name, method, damping), damping

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_rows_of_evaluate(self, name):
        problem, dense = problems.problem_of(name), problems.reference_of(name)
        table = ngeval.evaluate(problem, METHODS, DAMPINGS)
        assert list(table["status"].unique()) == ["ok"]
        least, bound = reference.gamma_min(dense), reference.floor(dense)
        sgd = reference.gamma(dense, reference.gradient(dense))
        gradient = reference.gradient(dense)
        for row in table.itertuples():
            direction = update_of(name, row.method, row.damping)
            tolerance = tolerance_of(name, row.method, row.damping)
            gamma = reference.gamma(dense, direction)
            cosine = torch.nn.functional.cosine_similarity(direction, gradient, dim=0)
            expected = {
                "gamma": gamma,
                "gamma_over_sgd": gamma / sgd,
                "gamma_over_ng": gamma / least,
                "gamma_min": least,
                "gamma_floor": bound,
                "decrease": float(direction @ gradient),
                "curvature": reference.curvature_along(dense, direction),
                "update_norm": float(direction.norm()),
                "cosine_sgd": float(cosine),
            }
            for column, value in expected.items():
                result = getattr(row, column)
                assert result == pytest.approx(value, rel=10 * tolerance), (row.method, column)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", ["categorical-sequence-float64", "gaussian-conv-float64"])
    def test_grades_are_those_of_the_direction(self, name, method):
        problem, state = problems.problem_of(name), state_of(name, method)
        updates = state.updates(DAMPINGS)
        grades = grade(Kernel(problem), [updates])[0]
        for i, damping in enumerate(DAMPINGS):
            direction = state.direction(damping)
            place = min(i, updates.count - 1)  # one update may stand for every λ
            tolerance = tolerance_of(name, method, damping)
            root, decrease, _ = root_forms(problem, problem.jvp(direction).unsqueeze(0))
            for result, expected in (
                (grades.curvature[place], root.square()),
                (grades.decrease[place], decrease),
                (grades.gammas[place], root / decrease.abs()),
                (grades.norms[place], direction.norm()),
            ):
                assert float(result) == pytest.approx(float(expected), rel=2 * tolerance)

    @pytest.mark.parametrize("method", METHODS)
    def test_float32_models(self, method):
        for name in ("categorical-mlp-float32", "gaussian-sequence-float32"):
            problem, dense = problems.problem_of(name), problems.reference_of(name)
            labels = problems.labels_of(problem, method)
            table = ngeval.evaluate(problem, [method], [1.0, 10.0])
            for row in table.itertuples():
                expected = reference.update(dense, method, row.damping, labels)
                result = reference.gamma(dense, expected)
                assert row.gamma == pytest.approx(result, rel=1e-4)


class TestGamma:
    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_scale_and_sign_do_not_matter(self, name):
        problem = problems.problem_of(name)
        direction = torch.randn(problem.num_parameters, dtype=torch.float64)
        expected = problem.gamma(direction)
        for scale in (-1.0, 2.0, -1e-12, 1e12, 1e-150, 1e140):
            assert problem.gamma(scale * direction) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_order_of_the_bounds(self, name):
        problem, dense = problems.problem_of(name), problems.reference_of(name)
        least, bound = ngeval.gamma_min(problem), ngeval.gamma_floor(problem)
        assert least == pytest.approx(reference.gamma_min(dense), rel=1e-9)
        assert bound == pytest.approx(reference.floor(dense), rel=1e-12)
        assert least >= bound * (1 - 1e-14)
        table = ngeval.evaluate(problem, METHODS, DAMPINGS)
        assert bool((table["gamma"] >= least * (1 - 1e-12)).all())
        directions = torch.randn(20, problem.num_parameters, dtype=torch.float64)
        assert all(problem.gamma(d) >= least for d in directions)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_the_natural_gradient_reaches_the_minimum(self, name):
        problem = problems.problem_of(name)
        direction = prepared("ng", problem).direction(0.0)
        least = ngeval.gamma_min(problem)
        assert problem.gamma(direction) == pytest.approx(least, rel=1e-9)

    @pytest.mark.parametrize("name", FULL_ROW_RANK)
    def test_the_floor_is_reached_when_j_has_full_row_rank(self, name):
        dense = problems.reference_of(name)
        rows = dense.jacobian.flatten(0, 1)
        assert int(torch.linalg.matrix_rank(rows)) == rows.shape[0]
        problem = problems.problem_of(name)
        bound = ngeval.gamma_floor(problem)
        assert ngeval.gamma_min(problem) == pytest.approx(bound, rel=1e-9)

    @pytest.mark.parametrize("name", ["categorical-linear-float64", "gaussian-tied-float64"])
    def test_the_floor_is_not_reached_otherwise(self, name):
        problem = problems.problem_of(name)
        assert ngeval.gamma_min(problem) > 1.01 * ngeval.gamma_floor(problem)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_kl_divergence_is_half_the_quadratic_form(self, name):
        """No code of the Fisher in sight: two forward passes and torch.distributions."""
        case, problem = problems.case(name), problems.problem_of(name)
        direction = torch.randn(problem.num_parameters, dtype=torch.float64)
        quadratic = float(root_forms(problem, problem.jvp(direction).unsqueeze(0))[0]) ** 2
        assert float(direction @ (problem.fisher() @ direction)) == pytest.approx(quadratic)
        step = 1e-3 / math.sqrt(quadratic)
        # The mean of both signs, in which the third order cancels.
        divergence = sum(kl_at(case, sign * step * direction) for sign in (-1, 1)) / 2
        assert divergence == pytest.approx(0.5 * step**2 * quadratic, rel=1e-5)


def kl_at(case: problems.Case, step: Tensor) -> float:
    """KL(θ‖θ + step) summed over the batch, padding left out."""
    moved = copy.deepcopy(case.model)
    trainable = [p for p in moved.parameters() if p.requires_grad]
    parts = step.split([p.numel() for p in trainable])
    with torch.no_grad():
        for parameter, part in zip(trainable, parts, strict=True):
            parameter.add_(part.reshape(parameter.shape))
        pair = [model(case.inputs) for model in (case.model, moved)]
    if case.family.name == "categorical":
        p, q = (distributions.Categorical(logits=z) for z in pair)
        terms = distributions.kl_divergence(p, q) * (case.targets != problems.PADDING)
    elif case.family.name == "bernoulli":
        p, q = (distributions.Bernoulli(logits=z) for z in pair)
        terms = distributions.kl_divergence(p, q)
    else:
        p, q = (distributions.Normal(z, math.sqrt(problems.VARIANCE)) for z in pair)
        terms = distributions.kl_divergence(p, q)
    return float(terms.sum())


class TestLimits:
    @pytest.mark.parametrize("method", ["ef", "sf", "sf:2", "ng", "diag", "diag-ef", "diag-ef:2"])
    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_large_damping_gives_the_gradient(self, name, method):
        problem = problems.problem_of(name)
        damping = 1e14
        exponent = 2 if method == "diag-ef:2" else 1
        direction = state_of(name, method).direction(damping) * damping**exponent
        assert relative_gap(direction, problem.gradient()) < 1e-9

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_large_damping_gives_ief_the_weighted_gradient(self, name):
        # Gᵀs: each sample's gradient times its own ‖u_n‖².
        dense = problems.reference_of(name)
        squares = dense.residual.square().sum(1)
        expected = reference.per_sample_gradients(dense).T @ squares
        direction = state_of(name, "ief").direction(1e14) * 1e14
        assert relative_gap(direction, expected) < 1e-9

    @pytest.mark.parametrize("name", INVERTIBLE)
    def test_ef_changes_every_loss_alike(self, name):
        problem = problems.problem_of(name)
        change = ngeval.loss_change(problem, state_of(name, "ef").direction(0.0))
        torch.testing.assert_close(change, -torch.ones_like(change), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("name", INVERTIBLE)
    def test_ief_changes_losses_in_proportion_to_the_squared_residual(self, name):
        problem = problems.problem_of(name)
        change = ngeval.loss_change(problem, state_of(name, "ief").direction(0.0))
        squares = problem.residual.square().flatten(1).sum(1)
        torch.testing.assert_close(change, -squares, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("name", INVERTIBLE)
    def test_projection_of_ef_on_a_sample_is_one_over_its_gradient_norm(self, name):
        gradients = reference.per_sample_gradients(problems.reference_of(name))
        direction = state_of(name, "ef").direction(0.0)
        norms = gradients.norm(dim=1)
        projections = gradients @ direction / norms
        torch.testing.assert_close(projections, 1 / norms, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("name", INVERTIBLE)
    def test_k_is_invertible_where_the_tests_above_say_so(self, name):
        problem = problems.problem_of(name)
        gram = gram_matrix(problem.rows, problem.residual.unsqueeze(1))
        assert float(torch.linalg.cond(gram)) < 1e6

    def test_ef_and_ief_agree_when_all_residuals_have_one_norm(self):
        # Two classes and one logit gap: ‖u_n‖² is the same for every sample.
        model = nn.Linear(5, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        inputs = torch.randn(4, 5, dtype=torch.float64)
        problem = ngeval.Problem(model, inputs, torch.tensor([0, 1, 1, 0]), "categorical")
        ef = prepared("ef", problem).direction(0.1)
        ief = prepared("ief", problem).direction(0.1)
        assert relative_gap(ief, 0.5 * ef) < 1e-12

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_a_gaussian_with_unit_variance_and_ief(self, name):
        """For the Gaussian, H is σ⁻²I: NG on J equals the damped least squares of J."""
        if not name.startswith("gaussian"):
            family = problems.case(name).family.name
            assert family in ("categorical", "bernoulli")
            return
        dense = problems.reference_of(name)
        rows = dense.jacobian.flatten(0, 1) / math.sqrt(problems.VARIANCE)
        target = math.sqrt(problems.VARIANCE) * dense.residual.flatten()
        stacked = torch.cat([rows, 0.1 * torch.eye(rows.shape[1]).double()])
        right = torch.cat([target, torch.zeros(rows.shape[1]).double()])
        expected = torch.linalg.lstsq(stacked, right.unsqueeze(1), driver="gelsd").solution
        assert relative_gap(state_of(name, "ng").direction(0.01), expected) < 1e-10


class TestSampledFisher:
    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_seed_decides(self, name):
        problem = problems.problem_of(name)
        method = ngeval.get_method("sf:2")
        first = prepared(method, problem, seed=5).direction(0.1)
        torch.manual_seed(123)
        assert torch.equal(first, prepared(method, problem, seed=5).direction(0.1))
        assert relative_gap(prepared(method, problem, seed=6).direction(0.1), first) > 1e-3

    def test_evaluate_passes_its_seed_on(self):
        problem = problems.problem_of("categorical-mlp-float64")
        tables = [ngeval.evaluate(problem, ["sf:2"], [0.1], seed=seed) for seed in (0, 0, 1)]
        gammas = [float(t["gamma"].iloc[0]) for t in tables]
        assert gammas[0] == gammas[1] != gammas[2]
        assert [int(t["seed"].iloc[0]) for t in tables] == [0, 0, 1]

    def test_draws_do_not_touch_the_global_generator(self):
        problem = problems.problem_of("gaussian-mlp-float64")
        before = torch.get_rng_state()
        prepared("sf:3", problem, seed=1)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("likelihood", problems.LIKELIHOODS)
    def test_3000_draws_come_within_ten_percent_of_ng(self, likelihood):
        problem, dense = few_samples(likelihood)
        exact = prepared("ng", problem).direction(1.0)
        estimate = sampled_fisher(problem, dense, draws=3000)
        assert relative_gap(estimate, reference.fisher(dense)) < 0.1
        identity = torch.eye(len(estimate), dtype=torch.float64)
        sampled = torch.linalg.solve(estimate + identity, reference.gradient(dense))
        assert relative_gap(sampled, exact) < 0.1
        # The method itself, with 150 draws of each of the four labels.
        direct = prepared("sf:150", problem, seed=0).direction(1.0)
        assert relative_gap(direct, exact) < 0.2

    @pytest.mark.parametrize("likelihood", problems.LIKELIHOODS)
    def test_more_draws_come_closer(self, likelihood):
        problem, _ = few_samples(likelihood)
        exact = prepared("ng", problem).direction(1.0)

        def mean_gap(method: str) -> float:
            states = [prepared(method, problem, seed) for seed in range(20)]
            return float(np.mean([relative_gap(s.direction(1.0), exact) for s in states]))

        few, more = mean_gap("sf:4"), mean_gap("sf:64")
        # Sixteen times the draws: a quarter of the error, within a factor of two.
        assert few / 8 < more < few / 2

    @pytest.mark.slow
    @pytest.mark.parametrize("likelihood", problems.LIKELIHOODS)
    def test_many_draws_come_within_two_percent_of_ng(self, likelihood):
        problem, dense = few_samples(likelihood)
        estimate = sampled_fisher(problem, dense, draws=100_000)
        assert relative_gap(estimate, reference.fisher(dense)) < 0.02
        identity = torch.eye(len(estimate), dtype=torch.float64)
        sampled = torch.linalg.solve(estimate + identity, reference.gradient(dense))
        exact = prepared("ng", problem).direction(1.0)
        assert relative_gap(sampled, exact) < 0.02
        # 3000 rows in the method's own Gram matrix.
        large = prepared("sf:750", problem, seed=1).direction(1.0)
        assert relative_gap(large, exact) < 0.1


@functools.cache
def few_samples(likelihood: str) -> tuple[ngeval.Problem, reference.Dense]:
    case = problems.make(f"{likelihood}-mlp-float64", num_samples=4)
    return case.problem(), case.reference()


def sampled_fisher(problem: ngeval.Problem, dense: reference.Dense, draws: int) -> Tensor:
    """The Fisher of labels that ngeval draws, with the reference's residuals and Jacobians."""
    labels = problem.distribution.sample(draws, torch.Generator().manual_seed(0))
    moments = torch.zeros_like(dense.curvature)
    for n in range(dense.num_samples):
        logits = dense.logits[n : n + 1].expand(draws, -1)
        residuals = reference.residual(logits, labels[:, n], dense.family)
        moments[n] = residuals.T @ residuals / draws
    return reference.fisher(dataclasses.replace(dense, curvature=moments))


class TestDampingScales:
    curved = ("ef", "ief", "sf:2", "ng", "diag", "diag-ef", "diag-ef:0.5")

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_mean_is_n_times_lambda(self, name):
        problem = problems.problem_of(name)
        scaled = ngeval.evaluate(problem, self.curved, [0.0, 0.1], damping_scale="mean")
        plain = ngeval.evaluate(problem, self.curved, [0.0, 0.1 * problems.NUM_SAMPLES])
        np.testing.assert_allclose(scaled["damping_absolute"], plain["damping"], rtol=1e-14)
        np.testing.assert_allclose(scaled["gamma"], plain["gamma"], rtol=1e-12)
        assert sorted(set(scaled["damping"])) == [0.0, 0.1]
        assert set(scaled["damping_scale"]) == {"mean"}

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_mean_is_the_damping_of_mean_reduced_curvature(self, name):
        dense, damping = problems.reference_of(name), 0.1
        count = problems.NUM_SAMPLES
        fisher = reference.fisher(dense) / count
        identity = torch.eye(len(fisher), dtype=torch.float64)
        direction = torch.linalg.solve(
            fisher + damping * identity, reference.gradient(dense) / count
        )
        table = ngeval.evaluate(problems.problem_of(name), ["ng"], [damping], damping_scale="mean")
        expected = reference.gamma(dense, direction)
        assert float(table["gamma"].iloc[0]) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("name", EXACT_NAMES)
    def test_relative_is_the_methods_own_largest_eigenvalue(self, name):
        problem, dense = problems.problem_of(name), problems.reference_of(name)
        table = ngeval.evaluate(problem, self.curved, [0.1], damping_scale="relative")
        for row in table.itertuples():
            labels = problems.labels_of(problem, row.method)
            rows = reference.curvature_rows(dense, row.method, labels)
            if rows is not None:
                largest = float(torch.linalg.svdvals(rows)[0]) ** 2
            elif row.method == "diag":
                largest = float(reference.fisher(dense).diagonal().max())
            else:
                squares = reference.per_sample_gradients(dense).square().sum(0)
                largest = float(squares.max())
            assert row.damping_absolute == pytest.approx(0.1 * largest, rel=1e-9), row.method
            direction = reference.update(dense, row.method, 0.1 * largest, labels)
            assert row.gamma == pytest.approx(reference.gamma(dense, direction), rel=1e-8)

    def test_sgd_has_no_relative_scale(self):
        problem = problems.problem_of("categorical-mlp-float64")
        table = ngeval.evaluate(problem, ["sgd"], [0.0, 0.1, 7.0], damping_scale="relative")
        assert table["damping_absolute"].isna().all()
        assert list(table["status"]) == ["ok"] * 3
        assert table["gamma"].nunique() == 1
        assert table["gamma_over_sgd"].tolist() == [1.0] * 3


class TestNames:
    @pytest.mark.parametrize("name", METHODS)
    def test_the_name_is_kept_as_asked(self, name):
        assert ngeval.get_method(name).name == name
        assert ngeval.get_method(f" {name} ").name == name
        assert ngeval.get_method(name.upper()).name == name

    @pytest.mark.parametrize(
        ("typed", "name"),
        [("SF", "sf"), ("iEF", "ief"), ("EF", "ef"), ("SF:4", "sf:4"), ("AdamW:0", "adamw:0")],
    )
    def test_case_does_not_matter(self, typed, name):
        assert ngeval.get_method(typed).name == name

    def test_objects_pass_through(self):
        method = ngeval.get_method("ef")
        assert ngeval.get_method(method) is method

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("eff", "did you mean 'ef'"),
            ("diagef", "did you mean 'diag-ef'"),
            ("kitten", "known: .*adamw, .*diag-ef, .*ief, kfac, .*ng, "),
            ("", "known:"),
            ("ef:2", "ef takes no parameter"),
            ("ef:", "ef takes no parameter"),
            ("sf:", "sf takes the draws"),
            ("sf:0", "whole number"),
            ("sf:-1", "whole number"),
            ("sf:1.5", "whole number"),
            ("sf:two", "whole number"),
            ("diag-ef:half", "diag-ef:0.5"),
            ("diag-ef:nan", "must be a number"),
            ("diag-ef:inf", "must be a number"),
            (7, r"\.name and \.prepare"),
        ],
    )
    def test_wrong_names_say_what_to_write(self, name, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.get_method(name)

    def test_table_of_methods(self):
        assert set(ngeval.METHODS) >= {m.partition(":")[0] for m in METHODS}
        assert {"kfac-ief", "ekfac", "block-ng", "diag-sf", "diag-ema"} <= set(ngeval.METHODS)
        for entry in ngeval.METHODS.values():
            assert entry.formula
            assert entry.labels
