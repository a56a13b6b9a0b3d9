"""The table that evaluate returns, failure as data, and the summary over batches."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

import ngeval
from ngeval.analysis.intervals import group_means
from ngeval.curvature.updates import DirectionUpdates
from ngeval.grading.evaluate import COLUMNS
from ngeval.grading.gradient_norms import sample_table
from tests import problems
from tests.problems import prepared

RATIOS = ("gamma_over_sgd", "gamma_over_ng")


def problem() -> ngeval.Problem:
    return problems.problem_of("categorical-mlp-float64")


def flat_problem() -> ngeval.Problem:
    """A batch that the model fits exactly: every residual is zero."""
    model = nn.Linear(3, 2).double()
    inputs = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        targets = model(inputs)
    return ngeval.Problem(model, inputs, targets, "gaussian")


class Failing:
    """A method that cannot be prepared, or not be solved."""

    def __init__(self, error: Exception, at: str = "prepare") -> None:
        self.name = "failing"
        self.error, self.at = error, at
        self.largest_curvature = 1.0

    def prepare(self, problem, kernel, seed=0):
        if self.at == "prepare":
            raise self.error
        return self

    def updates(self, dampings):
        raise self.error


class Mine:
    """A user's own method: the gradient's direction halved, by the documented protocol."""

    name = "mine"

    def prepare(self, problem, kernel, seed=0):
        self.state = prepared("sgd", problem)
        self.largest_curvature = 2.0
        return self

    def direction(self, damping):
        return 0.5 * self.state.direction(damping)

    def updates(self, dampings):
        return DirectionUpdates(len(dampings), lambda i: self.direction(dampings[i]))


class TestSampleTable:
    @pytest.mark.parametrize("failing", ["block-ng", Failing(RuntimeError("broken"), "prepare")])
    def test_a_method_that_fails_loses_its_own_column_alone(self, failing):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()
        inputs, targets = torch.randn(16, 20).double(), torch.arange(16) % 10
        problem = ngeval.Problem(model, inputs, targets, "categorical", memory=400_000)
        failing = ngeval.get_method(failing)
        methods, steps = [failing, ngeval.get_method("ef")], []
        table = sample_table(problem, methods, 1e-3, 0, steps.append)
        assert table[f"loss_change_{failing.name}"].isna().all()
        assert (table["loss_change_ef"] < 0).all()
        reason = "over the memory budget" if failing.name == "block-ng" else "RuntimeError: broken"
        assert table["reason"].str.startswith(f"{failing.name}: ").all()
        assert table["reason"].str.contains(reason).all()
        assert steps == [failing.name, "ef"]
        # The same methods in a table of γ: one failed row, and ef is kept.
        graded = ngeval.evaluate(problem, methods, [1e-3], natural=False)
        assert graded["status"].tolist() == ["failed", "ok"]
        assert graded["reason"][0] in table["reason"][0]


class TestTable:
    def test_columns_and_rows(self):
        table = ngeval.evaluate(problem(), ["sgd", "sf:2"], [1.0, 0.0, 1e-3], seed=4)
        assert list(table.columns) == COLUMNS
        assert table["method"].tolist() == ["sgd"] * 3 + ["sf:2"] * 3
        assert table["damping"].tolist() == [1.0, 0.0, 1e-3] * 2
        assert table.index.tolist() == list(range(6))

    def test_what_is_constant(self):
        row = ngeval.evaluate(problem(), ["ef"], [1.0], seed=4).iloc[0]
        assert row["status"] == "ok"
        assert row["reason"] == ""
        assert row["damping_scale"] == "absolute"
        assert row["num_samples"] == 7
        assert row["num_parameters"] == 43
        assert row["likelihood"] == "categorical"
        assert row["dtype"] == "float64"
        assert row["engine"] == problem().engine
        assert row["seed"] == 4
        assert row["loss"] == pytest.approx(float(problem().loss.mean()))
        assert row["gamma_min"] == ngeval.gamma_min(problem())
        assert row["gamma_floor"] == ngeval.gamma_floor(problem())

    def test_ratios_are_ratios(self):
        table = ngeval.evaluate(problem(), ["sgd", "ief"], [1e-3, 1.0])
        sgd = table.loc[table["method"] == "sgd", "gamma"].iloc[0]
        np.testing.assert_allclose(table["gamma_over_sgd"], table["gamma"] / sgd, rtol=1e-14)
        over = table["gamma"] / ngeval.gamma_min(problem())
        np.testing.assert_allclose(table["gamma_over_ng"], over, rtol=1e-14)
        gamma = table["curvature"].pow(0.5) / table["decrease"].abs()
        np.testing.assert_allclose(table["gamma"], gamma, rtol=1e-14)

    def test_sgd_is_the_yardstick_though_not_asked_for(self):
        alone = ngeval.evaluate(problem(), ["ef"], [1.0])
        both = ngeval.evaluate(problem(), ["sgd", "ef"], [1.0])
        assert alone["gamma_over_sgd"].iloc[0] == both["gamma_over_sgd"].iloc[1]

    def test_defaults(self):
        table = ngeval.evaluate(problem())
        assert table["method"].unique().tolist() == ["sgd", "ef", "sf", "ief", "diag", "ng"]
        assert (table["status"] == "ok").all()

    def test_the_same_twice(self):
        first, second = (ngeval.evaluate(problem(), seed=1) for _ in range(2))
        pd.testing.assert_frame_equal(first, second)

    def test_methods_as_text_and_repeated_dampings(self):
        table = ngeval.evaluate(problem(), "sgd, ef", [1.0, 1.0, 2, np.float32(2.0)])
        assert table["method"].tolist() == ["sgd", "sgd", "ef", "ef"]
        assert table["damping"].tolist() == [1.0, 2.0] * 2

    def test_steps_are_reported(self):
        steps: list[str] = []
        ngeval.evaluate(problem(), ["ef", "sf:2"], [1.0], on_step=steps.append)
        assert steps == ["ef", "sf:2", "gamma_min"]

    def test_a_method_of_ones_own(self):
        table = ngeval.evaluate(problem(), ["sgd", Mine()], [1.0, 2.0])
        mine, sgd = (table[table["method"] == name] for name in ("mine", "sgd"))
        np.testing.assert_allclose(mine["gamma"], sgd["gamma"], rtol=1e-14)
        np.testing.assert_allclose(mine["update_norm"], 0.5 * sgd["update_norm"], rtol=1e-14)
        relative = ngeval.evaluate(problem(), [Mine()], [3.0], damping_scale="relative")
        assert relative["damping_absolute"].tolist() == [6.0]


class TestFailure:
    @pytest.mark.parametrize("at", ["prepare", "tangents"])
    @pytest.mark.parametrize(
        "error",
        [
            ngeval.NumericalError("K is broken"),
            ngeval.EngineError("K is broken"),
            torch.linalg.LinAlgError("K is broken"),
            MemoryError("K is broken"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_a_failing_method_becomes_rows(self, error, at):
        table = ngeval.evaluate(problem(), ["sgd", Failing(error, at), "ef"], [0.0, 1.0])
        assert table["status"].tolist() == ["ok"] * 2 + ["failed"] * 2 + ["ok"] * 2
        failed = table[table["status"] == "failed"]
        assert failed["damping"].tolist() == [0.0, 1.0]
        assert failed["reason"].str.contains("K is broken").all()
        for column in ("gamma", "gamma_over_sgd", "gamma_over_ng", "decrease", "update_norm"):
            assert failed[column].isna().all()
        alone = ngeval.evaluate(problem(), ["sgd", "ef"], [0.0, 1.0])
        rest = table[table["status"] == "ok"].reset_index(drop=True)
        pd.testing.assert_frame_equal(rest, alone)

    def test_a_kernel_that_does_not_fit_gives_the_same_by_a_krylov_run(self):
        case = problems.case("categorical-mlp-float64")
        small = case.problem(memory=17_000)
        methods = ["sgd", "ef", "ng", "diag"]
        table = ngeval.evaluate(small, methods, [1.0], gap=1e-12).set_index("method")
        whole = ngeval.evaluate(problem(), methods, [1.0]).set_index("method")
        assert (table["status"] == "ok").all()
        assert (table["iterations"] > 0).all()
        assert (whole["iterations"] == 0).all()
        for method in methods:
            assert table.loc[method, "gamma"] == pytest.approx(whole.loc[method, "gamma"])
            result = table.loc[method, ["gamma_ng_lower", "gamma_ng_upper"]].to_numpy(float)
            assert result == pytest.approx(whole.loc["ng", "gamma"], rel=1e-6)

    def test_zero_gradient_is_undefined(self):
        table = ngeval.evaluate(flat_problem(), problems.METHODS, [0.0, 1.0])
        assert set(table["status"]) == {"undefined"}
        assert table["gamma"].isna().all()
        assert (table["reason"] != "").all()
        assert (table["gamma_floor"] == math.inf).all()
        assert (table["gamma_min"] == math.inf).all()
        assert (table["update_norm"] == 0).all()

    def test_zero_gradient_in_the_metrics(self):
        flat = flat_problem()
        assert ngeval.gamma_floor(flat) == math.inf
        assert ngeval.gamma_min(flat) == math.inf
        with pytest.raises(ngeval.NumericalError, match="undefined"):
            flat.gamma(torch.ones(flat.num_parameters).double())
        table = ngeval.gradient_norms(flat)
        assert (table["gradient_norm"] == 0).all()
        assert math.isnan(table.attrs["imbalance"])

    def test_one_zero_gradient_makes_the_imbalance_infinite(self):
        model = nn.Linear(3, 2).double()
        inputs = torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            targets = model(inputs)
            targets[1:] += 1.0
        table = ngeval.gradient_norms(ngeval.Problem(model, inputs, targets, "gaussian"))
        assert table.attrs["imbalance"] == math.inf

    def test_cancelling_gradients_are_undefined_for_sgd(self):
        # Two equal inputs with opposite residuals: g = 0 though no g_n is.
        model = nn.Linear(2, 1, bias=False).double()
        inputs = torch.tensor([[0.3, 0.7], [0.3, 0.7]]).double()
        with torch.no_grad():
            targets = model(inputs) + torch.tensor([[1.0], [-1.0]]).double()
        cancelled = ngeval.Problem(model, inputs, targets, "gaussian")
        table = ngeval.evaluate(cancelled, ["sgd", "diag", "ng"], [1.0])
        assert set(table["status"]) <= {"undefined", "uncertain"}
        assert ngeval.gamma_min(cancelled) > 1e6

    def test_a_label_of_vanishing_probability_fails_no_method(self):
        model = nn.Linear(1, 2, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[2000.0], [-2000.0]]))
        inputs, targets = torch.tensor([[1.0], [1e-3]]).double(), torch.tensor([1, 0])
        sure = ngeval.Problem(model, inputs, targets, "categorical")
        table = ngeval.evaluate(sure, ["sgd", "ef", "ng"], [1.0]).set_index("method")
        assert table.loc["sgd", "status"] == "ok"
        assert table.loc["ef", "status"] == "ok"
        assert table.loc["ng", "status"] == "uncertain"  # at 4000 nats
        assert (table["gamma_floor"] == 0).all()


class TestConveniences:
    def test_one_damping_and_one_optimizer(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
        problem = ngeval.Problem(model, torch.eye(3), torch.tensor([0, 1, 1]), "categorical")
        adam = torch.optim.Adam(model.parameters())
        table = ngeval.evaluate(problem, ["sgd", adam], 1e-3)
        assert table["method"].tolist() == ["sgd", "adam"]
        assert table["damping"].tolist() == [1e-3, 1e-3]
        expected = problem.gamma(prepared(ngeval.OptimizerStep(adam), problem).direction(0.0))
        assert table["gamma"][1] == pytest.approx(expected, rel=1e-6)

    def test_a_failed_row_covers_nothing(self):
        model = nn.Linear(3, 2).eval()
        problem = ngeval.Problem(model, torch.eye(3), torch.tensor([0, 1, 1]), "categorical")
        stranger = torch.optim.Adam(nn.Linear(3, 2).parameters())
        table = ngeval.evaluate(problem, [stranger], 1.0)
        assert table["status"].item() == "failed"
        assert table["coverage"].isna().all()


class TestBadArguments:
    @pytest.mark.parametrize(
        ("dampings", "words"),
        [
            ([], "no damping"),
            ([-1.0], "-1.0 is not allowed"),
            ([1.0, math.nan], "nan is not allowed"),
            ([math.inf], "inf is not allowed"),
            (["small"], "must be numbers"),
            ([None], "must be numbers"),
        ],
    )
    def test_dampings(self, dampings, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.evaluate(problem(), ["sgd"], dampings)

    @pytest.mark.parametrize(
        ("methods", "words"),
        [
            ([], "no method given; known: block-ng, diag"),
            (["sgd", "kfca"], "unknown method 'kfca'"),
            (["sgdd"], "did you mean 'sgd'"),
            (["sgd", "sgd"], "named twice: sgd"),
            ("ef,ief,ef", "named twice: ef"),
        ],
    )
    def test_methods(self, methods, words):
        with pytest.raises(ngeval.InputError, match=words):
            ngeval.evaluate(problem(), methods, [1.0])

    def test_damping_scale(self):
        with pytest.raises(ngeval.InputError, match="did you mean 'relative'"):
            ngeval.evaluate(problem(), ["sgd"], [1.0], damping_scale="relativ")


def rows(values: list[float], method: str = "ef", damping: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "batch": range(len(values)),
            "method": method,
            "damping": damping,
            "gamma": [2 * value for value in values],
            "gamma_floor": [0.1 * (1 + i) for i in range(len(values))],
            "gamma_over_sgd": values,
            "gamma_over_ng": [3 * value for value in values],
            "status": "ok",
        }
    )


class TestSummary:
    values = np.exp(np.random.default_rng(7).standard_normal(12)).tolist()

    def test_means(self):
        summary = ngeval.summarize(rows(self.values))
        assert len(summary) == 1
        row = summary.iloc[0]
        assert (row["method"], row["damping"], row["batches"]) == ("ef", 1.0, 12)
        geomean = math.exp(np.mean(np.log(self.values)))
        for ratio, factor in zip(RATIOS, (1, 3), strict=True):
            assert row[f"{ratio}_mean"] == pytest.approx(factor * np.mean(self.values))
            assert row[f"{ratio}_geomean"] == pytest.approx(factor * geomean)

    def test_the_floor_over_sgd_is_a_geometric_mean(self):
        # γ_SGD is 2 in every batch of `rows`, the floors are 0.1, 0.2 and 0.3.
        row = ngeval.summarize(rows([1.0, 2.0, 4.0])).iloc[0]
        assert row["floor_over_sgd"] == pytest.approx((0.1 * 0.2 * 0.3) ** (1 / 3) / 2)

    def test_a_floor_of_zero(self):
        # A label of probability 0 in one batch.
        table = rows([1.0, 2.0])
        table.loc[1, "gamma_floor"] = 0.0
        assert ngeval.summarize(table)["floor_over_sgd"].tolist() == [0.0]

    def test_a_missing_gamma_min_leaves_the_other_ratio(self):
        table = rows([1.0, 3.0]).assign(gamma_over_ng=math.nan)
        row = ngeval.summarize(table, confidence=0.9).iloc[0]
        assert row["gamma_over_sgd_mean_high"] == 3.0
        assert math.isnan(row["gamma_over_ng_mean"])
        assert math.isnan(row["gamma_over_ng_mean_high"])

    @pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
    def test_intervals_are_those_of_a_bootstrap_by_hand(self, confidence):
        values = np.array(self.values)
        chosen = np.random.default_rng(1).integers(0, 12, (40_000, 12))
        ends = [50 * (1 - confidence), 50 * (1 + confidence)]
        expected = {
            "mean": np.percentile(values[chosen].mean(1), ends),
            "geomean": np.exp(np.percentile(np.log(values)[chosen].mean(1), ends)),
        }
        summary = ngeval.summarize(rows(self.values), confidence=confidence, resamples=20_000)
        for kind, interval in expected.items():
            result = summary[[f"gamma_over_sgd_{kind}_low", f"gamma_over_sgd_{kind}_high"]].iloc[0]
            # Two Monte Carlo estimates: three percent of the interval's width apart.
            tolerance = 0.03 * (interval[1] - interval[0])
            np.testing.assert_allclose(result.to_numpy(float), interval, rtol=0, atol=tolerance)

    def test_intervals_are_scipys_with_the_same_draws(self):
        values = np.random.default_rng(3).lognormal(size=(7, 5))
        draws = np.random.default_rng(4)
        expected = scipy.stats.bootstrap(
            (values,), np.mean, axis=-1, method="percentile", n_resamples=500, rng=draws
        ).confidence_interval
        intervals = group_means(list(values), resamples=500, seed=4)[1:]
        np.testing.assert_allclose(intervals, expected, rtol=1e-12)

    def test_two_batches_are_a_known_case(self):
        # Means of two draws: 1, 2 or 3 with probabilities ¼, ½, ¼.
        row = ngeval.summarize(rows([1.0, 3.0]), confidence=0.9).iloc[0]
        result = row[["gamma_over_sgd_mean_low", "gamma_over_sgd_mean", "gamma_over_sgd_mean_high"]]
        assert result.tolist() == [1.0, 2.0, 3.0]
        row = ngeval.summarize(rows([1.0, 3.0]), confidence=0.4).iloc[0]
        result = row[["gamma_over_sgd_mean_low", "gamma_over_sgd_mean", "gamma_over_sgd_mean_high"]]
        assert result.tolist() == [2.0, 2.0, 2.0]

    def test_equal_batches_have_an_interval_of_no_width(self):
        row = ngeval.summarize(rows([2.0, 2.0, 2.0])).iloc[0]
        for end in ("mean", "mean_low", "mean_high", "geomean", "geomean_low", "geomean_high"):
            assert row[f"gamma_over_sgd_{end}"] == pytest.approx(2.0, rel=1e-15)

    def test_one_batch_has_no_interval(self):
        row = ngeval.summarize(rows([2.0])).iloc[0]
        assert row["batches"] == 1
        assert row["gamma_over_sgd_mean"] == 2.0
        assert math.isnan(row["gamma_over_sgd_mean_low"])
        assert math.isnan(row["gamma_over_ng_geomean_high"])

    def test_groups_keep_their_order_and_their_length(self):
        table = pd.concat(
            [
                rows([1.0, 2.0, 4.0], "sgd", 1.0),
                rows([5.0], "ef", 10.0),
                rows([1.0, 1.5], "ef", 1e-3),
            ]
        )
        summary = ngeval.summarize(table)
        assert summary["method"].tolist() == ["sgd", "ef", "ef"]
        assert summary["damping"].tolist() == [1.0, 10.0, 1e-3]
        assert summary["batches"].tolist() == [3, 1, 2]
        alone = ngeval.summarize(rows([1.0, 1.5], "ef", 1e-3))
        pd.testing.assert_frame_equal(summary.iloc[2:].reset_index(drop=True), alone)

    def test_only_rows_that_are_ok_count(self):
        table = rows([1.0, 2.0, math.nan])
        table.loc[2, "status"] = "failed"
        pd.testing.assert_frame_equal(ngeval.summarize(table), ngeval.summarize(rows([1.0, 2.0])))

    def test_no_row_that_is_ok(self):
        table = rows([1.0, 2.0]).assign(status="failed")
        summary = ngeval.summarize(table)
        assert len(summary) == 0
        assert "gamma_over_sgd_mean_low" in summary.columns

    def test_missing_columns_are_left_out_of_by(self):
        table = rows(self.values).assign(checkpoint="a.pt")
        assert list(ngeval.summarize(table).columns)[:3] == ["checkpoint", "method", "damping"]
        assert list(ngeval.summarize(rows(self.values)).columns)[:2] == ["method", "damping"]
        assert list(ngeval.summarize(table, by=["method"]).columns)[:2] == ["method", "batches"]
        with pytest.raises(ngeval.InputError, match="none of the columns"):
            ngeval.summarize(table, by=["epoch"])

    def test_the_seed_decides(self):
        first = ngeval.summarize(rows(self.values), seed=1)
        pd.testing.assert_frame_equal(first, ngeval.summarize(rows(self.values), seed=1))
        second = ngeval.summarize(rows(self.values), seed=2)
        column = "gamma_over_sgd_mean_low"
        assert first[column].iloc[0] != second[column].iloc[0]

    def test_rows_of_evaluate(self):
        tables = [
            ngeval.evaluate(
                problems.make("categorical-mlp-float64", seed).problem(), ["ef", "ng"], [1e-3, 1.0]
            )
            for seed in range(3)
        ]
        summary = ngeval.summarize(pd.concat(tables))
        assert summary["batches"].tolist() == [3] * 4
        means = pd.concat(tables).groupby(["method", "damping"])["gamma_over_sgd"].mean()
        for row in summary.itertuples():
            assert row.gamma_over_sgd_mean == pytest.approx(means[row.method, row.damping])
            assert row.gamma_over_sgd_mean_low <= row.gamma_over_sgd_mean
            assert row.gamma_over_sgd_mean <= row.gamma_over_sgd_mean_high
