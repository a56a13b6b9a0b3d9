"""How verdicts follow from rows: on made-up rows, each of them both ways."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ngeval import InputError
from studies import convergence_findings, diagonal_findings, optimization_findings
from studies import why_ef_fails_findings as ef_findings
from studies.base import Finding
from studies.convergence_findings import CROSS_ENTROPY, FOUR_OUTPUTS, ONE_OUTPUT
from studies.statistics import (
    Interval,
    geometric_interval,
    geometric_intervals,
    mean_interval,
    rank_correlation,
    slope_interval,
)
from studies.training_results import outcomes

pytestmark = pytest.mark.second_stage

YES, NO, PARTLY = "confirmed", "not confirmed", "under conditions"


def verdict(findings: list[Finding], words: str) -> str:
    (result,) = [finding for finding in findings if words in finding.claim]
    return result.verdict


class TestStatistics:
    def test_mean_against_scipy(self):
        sample = np.array([1.0, 2.5, 3.0, 7.0])
        result = mean_interval(sample)
        ends = stats.t.interval(0.95, 3, loc=sample.mean(), scale=stats.sem(sample))
        assert result == pytest.approx((sample.mean(), *ends))
        logs = geometric_interval(np.exp(sample))
        assert logs == pytest.approx(np.exp(result))

    def test_slope_by_hand(self):
        x, y = np.arange(5.0), np.array([0.1, 0.9, 2.2, 2.8, 4.1])
        slope = np.cov(x, y)[0, 1] / x.var(ddof=1)
        rest = y - y.mean() - slope * (x - x.mean())
        error = math.sqrt((rest**2).sum() / 3 / ((x - 2) ** 2).sum())
        half = stats.t.ppf(0.975, 3) * error
        assert slope_interval(x, y) == pytest.approx((slope, slope - half, slope + half))

    def test_rank_correlation_draws_groups(self):
        generator = np.random.default_rng(0)
        centre = np.repeat(generator.normal(size=8), 50)
        x, y = centre, np.repeat(generator.normal(size=8), 50)
        by_group = rank_correlation(x, y, list(np.repeat(range(8), 50)))
        by_point = rank_correlation(x, y, list(range(400)))
        assert by_group.value == by_point.value == pytest.approx(stats.spearmanr(x, y)[0])
        assert by_group.high - by_group.low > 3 * (by_point.high - by_point.low)
        assert rank_correlation([1, 2, 3], [1, 4, 9], [0, 1, 2]).value == 1

    def test_too_few_have_no_interval(self):
        one = mean_interval([2.0])
        assert one.value == 2
        assert not one.is_below(10)
        assert not one.is_above(-10)
        assert "no interval" in one.text()
        assert math.isnan(slope_interval([1, 1, 1], [1, 2, 3]).value)

    def test_by_value_in_order(self):
        rows = pd.DataFrame({"x": [2, 1, 1, 2], "y": [4.0, 1.0, 4.0, math.inf]})
        result = geometric_intervals(rows, "x", "y")
        assert list(result) == [1, 2]
        assert [interval.value for interval in result.values()] == pytest.approx([2, 4])
        assert Interval(1, 0.5, 2).text() == "1 [0.5, 2]"


def ef_rows(
    *, equal=1.0, ief=1.0, slope=-1.0, rising=True, ief_over=0.5, sensitive=4.0, settles=False
) -> pd.DataFrame:
    """Rows of *why EF fails* in which claims hold or not."""
    samples = [
        {
            "part": "samples",
            "method": method,
            "epoch": epoch,
            "sample": n,
            "residual_square": 2.0**-n,
            "gradient_norm": 2.0**-n,
            "loss_change": -(equal**n if method == "ef" else ief**n * 2.0**-n),
            "projection": 2.0 ** (-n * (slope if method == "ef" else 1)),
        }
        for method, epoch, n in itertools.product(("sgd", "ef", "ief"), (0, 1), range(6))
    ]
    gammas = []
    for seed, epoch, batch in itertools.product(range(2), range(4), range(3)):
        noise = 1 + 0.01 * ((seed + 2 * batch) % 3)
        for method, damping in itertools.product(("sgd", "ef", "sf", "ief"), (1e-7, 1.0)):
            value = {"sgd": 1.0, "ef": 2.0 * noise, "sf": 2.0, "ief": 2.0 * ief_over * noise}[
                method
            ]
            value *= 1 + (epoch if rising else -epoch / 10) * (method == "ef")
            if damping == 1.0 and method in ("ef", "sf"):
                value /= sensitive
            gammas.append(
                {
                    "part": "gamma",
                    "status": "ok",
                    "training_seed": seed,
                    "epoch": epoch,
                    "batch": batch,
                    "method": method,
                    "damping": damping,
                    "gamma": value,
                    "gamma_over_sgd": value,
                    "imbalance": 10.0**epoch * noise,
                }
            )
    toy = [
        {
            "part": "toy",
            "method": method,
            "start": 0,
            "step": step,
            "cosine_ng": 0.5 if method == "ef" and not settles else 1.0,
            "loss": 1e-9 if method == "ef" and settles else 1e-3**step,
        }
        for method, step in itertools.product(("sgd", "ief", "ef"), range(3))
    ]
    for row in toy:
        if row["method"] == "ef" and not settles:
            row["loss"] = 2.0
    return pd.DataFrame([*samples, *gammas, *toy])


class TestWhyEfFails:
    def test_all_hold(self):
        result = ef_findings.findings(ef_rows())
        for words in ("same amount", "in proportion to", "projection", "imbalance", "near-zero λ"):
            matching = [f for f in result if words in f.claim]
            assert {f.verdict for f in matching} == {YES}, words
        assert verdict(result, "linear least squares") == YES

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"equal": 0.5}, "same amount"),
            ({"ief": 1.5}, "in proportion to"),
            ({"slope": 0.0}, "1/‖g_n‖"),
            ({"rising": False}, "imbalance"),
            ({"ief_over": 9.0}, "SF at near-zero λ"),
            ({"ief_over": 9.0}, "best damping"),
        ],
    )
    def test_each_can_fail(self, change, words):
        assert verdict(ef_findings.findings(ef_rows(**change)), words) == NO

    def test_conditions(self):
        assert verdict(ef_findings.findings(ef_rows(sensitive=1.0)), "robust") == PARTLY
        result = ef_findings.findings(ef_rows(settles=True))
        assert verdict(result, "linear least squares") == PARTLY


def descent(kind, method, rate, seed, losses, times, **more) -> pd.DataFrame:
    columns = {"kind": kind, "method": method, "learning_rate": rate, "seed": seed, "status": "ok"}
    table = pd.DataFrame({"step": range(len(losses)), "time": times, "loss": losses})
    return table.assign(**columns, **more)


def convergence_rows(*, rate=1.0, exponent=-1.0, within=1.0, other=10.0) -> pd.DataFrame:
    """Rows of *convergence*: the rate times the predicted one, and so on."""
    times = 0.1 * np.arange(1, 41)
    tables = []
    for kind, seed in itertools.product((ONE_OUTPUT, FOUR_OUTPUTS, CROSS_ENTROPY), range(3)):
        start = 1 + 0.01 * seed
        predicted = 2 * math.log(0.9) / 0.1
        losses = start * np.exp(rate * predicted * times)
        low, high = losses, losses
        if kind == CROSS_ENTROPY:
            losses, low, high = (start * times**power for power in (exponent, -1.1, -0.9))
        columns = {"within": within, "falling": 1.0, "low": low, "high": high}
        tables.append(descent(kind, "ief", 0.1, seed, losses, times, **columns))
        for method in ("ef", "sgd"):
            tables.append(descent(kind, method, 0.1, seed, other * losses, times))
            tables.append(descent(kind, method, 0.9, seed, 1e9 * losses, times))
    return pd.concat(tables, ignore_index=True)


class TestConvergence:
    def test_all_hold(self):
        result = convergence_findings.findings(convergence_rows())
        assert [finding.verdict for finding in result] == [YES] * 4
        assert "predicted -2.11" in result[0].evidence

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rate": 0.5}, "converges linearly"),
            ({"exponent": -0.4}, "sub-linearly"),
            ({"within": 0.9}, "by itself"),
            ({"other": 0.1}, "below EF's and SGD's"),
        ],
    )
    def test_each_can_fail(self, change, words):
        assert verdict(convergence_findings.findings(convergence_rows(**change)), words) == NO

    def test_one_number_of_outputs_alone_is_a_condition(self):
        good, bad = convergence_rows(), convergence_rows(rate=0.5)
        mixed = pd.concat([good[good["kind"] != FOUR_OUTPUTS], bad[bad["kind"] == FOUR_OUTPUTS]])
        assert verdict(convergence_findings.findings(mixed), "converges linearly") == PARTLY

    def test_an_optimizer_has_its_best_rate(self):
        best = convergence_findings.compared(convergence_rows(), ONE_OUTPUT)
        assert set(best["sgd"]["learning_rate"]) == {0.1}


def diagonal_rows(*, by_width=-0.5, by_depth=0.3, level=1.0, over_sgd=1.5) -> pd.DataFrame:
    """Rows of *diagonal* with power laws in width and depth."""
    generator = np.random.default_rng(0)
    rows = []
    cells = itertools.product((1, 2, 4), (8, 32), range(3), (1.0, 0.1), range(2))
    for depth, width, seed, threshold, batch in cells:
        value = 1 + level * (width / 8) ** by_width * depth**by_depth
        value *= 1 + 0.01 * generator.random()
        for method in diagonal_findings.NAMES:
            for damping in (1e-8, 1.0):
                columns = {"depth": depth, "width": width, "seed": seed, "threshold": threshold}
                ratios = {"gamma_over_ng": value, "gamma_over_sgd": over_sgd}
                rows.append(
                    columns
                    | {"batch": batch, "method": method, "damping": damping, "status": "ok"}
                    | ratios
                )
    return pd.DataFrame(rows)


class TestDiagonal:
    def test_all_but_enough(self):
        result = diagonal_findings.findings(diagonal_rows())
        assert [finding.verdict for finding in result] == [NO, YES, YES, YES]

    def test_others(self):
        rows = diagonal_rows(by_width=0.0, by_depth=0.0, level=0.2, over_sgd=0.7)
        result = diagonal_findings.findings(rows)
        assert [finding.verdict for finding in result] == [YES, NO, NO, NO]

    def test_some_networks_are_a_condition(self):
        rows = diagonal_rows(by_width=-1.0, by_depth=0.0, level=1.0)
        assert verdict(diagonal_findings.findings(rows), "is enough") == PARTLY

    def test_slope_holds_the_other_axis(self):
        """Where only shallow networks are wide, depth does not pass for an effect of width."""
        rows = diagonal_rows(by_width=0.0, by_depth=1.0)
        best = diagonal_findings.at_best(rows[(rows["depth"] == 1) | (rows["width"] == 8)])
        slope = diagonal_findings.within_slope(best, "diag", 1.0, "width")
        assert abs(slope.value) < 0.02


def training_rows(*, accuracy=0.1, ratio=0.5) -> pd.DataFrame:
    """Rows of *optimization*: iEF's lead in accuracy, and its training loss over the others'."""
    rows = []
    names = ("adamw", "adafactor", "sgd", "ef", "sf", "ief")
    for task, name, seed, epoch in itertools.product(("a", "b"), names, range(4), (0, 1)):
        lead = accuracy if name == "ief" else 0.0
        wobble = 0.001 * ((seed + len(name)) % 3)
        rows.append(
            {
                "task": task,
                "optimizer": name,
                "phase": "final",
                "trial": 0,
                "learning_rate": 0.1,
                "damping": math.nan,
                "monitor": "validation_loss",
                "seed": seed,
                "epoch": epoch,
                "status": "ok",
                "train_loss": (ratio if name == "ief" else 1.0) * (1 + wobble),
                "validation_loss": 2.0 - epoch,
                "validation_accuracy": 0.5,
                "test_loss": 1.0,
                "test_accuracy": 0.5 + lead + wobble,
            }
        )
    return pd.DataFrame(rows)


class TestOptimization:
    def test_all_hold(self):
        result = optimization_findings.findings(training_rows())
        assert [finding.verdict for finding in result] == [YES] * 5

    def test_none_holds(self):
        result = optimization_findings.findings(training_rows(accuracy=-0.1, ratio=2.0))
        assert [finding.verdict for finding in result] == [NO] * 5

    def test_one_task_alone_is_a_condition(self):
        good, bad = training_rows(), training_rows(accuracy=-0.1, ratio=2.0)
        mixed = pd.concat([good[good["task"] == "a"], bad[bad["task"] == "b"]])
        verdicts = [finding.verdict for finding in optimization_findings.findings(mixed)]
        assert verdicts[:4] == [PARTLY] * 4

    def test_differences_are_paired_by_seed(self):
        ended = outcomes(training_rows())
        result = optimization_findings.paired(ended, "a", "adamw", "test_accuracy")
        rows = training_rows()
        last = rows[(rows["task"] == "a") & (rows["epoch"] == 1)].set_index("seed")
        local, other = (
            last.loc[last["optimizer"] == name, "test_accuracy"] for name in ("ief", "adamw")
        )
        expected = stats.ttest_rel(local, other).confidence_interval(0.95)
        assert result[1:] == pytest.approx(tuple(expected))

    def test_missing_optimizers(self):
        rows = training_rows()
        with pytest.raises(InputError, match="lack iEF"):
            optimization_findings.findings(rows[rows["optimizer"] != "ief"])
