"""Optimizers on the command line, ``ngeval layers`` and ``ngeval compare``."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from typer.testing import CliRunner

import ngeval
import ngeval.runs.tables
from ngeval.analysis.ranking import ranking
from ngeval.checkpoints import find_checkpoints, load_checkpoint
from ngeval.cli.app import app
from ngeval.cli.compare import METHODS
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.runs.run import Run
from ngeval.runs.tables import GammaTable, unit_tables
from ngeval.runs.units import Units
from ngeval.tasks import get_task

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

SMALL = ("--batch-size", "8", "--num-batches", "2")
MANIFEST = "results.parquet.manifest.json"

TASK_FILE = """
import torch
import ngeval


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 8):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, (x[:, :3] + 0.3 * torch.randn(batch_size, 3, generator=generator)).argmax(1)


def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


task = ngeval.Task("mine", net, batches, "categorical")
"""


def run(*args, code=0):
    """Run a command in this process; a wrong exit code shows what it printed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def _close_figures():
    plt = pytest.importorskip("matplotlib.pyplot")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network after 0 to 4 epochs of AdamW, with the optimizer's states."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tasks.py").write_text(TASK_FILE)
    task = f"{folder}/tasks.py:task"
    args = ("--optimizer", "adamw", "--epochs", "4", "--lr", "0.02", "--batch-size", "16")
    run("train", "-t", task, *args, "-o", folder / "run", "--quiet")
    return SimpleNamespace(folder=folder / "run", task=task)


@pytest.fixture
def last(trained):
    """The arguments of a grading of the last checkpoint."""
    return ("-t", trained.task, "-c", trained.folder / "epoch-004.safetensors", *SMALL)


def gamma(output, *args):
    run("gamma", *args, "--quiet", "--output", output)
    return pd.read_csv(output)


def model_at(trained, epoch):
    task = get_task(trained.task)
    model = task.model().double().eval()
    path = trained.folder / f"epoch-00{epoch}.safetensors"
    load_checkpoint(model, find_checkpoints([str(path)])[0])
    return model


def real_step(trained, epoch, state_of, batch, **options):
    """θ − θ′ of a step of torch's own AdamW with a saved state, in float64."""
    model = model_at(trained, epoch)
    optimizer = torch.optim.AdamW(model.named_parameters(), **options)
    path = trained.folder / f"epoch-00{state_of}.optimizer.pt"
    (saved,) = torch.load(path, weights_only=True)["states"]
    for group in saved["param_groups"]:
        group.update(options)
    optimizer.load_state_dict(saved)
    inputs, targets = batch
    torch.nn.functional.cross_entropy(model(inputs.double()), targets).backward()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    optimizer.step()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


class TestOptimizers:
    def expected(self, trained, state_of=4, **options):
        """γ of the real steps on both batches, under the float64 model."""
        result = []
        for batch in get_task(trained.task).batches(8, 2, 0):
            step = real_step(trained, 4, state_of, batch, **options)
            model = model_at(trained, 4)
            problem = ngeval.Problem(model, batch[0].double(), batch[1], "categorical")
            result.append(problem.gamma(step))
        return result

    def test_the_state_is_found_beside_the_checkpoint(self, trained, last, tmp_path):
        table = gamma(tmp_path / "g.csv", *last, "-m", "adamw", "--damping", "1")
        assert table["gamma"].tolist() == pytest.approx(self.expected(trained), rel=1e-4)
        assert (table["status"] == "ok").all()

    def test_another_state_file(self, trained, last, tmp_path):
        moved = shutil.copy(trained.folder / "epoch-001.optimizer.pt", tmp_path / "state.pt")
        args = (*last, "-m", "adamw", "--damping", "1", "--optimizer-state", moved)
        table = gamma(tmp_path / "g.csv", *args)
        expected = self.expected(trained, state_of=1)
        assert table["gamma"].tolist() == pytest.approx(expected, rel=1e-4)
        assert expected != pytest.approx(self.expected(trained), rel=1e-3)

    def test_without_weight_decay(self, trained, last, tmp_path):
        args = (*last, "-m", "adamw", "--damping", "1")
        table = gamma(tmp_path / "g.csv", *args, "--no-weight-decay")
        expected = self.expected(trained, weight_decay=0.0)
        assert table["gamma"].tolist() == pytest.approx(expected, rel=1e-4)
        decayed = gamma(tmp_path / "d.csv", *args, "--weight-decay")
        assert decayed["gamma"].tolist() != pytest.approx(expected, rel=1e-6)

    def test_reduction(self, last, tmp_path):
        args = (*last, "-m", "adamw", "--damping", "1")
        values = {
            name: gamma(tmp_path / f"{name}.csv", *args, "--reduction", name)["gamma"].tolist()
            for name in ("mean", "sum", "token-mean")
        }
        assert values["sum"] != pytest.approx(values["mean"], rel=1e-3)
        assert values["token-mean"] == pytest.approx(values["mean"])  # one position

    def test_a_state_for_each_checkpoint(self, trained, tmp_path):
        files = [trained.folder / f"epoch-00{i}.safetensors" for i in (1, 4)]
        args = ("-t", trained.task, "-c", *files, *SMALL, "-m", "adamw", "--damping", "1")
        local = gamma(tmp_path / "own.csv", *args)
        argument = []
        for i in (1, 4):
            argument += ["--optimizer-state", trained.folder / f"epoch-00{i}.optimizer.pt"]
        assert_frame_equal(gamma(tmp_path / "given.csv", *args, *argument), local)
        swapped = [argument[0], argument[3], argument[2], argument[1]]
        other = gamma(tmp_path / "swapped.csv", *args, *swapped)
        assert (abs(other["gamma"] / local["gamma"] - 1) > 1e-3).all()

    def test_state_accumulated_over_other_batches(self, trained, tmp_path):
        checkpoints = find_checkpoints([str(trained.folder)])
        job = Run(get_task(trained.task), checkpoints, batch_size=8, num_batches=3, seed=5)
        stage = job.stage(2)
        assert stage.name == str(trained.folder / "epoch-002.safetensors")
        assert stage.optimizer_state == trained.folder / "epoch-002.optimizer.pt"
        assert stage.optimizer == "adamw"
        graded = list(job.task.batches(8, 3, 5))
        first, again = (list(stage.batches(3)) for _ in range(2))
        assert [len(x) for x, _ in first] == [8, 8, 8]
        for (x, _), (same, _) in zip(first, again, strict=True):
            assert torch.equal(x, same)
            assert not any(torch.equal(x, other) for other, _ in graded)

    def test_methods_with_at_are_asked_at_every_checkpoint(self, trained):
        seen = []

        class Bound:
            name = "mine"

            def at(self, stage: Stage):
                seen.append((Path(stage.name).stem, stage.options))
                return ngeval.get_method("sgd")

        checkpoints = find_checkpoints([str(trained.folder)])[:2]
        options = OptimizerOptions("sum", False, False)
        job = Run(get_task(trained.task), checkpoints, 8, 1, optimizer_options=options)
        work = GammaTable.of([_Named(Bound())], dampings=[1.0])
        entries = unit_tables(Units(job, work.resolved), work, job.keys)
        tables = [entry.table for _, entry in entries]
        assert set(seen) == {("epoch-000", options), ("epoch-001", options)}
        assert [table["gamma_over_sgd"].tolist() for table in tables] == [[1.0], [1.0]]

    def test_imbalance_knows_optimizers(self, trained, last, tmp_path):
        run("imbalance", *last, "-m", "adamw", "-q", "-o", tmp_path / "i.csv")
        table = pd.read_csv(tmp_path / "i.csv")
        batch = next(get_task(trained.task).batches(8, 2, 0))
        step = real_step(trained, 4, 4, batch)
        problem = ngeval.Problem(model_at(trained, 4), batch[0].double(), batch[1], "categorical")
        result = table.loc[table["batch"] == 0, "loss_change_adamw"].to_numpy()
        expected = ngeval.loss_change(problem, step).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("command", ["gamma", "sweep", "layers", "imbalance"])
    def test_no_state_is_an_error_before_work(self, trained, tmp_path, command):
        weights = tmp_path / "w.safetensors"
        shutil.copy(trained.folder / "epoch-004.safetensors", weights)
        args = ("-t", trained.task, "-c", trained.folder / "epoch-001.safetensors", weights)
        out = tmp_path / "r.csv"
        result = run(command, *args, *SMALL, "-m", "sgd,adamw", "-q", "-o", out, code=2)
        assert result.stderr.startswith("ngeval: ")
        assert result.stderr.count("\n") == 1
        assert "no optimizer state beside" in result.stderr
        assert str(weights) in result.stderr
        assert not out.exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--reduction", "meen"),
                "unknown reduction of the training loss 'meen'; did you mean 'mean'",
            ),
            (("--optimizer-state", "nowhere.pt"), "nowhere.pt is not a file"),
            (
                ("--optimizer-state", "a.pt", "--optimizer-state", "b.pt"),
                "2 optimizer states for 1 checkpoints: give one for each",
            ),
        ],
    )
    def test_bad_options(self, last, options, message):
        result = run("gamma", *last, "-m", "adamw", *options, code=2)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


class _Named:
    """A method as users write them: an object that may know a checkpoint."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.name = inner.name

    def at(self, stage):
        return self.inner.at(stage)

    def prepare(self, problem, kernel, seed=0):
        raise AssertionError("not at a checkpoint")


class TestLayers:
    def test_results_are_those_of_layer_table(self, trained, last, tmp_path):
        args = (*last, "-m", "sgd,ief,sf", "--damping", "1e-3,1", "--seed", "3")
        run("layers", *args, "-q", "-o", tmp_path / "l.csv")
        result = pd.read_csv(tmp_path / "l.csv")
        assert result["layer"].astype(str).unique().tolist() == ["0", "2"]
        model = model_at(trained, 4).float()
        tables = [
            ngeval.layer_table(
                ngeval.Problem(model, x, y, "categorical"),
                ["sgd", "ief", "sf"],
                [1e-3, 1.0],
                seed=3 + batch,
            )
            for batch, (x, y) in enumerate(get_task(trained.task).batches(8, 2, 3))
        ]
        expected = pd.concat(tables, ignore_index=True)
        columns = ["task", "checkpoint", "stage", "epoch", "step", "batch"]
        assert list(result.columns) == [*columns, *expected.columns]
        for column in ("gamma", "gamma_over_sgd", "decrease", "curvature", "excess"):
            np.testing.assert_allclose(result[column], expected[column], rtol=1e-6, atol=1e-12)

    def test_groups(self, last, tmp_path):
        args = (*last, "-m", "sgd", "-q")
        counts = {}
        for groups in ("layer", "parameter", "1"):
            run("layers", *args, "--groups", groups, "-o", tmp_path / f"{groups}.csv")
            counts[groups] = pd.read_csv(tmp_path / f"{groups}.csv")["layer"].nunique()
        assert counts == {"layer": 2, "parameter": 4, "1": 2}
        result = run("layers", *args, "--groups", "blocks", code=2)
        assert "groups 'blocks': write layer, parameter, or how many components" in result.stderr

    def test_another_batch_grades(self, last, tmp_path):
        args = (*last, "-m", "ief", "-q")
        run("layers", *args, "-o", tmp_path / "own.csv")
        run("layers", *args, "--metric-batches", "4", "-o", tmp_path / "other.csv")
        local, other = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("own", "other"))
        assert set(other["metric_samples"]) == {32}
        assert (local["gamma"] != other["gamma"]).all()

    def test_prints_a_table_and_progress(self, trained):
        result = run("layers", "-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd,ng")
        for word in ("epoch 0", "epoch 2", "epoch 4", "buys", "spends", "γ/γ_SGD", "ng"):
            assert word in result.stdout
        assert "epoch 3" not in result.stdout
        assert "grading layers" in result.stderr

    def test_quiet_prints_nothing(self, last, tmp_path):
        result = run("layers", *last, "-m", "sgd", "-q", "-o", tmp_path / "l.csv")
        assert (result.stdout, result.stderr) == ("", "")

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
    def test_is_drawn(self, last, tmp_path, suffix):
        table = tmp_path / f"l{suffix}"
        run("layers", *last, "-m", "sgd,ief", "-q", "-o", table)
        run("plot", table, "--kind", "layers", "-o", tmp_path / "l.svg")
        content = (tmp_path / "l.svg").read_text()
        for label in ("epoch 4", "loss bought", "KL spent", "ief: γ", ">0<", ">2<"):
            assert label in content

    def test_interrupted(self, trained, tmp_path, monkeypatch):
        built, calls = ngeval.runs.tables.layer_table, []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return built(*args, **kwargs)

        monkeypatch.setattr(ngeval.runs.tables, "layer_table", interrupted)
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd", "-q")
        run("layers", *args, "-o", tmp_path / "l.csv", code=130)
        assert len(pd.read_csv(tmp_path / "l.csv")) == 3 * 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-m", "iff"), "did you mean 'ief'"),
            (("-m", "sgd", "--damping", "-1"), "damping -1.0 is not allowed"),
            (("-m", "sgd", "-o", "l.txt"), "use one of .csv"),
            (("-m", "sgd", "--metric-batches", "few"), "a number of batches, or all"),
        ],
    )
    def test_bad_options(self, last, options, message):
        assert message in run("layers", *last, *options, code=2).stderr


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """The comparison that needs no options."""
    output = tmp_path_factory.mktemp("compared") / "out"
    args = ("-t", trained.task, "-c", trained.folder, *SMALL)
    return SimpleNamespace(output=output, args=args, result=run("compare", *args, "-o", output))


class TestCompare:
    def test_files(self, compared):
        names = sorted(path.name for path in compared.output.iterdir())
        assert names == ["kfac.png", "ranking.csv", "ranking.png", "results.parquet", MANIFEST]
        for name in ("kfac.png", "ranking.png"):
            content = (compared.output / name).read_bytes()
            assert content.startswith(b"\x89PNG")
            assert len(content) > 10_000

    def test_every_method_at_every_checkpoint(self, compared):
        table = pd.read_parquet(compared.output / "results.parquet")
        assert list(dict.fromkeys(table["method"])) == METHODS.split(",")
        assert table["epoch"].unique().tolist() == [0, 1, 2, 3, 4]
        assert table["damping"].nunique() == 11
        lost = table[table["status"] != "ok"]
        assert lost.empty, lost["reason"].unique()
        assert (table["gamma_over_ng"] > 1 - 1e-4).all()

    def test_ranking_of_more_than_ten_at_three_stages(self, compared):
        table = pd.read_parquet(compared.output / "results.parquet")
        ranked = pd.read_csv(compared.output / "ranking.csv")
        read = ranked.assign(reason=ranked["reason"].astype(object).fillna(""))
        assert_frame_equal(read, ranking(table), check_dtype=False, rtol=1e-9)
        assert ranked["stage_name"].unique().tolist() == ["early", "middle", "late"]
        assert ranked["epoch"].unique().tolist() == [0, 2, 4]
        for _, rows in ranked.groupby("stage_name"):
            assert len(rows) == len(METHODS.split(",")) >= 10
            assert rows["rank"].is_monotonic_increasing
            assert (rows["gamma_over_ng"] <= rows["gamma_over_ng_run"] * (1 + 1e-9)).all()
        plain = ranked[ranked["method"].isin(["sgd", "adamw:20", "muon:20"])]
        assert plain["damping"].isna().all()

    def test_prints_the_ranking(self, compared):
        shown = compared.result.stdout
        for word in ("early: epoch 0", "middle: epoch 2", "late: epoch 4", "γ/γ_min", "95 %"):
            assert word in shown
        for method in METHODS.split(","):
            assert shown.count(f" {method} ") == 3
        for name in ("results.parquet", "ranking.csv", "kfac.png", "ranking.png"):
            assert name in shown.replace("\n", "")

    def test_pictures_of_the_table(self, compared, tmp_path):
        results = compared.output / "results.parquet"
        for kind, label in (("kfac", "ieKFAC"), ("ranking", "late: epoch 4")):
            run("plot", results, "--kind", kind, "-o", tmp_path / f"{kind}.svg")
            assert label in (tmp_path / f"{kind}.svg").read_text()

    def test_a_second_run_needs_force_and_is_refused_before_work(self, compared, monkeypatch):
        monkeypatch.setattr(ngeval.runs.tables, "evaluate", None)
        before = {path: path.read_bytes() for path in compared.output.iterdir()}
        result = run("compare", *compared.args, "-o", compared.output, code=2)
        assert "--force" in result.stderr
        assert {path: path.read_bytes() for path in compared.output.iterdir()} == before

    @pytest.mark.parametrize("name", ["ranking.csv", "ranking.png", "kfac.png"])
    def test_no_file_of_the_users_is_replaced(self, trained, tmp_path, monkeypatch, name):
        monkeypatch.setattr(ngeval.runs.tables, "evaluate", None)
        (tmp_path / name).write_text("mine")
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd,kfac")
        assert name in run("compare", *args, "-o", tmp_path, code=2).stderr
        assert (tmp_path / name).read_text() == "mine"

    def test_own_methods_without_kfac_have_no_picture_of_it(self, trained, tmp_path):
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "--dampings", "1e-3,1")
        result = run("compare", *args, "-m", "sgd,ef,adamw", "-q", "-o", tmp_path / "out")
        assert (result.stdout, result.stderr) == ("", "")
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["ranking.csv", "ranking.png", "results.parquet", MANIFEST]

    def test_without_the_natural_gradient_it_ranks_by_sgd(self, trained, tmp_path):
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd,ief")
        result = run("compare", *args, "--no-natural", "-o", tmp_path / "out")
        assert "γ/γ_SGD at each method's best λ" in result.stdout
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["kfac.png", "ranking.csv", "results.parquet", MANIFEST]
        assert "ranking.png" not in result.stdout

    def test_one_damping_for_the_picture(self, trained, tmp_path):
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd,ief")
        options = ("--dampings", "1e-4,1", "--damping", "0.01", "-q")
        run("compare", *args, *options, "-o", tmp_path / "out")
        table = pd.read_parquet(tmp_path / "out" / "results.parquet")
        assert set(table["damping"]) == {1e-4, 1e-2, 1.0}

    def test_interrupted(self, trained, tmp_path, monkeypatch):
        built, calls = ngeval.runs.tables.evaluate, []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return built(*args, **kwargs)

        monkeypatch.setattr(ngeval.runs.tables, "evaluate", interrupted)
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-m", "sgd,ef", "-q")
        result = run("compare", *args, "--dampings", "1", "-o", tmp_path / "out", code=130)
        assert "interrupted" in result.stderr
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["results.parquet", "results.parquet.journal", MANIFEST]
        assert len(pd.read_parquet(tmp_path / "out" / "results.parquet")) == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-m", "sgd,kfak"), "did you mean 'kfac'"),
            (("-m", "sgd", "--dampings", "1:2"), "write a comma list"),
            (("-m", "sgd", "--damping", "-1"), "damping -1.0 is not allowed"),
        ],
    )
    def test_bad_options(self, trained, tmp_path, options, message):
        args = ("-t", trained.task, "-c", trained.folder, *SMALL, "-o", tmp_path / "out")
        assert message in run("compare", *args, *options, code=2).stderr

    def test_it_needs_a_folder(self, tmp_path):
        args = ("compare", "-t", "digits-mlp", "-c", "x")
        assert "--output" in run(*args, code=2).stderr
        assert "give a folder" in run(*args, "-o", tmp_path / "x.png", code=2).stderr

    def test_a_table_is_no_checkpoint(self, last, tmp_path):
        run("gamma", *last, "-m", "sgd", "--damping", "1", "-q", "-o", tmp_path / "g.csv")
        result = run("compare", *last[:2], "-c", tmp_path / "g.csv", "-o", tmp_path / "x", code=2)
        assert "g.csv holds a table of gammas; compare grades checkpoints" in result.stderr
        assert not (tmp_path / "x").exists()


def test_methods_lists_optimizers_and_where_they_are_from():
    shown = run("methods").stdout
    for word in ("adamw", "muon", "torch.optim", "kfac-ief", "diag-ema", "pytorch_optimizer.SOAP"):
        assert word in shown


def test_a_module_with_a_root_parameter_prints(tmp_path):
    (tmp_path / "t.py").write_text(TASK_FILE.replace("torch.nn.Sequential(", "Root("))
    source = "class Root(torch.nn.Sequential):\n    def __init__(self, *parts):\n"
    source += "        super().__init__(*parts)\n"
    source += "        self.scale = torch.nn.Parameter(torch.ones(3))\n\n"
    source += "    def forward(self, x):\n        return super().forward(x) * self.scale\n\n\n"
    text = (tmp_path / "t.py").read_text()
    (tmp_path / "t.py").write_text(text.replace("def net()", f"{source}def net()"))
    task = get_task(f"{tmp_path}/t.py:task")
    model: nn.Module = task.model()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    args = ("-t", f"{tmp_path}/t.py:task", "-c", tmp_path / "w.pt", *SMALL, "-m", "sgd")
    assert "(model)" in run("layers", *args).stdout
