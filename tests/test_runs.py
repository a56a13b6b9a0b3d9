"""Runs from Python and what they report: kinds of tables, sizes and forecasts, early stops."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from torch import nn

import ngeval
import ngeval.results.hashes
import ngeval.runs.identity
from ngeval import InputError, NgevalError, OutputError
from ngeval.checkpoints import Checkpoint
from ngeval.methods.block_ng import BlockNaturalGradient
from ngeval.methods.registry import METHODS
from ngeval.methods.sgd import Sgd
from ngeval.results.hashes import hash_checkpoint
from ngeval.results.journal import Journal
from ngeval.results.manifest import RunManifest, read_manifest, read_run_manifest
from ngeval.results.table_files import read_results
from ngeval.runs.execute import execute
from ngeval.runs.options import OutputOptions
from ngeval.runs.progress import Progress
from ngeval.runs.run import Run
from ngeval.runs.tables import KINDS, GammaTable, LayerTable, SampleTable
from ngeval.verification.recompute import read_options, read_work
from tests.small_runs import BATCH, BATCHES, STAGES, Small
from tests.small_runs import run as command

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

UNITS = STAGES * BATCHES
OLD = Path(__file__).parent / "old_runs"
"""Manifests and a journal that version 0.1 wrote."""


@pytest.fixture(autouse=True)
def _code(monkeypatch):
    """The files of ngeval may be edited while it is tested."""
    monkeypatch.setattr(ngeval.runs.identity, "code", lambda: {"ngeval": "0"})


@pytest.fixture
def small(tmp_path):
    return Small.of(tmp_path)


@pytest.fixture
def loud(small):
    """The same without --quiet."""
    return Small(small.folder, more=())


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 2):
        yield torch.randn(batch_size, 4, generator=generator), torch.zeros(batch_size).long()


@pytest.fixture
def run(tmp_path):
    task = ngeval.Task("mine", lambda: nn.Linear(4, 3), batches, "categorical")
    return Run(task, [Checkpoint(tmp_path, {}, as_built=True)], batch_size=5, num_batches=2)


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class Listener(Progress):
    """Remembers what it was notified of."""

    def __init__(self):
        self.lines, self.calls = [], []

    def note(self, text):
        self.lines.append(text)

    def begin(self, description, total, completed):
        self.calls.append((description, total))
        self.completed = completed

    def advance(self):
        self.calls.append(self.completed())

    def end(self):
        self.calls.append("end")


class TestKinds:
    OPTIONS: ClassVar = {
        "gamma": {"dampings": [1.0]},
        "layers": {"dampings": [1.0]},
        "imbalance": {},
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_options_survive_a_manifest(self, kind):
        work = KINDS[kind].of(["sgd", "sf:2"], **self.OPTIONS[kind])
        again = read_work({"kind": kind, **json.loads(json.dumps(work.options))}, Path("m"))
        assert (type(again), again.options) == (type(work), work.options)
        assert again.methods == work.methods == ["sgd", "sf:2"]

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (GammaTable, {"dampings": []}, "no damping"),
            (GammaTable, {"dampings": [-1.0]}, "damping -1.0 is not allowed"),
            (
                GammaTable,
                {"dampings": [1.0], "damping_scale": "rel"},
                "unknown damping scale 'rel'",
            ),
            (GammaTable, {"dampings": [1.0], "gap": 0.0}, "gap is 0.0: Input should be greater"),
            (GammaTable, {"dampings": [1.0], "metric_batches": 0}, "metric_batches"),
            (LayerTable, {"dampings": [1.0], "groups": "rows"}, "groups"),
            (SampleTable, {"damping": float("nan")}, "damping nan is not allowed"),
            (SampleTable, {"dampling": 1.0}, "dampling is 1.0: Extra inputs are not permitted"),
        ],
    )
    def test_an_option_that_cannot_be_used(self, kind, options, message):
        with pytest.raises(InputError, match=message):
            kind.of("sgd", **options)

    @pytest.mark.parametrize("kind", KINDS)
    def test_steps_and_rows_in_python_alone(self, run, kind):
        work, listener = KINDS[kind].of("sgd,ief", **self.OPTIONS[kind]), Listener()
        outcome = execute(run, work, OutputOptions(), {}, listener)
        assert outcome is not None
        assert (outcome.num_done, outcome.num_units) == (2, 2)
        assert sorted(set(outcome.table["batch"])) == [0, 1]
        assert (outcome.lost_rows(), outcome.missing_units()) == ("", "")
        assert listener.calls == [(work.description, 4), 1, 2, 2, 3, 4, 4, "end"]

    def test_without_methods_a_unit_is_one_step(self, run):
        listener = Listener()
        execute(run, SampleTable.of(()), OutputOptions(), {}, listener)
        assert listener.calls == [("gradient norms", 2), 1, 2, "end"]

    def test_neither_typer_nor_the_command_line_is_needed(self):
        line = "import sys, ngeval.runs.execute, ngeval.verification.recompute\n"
        line += "print([m for m in sys.modules if m in ('typer', 'rich') or 'ngeval.cli' in m])"
        done = subprocess.run(
            [sys.executable, "-c", line], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


class TestSamplesOfMethodsThatFail:
    def test_the_others_are_kept(self, small, monkeypatch):
        error = ngeval.EngineError("F_ll does not fit")
        monkeypatch.setattr(BlockNaturalGradient, "prepare", failing(error))
        output = small.folder / "i.csv"
        result = small.run("imbalance", output, "-m", "ef,block-ng,sgd")
        assert (
            f"loss changes of {UNITS * BATCH} of {UNITS * BATCH} samples could not be computed: "
            "block-ng: F_ll does not fit" in result.stderr
        )
        table = read_results(output)
        assert len(table) == UNITS * BATCH
        assert table[["loss_change_ef", "loss_change_sgd", "gradient_norm"]].notna().all().all()
        assert table["loss_change_block-ng"].isna().all()
        assert read_manifest(output)["complete"] is True

    def test_for_a_lack_of_memory_they_are_computed_again(self, small):
        output, real, calls = small.folder / "i.csv", Sgd.prepare, []
        small.run("imbalance", small.folder / "whole.csv", "-m", "ef,sgd")

        def prepare(self, *args):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no memory")
            return real(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sgd, "prepare", prepare)
            message = small.run("imbalance", output, "-m", "ef,sgd", code=3).stderr
        assert f"1 of {UNITS} units (checkpoint × batch) could not be graded, or not by" in message
        assert "epoch=0.safetensors batch 1: sgd: out of memory" in message
        assert read_manifest(output)["failed_units"] == [[0, 1]]
        small.run("imbalance", output, "-m", "ef,sgd", "--resume")
        assert output.read_bytes() == (small.folder / "whole.csv").read_bytes()

    def test_tables_of_earlier_versions_have_no_reasons(self, run):
        outcome = execute(run, SampleTable.of("sgd"), OutputOptions(), {})
        assert outcome is not None
        old = replace(outcome, table=outcome.table.drop(columns="reason"), failures={(0, 1): "x"})
        assert old.lost_rows() == ""
        assert "could not be graded, the others are done" in old.missing_units()


class TestWhatARunReports:
    def test_sizes_before_and_a_forecast_after_the_first_unit(self, loud):
        output = loud.run("gamma", loud.folder / "g.csv").stderr
        before, _, after = output.partition("the first unit took ")
        sizes = f"{UNITS} units ({STAGES} checkpoints × {BATCHES} batches), 2 methods × 2 dampings"
        assert f"{sizes} in each" in before
        assert "a unit: 5 samples × 3 outputs, 15 parameters; it keeps J, which takes" in before
        assert f"the other {UNITS - 1} will take at most about " in after
        assert "the results will need about" in after
        assert after.count("a unit: ") == 0

    def test_a_batch_that_does_not_fit(self, loud):
        output = loud.run("gamma", loud.folder / "g.csv", "-m", "sgd,ief", "--memory", "200").stderr
        assert (
            "methods that need the logit kernel will fail: the Gram matrix of 5 samples" in output
        )

    def test_nothing_when_quiet(self, small):
        result = small.run("gamma", small.folder / "g.csv")
        assert (result.stdout, result.stderr) == ("", "")


class TestStopAfter:
    @pytest.mark.parametrize("command", ["gamma", "sweep", "layers", "imbalance"])
    def test_the_rest_is_resumed(self, small, loud, command):
        output, whole = small.folder / "g.csv", small.folder / "whole.csv"
        small.run(command, whole)
        text = loud.run(command, output, "--stop-after", 2).stderr
        assert f"2 of {UNITS} units are done; the same command with --resume continues" in text
        assert "2 of them in this start" in text
        assert f"the other {UNITS - 1} will take at most about " in text
        assert len(Journal(output).entries()) == 2
        assert "complete" not in read_manifest(output)
        text = loud.run(command, output, "--stop-after", 1, "--resume").stderr
        assert f"2 of {UNITS} units were done before" in text
        assert len(Journal(output).entries()) == 3
        loud.run(command, output, "--stop-after", UNITS, "--resume")
        assert output.read_bytes() == whole.read_bytes()
        assert not Journal(output).folder.exists()
        assert read_manifest(output)["complete"] is True

    def test_compare_ranks_when_all_is_done(self, small):
        folder = small.folder / "compared"
        args = small.args("compare", folder)
        args[args.index("--damping")] = "--dampings"
        for more in (("--stop-after", 1), ("--resume",)):
            with contextlib.chdir(small.folder):
                command(*args, *more)
            assert (folder / "ranking.csv").exists() == (more == ("--resume",))
        assert read_manifest(folder / "results.parquet")["complete"] is True

    def test_a_unit_that_fails_is_not_the_end(self, small):
        small.checkpoint(0).write_bytes(b"\xff" * 50)
        output = small.folder / "g.csv"
        message = small.run("gamma", output, "--stop-after", BATCHES + 1, code=3).stderr
        assert f"{BATCHES} of {UNITS} units (checkpoint × batch) could not be graded" in message
        small.save(0)
        small.run("gamma", output, "--resume")
        assert set(read_results(output)["status"]) == {"ok"}

    def test_it_needs_a_file_and_a_number(self, small):
        words = small.args("gamma", Path("g.csv"), "--stop-after", 1)
        place = words.index("-o")
        with contextlib.chdir(small.folder):
            output = command(*words[:place], *words[place + 2 :], code=2).stderr
        assert "--stop-after needs the file that the run is kept in: --output" in output
        with pytest.raises(InputError, match="from 1 on"):
            ngeval.runs.execute.check_result(OutputOptions(Path("g.csv"), stop_after=0))


class TestNothingIsDoneTwice:
    def test_a_method_is_resolved_once(self, small, monkeypatch):
        calls, entry = [], METHODS["ief"]

        def make(*args):
            calls.append(args)
            return entry.make(*args)

        monkeypatch.setitem(METHODS, "ief", replace(entry, make=make))
        small.run("gamma", small.folder / "g.csv")
        assert len(calls) == 1

    def test_a_checkpoint_is_read_once_for_its_hash(self, small, monkeypatch):
        calls, real = [], ngeval.results.hashes._read_digest

        def read(path):
            calls.append(path)
            return real(path)

        monkeypatch.setattr(ngeval.results.hashes, "_read_digest", read)
        for stage in range(STAGES):
            age(small.checkpoint(stage))
        small.run("gamma", small.folder / "g.csv")
        paths = [small.checkpoint(stage).name for stage in range(STAGES)]
        assert sorted(path.name for path in calls if path.suffix == ".safetensors") == paths

    def test_one_that_may_have_changed_is_read_again(self, small):
        path = small.checkpoint(0)
        checkpoint = Checkpoint(path, {})
        first = hash_checkpoint(checkpoint)  # it has just been written
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        stat = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # within one step of its time
        assert hash_checkpoint(checkpoint) == sha256(content).hexdigest() != first
        age(path)
        settled = hash_checkpoint(checkpoint)
        path.write_bytes(path.read_bytes()[:-1] + b"\x77")
        assert hash_checkpoint(checkpoint) == sha256(path.read_bytes()).hexdigest() != settled


def age(path: Path) -> None:
    """Let a file look as if it was written an hour ago."""
    then = time.time() - 3600
    os.utime(path, (then, then))


class TestEarlierVersions:
    @pytest.mark.parametrize("name", ["main", "metric", "layers", "imbalance"])
    def test_manifests_are_read(self, tmp_path, name):
        place = tmp_path / f"{name}.csv.manifest.json"
        shutil.copy(OLD / place.name, place)
        manifest = read_run_manifest(tmp_path / f"{name}.csv")
        assert manifest is not None
        assert manifest.plain() == json.loads(place.read_text())
        assert (manifest.finished, manifest.complete) == (True, True)
        work = read_work(manifest.identity.options, place)
        assert work.options == {k: v for k, v in manifest.identity.options.items() if k != "kind"}
        options = read_options(manifest.options, place)
        recorded = {k: v for k, v in vars(options).items() if k in manifest.options}
        assert recorded == {k: manifest.options[k] for k in recorded}

    def test_a_journal_is_read(self, tmp_path):
        shutil.copytree(OLD / "gamma.csv.journal", tmp_path / "gamma.csv.journal")
        journal = Journal(tmp_path / "gamma.csv")
        journal.check()
        assert journal.exists
        saved = RunManifest.model_validate_json(journal.description())
        journal.run = saved.id
        entries = journal.entries()
        assert list(entries) == [(0, 0), (0, 1), (1, 0)]
        assert all(not entry.failure for entry in entries.values())
        table = pd.concat([entry.table for entry in entries.values()])
        assert set(table["method"]) == {"sgd", "ief"}
        assert (table["status"] == "ok").all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.pop("identity"), "it has no 'identity'"),
            (lambda m: m["identity"].pop("batches"), "it has no 'identity.batches'"),
            (lambda m: m.update(complete="yes"), "complete is 'yes': Input should be a valid bool"),
            (lambda m: m["identity"].update(checkpoints=[1]), r"identity.checkpoints is \[1\]: "),
            (lambda m: m.update(failed_units=[[0]]), "failed_units.0.1"),
        ],
    )
    def test_a_broken_one_has_one_clear_error(self, tmp_path, change, message):
        manifest = json.loads((OLD / "layers.csv.manifest.json").read_text())
        change(manifest)
        (tmp_path / "r.csv.manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(OutputError, match=message) as caught:
            read_run_manifest(tmp_path / "r.csv")
        assert isinstance(caught.value, NgevalError)
        assert "r.csv.manifest.json is not a manifest that a run can be repeated" in str(caught)
        assert "\n" not in str(caught.value)
