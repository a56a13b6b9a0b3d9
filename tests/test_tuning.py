"""Tuning: equal budgets, reproducible draws, and what diverges or fails."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

from ngeval.errors import InputError, TaskError
from ngeval.training import Training
from studies.tuning import COLUMNS, Tuning, grid
from tests.trainings import ALONE, CLASSES, MISLED, NUMBERS, load_batches

pytestmark = pytest.mark.second_stage


def rates(*values):
    return {"learning_rate": values}


def tuning(spaces, task=CLASSES, trials=None, seeds=1, **options):
    training = Training(task, None, **{"epochs": 1, "batch_size": 24} | options)
    return Tuning(training, spaces, trials, seeds)


def rows_of(job) -> pd.DataFrame:
    return pd.concat(list(job.run()), ignore_index=True)


def trainings(rows) -> pd.DataFrame:
    return rows.drop_duplicates(["optimizer", "phase", "trial", "seed"])


def tried(rows) -> dict[str, list[tuple[float, float]]]:
    """Learning rates and dampings of the search by optimizer, in order."""
    single = trainings(rows)
    return {
        name: list(zip(part["learning_rate"], part["damping"], strict=True))
        for name, part in single[single["phase"] == "search"].groupby("optimizer", sort=False)
    }


class TestSettings:
    def test_a_grid_is_every_rate_with_every_damping(self):
        space = {"learning_rate": [0.1, 1.0], "damping": [1e-4, 1e-2, 1.0]}
        rows = rows_of(tuning({"ief": space}, epochs=0))
        assert tried(rows) == {"ief": list(itertools.product([0.1, 1.0], [1e-4, 1e-2, 1.0]))}
        assert trainings(rows)["trial"].tolist()[:6] == list(range(6))
        assert len(grid(space)) == 6

    def test_draws_are_reproducible_and_between_the_ends(self):
        spaces = {
            "sgd": rates(0.01, 1.0),
            "ief": {"learning_rate": [0.01, 1.0], "damping": [1e-6, 1e-2]},
        }
        first, again, other = (
            tried(rows_of(tuning(spaces, trials=40, epochs=0, seed=seed))) for seed in (0, 0, 1)
        )
        assert {name: len(settings) for name, settings in first.items()} == {"sgd": 40, "ief": 40}
        np.testing.assert_equal(first, again)
        assert first["ief"] != other["ief"]
        for rate, damping in first["ief"]:
            assert 0.01 <= rate <= 1.0
            assert 1e-6 <= damping <= 1e-2
        places = np.log10([rate for rate, _ in first["sgd"]]) / 2 + 1
        assert 0.35 < places.mean() < 0.65  # even in the logarithm
        assert np.abs(np.corrcoef(np.log(first["ief"]).T)[0, 1]) < 0.5

    @pytest.mark.parametrize(
        ("spaces", "options", "message"),
        [
            ({}, {}, "no optimizer"),
            ({"iff": rates(1.0)}, {}, "did you mean 'ief'"),
            ({"sgd": rates(0.1)}, {"trials": 0}, "at least 1"),
            ({"sgd": rates(0.1)}, {"trials": 100_000_000}, "trials must be at least 1 and at most"),
            ({"ief": rates(*range(1, 1002))}, {}, "at most 1000, not 1001"),
            ({"sgd": {"learning_rate": [1.0], "damping": [1.0]}}, {}, "no damping"),
            ({"sgd": rates(0.1, -1.0)}, {}, "learning rate must be positive"),
            ({"ief": {"damping": [-1.0]}}, {}, "damping must be ≥ 0"),
            ({"ief": rates()}, {}, "trials must be at least 1"),
            ({"sgd": rates(0.1), "ief": rates(0.1, 1.0)}, {}, "sgd: 1, ief: 2"),
            ({"ief": {"damping": [0, 1]}}, {"trials": 2}, "log-uniformly"),
            ({"sgd": rates(1.0)}, {"seeds": 0}, "seeds must be at least 1"),
            ({"sgd": rates(1.0)}, {"seeds": 1001}, "seeds must be at least 1 and at most 1000"),
            ({"sgd": rates(1.0)}, {"patience": 1, "task": ALONE}, "'alone' has none"),
            ({"sgd": rates(1.0)}, {"epochs": -1}, "epochs must be ≥ 0"),
            ({"sgd": rates(1.0)}, {"max_norm": -1.0}, "max norm must be positive"),
            ({"adamw": rates(1.0)}, {"momentum": 0.5}, "adamw has no momentum"),
            ({"torch.optim.SparseAdam": rates(1.0)}, {}, "torch.optim.SparseAdam.*dense gradient"),
        ],
    )
    def test_refused_before_any_training(self, spaces, options, message, monkeypatch):
        monkeypatch.setattr(Training, "run", lambda self: pytest.fail("it trains"))
        with pytest.raises(InputError, match=message):
            next(tuning(spaces, **options).run())


class TestRows:
    def test_budgets_are_equal_and_rows_complete(self):
        spaces = {
            "sgd": rates(0.01, 0.1, 1.0, 10.0),
            "ief": {"learning_rate": [0.1, 1.0], "damping": [1e-6, 1e-2]},
        }
        job = tuning(spaces, seeds=3)
        rows = rows_of(job)
        assert list(rows.columns) == list(COLUMNS)
        counts = trainings(rows).groupby(["optimizer", "phase"]).size()
        assert counts.to_dict() == {
            (name, phase): count
            for name in ("sgd", "ief")
            for phase, count in (("search", 4), ("final", 3))
        }
        assert job.num_trainings == len(trainings(rows)) == 14
        assert len(rows) == 14 * 2
        assert set(rows["status"]) == {"ok"}
        assert rows.loc[rows["optimizer"] == "sgd", "damping"].isna().all()
        assert rows["train_loss"].dtype == rows["damping"].dtype == float

    @pytest.mark.parametrize("monitor", ["loss", "accuracy"])
    def test_the_best_by_validation_is_trained_from_each_seed(self, monitor):
        spaces = {"sgd": rates(0.01, 0.1, 1.0, 10.0)}
        rows = rows_of(tuning(spaces, seeds=2, seed=5, epochs=3, monitor=monitor))
        column = f"validation_{monitor}"
        assert set(rows["monitor"]) == {column}
        tries = rows[rows["phase"] == "search"].groupby("learning_rate", sort=False)[column]
        best = tries.max().idxmax() if monitor == "accuracy" else tries.min().idxmin()
        final = rows[rows["phase"] == "final"]
        assert set(final["learning_rate"]) == {best}
        assert final["seed"].unique().tolist() == [5, 6]
        assert set(rows.loc[rows["phase"] == "search", "seed"]) == {5}

    def test_without_validation_by_the_last_training_loss(self):
        rows = rows_of(tuning({"sgd": rates(0.01, 1.0)}, ALONE, epochs=2))
        assert set(rows["monitor"]) == {"train_loss"}
        last = rows[(rows["phase"] == "search") & (rows["epoch"] == 2)]
        best = last.loc[last["train_loss"].idxmin(), "learning_rate"]
        assert set(rows.loc[rows["phase"] == "final", "learning_rate"]) == {best}
        assert rows["validation_loss"].isna().all()

    def test_a_final_training_is_that_of_its_seed_alone(self):
        options = {"epochs": 2, "batch_size": 24, "momentum": 0.5, "schedule": "cosine"}
        space = {"learning_rate": [0.3], "damping": [1e-3]}
        rows = rows_of(tuning({"ief": space}, seeds=2, **options))
        assert set(rows["phase"]) == {"final"}  # with one setting there is nothing to tune
        for seed, part in rows.groupby("seed"):
            alone = Training(
                CLASSES, None, "ief", learning_rate=0.3, damping=1e-3, seed=seed, **options
            )
            expected = [report.test_loss for report in alone.run()]
            assert part["test_loss"].tolist() == expected

    def test_any_setting_can_be_tuned(self):
        spaces = {"sgd": {"momentum": [0.0, 0.5]}, "rprop": rates(0.01, 0.1)}
        rows = trainings(rows_of(tuning(spaces)))
        momentum = rows[rows["phase"] == "search"].groupby("optimizer")["momentum"].apply(list)
        assert momentum["sgd"] == [0.0, 0.5]
        assert all(map(math.isnan, momentum["rprop"]))

    def test_the_same_rows_for_the_same_seed(self):
        first, again = (rows_of(tuning({"sf:2": rates(0.1, 1.0)}, seed=3)) for _ in range(2))
        assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))

    def test_early_stop(self):
        rows = rows_of(tuning({"sgd": rates(0.1)}, MISLED, epochs=9, patience=2))
        assert rows["epoch"].tolist() == [0, 1, 2]

    def test_numbers_as_targets(self):
        rows = rows_of(tuning({"sgd": rates(0.1)}, NUMBERS))
        assert rows["test_accuracy"].isna().all()
        assert rows["test_loss"].notna().all()


class TestWhatDoesNotEndWell:
    def test_a_diverged_trial_is_a_row_and_not_the_best(self):
        rows = rows_of(tuning({"sgd": rates(0.1, 3e38)}, epochs=3))
        lost = rows[rows["learning_rate"] == 3e38]
        assert set(lost["status"]) == {"diverged"}
        assert lost["reason"].str.contains("NaN or infinite").all()
        assert lost["train_loss"].tolist()[:1] == [rows["train_loss"][0]]
        assert math.isnan(lost["train_loss"].iloc[-1])
        assert lost["epoch"].tolist() == list(range(len(lost)))
        assert set(rows.loc[rows["phase"] == "final", "learning_rate"]) == {0.1}

    def test_where_all_diverge_the_other_optimizers_are_trained(self):
        rows = rows_of(tuning({"sgd": rates(3e38, 3.1e38), "adamw": rates(1e-3, 1e-2)}))
        assert set(rows.loc[rows["optimizer"] == "sgd", "phase"]) == {"search"}
        assert set(rows.loc[rows["optimizer"] == "adamw", "phase"]) == {"search", "final"}

    def test_an_optimizer_that_the_model_is_not_made_for_has_failed(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))

            def forward(self, x):
                return x[:, :3] * self.scale

        task = dataclasses.replace(CLASSES, build_model=Scaled)
        rows = rows_of(tuning({"muon": rates(0.1), "sgd": rates(0.1)}, task))
        lost = rows[rows["optimizer"] == "muon"]
        assert lost["status"].tolist() == ["failed"]
        assert "no trainable matrix" in lost["reason"].iloc[0]
        assert lost["epoch"].tolist() == [0]
        assert set(rows.loc[rows["optimizer"] == "sgd", "status"]) == {"ok"}

    def test_a_rate_beyond_the_range_of_numbers_has_diverged(self):
        rows = rows_of(tuning({"adamw": rates(1e-3, 1e300)}))
        lost = rows[rows["status"] != "ok"]
        assert set(lost["learning_rate"]) == {1e300}
        assert set(lost["status"]) == {"diverged"}
        assert lost["reason"].str.contains("AdamW's step failed: RuntimeError: value cannot").all()

    def test_a_step_of_a_class_that_fails_has_failed(self):
        rows = rows_of(tuning({"tests.trainings.Fifth": rates(0.1), "sgd": rates(0.1)}, epochs=5))
        lost = rows[rows["optimizer"] == "tests.trainings.Fifth"]
        assert lost["epoch"].tolist() == [0, 1, 2, 3]
        assert set(lost["status"]) == {"failed"}
        assert lost["reason"].str.contains("the fifth step").all()
        assert set(rows.loc[rows["optimizer"] == "sgd", "status"]) == {"ok"}

    def test_a_task_that_fails_is_an_error(self):
        def broken(*args):
            yield next(iter(load_batches(*args)))
            raise OSError("the disk is gone")

        task = dataclasses.replace(CLASSES, load_batches=broken)
        with pytest.raises(TaskError, match="the disk is gone"):
            rows_of(tuning({"sgd": rates(0.1)}, task))
