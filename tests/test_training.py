"""Training runs: exact optimizers, settings, schedules, early stopping, and what breaks off."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import ngeval
from ngeval.checkpoints import find_checkpoints, load_checkpoint, read_optimizer
from ngeval.errors import InputError
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.tasks import get_task
from ngeval.training import EXACT, DivergedError, Settings, Training
from ngeval.training.optimizers import build, resolved
from ngeval.training.steppers import Stepper
from tests.test_cli import run
from tests.trainings import (
    ALONE,
    CLASSES,
    DROPPED,
    MISLED,
    NUMBERS,
    SAMPLES,
    data,
    load_batches,
    net,
)

DOUBLE = dataclasses.replace(
    CLASSES,
    build_model=lambda: net().double(),
    load_batches=lambda *args: ((x.double(), y) for x, y in load_batches(*args)),
    load_validation=None,
    load_test=None,
)


def reports(task=CLASSES, **options):
    return list(Training(task, None, **{"epochs": 2, "batch_size": 16} | options).run())


def initial(task=DOUBLE, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return task.model()


def trained(folder, name, **options) -> dict[str, torch.Tensor]:
    """The weights after one step on the whole data in float64."""
    options = {"epochs": 1, "batch_size": SAMPLES} | options
    list(Training(DOUBLE, folder, name, **options).run())
    model = DOUBLE.model()
    load_checkpoint(model, find_checkpoints([str(folder)])[-1])
    return model.state_dict()


def gradient_rows(model) -> torch.Tensor:
    """Per-sample gradients by a loop: shape (N, P)."""
    x, y = data(0, SAMPLES)
    rows = []
    for n in range(SAMPLES):
        loss = nn.functional.cross_entropy(model(x[n : n + 1].double()), y[n : n + 1])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def flat(state) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


class TestExact:
    @pytest.mark.parametrize("name", [*EXACT, "sf:3", "fadam"])
    @pytest.mark.parametrize("task", [CLASSES, NUMBERS], ids=lambda task: task.name)
    def test_training_lowers_the_loss(self, name, task):
        rate = {"fadam": 0.03, "ef": 0.01}.get(name, 0.1)
        first, *_, last = reports(task, optimizer=name, epochs=8, learning_rate=rate)
        # The least loss that there is: a Gaussian's constant, here.
        least = 1.5 * math.log(2 * math.pi) if task is NUMBERS else 0.0
        assert last.train_loss - least < 0.9 * (first.train_loss - least)
        assert last.validation_loss < first.validation_loss
        assert (last.epoch, last.step) == (8, 24)
        assert last.seconds > 0 == first.seconds

    @pytest.mark.parametrize("name", ["ef", "ief"])
    def test_a_step_against_a_loop_over_samples(self, tmp_path, name):
        model = initial()
        rows = gradient_rows(model)
        x, y = data(0, SAMPLES)
        residual = model(x.double()).softmax(1) - nn.functional.one_hot(y, 3)
        b = residual.detach().square().sum(1) if name == "ief" else torch.ones(SAMPLES).double()
        weights = torch.linalg.solve(rows @ rows.T + 0.5 * torch.eye(SAMPLES).double(), b)
        expected = flat(model.state_dict()) - 0.3 * rows.T @ weights
        result = flat(trained(tmp_path, name, learning_rate=0.3, damping=0.5))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("name", ["ief", "sgd"])
    def test_max_norm_is_the_length_of_a_step_over_the_rate(self, tmp_path, name):
        moved = flat(trained(tmp_path, name, learning_rate=0.2, max_norm=1e-3))
        before = flat(initial().state_dict())
        assert float((moved - before).norm()) == pytest.approx(0.2 * 1e-3, rel=1e-4)

    def test_weight_decay_of_the_exact_ones_is_decoupled(self, tmp_path):
        options = {"learning_rate": 0.2, "damping": 0.5}
        plain = flat(trained(tmp_path / "plain", "ief", **options))
        decayed = flat(trained(tmp_path / "decayed", "ief", weight_decay=0.1, **options))
        before = flat(initial().state_dict())
        torch.testing.assert_close(decayed - plain, -0.2 * 0.1 * before, rtol=0, atol=1e-12)

    def test_draws_of_sf_are_of_the_seed(self):
        build_model = DOUBLE.build_model

        def same_weights():
            torch.manual_seed(9)
            return build_model()

        task = dataclasses.replace(DOUBLE, build_model=same_weights)
        options = {"optimizer": "sf", "epochs": 1, "batch_size": SAMPLES}
        losses = [reports(task, seed=seed, **options)[-1].train_loss for seed in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]

    @pytest.mark.parametrize(("name", "mode"), [("ief", False), ("sgd", True)])
    def test_mode_in_which_the_model_trains(self, name, mode):
        modes = []

        class Watched(nn.Linear):
            def forward(self, x):
                if torch.is_grad_enabled():
                    modes.append(self.training)
                return super().forward(x)

        reports(dataclasses.replace(CLASSES, build_model=lambda: Watched(4, 3)), optimizer=name)
        assert modes
        assert set(modes) == {mode}

    def test_what_differs_in_eval_mode_is_said_once(self):
        notes = []
        reports(DROPPED, optimizer="ief", on_note=notes.append)
        [note] = notes
        assert note.startswith("ief: the model trains in eval mode, without its dropout and with ")
        reports(DROPPED, optimizer="sgd", on_note=notes.append)
        reports(CLASSES, optimizer="ief", on_note=notes.append)
        assert len(notes) == 1

    def test_its_checkpoints_are_graded_and_its_state_is_nobody_elses(self, tmp_path):
        args = ("-t", "digits-mlp", "--num-batches", "2")
        run("train", *args, "--optimizer", "ief", "--epochs", "1", "-q", "-o", tmp_path / "run")
        grade = (*args, "-c", tmp_path / "run", "--batch-size", "16", "-q", "-o")
        run("gamma", *grade, tmp_path / "g.jsonl", "-m", "sgd,ief,adamw")
        rows = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
        status = {(row["method"], row["status"]) for row in rows}
        assert status == {("sgd", "ok"), ("ief", "ok"), ("adamw", "failed")}
        reason = next(row["reason"] for row in rows if row["method"] == "adamw")
        assert "holds the state of ief, not of adamw" in reason
        saved = read_optimizer(tmp_path / "run" / "epoch-001.optimizer.pt")
        assert saved.name == "ief"
        model = get_task("digits-mlp").model()
        [optimizer] = build("ief", model, Settings())
        optimizer.load_state_dict(saved.states[0])
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.param_groups[0]["param_names"] == names


class TestSettings:
    def test_momentum_and_weight_decay_reach_torchs_optimizer(self, tmp_path):
        options = {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.05}
        result = trained(tmp_path, "sgd", epochs=3, **options)
        model = initial()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.05)
        x, y = data(0, SAMPLES)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
        torch.testing.assert_close(flat(result), flat(model.state_dict()), rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [
            ("constant", [1, 1, 1, 1]),
            ("linear", [1, 0.75, 0.5, 0.25]),
            ("cosine", [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ],
    )
    @pytest.mark.parametrize("name", ["ief", "muon"])
    def test_schedules_step_by_step(self, schedule, factors, name):
        stepper = Stepper(name, CLASSES, net(), Settings(learning_rate=0.2), 0, "cpu")
        stepper.schedule(schedule, 4)
        stepper.ready()
        seen = []
        for batch in load_batches(12, 4, 0):
            seen.append({group["lr"] for o in stepper.optimizers for group in o.param_groups})
            stepper.step(batch)
        assert [len(rates) for rates in seen] == [1] * 4
        assert [rates.pop() for rates in seen] == pytest.approx([0.2 * f for f in factors])

    def test_a_schedule_ends_with_the_last_epoch(self, tmp_path):
        options = {"schedule": "linear", "learning_rate": 0.1, "num_batches": 4, "batch_size": 8}
        list(Training(CLASSES, tmp_path, "adamw", epochs=2, **options).run())
        rates = [
            read_optimizer(tmp_path / f"epoch-00{epoch}.optimizer.pt").states[0]["param_groups"][0]
            for epoch in (1, 2)
        ]
        assert [group["lr"] for group in rates] == pytest.approx([0.05, 0.0])
        assert [group["initial_lr"] for group in rates] == [0.1, 0.1]

    def test_fadam_by_its_class_is_fadam(self):
        paths = [reports(optimizer=name)[-1].train_loss for name in ("fadam", "ngeval.optim.FAdam")]
        assert paths[0] == paths[1]

    def test_json_has_the_settings_in_force(self, tmp_path):
        list(Training(CLASSES, tmp_path, "sf:2", epochs=0, damping=0.25, schedule="linear").run())
        output = json.loads((tmp_path / "epoch-000.json").read_text())
        assert output["optimizer"] == "sf:2"
        assert output["learning_rate"] == EXACT["sf"][1]
        assert (output["damping"], output["momentum"], output["weight_decay"]) == (0.25, 0, 0)
        assert (output["schedule"], output["step"]) == ("linear", 0)
        assert "seconds" not in output

    @pytest.mark.parametrize("name", [*OPTIMIZERS, *EXACT, "sf:4", "torch.optim.SGD"])
    def test_every_optimizer_tells_its_learning_rate(self, name):
        state = torch.get_rng_state()
        assert resolved(name, Settings()).learning_rate > 0
        assert resolved(name, Settings(learning_rate=0.25)).learning_rate == 0.25
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optimizer": "adamw", "damping": 1.0}, "adamw has no damping"),
            ({"optimizer": "adamw", "momentum": 0.5}, "adamw has no momentum"),
            ({"optimizer": "rprop", "weight_decay": 0.5}, "rprop has no weight decay"),
            ({"optimizer": "iff"}, "did you mean 'ief'"),
            ({"optimizer": "torch.optim.LBFGS"}, "LBFGS' cannot be stepped on a dense gradient"),
            ({"optimizer": "torch.optim.SparseAdam"}, "does not support dense gradients"),
            ({"optimizer": "ngeval.optim.iEF"}, "train with 'ief'"),
            ({"optimizer": "ngeval.optim.exact.NG"}, "train with 'ng'"),
            ({"optimizer": "tests.trainings.Own"}, "train with 'ief'"),
            ({"optimizer": "ief:2"}, "only sf takes a number"),
            ({"optimizer": "sf:0"}, "only sf takes a number"),
            ({"optimizer": "sf:x"}, "only sf takes a number"),
            ({"optimizer": "ief", "damping": -1.0}, "damping must be ≥ 0"),
            ({"optimizer": "ief", "damping": math.nan}, "damping must be ≥ 0"),
            ({"optimizer": "ief", "momentum": 1.0}, r"momentum must be in \[0, 1\)"),
            ({"weight_decay": -1.0}, "weight decay must be ≥ 0"),
            ({"max_norm": 0.0}, "max norm must be positive"),
            ({"schedule": "cosin"}, "did you mean 'cosine'"),
            ({"patience": 0}, "patience must be at least 1"),
            ({"task": ALONE, "patience": 1}, "'alone' has none"),
            ({"monitor": "acc"}, "loss, accuracy"),
            ({"task": NUMBERS, "monitor": "accuracy"}, "no classes as targets"),
        ],
    )
    def test_refused_before_any_work(self, tmp_path, options, message):
        task = options.pop("task", CLASSES)

        def never():
            raise AssertionError("the model is built")

        task = dataclasses.replace(task, build_model=never)
        with pytest.raises(InputError, match=message):
            next(Training(task, tmp_path / "run", **options).run())
        assert not (tmp_path / "run").exists()


class TestFolder:
    def test_of_an_earlier_run_is_not_taken_without_force(self, tmp_path):
        earlier, other = tmp_path / "epoch-007.safetensors", tmp_path / "training.parquet"
        earlier.write_text("of hours")
        other.write_text("of days")
        job = Training(CLASSES, tmp_path, "sgd", epochs=0)
        with pytest.raises(ngeval.OutputError, match=r"of an earlier run \(epoch-007\.safetensors"):
            next(job.run())
        assert earlier.read_text() == "of hours"
        list(dataclasses.replace(job, force=True).run())
        assert not earlier.exists()
        assert other.read_text() == "of days"
        assert len(list(tmp_path.iterdir())) == 4


class TestReports:
    def test_each_part_on_its_own_data(self, tmp_path):
        last = list(Training(CLASSES, tmp_path, "sgd", epochs=1).run())[-1]
        model = CLASSES.model().eval()
        load_checkpoint(model, find_checkpoints([str(tmp_path)])[-1])
        parts = {
            "train": data(0, SAMPLES),
            "validation": data(1, 30),
            "test": tuple(torch.cat(pair) for pair in zip(data(2, 20), data(3, 10), strict=True)),
        }
        for name, (x, y) in parts.items():
            outputs = model(x).detach().double()
            loss = float(nn.functional.cross_entropy(outputs, y))
            assert getattr(last, f"{name}_loss") == pytest.approx(loss, rel=1e-5)
            share = float((outputs.argmax(1) == y).double().mean())
            assert getattr(last, f"{name}_accuracy") == pytest.approx(share)

    def test_without_held_out_data_there_are_no_figures(self):
        last = reports(ALONE, optimizer="sgd")[-1]
        assert {last.validation_loss, last.validation_accuracy, last.test_loss} == {None}
        assert reports(NUMBERS, optimizer="sgd")[-1].test_accuracy is None

    def test_no_output_writes_nothing_and_trains_the_same(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        written = list(Training(CLASSES, tmp_path / "run", "ief", epochs=2, batch_size=16).run())
        others = set(tmp_path.iterdir())
        plain = reports(optimizer="ief")
        assert set(tmp_path.iterdir()) == others
        strip = [dataclasses.replace(r, seconds=0.0) for r in written]
        assert strip == [dataclasses.replace(r, seconds=0.0) for r in plain]


class TestEarlyStop:
    @pytest.mark.parametrize("patience", [1, 3])
    def test_stops_when_the_validation_gets_no_better(self, patience):
        result = reports(MISLED, optimizer="sgd", epochs=9, patience=patience)
        assert [report.epoch for report in result] == list(range(patience + 1))

    def test_goes_on_while_it_gets_better(self):
        assert len(reports(optimizer="sgd", epochs=6, patience=1)) == 7

    def test_a_better_epoch_starts_the_count_again(self):
        losses = iter([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])

        class Told(Training):
            def _measured(self, *args):
                report, batches = super()._measured(*args)
                return dataclasses.replace(report, validation_loss=next(losses)), batches

        result = list(Told(CLASSES, None, "sgd", epochs=6, patience=2).run())
        assert [report.validation_loss for report in result] == [5.0, 4.0, 4.5, 3.0, 3.0, 3.5]

    def test_by_accuracy(self):
        """Accuracies that stay the same are no better, losses that fall are."""
        options = {"optimizer": "sgd", "learning_rate": 1e-4, "epochs": 5, "patience": 2}
        assert len(reports(monitor="accuracy", **options)) == 3
        assert len(reports(monitor="loss", **options)) == 6


class TestDivergence:
    @pytest.mark.parametrize("name", ["sgd", "ief", "ng", "sf"])
    def test_is_said_as_such(self, name):
        with pytest.raises(DivergedError, match="training diverged"):
            reports(optimizer=name, learning_rate=3e38, epochs=9)

    def test_an_engine_that_cannot_treat_the_model_is_another_error(self):
        class Mixing(nn.Linear):
            def forward(self, x):
                return super().forward(x - x.mean(0))

        task = dataclasses.replace(CLASSES, build_model=lambda: Mixing(4, 3))
        with pytest.raises(ngeval.EngineError):
            reports(task, optimizer="ief")

    @pytest.mark.parametrize("name", ["sgd", "adamw", "fadam", "ief", "torch.optim.Adam"])
    def test_a_rate_beyond_the_range_of_numbers(self, name):
        with pytest.raises(DivergedError, match="training diverged"):
            reports(optimizer=name, learning_rate=1e300)

    def test_what_anothers_step_raises_is_said_to_be_that(self):
        result = Training(CLASSES, None, "tests.trainings.Fifth", epochs=2, batch_size=16).run()
        assert [next(result).epoch, next(result).epoch] == [0, 1]
        with pytest.raises(ngeval.ModelError, match="Fifth's step failed: KeyError: 'the fifth st"):
            next(result)

    def test_numbers_that_are_finite_are_no_divergence(self):
        result = reports(optimizer="sgd", learning_rate=50.0)
        assert np.isfinite([report.train_loss for report in result]).all()
