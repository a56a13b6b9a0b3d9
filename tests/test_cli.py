"""The commands, as a user runs them: what they print, write and return."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

import ngeval
import ngeval.grading.gradient_norms
import ngeval.runs.tables
import ngeval.runs.units
import ngeval.training
from ngeval.checkpoints import find_checkpoints, load_checkpoint
from ngeval.cli.app import app
from ngeval.results.manifest import manifest_path
from ngeval.tasks import get_task

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

COMMANDS = (
    *("demo", "train", "gamma", "sweep", "compare", "layers", "imbalance", "plot", "tasks"),
    "report",
    "methods",
)
KINDS = ("json", "optimizer.pt", "safetensors")
"""What ``ngeval train`` writes for each epoch."""

SMALL = ("--batch-size", "8", "--num-batches", "1")
CNN = ("--task", "digits-cnn")

TASK_FILE = '''
import os
import signal
import torch
import ngeval


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 4):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, torch.randint(3, (batch_size,), generator=generator)


def double_batches(*args):
    return ((x.double(), y) for x, y in batches(*args))


def dict_batches(*args):
    return (({"right": x[:, 2:], "left": x[:, :2]}, y) for x, y in batches(*args))


passes = []


def interrupted_batches(*args):
    """In the second pass, in which the batches are graded; in the first they are hashed."""
    first, second, *_ = batches(*args)
    passes.append(args)
    yield first
    if len(passes) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    yield second


class Halves(torch.nn.Module):
    """Takes its inputs by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, left, right):
        return self.linear(torch.cat([left, right], 1))


def linear():
    return torch.nn.Linear(4, 3)


task = ngeval.Task("mine", linear, batches, "categorical")
double = ngeval.Task("double", lambda: linear().double(), double_batches, "categorical")
halves = ngeval.Task("halves", Halves, dict_batches, "categorical")
interrupted = ngeval.Task("interrupted", linear, interrupted_batches, "categorical")


def make_task():
    return task
'''


def run(*args, code=0):
    """Run a command in this process; a wrong exit code shows what it printed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def gamma(output, *args):
    """Run ``ngeval gamma`` quietly and read its result file."""
    run("gamma", *args, "--quiet", "--output", output)
    return read(output)


def read(path):
    """Read a result file as DESIGN says that it can be: with pandas alone."""
    if path.suffix == ".csv":
        return pd.read_csv(path)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    # pandas' quick parser of JSON numbers drops digits; the file has them all.
    return pd.read_json(path, lines=True, precise_float=True)


def random_weights(path, prefix="", dtype=torch.float32):
    """Weights for the task file's models, the same for all of them."""
    generator = torch.Generator().manual_seed(5)
    state = {
        f"{prefix}weight": torch.randn(3, 4, generator=generator).to(dtype),
        f"{prefix}bias": torch.randn(3, generator=generator).to(dtype),
    }
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """Two epochs of digits-cnn."""
    folder = tmp_path_factory.mktemp("runs") / "cnn"
    result = run("train", *CNN, "--epochs", "2", "--seed", "3", "--output", folder)
    return SimpleNamespace(folder=folder, output=result.output)


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(TASK_FILE)
    return path


class TestTrain:
    def test_writes_a_checkpoint_and_json_for_every_epoch(self, cnn):
        names = sorted(path.name for path in cnn.folder.iterdir())
        expected = [f"epoch-00{i}.{kind}" for i in range(3) for kind in KINDS]
        assert names == expected

    def test_json_tells_where_the_weights_come_from(self, cnn):
        for epoch in range(3):
            output = json.loads((cnn.folder / f"epoch-00{epoch}.json").read_text())
            assert output["task"] == "digits-cnn"
            assert output["epoch"] == epoch
            assert output["seed"] == 3
            assert output["optimizer"] == "adamw"
            assert output["versions"]["ngeval"] == ngeval.__version__
            assert output["versions"]["torch"] == torch.__version__
            assert output["versions"]["python"].startswith("3.")
            for loss in ("train_loss", "validation_loss"):
                assert 0 < output[loss] < 3
            for accuracy in ("train_accuracy", "validation_accuracy"):
                assert 0 <= output[accuracy] <= 1

    def test_loss_and_accuracy_are_those_of_the_saved_weights(self, cnn):
        task = get_task("digits-cnn")
        model = task.model().eval()
        load_checkpoint(model, find_checkpoints([str(cnn.folder / "epoch-002.safetensors")])[0])
        output = json.loads((cnn.folder / "epoch-002.json").read_text())
        parts = {
            "train": list(task.batches(64, None, 0)),
            "validation": list(task.load_validation()),
        }
        for name, batches in parts.items():
            inputs = torch.cat([x for x, _ in batches])
            targets = torch.cat([y for _, y in batches])
            with torch.no_grad():
                outputs = model(inputs)
            loss = torch.nn.functional.cross_entropy(outputs.double(), targets)
            accuracy = (outputs.argmax(1) == targets).double().mean()
            assert output[f"{name}_loss"] == pytest.approx(float(loss), rel=1e-5)
            assert output[f"{name}_accuracy"] == pytest.approx(float(accuracy), abs=1e-9)

    def test_loss_goes_down_from_epoch_0(self, cnn):
        output = [json.loads((cnn.folder / f"epoch-00{i}.json").read_text()) for i in range(3)]
        losses = [epoch["train_loss"] for epoch in output]
        assert losses[0] == pytest.approx(np.log(10), abs=0.1)  # chance, before any step
        assert losses[0] > losses[1] > losses[2]
        assert output[2]["validation_accuracy"] > output[0]["validation_accuracy"] + 0.3

    def test_prints_a_line_for_each_epoch_and_where_the_files_are(self, cnn):
        for epoch in range(3):
            assert f"epoch   {epoch}  train loss" in cnn.output
        assert cnn.output.count("validation loss") == 3
        assert cnn.output.count("%") >= 6  # accuracies
        assert str(cnn.folder) in cnn.output.replace("\n", "")

    def test_same_seed_gives_the_same_bytes(self, cnn, tmp_path):
        for name, seed in (("again", 3), ("other", 4)):
            run("train", *CNN, "--epochs", "1", "--seed", seed, "-o", tmp_path / name, "--quiet")
        for epoch in range(2):
            file = f"epoch-00{epoch}.safetensors"
            first, again = (
                (cnn.folder / file).read_bytes(),
                (tmp_path / "again" / file).read_bytes(),
            )
            assert first == again
            assert first != (tmp_path / "other" / file).read_bytes()

    def test_regression_reports_losses_and_no_accuracy(self, tmp_path):
        run("train", "-t", "digits-regression", "--epochs", "2", "-o", tmp_path, "--quiet")
        output = [json.loads((tmp_path / f"epoch-00{i}.json").read_text()) for i in range(3)]
        assert [epoch["train_accuracy"] for epoch in output] == [None, None, None]
        assert [epoch["validation_accuracy"] for epoch in output] == [None, None, None]
        assert output[0]["train_loss"] > output[1]["train_loss"] > output[2]["train_loss"]
        assert output[0]["validation_loss"] > output[2]["validation_loss"]

    def test_sgd_with_a_learning_rate_of_its_own(self, tmp_path, task_file):
        args = ("--optimizer", "sgd", "--lr", "0.25", "--epochs", "1", "--batch-size", "5")
        run("train", "-t", f"{task_file}:task", *args, "--num-batches", "1", "-o", tmp_path / "r")
        output = json.loads((tmp_path / "r" / "epoch-001.json").read_text())
        assert (output["optimizer"], output["learning_rate"]) == ("sgd", 0.25)
        states = [
            safetensors.torch.load_file(tmp_path / "r" / f"epoch-00{i}.safetensors")
            for i in range(2)
        ]
        before = {name: tensor.requires_grad_() for name, tensor in states[0].items()}
        x, y = next(get_task(f"{task_file}:task").batches(5, 1, 1))  # epoch 1 of seed 0
        loss = torch.nn.functional.cross_entropy(x @ before["weight"].T + before["bias"], y)
        gradients = torch.autograd.grad(loss, list(before.values()))
        for (name, tensor), gradient in zip(before.items(), gradients, strict=True):
            torch.testing.assert_close(states[1][name], tensor.detach() - 0.25 * gradient)

    def test_force_replaces_an_earlier_and_longer_run(self, tmp_path, task_file):
        task = ("--task", f"{task_file}:task", "--output", tmp_path / "r", "--quiet")
        run("train", *task, "--epochs", "2")
        run("train", *task, "--epochs", "1", "--force")
        names = sorted(path.name for path in (tmp_path / "r").glob("*.safetensors"))
        assert names == ["epoch-000.safetensors", "epoch-001.safetensors"]

    def test_force_leaves_other_files_alone(self, tmp_path, task_file):
        task = ("--task", f"{task_file}:task", "--output", tmp_path / "r", "--quiet")
        run("train", *task, "--epochs", "0")
        (tmp_path / "r" / "epoch-notes.txt").write_text("mine")
        run("train", *task, "--epochs", "0", "--force")
        assert (tmp_path / "r" / "epoch-notes.txt").read_text() == "mine"

    def test_folder_with_brackets_is_shown_as_it_is(self, tmp_path, task_file):
        folder = tmp_path / "run[old]"
        result = run("train", "-t", f"{task_file}:task", "--epochs", "0", "-o", folder)
        assert "run[old]" in result.output.replace("\n", "")


class TestGamma:
    def test_every_way_to_name_checkpoints(self, cnn, tmp_path):
        files = sorted(cnn.folder.glob("*.safetensors"))
        ways = {
            "folder": ("-c", cnn.folder),
            "glob": ("-c", f"{cnn.folder}/*.safetensors"),
            "repeated": ("-c", files[0], "-c", files[1], "--checkpoint", files[2]),
            "positional": ("-c", *files),
        }
        tables = {
            name: gamma(tmp_path / f"{name}.parquet", *CNN, *SMALL, "-m", "sgd,ef", *way)
            for name, way in ways.items()
        }
        for table in tables.values():
            assert_frame_equal(table, tables["folder"])
        table = tables["folder"]
        assert list(dict.fromkeys(table["checkpoint"])) == [str(path) for path in files]
        assert list(dict.fromkeys(table["epoch"])) == [0, 1, 2]
        assert list(dict.fromkeys(table["stage"])) == [0, 1, 2]

    def test_one_row_per_checkpoint_batch_method_and_damping(self, cnn, tmp_path):
        args = ("-m", "sgd,ief,diag-ef:0.5", "--damping", "0,1e-3", "--num-batches", "2")
        table = gamma(tmp_path / "g.csv", *CNN, "-c", cnn.folder, "--batch-size", "6", *args)
        keys = ["checkpoint", "batch", "method", "damping"]
        assert len(table) == 3 * 2 * 3 * 2
        assert not table.duplicated(keys).any()
        assert set(table["batch"]) == {0, 1}
        assert list(dict.fromkeys(table["method"])) == ["sgd", "ief", "diag-ef:0.5"]
        assert set(table["damping"]) == {0, 1e-3}
        assert set(table["task"]) == {"digits-cnn"}
        assert (table["status"] == "ok").all()
        assert {"damping_absolute", "gamma", "gamma_floor", "num_samples"} <= set(table.columns)
        assert (table["num_samples"] == 6).all()

    def test_sgd_is_the_unit_and_nothing_beats_the_natural_gradient(self, cnn, tmp_path):
        table = gamma(tmp_path / "g.parquet", *CNN, "-c", cnn.folder, *SMALL)
        sgd = table[table["method"] == "sgd"]
        assert len(sgd) == 6
        assert (sgd["gamma_over_sgd"] == 1).all()
        others = table[table["method"] != "sgd"]
        assert (others["gamma_over_sgd"] != 1).all()
        assert (table["gamma_over_ng"] > 1 - 1e-6).all()
        assert (table["gamma_floor"] <= table["gamma_min"] * (1 + 1e-9)).all()

    def test_results_are_those_of_evaluate(self, cnn, tmp_path):
        methods, dampings = ["sgd", "ef", "sf:2", "diag"], [1e-6, 1.0]
        args = ("-m", ",".join(methods), "--damping", "1e-6,1", "--seed", "11")
        sizes = ("--batch-size", "5", "--num-batches", "2")
        result = gamma(tmp_path / "g.parquet", *CNN, "-c", cnn.folder, *args, *sizes)
        task, frames = get_task("digits-cnn"), []
        for epoch in range(3):
            model = task.model().eval()
            state = safetensors.torch.load_file(cnn.folder / f"epoch-00{epoch}.safetensors")
            model.load_state_dict(state)
            for batch, (x, y) in enumerate(task.batches(5, 2, 11)):
                problem = ngeval.Problem(model, x, y, "categorical")
                frames.append(ngeval.evaluate(problem, methods, dampings, seed=11 + batch))
        expected = pd.concat(frames, ignore_index=True)
        assert list(result.columns) == [
            *("task", "checkpoint", "stage", "epoch", "step", "batch"),
            *expected.columns,
        ]
        assert_frame_equal(result[expected.columns], expected, rtol=1e-9)

    def test_batches_differ_but_are_the_same_for_every_checkpoint(self, task_file, tmp_path):
        first, second = (random_weights(tmp_path / name) for name in ("a.safetensors", "b.pt"))
        second.unlink()
        torch.save(safetensors.torch.load_file(first), second)
        args = ("-t", f"{task_file}:task", "-c", first, second, "-m", "sgd,sf,ng")
        table = gamma(tmp_path / "g.parquet", *args, "--batch-size", "5", "--num-batches", "2")
        by_checkpoint = [part for _, part in table.groupby("checkpoint", sort=False)]
        values = ["batch", "method", "damping", "gamma", "gamma_min", "loss"]
        left, right = (part[values].reset_index(drop=True) for part in by_checkpoint)
        assert_frame_equal(left, right)
        assert left.loc[left["batch"] == 0, "loss"].iloc[0] != left["loss"].iloc[-1]

    def test_csv_parquet_and_jsonl_give_the_same_table(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder, *SMALL, "--damping", "0,1e-12,1e4")
        tables = {
            kind: gamma(tmp_path / f"g.{kind}", *args) for kind in ("csv", "parquet", "jsonl")
        }
        expected = tables["parquet"]
        assert expected["gamma"].dtype == np.float64
        for kind in ("csv", "jsonl"):
            texts = tables[kind][["reason", "note"]].astype(object).fillna("")
            table = tables[kind].assign(**texts)
            assert_frame_equal(table, expected, check_dtype=False, rtol=1e-12, atol=0)

    def test_damping_scale_is_applied_and_stored(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder / "epoch-001.safetensors", *SMALL, "-m", "ef,ief")
        means = (*args, "--damping", "1e-3", "--damping-scale", "mean")
        mean = gamma(tmp_path / "m.csv", *means)
        absolute = gamma(tmp_path / "a.csv", *args, "--damping", "8e-3")
        assert set(mean["damping_scale"]) == {"mean"}
        assert mean["damping_absolute"].tolist() == pytest.approx([8e-3, 8e-3])
        assert mean["gamma"].tolist() == pytest.approx(absolute["gamma"].tolist(), rel=1e-12)

    def test_loop_engine_and_small_memory_agree_with_the_default(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder / "epoch-001.safetensors", "--batch-size", "4")
        args = (*args, "--num-batches", "1", "-m", "sgd,ef,ng", "--dtype", "float64")
        default = gamma(tmp_path / "d.csv", *args)
        for name, options in {
            "loop": ("--engine", "loop"),
            "vmap": ("--engine", "vmap", "--memory", "4MiB"),
        }.items():
            other = gamma(tmp_path / f"{name}.csv", *args, *options)
            assert set(other["engine"]) == {name}
            assert other["gamma"].tolist() == pytest.approx(default["gamma"].tolist(), rel=1e-9)

    def test_prints_a_table_for_each_damping(self, cnn):
        result = run("gamma", *CNN, "-c", cnn.folder, *SMALL, "-m", "sgd,ef", "--damping", "0,0.01")
        assert "λ = 0:" in result.stdout
        assert "λ = 0.01:" in result.stdout
        for word in ("γ/γ_SGD", "ef", "floor", "epoch 0", "epoch 1", "epoch 2"):
            assert word in result.stdout

    def test_rows_that_cannot_be_computed_are_counted_and_kept(self, cnn, tmp_path):
        # 40 × 100 sampled gradients have a Gram matrix of more than 1 MiB.
        args = (*CNN, "-c", cnn.folder / "epoch-001.safetensors", "--batch-size", "40")
        args = (*args, "--num-batches", "1", "-m", "sgd,sf:100,ng", "--damping", "1")
        args = (*args, "--memory", "1MiB")
        result = run("gamma", *args, "--quiet", "-o", tmp_path / "g.csv")
        assert result.stderr.count("ngeval:") == 1
        assert "1 of 3 rows could not be computed" in result.stderr
        assert "memory" in result.stderr
        table = read(tmp_path / "g.csv")
        assert table["status"].tolist() == ["ok", "failed", "ok"]
        assert np.isfinite(table["gamma"][[0, 2]]).all()
        assert np.isnan(table["gamma"][1])
        assert "memory" in table["reason"][1]
        # Nor does the kernel of 400 outputs fit: the natural gradient is from a Krylov run.
        assert (table["iterations"] > 0).all()
        assert (table["gamma_ng_upper"] < 1.001 * table["gamma_ng_lower"])[[0, 2]].all()

    def test_another_batch_grades(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder / "epoch-001.safetensors", *SMALL, "-m", "sgd,ief")
        table = gamma(tmp_path / "m.csv", *args, "--metric-batches", "3")
        size = table["num_samples"].iloc[0]
        assert (table["metric_samples"] == 3 * size).all()
        assert table["gamma_min"].isna().all()
        local = gamma(tmp_path / "o.csv", *args, "--no-natural")
        assert local["gamma_min"].isna().all()
        assert (local["gamma"] != table["gamma"]).all()
        result = run("gamma", *args, "--metric-batches", "none", code=2)
        assert "a number of batches, or all" in result.stderr

    def test_force_replaces_the_result(self, cnn, tmp_path):
        output = tmp_path / "g.csv"
        output.write_text("old")
        table = gamma(output, *CNN, "-c", cnn.folder, *SMALL, "-m", "sgd", "--force")
        assert len(table) == 6
        assert sorted(tmp_path.iterdir()) == [output, manifest_path(output)]

    def test_makes_the_folder_of_the_output(self, cnn, tmp_path):
        output = tmp_path / "new" / "folder" / "g.jsonl"
        assert len(gamma(output, *CNN, "-c", cnn.folder, *SMALL, "-m", "sgd")) == 6

    def test_checkpoints_without_json_are_named_by_their_file(self, task_file, tmp_path):
        path = random_weights(tmp_path / "w[best].safetensors")
        args = ("-t", f"{task_file}:task", "-c", path, *SMALL, "-m", "sgd,ef")
        result = run("gamma", *args, "--output", tmp_path / "g.parquet")
        assert read(tmp_path / "g.parquet")["epoch"].isna().all()
        assert "w[best].safetensors" in result.stdout


class TestSweep:
    def test_dampings_are_log_spaced_from_low_to_high(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder / "epoch-002.safetensors", *SMALL, "-m", "sgd,ef,ng")
        run("sweep", *args, "--dampings", "1e-8:1e4:13", "-q", "-o", tmp_path / "s.parquet")
        table = read(tmp_path / "s.parquet")
        assert len(table) == 3 * 13
        ef = table[table["method"] == "ef"]
        np.testing.assert_allclose(ef["damping"], np.logspace(-8, 4, 13), rtol=1e-11)
        assert (table.loc[table["method"] == "sgd", "gamma_over_sgd"] == 1).all()
        # λ → ∞ gives the gradient's direction for NG, and λ → 0 the least γ.
        ng = table[table["method"] == "ng"].set_index("damping")
        assert ng["gamma_over_sgd"].iloc[-1] == pytest.approx(1, abs=1e-2)
        assert ng["gamma_over_ng"].iloc[0] == pytest.approx(1, abs=1e-3)

    def test_comma_list_and_printed_best(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder, *SMALL, "-m", "sgd,ng", "--dampings", "0,1")
        result = run("sweep", *args, "-o", tmp_path / "s.csv")
        assert set(read(tmp_path / "s.csv")["damping"]) == {0, 1}
        for word in ("γ/γ_min", "best", "epoch 2", "ng"):
            assert word in result.stdout


@pytest.fixture(scope="module")
def samples(cnn, tmp_path_factory):
    """What ``ngeval imbalance`` writes about the network's checkpoints."""
    output = tmp_path_factory.mktemp("imbalance") / "i.parquet"
    args = ("-m", "sgd,ef,ief", "--damping", "0", "--dtype", "float64", "--quiet")
    sizes = ("--batch-size", "8", "--num-batches", "2")
    run("imbalance", *CNN, "-c", cnn.folder, *sizes, *args, "-o", output)
    return read(output)


class TestImbalance:
    def test_one_row_for_each_sample(self, samples):
        assert len(samples) == 3 * 2 * 8
        assert not samples.duplicated(["checkpoint", "batch", "sample"]).any()
        assert (samples["gradient_norm"] > 0).all()
        assert (samples["residual_norm"] > 0).all()

    def test_ef_changes_every_loss_alike(self, samples):
        changes = samples.groupby(["checkpoint", "batch"])["loss_change_ef"]
        assert (changes.max() < 0).all()
        np.testing.assert_allclose(changes.max(), changes.min(), rtol=1e-6)

    def test_ief_changes_losses_by_the_squared_residual(self, samples):
        ratio = samples["loss_change_ief"] / samples["residual_norm"] ** 2
        np.testing.assert_allclose(ratio, -1, rtol=1e-6)

    def test_norms_and_changes_by_a_loop_over_samples(self, cnn, samples):
        task = get_task("digits-cnn")
        model = task.model().double().eval()
        model.load_state_dict(safetensors.torch.load_file(cnn.folder / "epoch-001.safetensors"))
        x, y = next(task.batches(8, 2, 0))
        parameters = list(model.parameters())
        gradients = []
        for n in range(8):
            loss = torch.nn.functional.cross_entropy(model(x[n : n + 1].double()), y[n : n + 1])
            parts = torch.autograd.grad(loss, parameters)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        rows = torch.stack(gradients)
        result = samples[samples["checkpoint"].str.contains("epoch-001") & (samples["batch"] == 0)]
        np.testing.assert_allclose(result["gradient_norm"], rows.norm(dim=1), rtol=1e-9)
        np.testing.assert_allclose(result["loss_change_sgd"], -rows @ rows.sum(0), rtol=1e-7)

    def test_a_method_without_memory_does_not_lose_the_unit(self, cnn, tmp_path):
        options = ("-m", "ef,block-ng", "--memory", "3MB", "-q", "-o", tmp_path / "i.csv")
        run("imbalance", *CNN, "-c", max(cnn.folder.glob("*.safetensors")), *SMALL[2:], *options)
        samples = read(tmp_path / "i.csv")
        assert len(samples) == 160
        assert samples["loss_change_ef"].notna().all()
        assert samples["loss_change_block-ng"].isna().all()
        assert samples["reason"].str.contains("block-ng: .*raise memory=").all()

    def test_prints_quantiles_and_imbalance(self, cnn):
        result = run("imbalance", *CNN, "-c", cnn.folder, *SMALL)
        for word in ("‖g_n‖", "median", "max/min", "epoch 0", "epoch 2"):
            assert word in result.stdout

    def test_without_methods_there_are_norms_alone(self, cnn, tmp_path):
        run("imbalance", *CNN, "-c", cnn.folder, *SMALL, "-q", "-o", tmp_path / "i.csv")
        columns = read(tmp_path / "i.csv").columns
        assert [name for name in columns if name.startswith("loss_change")] == []
        assert {"sample", "gradient_norm", "residual_norm", "loss"} <= set(columns)


MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture(scope="module")
def results(cnn, tmp_path_factory):
    """A result file for each kind of picture."""
    folder = tmp_path_factory.mktemp("results")
    args = (*CNN, "-c", cnn.folder, "--batch-size", "6", "--num-batches", "2", "--quiet")
    run("sweep", *args, "-m", "sgd,ef,ng", "--dampings", "1e-4,1", "-o", folder / "s.csv")
    run("imbalance", *args, "-o", folder / "i.jsonl")
    return {
        "stages": folder / "s.csv",
        "damping": folder / "s.csv",
        "imbalance": folder / "i.jsonl",
    }


@pytest.fixture(scope="module")
def drawn(results, tmp_path_factory):
    """The file of a picture of a kind, which is drawn once."""
    folder = tmp_path_factory.mktemp("drawn")

    def picture(kind, suffix):
        output = folder / f"{kind}{suffix}"
        if not output.exists():
            run("plot", results[kind], "--kind", kind, "--output", output)
        return output

    return picture


class TestPlot:
    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    @pytest.mark.parametrize("kind", ["stages", "damping", "imbalance"])
    def test_draws_every_kind_in_every_format(self, drawn, kind, suffix):
        content = drawn(kind, suffix).read_bytes()
        assert content.startswith(MAGIC[suffix])
        assert len(content) > 4000

    @pytest.mark.parametrize(
        ("kind", "labels"),
        [
            ("stages", ["training epoch", "γ", "damping λ = ", "closer to NG", "ef", "ng"]),
            ("damping", ["damping λ (absolute)", "γ", "floor", "epoch 0", "epoch 2"]),
            ("imbalance", ["training epoch", "per-sample gradient norm", "imbalance", "median"]),
        ],
    )
    def test_svg_has_its_labels_as_text(self, drawn, kind, labels):
        content = drawn(kind, ".svg").read_text()
        assert "<text" in content, "text is drawn as outlines: it cannot be edited or searched"
        texts = [line for line in content.splitlines() if "<!--" not in line]
        for label in labels:
            assert any(label in line for line in texts), label

    def test_chosen_damping_and_checkpoint(self, cnn, results, tmp_path):
        output = tmp_path / "figure.svg"
        run("plot", results["stages"], "--damping", "1", "--output", output)
        assert "damping λ = 1 " in output.read_text()
        chosen = ("--kind", "damping", "--checkpoint", cnn.folder / "epoch-001.safetensors")
        run("plot", results["damping"], *chosen, "--output", output, "--force")
        assert "epoch 1" in output.read_text()
        assert "epoch 2" not in output.read_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, small."""
    output = tmp_path_factory.mktemp("demo") / "out"
    args = ("--epochs", "1", "--batch-size", "16", "--num-batches", "2")
    return SimpleNamespace(output=output, result=run("demo", "-o", output, *args), args=args)


class TestDemo:
    def test_files(self, demo):
        names = sorted(str(path.relative_to(demo.output)) for path in demo.output.rglob("*.*"))
        assert names == [
            *(f"checkpoints/epoch-00{i}.{kind}" for i in (0, 1) for kind in KINDS),
            "damping.png",
            "imbalance.parquet",
            "imbalance.parquet.manifest.json",
            "imbalance.png",
            "results.parquet",
            "results.parquet.manifest.json",
            "stages.png",
        ]
        for kind in ("stages", "damping", "imbalance"):
            content = (demo.output / f"{kind}.png").read_bytes()
            assert content.startswith(MAGIC[".png"])
            assert len(content) > 10_000

    def test_results_cover_every_checkpoint_damping_and_method(self, demo):
        table = pd.read_parquet(demo.output / "results.parquet")
        assert set(table["method"]) == {"sgd", "ef", "sf", "ief", "diag", "ng"}
        assert table["damping"].nunique() == 50
        assert table["epoch"].unique().tolist() == [0, 1]
        assert len(table) == 2 * 2 * 6 * 50
        assert (table["status"] == "ok").all()
        samples = pd.read_parquet(demo.output / "imbalance.parquet")
        assert len(samples) == 2 * 2 * 16

    def test_prints_epochs_a_summary_and_the_files(self, demo):
        shown = demo.result.stdout
        for word in ("epoch   0", "epoch   1", "γ/γ_SGD", "floor", "max/min"):
            assert word in shown
        for name in ("results.parquet", "imbalance.parquet", "stages.png", "damping.png"):
            assert name in shown.replace("\n", "")

    def test_natural_gradient_is_on_the_floor_at_small_damping(self, demo):
        table = pd.read_parquet(demo.output / "results.parquet")
        ng = table[(table["method"] == "ng") & (table["damping"] == table["damping"].min())]
        np.testing.assert_allclose(ng["gamma"], ng["gamma_floor"], rtol=1e-3)

    def test_a_second_run_needs_force(self, demo):
        before = {path: path.read_bytes() for path in demo.output.rglob("*.*")}
        result = run("demo", "-o", demo.output, *demo.args, code=2)
        assert "--force" in result.stderr
        assert {path: path.read_bytes() for path in demo.output.rglob("*.*")} == before

    def test_resume_does_what_is_missing(self, demo):
        output = demo.output
        norms = pd.read_parquet(output / "imbalance.parquet")
        for name in ("imbalance.parquet", "imbalance.parquet.manifest.json", "stages.png"):
            (output / name).unlink()
        kept = pd.read_parquet(output / "results.parquet")
        result = run("demo", "-o", output, *demo.args, "--resume")
        assert "epoch   1" not in result.stdout  # no second training
        pd.testing.assert_frame_equal(pd.read_parquet(output / "results.parquet"), kept)
        pd.testing.assert_frame_equal(pd.read_parquet(output / "imbalance.parquet"), norms)
        assert (output / "stages.png").exists()

    def test_resume_of_a_training_that_was_cut_off_trains_again(self, demo, tmp_path):
        output = tmp_path / "copy"
        (output / "checkpoints").mkdir(parents=True)
        first = "checkpoints/epoch-000.safetensors"
        shutil.copy(demo.output / first, output / first)
        result = run("demo", "-o", output, *demo.args, "--resume")
        assert "epoch   1" in result.stdout
        assert (output / "imbalance.parquet").exists()

    def test_a_picture_of_the_users_is_not_overwritten(self, tmp_path, demo):
        (tmp_path / "stages.png").write_text("mine")
        result = run("demo", "-o", tmp_path, *demo.args, "-q", code=2)
        assert "stages.png" in result.stderr
        assert (tmp_path / "stages.png").read_text() == "mine"


class TestListsAndHelp:
    def test_tasks_shows_names_and_sizes(self):
        shown = run("tasks").stdout
        for word in ("digits-mlp", "digits-cnn", "digits-regression", "15,338", "Gaussian"):
            assert word in shown

    def test_methods_shows_names_formulas_and_an_example(self):
        shown = run("methods").stdout
        for name in ngeval.METHODS:
            assert name in shown
        assert "(F + λI)⁻¹ g" in shown
        assert "sf:4" in shown

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_says_what_it_does_with_an_example(self, command):
        shown = run(command, "--help").stdout
        assert f"Usage: root {command}" in shown or f"Usage: ngeval {command}" in shown
        assert "Example" in shown
        assert f"ngeval {command}" in shown

    def test_help_lists_every_command(self):
        shown = run("--help").stdout
        for command in COMMANDS:
            assert command in shown

    def test_quiet_prints_nothing(self, cnn, tmp_path, task_file):
        task = ("--task", f"{task_file}:task")
        common = (*CNN, "-c", cnn.folder, *SMALL, "--quiet")
        for args in (
            ("train", *task, "--epochs", "1", "--quiet", "-o", tmp_path / "t"),
            ("gamma", *common, "-m", "sgd,ef", "-o", tmp_path / "g.csv"),
            ("sweep", *common, "-m", "sgd,ef", "--dampings", "1,2", "-o", tmp_path / "s.csv"),
            ("imbalance", *common, "-q", "-o", tmp_path / "i.csv"),
            ("demo", "--epochs", "0", *SMALL, "-q", "-o", tmp_path / "d"),
        ):
            result = run(*args)
            assert (args[0], result.stdout, result.stderr) == (args[0], "", "")

    def test_results_go_to_stdout_and_progress_to_stderr(self, cnn, tmp_path):
        result = run("gamma", *CNN, "-c", cnn.folder, *SMALL, "-m", "sgd", "-o", tmp_path / "g.csv")
        assert "γ/γ_SGD" in result.stdout
        assert "grading updates" not in result.stdout
        assert "grading updates" in result.stderr
        assert "(6 rows)" in result.stderr


class TestOwnTasks:
    @pytest.mark.parametrize("name", ["task", "make_task"])
    def test_file_with_a_task_or_a_function(self, task_file, tmp_path, name):
        path = random_weights(tmp_path / "w.safetensors")
        table = gamma(tmp_path / "g.csv", "-t", f"{task_file}:{name}", "-c", path, *SMALL)
        assert set(table["task"]) == {"mine"}
        assert set(table["num_parameters"]) == {15}
        assert np.isfinite(table["gamma"]).all()

    def test_package_and_module(self, tmp_path, monkeypatch):
        package = tmp_path / "ngeval_test_package"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "tasks.py").write_text(TASK_FILE)
        monkeypatch.syspath_prepend(tmp_path)
        path = random_weights(tmp_path / "w.safetensors")
        for name in ("task", "make_task"):
            spec = f"ngeval_test_package.tasks:{name}"
            table = gamma(tmp_path / f"{name}.csv", "-t", spec, "-c", path, *SMALL)
            assert set(table["task"]) == {"mine"}

    def test_module_in_the_current_folder(self, tmp_path, monkeypatch):
        # As with `python -m ngeval`: the command `ngeval` must see it too.
        (tmp_path / "ngeval_test_here.py").write_text(TASK_FILE)
        monkeypatch.chdir(tmp_path)
        path = random_weights(tmp_path / "w.safetensors")
        table = gamma(tmp_path / "g.csv", "-t", "ngeval_test_here:task", "-c", path, *SMALL)
        assert set(table["task"]) == {"mine"}

    def test_file_that_imports_its_neighbour(self, tmp_path):
        (tmp_path / "ngeval_test_neighbour.py").write_text(TASK_FILE)
        (tmp_path / "mine.py").write_text("from ngeval_test_neighbour import task\n")
        path = random_weights(tmp_path / "w.safetensors")
        table = gamma(tmp_path / "g.csv", "-t", f"{tmp_path}/mine.py:task", "-c", path, *SMALL)
        assert set(table["task"]) == {"mine"}

    def test_float64_task(self, task_file, tmp_path):
        double = random_weights(tmp_path / "d.safetensors", dtype=torch.float64)
        table = gamma(tmp_path / "d.csv", "-t", f"{task_file}:double", "-c", double, *SMALL)
        assert set(table["dtype"]) == {"float64"}
        single = random_weights(tmp_path / "s.safetensors")
        args = ("-t", f"{task_file}:task", "-c", single, *SMALL)
        cast = gamma(tmp_path / "c.csv", *args, "--dtype", "float64")
        assert set(cast["dtype"]) == {"float64"}
        plain = gamma(tmp_path / "p.csv", *args)
        assert set(plain["dtype"]) == {"float64"}  # the default, whatever the file holds
        narrow = gamma(tmp_path / "n.csv", *args, "--dtype", "model")
        assert set(narrow["dtype"]) == {"float32"}
        gammas = [part["gamma"].tolist() for part in (table, cast, plain, narrow)]
        assert gammas[1] == pytest.approx(gammas[0], rel=1e-6)
        assert gammas[2] == gammas[1]
        assert gammas[3] == pytest.approx(gammas[0], rel=1e-3)
        assert gammas[3] != gammas[0]

    def test_dtype_float64_on_digits(self, cnn, tmp_path):
        args = (*CNN, "-c", cnn.folder / "epoch-001.safetensors", *SMALL, "-m", "sgd,ng")
        plain = gamma(tmp_path / "p.csv", *args)
        cast = gamma(tmp_path / "c.csv", *args, "--dtype", "float64")
        assert set(cast["dtype"]) == {"float64"}
        assert cast["gamma"].tolist() == pytest.approx(plain["gamma"].tolist(), rel=1e-3)

    def test_inputs_by_keyword(self, task_file, tmp_path):
        whole = random_weights(tmp_path / "w.safetensors")
        halves = random_weights(tmp_path / "h.safetensors", "linear.")
        expected = gamma(tmp_path / "w.csv", "-t", f"{task_file}:task", "-c", whole, *SMALL)
        result = gamma(tmp_path / "h.csv", "-t", f"{task_file}:halves", "-c", halves, *SMALL)
        assert set(result["task"]) == {"halves"}
        assert result["gamma"].tolist() == pytest.approx(expected["gamma"].tolist(), rel=1e-5)

    def test_inputs_by_keyword_train(self, task_file, tmp_path):
        args = ("--epochs", "1", "--batch-size", "8", "--quiet")
        run("train", "-t", f"{task_file}:halves", *args, "-o", tmp_path / "r")
        names = sorted(path.name for path in (tmp_path / "r").glob("*.safetensors"))
        assert names == ["epoch-000.safetensors", "epoch-001.safetensors"]

    def test_a_pickled_checkpoint_needs_the_flag(self, task_file, tmp_path):
        path = random_weights(tmp_path / "w.safetensors")
        pickled = tmp_path / "w.pt"
        torch.save(UserDict(safetensors.torch.load_file(path)), pickled)
        args = ("-t", f"{task_file}:task", *SMALL)
        expected = gamma(tmp_path / "w.csv", *args, "-c", path)
        result = gamma(tmp_path / "p.csv", *args, "-c", pickled, "--allow-pickle")
        assert result["gamma"].tolist() == expected["gamma"].tolist()


class TestInterruption:
    @pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
    def test_finished_rows_of_gamma_are_saved(self, cnn, tmp_path, monkeypatch, kind):
        evaluate, calls = ngeval.runs.tables.evaluate, []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(ngeval.runs.tables, "evaluate", interrupted)
        output = tmp_path / f"g.{kind}"
        args = (*CNN, "-c", cnn.folder, *SMALL, "-m", "sgd,ef", "--quiet")
        result = run("gamma", *args, "-o", output, code=130)
        assert "Traceback" not in result.output
        assert result.stderr.count("ngeval:") == 1
        assert "interrupted" in result.stderr
        table = read(output)
        assert len(table) == 4
        assert set(table["stage"]) == {0}
        journal = output.with_name(f"{output.name}.journal")
        assert sorted(tmp_path.iterdir()) == [output, journal, manifest_path(output)]

    def test_finished_rows_of_imbalance_are_saved(self, cnn, tmp_path, monkeypatch):
        norms, calls = ngeval.grading.gradient_norms.gradient_norms, []

        def interrupted(problem):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return norms(problem)

        monkeypatch.setattr(ngeval.grading.gradient_norms, "gradient_norms", interrupted)
        args = (*CNN, "-c", cnn.folder, *SMALL, "--quiet", "-o", tmp_path / "i.csv")
        run("imbalance", *args, code=130)
        assert len(read(tmp_path / "i.csv")) == 16

    def test_interrupted_before_anything_is_finished_leaves_the_old_file(
        self, cnn, tmp_path, monkeypatch
    ):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(ngeval.runs.tables, "evaluate", interrupted)
        (tmp_path / "g.csv").write_text("old")
        args = (*CNN, "-c", cnn.folder, *SMALL, "--force", "-o", tmp_path / "g.csv")
        run("gamma", *args, code=130)
        assert (tmp_path / "g.csv").read_text() == "old"

    def test_finished_checkpoints_of_training_are_kept(self, tmp_path, task_file, monkeypatch):
        step = ngeval.training.Training._train_epoch

        def interrupted(self, stepper, epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            step(self, stepper, epoch)

        monkeypatch.setattr(ngeval.training.Training, "_train_epoch", interrupted)
        args = ("-t", f"{task_file}:task", "--epochs", "5", "-o", tmp_path / "r")
        result = run("train", *args, code=130)
        assert "interrupted" in result.stderr
        names = sorted(path.name for path in (tmp_path / "r").iterdir())
        assert names == [f"epoch-00{i}.{kind}" for i in (0, 1) for kind in KINDS]

    def test_a_real_ctrl_c(self, tmp_path, task_file):
        path = random_weights(tmp_path / "w.safetensors")
        args = ["gamma", "-t", f"{task_file}:interrupted", "-c", path, "--num-batches", "2"]
        args += ["--batch-size", "5", "-m", "sgd,ef", "-o", tmp_path / "g.csv"]
        result = subprocess.run(
            [sys.executable, "-m", "ngeval", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # A parent that ignores the signal (nohup, &) would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert result.returncode == 130, result.stderr
        assert "Traceback" not in result.stderr
        assert "ngeval: interrupted; finished rows are in the output file" in result.stderr
        table = pd.read_csv(tmp_path / "g.csv")
        assert set(table["batch"]) == {0}
        assert len(table) == 4


class TestAsAProgram:
    def test_python_m_ngeval_is_the_command(self):
        command = [sys.executable, "-m", "ngeval", "--version"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"ngeval {ngeval.__version__}\n"

    def test_the_installed_script_refuses_without_traceback(self, tmp_path):
        script = Path(sys.executable).with_name("ngeval")
        command = [script, "gamma", "--task", "digits-cn", "-c", "x.pt", "-o", "r.csv"]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("ngeval: unknown task 'digits-cn'; did you mean")
        assert result.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
