"""The manifest beside a result file: what it tells, and when it is written."""

import json
import platform
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import ngeval
import ngeval.grading.gradient_norms
import ngeval.runs.tables
from ngeval import OutputError
from ngeval.cli.app import app
from ngeval.results.manifest import (
    command_line,
    manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from ngeval.runs.options import RunOptions
from ngeval.tasks import get_task

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "epoch-003.pt"
    torch.manual_seed(0)
    torch.save(get_task("digits-mlp").model().state_dict(), path)
    return path


def run(*args, code=0):
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result


SMALL = ("--batch-size", "8", "--num-batches", "2", "--quiet")


class TestManifest:
    def test_versions_machine_and_time(self):
        record = manifest({"task": "t"}, command=["ngeval", "gamma"])
        assert record["versions"]["ngeval"] == ngeval.__version__
        assert record["versions"]["torch"] == version("torch")
        assert record["versions"]["python"] == platform.python_version()
        assert record["machine"]["cores"] >= 1
        assert record["machine"]["memory"] > 2**20
        assert record["machine"]["cpu"]
        created = datetime.fromisoformat(record["created"])
        assert abs(datetime.now(UTC) - created) < timedelta(hours=1)
        assert (record["command"], record["options"]) == ("ngeval gamma", {"task": "t"})

    def test_values_are_plain(self, tmp_path):
        odd = {"path": Path("a/b"), "dtype": torch.float64, "top": float("inf"), "many": (1, 2.5)}
        record = manifest(odd, facts={"deep": {"set": {"x"}}})
        assert record["options"] == {
            "path": str(Path("a/b")),
            "dtype": "torch.float64",
            "top": "inf",
            "many": [1, 2.5],
        }
        assert record["run"] == {"deep": {"set": ["x"]}}
        write_manifest(tmp_path / "r.csv", record)
        assert read_manifest(tmp_path / "r.csv") == record

    def test_options_that_are_not_set_are_left_out(self):
        options = RunOptions(task="t", checkpoint=[]).recorded()
        recorded = manifest(options | {"methods": ["sgd"], "damping": 0.0})["options"]
        assert recorded["task"] == "t"
        assert (recorded["methods"], recorded["damping"], recorded["seed"]) == (["sgd"], 0.0, 0)
        assert recorded["dtype"] == "auto"
        assert not {"checkpoint", "memory"} & set(recorded)

    def test_python_m(self):
        assert command_line(["/x/ngeval/__main__.py", "tasks"]) == "python -m ngeval tasks"

    def test_no_manifest_is_none(self, tmp_path):
        assert read_manifest(tmp_path / "r.csv") is None

    @pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
    def test_one_that_cannot_be_read_is_named(self, tmp_path, text):
        path = manifest_path(tmp_path / "r.csv")
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(OutputError, match=r"r\.csv\.manifest\.json.*delete it"):
            read_manifest(tmp_path / "r.csv")

    def test_folder_that_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            write_manifest(tmp_path / "none" / "r.csv", {})


class TestCommands:
    def test_gamma_tells_its_options_and_what_they_came_to(self, weights, tmp_path):
        output = tmp_path / "g.csv"
        words = ("-m", "sgd,ief", "--damping", "1e-6,1e-3", "--seed", "7", "-o", output)
        run("gamma", "-t", "digits-mlp", "-c", weights, *SMALL, *words)
        record = json.loads(manifest_path(output).read_text())
        assert record == read_manifest(output)
        assert record["options"]["dampings"] == [1e-6, 1e-3]
        assert record["options"]["methods"] == ["sgd", "ief"]
        assert record["options"]["damping_scale"] == "absolute"
        assert record["options"]["seed"] == record["run"]["seed"] == 7
        assert record["run"]["checkpoints"] == [str(weights)]
        assert (record["run"]["batch_size"], record["run"]["num_batches"]) == (8, 2)
        assert "ategorical" in record["run"]["likelihood"]
        assert record["format"] == 1
        assert "padding_side" not in record["options"]  # of Hugging Face models alone

    def test_layers_and_imbalance_have_one(self, weights, tmp_path):
        which = ("-t", "digits-mlp", "-c", weights, *SMALL, "-m", "sgd")
        run("layers", *which, "--groups", "1", "-o", tmp_path / "l.parquet")
        run("imbalance", *which, "--damping", "0.5", "-o", tmp_path / "i.jsonl")
        assert read_manifest(tmp_path / "l.parquet")["options"]["groups"] == 1
        assert read_manifest(tmp_path / "i.jsonl")["options"]["damping"] == 0.5

    def test_a_run_that_is_stopped_has_one(self, weights, tmp_path, monkeypatch):
        norms, calls = ngeval.grading.gradient_norms.gradient_norms, []

        def interrupted(problem):
            calls.append(1)
            if len(calls) == 2:
                assert read_manifest(tmp_path / "i.csv")["options"]["seed"] == 0  # before the end
                raise KeyboardInterrupt
            return norms(problem)

        monkeypatch.setattr(ngeval.grading.gradient_norms, "gradient_norms", interrupted)
        args = ("-t", "digits-mlp", "-c", weights, *SMALL, "-o", tmp_path / "i.csv")
        run("imbalance", *args, code=130)
        assert len(pd.read_csv(tmp_path / "i.csv")) == 8
        assert read_manifest(tmp_path / "i.csv") is not None

    def test_a_run_without_rows_leaves_the_old_one(self, weights, tmp_path, monkeypatch):
        def interrupted(problem):
            raise KeyboardInterrupt

        monkeypatch.setattr(ngeval.grading.gradient_norms, "gradient_norms", interrupted)
        write_manifest(tmp_path / "i.csv", {"of": "an earlier run"})
        args = ("-t", "digits-mlp", "-c", weights, *SMALL, "--force", "-o", tmp_path / "i.csv")
        run("imbalance", *args, code=130)
        assert read_manifest(tmp_path / "i.csv") == {"of": "an earlier run"}
