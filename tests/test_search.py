"""Searches: equal budgets, reproducible draws, what diverges, files, and the command."""

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

import ngeval.training.search
from ngeval.errors import InputError, OutputError, TaskError
from ngeval.results.manifest import read_manifest
from ngeval.training import COLUMNS, Search, Training, default_grids
from ngeval.training.grids import plan_trials
from tests.test_cli import run
from tests.trainings import ALONE, CLASSES, DROPPED, MISLED, NUMBERS, load_batches

TASK_FILE = """
import torch, ngeval

def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

def data(seed, count=24):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)

def batches(batch_size, num_batches, seed):
    x, y = data(0)
    for part in torch.randperm(24, generator=torch.Generator().manual_seed(seed)).split(batch_size):
        yield x[part], y[part]

task = ngeval.Task(
    "mine", net, batches, "categorical", lambda: [data(1)], load_test=lambda: [data(2)]
)
alone = ngeval.Task("alone", net, batches, "categorical")
"""


def search(*names, task=CLASSES, **options):
    return Search(task, names, **{"seeds": 1, "epochs": 1, "batch_size": 24} | options)


def rows_of(job) -> pd.DataFrame:
    return pd.concat(list(job.run()), ignore_index=True)


def trainings(rows) -> pd.DataFrame:
    return rows.drop_duplicates(["optimizer", "phase", "trial", "seed"])


def tried(plan) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(trial.learning_rate, trial.damping) for trial in trials]
        for name, trials in plan.items()
    }


def plan(names, rates=None, dampings=None, kind="grid", trials=None, seed=0):
    return tried(plan_trials(names, rates, dampings, kind, trials, seed))


class TestPlan:
    def test_a_grid_is_every_rate_with_every_damping(self):
        found = plan(["ief"], [0.1, 1.0], [1e-4, 1e-2, 1.0])
        assert found == {"ief": list(itertools.product([0.1, 1.0], [1e-4, 1e-2, 1.0]))}

    def test_without_damping_there_are_more_rates_between_the_same_ends(self):
        found = plan(["ief", "sgd"], [0.01, 1.0], [1e-4, 1e-2])
        assert [damping for _, damping in found["sgd"]] == [None] * 4
        expected = [float(f"{rate:.3g}") for rate in np.geomspace(0.01, 1.0, 4)]
        assert [rate for rate, _ in found["sgd"]] == expected

    @pytest.mark.parametrize(
        ("kind", "trials"), [("grid", None), ("grid", 2), ("grid", 24), ("random", 7)]
    )
    def test_every_optimizer_has_as_many(self, kind, trials):
        names = ["sgd", "adamw", "adafactor", "fadam", "muon", "ef", "ief", "sf", "sf:2", "ng"]
        counts = {len(trials) for trials in plan(names, kind=kind, trials=trials).values()}
        assert counts == {trials or 12}

    @pytest.mark.parametrize("name", ["sgd", "adamw", "ief", "ng", "torch.optim.SGD"])
    def test_default_grids_lie_around_the_default(self, name):
        rates, dampings = default_grids(name)
        assert rates == sorted(rates)
        default = rates[2]
        assert [rate / default for rate in rates] == pytest.approx([0.1, 0.3, 1, 3, 10, 30])
        assert dampings == ([None] if name not in ("ief", "ng") else sorted(dampings))

    def test_grids_by_name(self):
        rates = {"sgd": [1.0, 2.0], "ief": [0.5]}
        found = plan(["sgd", "ief"], rates, {"ief": [1e-3, 1e-2]})
        assert found == {"sgd": [(1.0, None), (2.0, None)], "ief": [(0.5, 1e-3), (0.5, 1e-2)]}

    def test_random_draws_are_reproducible_and_between_the_ends(self):
        options = {"rates": [0.01, 1.0], "dampings": [1e-6, 1e-2], "kind": "random", "trials": 40}
        first, again = (plan(["sgd", "ief"], **options) for _ in range(2))
        assert first == again
        assert first != plan(["sgd", "ief"], **options, seed=1)
        for rate, damping in first["ief"]:
            assert 0.01 <= rate <= 1.0
            assert 1e-6 <= damping <= 1e-2
        assert [rate for rate, _ in first["sgd"]] == [rate for rate, _ in first["ief"]]
        places = np.log10([rate for rate, _ in first["sgd"]]) / 2 + 1
        assert 0.35 < places.mean() < 0.65  # even in the logarithm
        assert np.abs(np.corrcoef(np.log(first["ief"]).T)[0, 1]) < 0.5

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            ([], {}, "at least one"),
            (["sgd", "sgd"], {}, "sgd is there twice"),
            (["sgd", "iff"], {}, "did you mean 'ief'"),
            (["sgd"], {"kind": "gird"}, "grid, random"),
            (["sgd"], {"trials": 0}, "at least 1"),
            (["sgd"], {"trials": 100_000_000}, "trials must be at least 1 and at most 1000"),
            (["ief"], {"trials": 1001, "kind": "random"}, "at most 1000, not 1001"),
            (["ief"], {"rates": [0.1 + i for i in range(501)]}, "at most 1000, not 1002"),
            (["sgd"], {"kind": "random"}, "needs a number of trials"),
            (["sgd", "adamw"], {"dampings": [1.0]}, "no damping"),
            (["sgd"], {"rates": [0.1, -1.0]}, "learning rate must be positive"),
            (["ief"], {"dampings": [-1.0]}, "damping must be ≥ 0"),
            (["ief"], {"rates": []}, "no learning rate or damping"),
            (["sgd", "ief"], {"rates": [0.1], "dampings": [0.1, 1]}, "every optimizer gets as"),
            (["ief"], {"dampings": [0.1, 1], "trials": 5}, "--trials asks for"),
            (["ief"], {"dampings": [0, 1], "kind": "random", "trials": 2}, "in the logarithm"),
            (["sgd"], {"rates": {"sdg": [1.0]}}, "did you mean 'sgd'"),
        ],
    )
    def test_refused(self, names, options, message):
        with pytest.raises(InputError, match=message):
            plan(names, **options)


class TestSearch:
    def test_budgets_are_equal_and_rows_complete(self):
        job = search("sgd", "ief", learning_rates=[0.1, 1.0], dampings=[1e-6, 1e-2], seeds=3)
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
        options = {"learning_rates": [0.01, 0.1, 1.0, 10.0], "epochs": 3, "monitor": monitor}
        rows = rows_of(search("sgd", seeds=2, seed=5, **options))
        column = f"validation_{monitor}"
        assert set(rows["monitor"]) == {column}
        tries = rows[rows["phase"] == "search"].groupby("learning_rate", sort=False)[column]
        best = tries.max().idxmax() if monitor == "accuracy" else tries.min().idxmin()
        final = rows[rows["phase"] == "final"]
        assert set(final["learning_rate"]) == {best}
        assert final["seed"].unique().tolist() == [5, 6]
        assert set(rows.loc[rows["phase"] == "search", "seed"]) == {5}

    def test_without_validation_by_the_last_training_loss(self):
        rows = rows_of(search("sgd", task=ALONE, learning_rates=[0.01, 1.0], epochs=2))
        assert set(rows["monitor"]) == {"train_loss"}
        last = rows[(rows["phase"] == "search") & (rows["epoch"] == 2)]
        best = last.loc[last["train_loss"].idxmin(), "learning_rate"]
        assert set(rows.loc[rows["phase"] == "final", "learning_rate"]) == {best}
        assert rows["validation_loss"].isna().all()

    def test_a_final_training_is_that_of_its_seed_alone(self):
        options = {"epochs": 2, "batch_size": 24, "momentum": 0.5, "schedule": "cosine"}
        job = search("ief", learning_rates=[0.3], dampings=[1e-3], seeds=2, **options)
        rows = rows_of(job)
        assert set(rows["phase"]) == {"final"}  # of one setting, nothing is to be found
        for seed, part in rows.groupby("seed"):
            alone = Training(
                CLASSES, None, "ief", learning_rate=0.3, damping=1e-3, seed=seed, **options
            )
            expected = [report.test_loss for report in alone.run()]
            assert part["test_loss"].tolist() == expected

    def test_options_reach_the_optimizers_that_have_them(self):
        rows = rows_of(search("sgd", "adamw", "rprop", learning_rates=[0.01], momentum=0.5))
        found = trainings(rows).set_index("optimizer")["momentum"]
        assert found["sgd"] == 0.5
        assert math.isnan(found["adamw"])
        with pytest.raises(InputError, match="adamw: no momentum"):
            search("adamw", momentum=0.5).check()

    def test_early_stop(self):
        rows = rows_of(search("sgd", task=MISLED, epochs=9, patience=2, learning_rates=[0.1]))
        assert rows["epoch"].tolist() == [0, 1, 2]

    def test_what_differs_in_eval_mode_is_said_once(self):
        notes = []
        rows_of(search("ief", "sgd", task=DROPPED, trials=2, on_note=notes.append))
        assert len(notes) == 1
        assert notes[0].startswith("ief: the model trains in eval mode")

    def test_numbers_as_targets(self):
        rows = rows_of(search("sgd", task=NUMBERS, learning_rates=[0.1]))
        assert rows["test_accuracy"].isna().all()
        assert rows["test_loss"].notna().all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seeds": 0}, "seeds must be at least 1"),
            ({"seeds": 1001}, "seeds must be at least 1 and at most 1000"),
            ({"patience": 1, "task": ALONE}, "'alone' has none"),
            ({"epochs": -1}, "epochs must be ≥ 0"),
            ({"max_norm": -1.0}, "max norm must be positive"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            next(search("sgd", **options).run())


class TestWhatBreaksOff:
    def test_a_diverged_trial_is_a_row_and_not_the_best(self):
        rows = rows_of(search("sgd", learning_rates=[0.1, 3e38], epochs=3))
        lost = rows[rows["learning_rate"] == 3e38]
        assert set(lost["status"]) == {"diverged"}
        assert lost["reason"].str.contains("NaN or infinite").all()
        assert lost["train_loss"].tolist()[:1] == [rows["train_loss"][0]]
        assert math.isnan(lost["train_loss"].iloc[-1])
        assert lost["epoch"].tolist() == list(range(len(lost)))
        assert set(rows.loc[rows["phase"] == "final", "learning_rate"]) == {0.1}

    def test_where_all_diverge_the_others_go_on(self):
        rates = {"sgd": [3e38, 3.1e38], "adamw": [1e-3, 1e-2]}
        rows = rows_of(search("sgd", "adamw", learning_rates=rates))
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
        rows = rows_of(search("muon", "sgd", task=task, learning_rates=[0.1]))
        lost = rows[rows["optimizer"] == "muon"]
        assert lost["status"].tolist() == ["failed"]
        assert "no trainable matrix" in lost["reason"].iloc[0]
        assert lost["epoch"].tolist() == [0]
        assert set(rows.loc[rows["optimizer"] == "sgd", "status"]) == {"ok"}

    def test_a_rate_beyond_the_range_of_numbers_has_diverged(self):
        rows = rows_of(search("adamw", learning_rates=[1e-3, 1e300]))
        lost = rows[rows["status"] != "ok"]
        assert set(lost["learning_rate"]) == {1e300}
        assert set(lost["status"]) == {"diverged"}
        assert lost["reason"].str.contains("AdamW's step failed: RuntimeError: value cannot").all()

    def test_anothers_step_that_fails_has_failed(self):
        rows = rows_of(search("trainings.Fifth", "sgd", epochs=5, learning_rates=[0.1]))
        lost = rows[rows["optimizer"] == "trainings.Fifth"]
        assert lost["epoch"].tolist() == [0, 1, 2, 3]
        assert set(lost["status"]) == {"failed"}
        assert lost["reason"].str.contains("the fifth step").all()
        assert set(rows.loc[rows["optimizer"] == "sgd", "status"]) == {"ok"}

    def test_one_that_takes_no_gradient_is_refused_before_any_work(self, monkeypatch):
        monkeypatch.setattr(Training, "run", lambda self: pytest.fail("it trains"))
        with pytest.raises(InputError, match=r"torch\.optim\.SparseAdam.*dense gradients"):
            rows_of(search("sgd", "torch.optim.SparseAdam"))

    def test_a_task_that_fails_is_an_error(self):
        def broken(*args):
            yield next(iter(load_batches(*args)))
            raise OSError("the disk is gone")

        with pytest.raises(TaskError, match="the disk is gone"):
            rows_of(search("sgd", task=dataclasses.replace(CLASSES, load_batches=broken)))


class TestFiles:
    def test_rows_and_checkpoints(self, tmp_path):
        rows = rows_of(search("sgd", "sf:2", learning_rates=[0.1, 0.2], output=tmp_path, seeds=2))
        assert_frame_equal(pd.read_parquet(tmp_path / "training.parquet"), rows)
        folders = {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*/*.json")}
        assert folders == {f"{name}/seed-{seed}" for name in ("sgd", "sf-2") for seed in (0, 1)}

    def test_a_finished_training_is_on_disk_before_the_next(self, tmp_path):
        found = search("sgd", learning_rates=[0.1, 0.2], output=tmp_path).run()
        first = next(found)
        assert_frame_equal(pd.read_parquet(tmp_path / "training.parquet"), first)
        second = next(found)
        both = pd.concat([first, second], ignore_index=True)
        assert_frame_equal(pd.read_parquet(tmp_path / "training.parquet"), both)

    def test_an_earlier_search_is_refused_before_any_work(self, tmp_path, monkeypatch):
        job = search("sgd", learning_rates=[0.1], output=tmp_path)
        rows_of(job)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        with monkeypatch.context() as patch:
            patch.setattr(Training, "run", lambda self: pytest.fail("it trains"))
            with pytest.raises(OutputError, match="--force"):
                next(job.run())
            (tmp_path / "training.parquet").rename(tmp_path / "mine.parquet")
            with pytest.raises(OutputError, match="seed-0 holds checkpoints"):
                next(job.run())
        (tmp_path / "mine.parquet").rename(tmp_path / "training.parquet")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
        other = rows_of(dataclasses.replace(job, learning_rates=[0.2], force=True))
        assert_frame_equal(pd.read_parquet(tmp_path / "training.parquet"), other)

    def test_checkpoints_of_a_single_run_are_not_mixed_in(self, tmp_path):
        list(Training(CLASSES, tmp_path, "sgd", epochs=0).run())
        job = search("sgd", learning_rates=[0.1, 0.2], output=tmp_path)
        with pytest.raises(OutputError, match=r"holds checkpoints .*epoch-000\.json"):
            next(job.run())
        assert len(list(tmp_path.iterdir())) == 3  # and no folder for a seed
        rows_of(dataclasses.replace(job, force=True))
        told = read_manifest(tmp_path / "training.parquet")
        assert told["options"]["learning_rates"] == [0.1, 0.2]
        (tmp_path / "training.parquet.manifest.json").unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sgd", "training.parquet"]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "mine.py"
    path.write_text(TASK_FILE)
    return path


@pytest.fixture(scope="module")
def tuned(task_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    args = ("-t", f"{task_file}:task", "--epochs", "2", "--batch-size", "12", "-o", folder)
    options = ("--optimizer", "sgd,ief", "--lr", "0.1,1", "--damping", "1e-6,1e-2")
    return folder, run("train", *args, *options, "--seeds", "2", "--patience", "2")


class TestCommand:
    def test_one_line_for_each_training_then_the_table(self, tuned):
        _, result = tuned
        lines = result.stdout.splitlines()
        assert sum(" search  lr " in line for line in lines) == 8
        assert sum(" final  lr " in line for line in lines) == 4
        shown = result.stdout
        for word in ("test performance", "training loss after", "tuned to", "mine", "±", "written"):
            assert word in shown
        assert shown.index("final  lr") < shown.index("test performance")
        assert "training.parquet" in lines[-1]
        assert "36/36" in result.stderr  # 12 trainings of 3 epochs

    def test_files(self, tuned):
        folder, _ = tuned
        rows = pd.read_parquet(folder / "training.parquet")
        assert len(trainings(rows)) == 12
        found = {path.relative_to(folder).as_posix() for path in folder.glob("*/*/*.safetensors")}
        assert found == {
            f"{name}/seed-{seed}/epoch-00{epoch}.safetensors"
            for name in ("sgd", "ief")
            for seed in (0, 1)
            for epoch in (0, 1, 2)
        }

    def test_the_checkpoints_are_graded(self, tuned, task_file, tmp_path):
        args = ("-t", f"{task_file}:task", "-c", tuned[0] / "sgd" / "seed-1", "-m", "sgd,ief")
        run("gamma", *args, "--batch-size", "8", "--num-batches", "1", "-o", tmp_path / "g.csv")
        assert set(pd.read_csv(tmp_path / "g.csv")["status"]) == {"ok"}

    @pytest.mark.parametrize(
        ("options", "tries", "finals"),
        [
            (("--seeds", "2"), 0, 2),
            (("--optimizer", "sgd,adamw"), 0, 2),
            (("--optimizer", "ief", "--lr", "0.1,1"), 2, 1),
            (("--optimizer", "ief", "--damping", "1e-3,1"), 2, 1),
            (("--search", "random", "--trials", "3"), 3, 1),
            (("--optimizer", "ief", "--trials", "2"), 2, 1),
            (("--lr", "0.001:0.1:3"), 3, 1),
        ],
    )
    def test_what_is_tried(self, task_file, tmp_path, options, tries, finals):
        args = ("-t", f"{task_file}:task", "--epochs", "0", "-q", "-o", tmp_path / "out")
        result = run("train", *args, *options)
        assert (result.stdout, result.stderr) == ("", "")
        counts = trainings(pd.read_parquet(tmp_path / "out" / "training.parquet"))["phase"]
        assert counts.value_counts().to_dict() == {"final": finals} | (
            {"search": tries} if tries else {}
        )

    def test_one_of_each_is_a_single_run(self, task_file, tmp_path):
        options = ("--optimizer", "ief", "--lr", "0.1", "--damping", "1e-3", "--patience", "2")
        run("train", "-t", f"{task_file}:task", "--epochs", "1", *options, "-o", tmp_path / "out")
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        kinds = ("json", "optimizer.pt", "safetensors")
        assert names == [f"epoch-00{i}.{kind}" for i in (0, 1) for kind in kinds]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--optimizer", "sgd", "--damping", "1"), "no damping"),
            (("--optimizer", "sgd,iff"), "did you mean 'ief'"),
            (("--lr", "0.1,-1"), "learning rate must be positive"),
            (("--lr", "0.1:x"), "--lr '0.1:x': write a number"),
            (("--damping", ""), "--damping '': write a number"),
            (("--seeds", "0"), "seeds must be at least 1"),
            (("--trials", "100000000"), "at most 1000"),
            (("--lr", "0.1:1:100000000"), "--lr '0.1:1:100000000': write a number"),
            (("--optimizer", "torch.optim.LBFGS"), "cannot be stepped on a dense gradient alone"),
            (("--optimizer", "ngeval.optim.SF", "--seeds", "2"), "train with 'sf'"),
            (("--search", "random"), "needs a number of trials"),
            (("--search", "bayes"), "'bayes'; write one of grid, random"),
            (("--optimizer", ","), "at least one optimizer"),
            (("--schedule", "exponential", "--seeds", "2"), "unknown schedule"),
            (("--momentum", "0.9"), "adamw: no momentum"),
        ],
    )
    def test_bad_input_is_one_message(self, task_file, tmp_path, options, message):
        args = ("-t", f"{task_file}:task", "-q", "-o", tmp_path / "out")
        result = run("train", *args, *options, code=2)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.rglob("*.*"))

    def test_patience_needs_validation_data(self, task_file, tmp_path):
        args = ("-t", f"{task_file}:alone", "--patience", "1", "--seeds", "2", "-q")
        assert "load_validation" in run("train", *args, "-o", tmp_path / "out", code=2).stderr

    def test_nothing_but_divergence(self, task_file, tmp_path):
        args = ("-t", f"{task_file}:task", "--optimizer", "sgd", "--lr", "3e38", "--seeds", "2")
        result = run("train", *args, "-q", "-o", tmp_path, code=2)
        assert "no training came to its end: training diverged" in result.stderr
        assert len(trainings(pd.read_parquet(tmp_path / "training.parquet"))) == 2

    def test_ctrl_c_keeps_the_finished_trainings(self, task_file, tmp_path, monkeypatch):
        train, calls = Training.run, []

        def interrupted(self):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return train(self)

        monkeypatch.setattr(ngeval.training.search.Training, "run", interrupted)
        args = ("-t", f"{task_file}:task", "--epochs", "1", "--lr", "0.1,1,10", "-o", tmp_path)
        result = run("train", *args, code=130)
        assert "interrupted" in result.stderr
        rows = pd.read_parquet(tmp_path / "training.parquet")
        assert rows.groupby("trial")["epoch"].apply(list).tolist() == [[0, 1], [0, 1]]


class TestFewTrials:
    @pytest.mark.parametrize(("trials", "dampings"), [(1, 1), (3, 1), (5, 1), (6, 2), (12, 2)])
    def test_the_default_dampings_leave_learning_rates_to_try(self, trials, dampings):
        plan = plan_trials(["sgd", "ief"], None, None, "grid", trials, 0)
        assert {name: len(found) for name, found in plan.items()} == {"sgd": trials, "ief": trials}
        assert len({trial.damping for trial in plan["ief"]}) == dampings

    def test_dampings_that_are_given_are_kept(self):
        plan = plan_trials(["ief"], None, [1e-7, 1e-3], "grid", 4, 0)
        assert {trial.damping for trial in plan["ief"]} == {1e-7, 1e-3}

    def test_values_that_are_given_are_all_tried_or_refused(self):
        with pytest.raises(
            InputError, match=r"sgd: .* are 3 trainings, more than the 2 of --trials"
        ):
            plan_trials(["sgd"], [0.1, 0.3, 1.0], None, "grid", 2, 0)
