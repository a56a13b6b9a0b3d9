"""``--resume``: what is done is never done again, and the table is the one of a quiet run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import ngeval
import ngeval.methods
import ngeval.runs.identity
import ngeval.runs.tables
import ngeval.runs.units
from ngeval.methods.registry import METHODS, MethodEntry
from ngeval.results.journal import Entry, Journal
from ngeval.results.manifest import manifest_path, read_manifest
from ngeval.results.table_files import read_results
from tests import hf_layouts as layouts
from tests.problems import prepared
from tests.small_runs import BATCHES, STAGES, Small, files, run, stop_after

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

UNITS = STAGES * BATCHES
CODE = {"ngeval": "0", "ngeval_files": "a" * 64}


@pytest.fixture(autouse=True)
def _code(monkeypatch):
    """Somebody may be editing ngeval while it is tested, which is no business of these tests."""
    monkeypatch.setattr(ngeval.runs.identity, "code", lambda: dict(CODE))


@pytest.fixture
def small(tmp_path):
    return Small.of(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Files of runs that nothing happened to, by command and extension."""
    small = Small.of(tmp_path_factory.mktemp("undisturbed"))
    expected = [("gamma", kind) for kind in (".csv", ".parquet", ".jsonl")]
    expected += [("layers", ".csv"), ("imbalance", ".csv")]
    for command, kind in expected:
        small.run(command, small.folder / f"{command}{kind}")
    return {(c, kind): (small.folder / f"{c}{kind}").read_bytes() for c, kind in expected}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that was stopped in the midst of its second checkpoint."""
    small = Small.of(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngeval.runs.identity, "code", lambda: dict(CODE))
        interrupted(small, "gamma", small.folder / "g.csv", 3)
    return small.folder


@pytest.fixture
def half(stopped, tmp_path):
    """Such a folder of one's own."""
    return Small(shutil.copytree(stopped, tmp_path / "half"))


def interrupted(small: Small, command: str, output: Path, units: int, *more: object) -> None:
    """A run that Ctrl-C stops once so many units are done."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, units)
        small.run(command, output, *more, code=130)


def refused(small: Small, command: str, output: Path, *words: object) -> str:
    """The message of a run that is not gone on with, which leaves everything as it was."""
    folder = output.parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    text = small.run(command, output, *words, code=2).stderr
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"writer.json"}
    return text


class TestInterruption:
    @pytest.mark.parametrize("units", range(UNITS))
    def test_after_any_unit(self, small, undisturbed, units):
        output = small.folder / "o" / "g.csv"
        interrupted(small, "gamma", output, units)
        journal = Journal(output)
        assert len(journal.entries()) == units
        if units:
            text = read_manifest(output)
            assert "complete" not in text
            assert len(read_results(output)) == units * 4
        built = mock.Mock(wraps=ngeval.runs.tables.evaluate)
        with mock.patch.object(ngeval.runs.tables, "evaluate", built):
            small.run("gamma", output, "--resume")
        assert built.call_count == UNITS - units
        assert output.read_bytes() == undisturbed["gamma", ".csv"]
        text = read_manifest(output)
        assert text["complete"]
        assert len(text.get("resumed", [])) == (units > 0)  # of nothing, a new run was begun
        assert files(output.parent) == {"g.csv", "g.csv.manifest.json"}

    @pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
    def test_in_every_format(self, small, undisturbed, kind):
        output = (small.folder / "g").with_suffix(kind)
        interrupted(small, "gamma", output, 3)
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == undisturbed["gamma", kind]

    @pytest.mark.parametrize("command", ["layers", "imbalance"])
    def test_of_every_command(self, small, undisturbed, command):
        output = small.folder / "t.csv"
        interrupted(small, command, output, 2)
        small.run(command, output, "--resume")
        assert output.read_bytes() == undisturbed[command, ".csv"]

    def test_again_and_again(self, small, undisturbed):
        output = small.folder / "g.csv"
        for _ in range(UNITS - 1):
            interrupted(small, "gamma", output, 1, "--resume")
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == undisturbed["gamma", ".csv"]
        assert len(read_manifest(output)["resumed"]) == UNITS - 1
        assert files(small.folder) == {"g.csv", "g.csv.manifest.json"}

    def test_a_torn_or_lost_unit_is_done_again(self, small, undisturbed):
        output = small.folder / "g.csv"
        interrupted(small, "gamma", output, 5)
        units = sorted(Journal(output).folder.glob("0*.arrow"))
        units[1].write_bytes(units[1].read_bytes()[:-100])
        units[3].unlink()
        output.unlink()
        built = mock.Mock(wraps=ngeval.runs.tables.evaluate)
        with mock.patch.object(ngeval.runs.tables, "evaluate", built):
            small.run("gamma", output, "--resume")
        assert built.call_count == 3
        assert output.read_bytes() == undisturbed["gamma", ".csv"]

    def test_killed(self, small, undisturbed):
        """SIGKILL, in a process of its own, while units come."""
        output = small.folder / "g.csv"
        line = "import time, ngeval.runs.tables as r; from ngeval.cli.app import main\n"
        line += "make = r.evaluate\n"
        line += "r.evaluate = lambda *a, **k: (time.sleep(0.3), make(*a, **k))[1]; main()"
        args = [sys.executable, "-c", line, *small.args("gamma", output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(args, env=environment, cwd=small.folder) as process:
            until = time.monotonic() + 120
            while len(list(Journal(output).folder.glob("00*.arrow"))) < 2:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        done = len(Journal(output).entries())
        assert 2 <= done < UNITS
        text = json.loads((Journal(output).folder / "run.json").read_text())
        text["identity"]["code"] = CODE  # it ran with the code's true hash
        (Journal(output).folder / "run.json").write_text(json.dumps(text))
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == undisturbed["gamma", ".csv"]
        assert files(small.folder) == {"g.csv", "g.csv.manifest.json"}

    @settings(max_examples=4, phases=[Phase.generate])
    @given(order=st.permutations(range(UNITS)), stop=st.integers(0, UNITS - 1))
    def test_any_order_and_any_stop(self, undisturbed, stopped, order, stop):
        """Units that others than one process did in turn, as torchrun's ranks."""
        keys = [(number // BATCHES, number % BATCHES) for number in order]
        with tempfile.TemporaryDirectory() as name:
            small = Small(shutil.copytree(stopped, Path(name) / "half"))
            output = small.folder / "g.csv"
            (expected := small.folder / "w.parquet").write_bytes(undisturbed["gamma", ".parquet"])
            table = read_results(expected)
            journal = Journal(output)
            journal.forget(list(journal.entries()))
            journal.run = json.loads(journal.description())["id"]
            for stage, batch in keys[:stop]:
                rows = table[(table["stage"] == stage) & (table["batch"] == batch)]
                journal.write((stage, batch), Entry(rows))
            small.run("gamma", output, "--resume")
            assert output.read_bytes() == undisturbed["gamma", ".csv"]


class TestRefusal:
    CHANGES: ClassVar = {
        "seed": (("--seed", "1"), "settings.seed: 0 then, 1 now"),
        "methods": (("-m", "sgd,ef"), 'options.methods: ["sgd", "ief"] then'),
        "order": (("-m", "ief,sgd"), "options.methods"),
        "damping": (("--damping", "1e-3"), "options.dampings: [0.001, 1.0] then, [0.001] now"),
        "scale": (("--damping-scale", "mean"), 'damping_scale: "absolute" then, "mean" now'),
        "size": (("--batch-size", "6"), "settings.batch_size: 5 then, 6 now"),
        "batches": (("--num-batches", "1"), "settings.num_batches: 2 then, 1 now"),
        "dtype": (("--dtype", "float64"), 'settings.dtype: "auto" then, "torch.float64" now'),
        "engine": (("--engine", "loop"), 'settings.engine: "auto" then, "loop" now'),
        "natural": (("--no-natural",), "options.natural: true then, false now"),
        "gap": (("--gap", "0.1"), "options.gap: 0.0001 then, 0.1 now"),
        "metric": (("--metric-batches", "all"), 'metric_batches: null then, "all" now'),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_options(self, half, change):
        words, text = self.CHANGES[change]
        output = half.folder / "g.csv"
        assert text in refused(half, "gamma", output, "--resume", *words)

    def test_options_of_a_complete_run(self, small):
        output = small.folder / "g.csv"
        small.run("gamma", output)
        assert "settings.seed" in refused(small, "gamma", output, "--resume", "--seed", "1")

    def test_another_command(self, half):
        output = refused(half, "layers", half.folder / "g.csv", "--resume")
        assert 'options.kind: "gamma" then, "layers" now' in output

    @pytest.mark.parametrize("stage", [0, 1])
    def test_a_checkpoint_of_which_something_is_done(self, half, stage):
        half.save(stage, seed=9)
        output = refused(half, "gamma", half.folder / "g.csv", "--resume")
        assert f"checkpoints.{half.checkpoint(stage).name}: " in output

    def test_a_checkpoint_of_which_nothing_is_done(self, half):
        half.save(2, seed=9)
        output, fresh = half.folder / "g.csv", half.folder / "f.csv"
        half.run("gamma", output, "--resume")
        half.run("gamma", fresh)
        assert output.read_bytes() == fresh.read_bytes()
        assert read_manifest(output)["identity"] == read_manifest(fresh)["identity"]

    def test_more_or_fewer_checkpoints(self, half):
        output = half.folder / "g.csv"
        shutil.copy(half.checkpoint(0), half.folder / "epoch=7.safetensors")
        text = refused(half, "gamma", output, "--resume")
        assert "epoch=7.safetensors: nothing then, " in text
        (half.folder / "epoch=7.safetensors").unlink()
        half.checkpoint(0).unlink()
        text = refused(half, "gamma", output, "--resume")
        assert f"{half.checkpoint(0).name}: " in text
        assert " then, nothing now" in text

    def test_checkpoints_in_another_order(self, half):
        names = [half.checkpoint(stage).name for stage in (1, 0, 2)]
        words = half.args("gamma", half.folder / "g.csv", "--resume")
        place = words.index("-c")
        words[place : place + 2] = [word for name in names for word in ("-c", name)]
        with contextlib.chdir(half.folder):
            assert "in a different order" in run(*words, code=2).stderr

    TASKS: ClassVar = {
        "model": ("torch.nn.Linear(4, 3)", "torch.nn.Linear(4, 3, bias=False)", "task.model: "),
        "data": ("torch.randn", "2 * torch.randn", "batches[0].sha256: "),
        "likelihood": ('"categorical"', "ngeval.Categorical(ignore_index=2)", "task.likelihood: "),
        "name": ('"mine"', '"yours"', 'task.name: "mine" then, "yours" now'),
        "comment": ("import ngeval", "import ngeval  # why", "task.files.mine.py: "),
    }

    @pytest.mark.parametrize("change", TASKS)
    def test_a_task(self, half, change):
        old, new, output = self.TASKS[change]
        path = half.folder / "mine.py"
        path.write_text(path.read_text().replace(old, new, 1))
        shutil.rmtree(half.folder / "__pycache__", ignore_errors=True)
        assert output in refused(half, "gamma", half.folder / "g.csv", "--resume")

    def test_code(self, half, monkeypatch):
        now = CODE | {"ngeval_files": "b" * 64}
        monkeypatch.setattr(ngeval.runs.identity, "code", lambda: now)
        output = refused(half, "gamma", half.folder / "g.csv", "--resume")
        assert "code.ngeval_files: " in output
        assert "--force" in output

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": []}', "[" * 100_000, "\0"])
    def test_a_damaged_journal(self, half, text):
        output = half.folder / "g.csv"
        (Journal(output).folder / "run.json").write_text(text)
        assert "is damaged" in refused(half, "gamma", output, "--resume")

    def test_a_module_beside_the_task(self, small):
        """Also one that is imported by another, or within a function."""
        mine, output = small.folder / "mine.py", small.folder / "g.csv"
        (small.folder / "helping").mkdir()
        (small.folder / "helping" / "__init__.py").write_text("from helping import inner\n")
        (small.folder / "helping" / "inner.py").write_text("VALUE = 1\n")
        mine.write_text(mine.read_text() + "\n\ndef later():\n    import helping\n")
        interrupted(small, "gamma", output, 1)
        (small.folder / "helping" / "inner.py").write_text("VALUE = 2\n")
        (small.folder / "other.py").write_text("VALUE = 1\n")  # which nobody imports
        said = refused(small, "gamma", output, "--resume")
        assert "task.files.helping/inner.py: " in said
        assert said.count(" then, ") == 1

    def test_steps_of_optimizers(self, half):
        output = half.folder / "g.csv"
        for option in (("--reduction", "sum"), ("--no-weight-decay",)):
            assert "settings.optimizer." in refused(half, "gamma", output, "--resume", *option)

    def test_what_is_told_of_a_checkpoint(self, half):
        first = min(half.folder.glob("epoch=*.safetensors"))
        first.with_suffix(".json").write_text('{"epoch": 100}')
        output = refused(half, "gamma", half.folder / "g.csv", "--resume")
        assert f"metadata.{first.name}.epoch: 0 then, 100 now" in output
        assert "checkpoints." not in output  # whose bytes are the same

    def test_a_table_that_was_cut(self, small):
        output = small.folder / "g.csv"
        small.run("gamma", output)
        lines = output.read_text().splitlines(keepends=True)
        for cut in (lines[:-1], lines[:1] + lines[5:]):
            output.write_text("".join(cut))
            assert "was changed since its run" in refused(small, "gamma", output, "--resume")
            assert output.read_text() == "".join(cut)

    @pytest.mark.parametrize("kind", ["link", "folder", "file"])
    def test_a_folder_that_is_no_journal_is_left_alone(self, small, kind):
        output, local = small.folder / "g.csv", small.folder / "own"
        local.mkdir()
        (local / "notes.txt").write_text("mine")
        folder = Journal(output).folder
        if kind == "link":
            folder.symlink_to(local, target_is_directory=True)
        elif kind == "folder":
            local.rename(folder)
            local = folder
        else:
            folder.write_text("mine")
        assert "is not a journal" in refused(small, "gamma", output)
        if kind != "file":
            assert [path.name for path in local.iterdir()] == ["notes.txt"]

    def test_a_manifest_that_cannot_be_written_is_told_before_the_work(self, small, monkeypatch):
        monkeypatch.setattr(
            "ngeval.runs.execute.Units", lambda *_, **__: pytest.fail("work was begun")
        )
        (small.folder / "g.csv.manifest.json").mkdir()
        assert "is a folder" in refused(small, "gamma", small.folder / "g.csv")

    def test_a_journal_that_tells_nonsense(self, half):
        output = half.folder / "g.csv"
        text = {"identity": {"checkpoints": {}, "code": [{"a": 1}], "batches": 7}, "resumed": 1}
        (Journal(output).folder / "run.json").write_text(json.dumps(text))
        assert "is damaged and does not record which run it belongs to" in refused(
            half, "gamma", output, "--resume"
        )

    def test_neither_journal_nor_manifest(self, half):
        output = half.folder / "old.csv"
        output.write_text("method,gamma\nsgd,1\n")
        text = refused(half, "gamma", output, "--resume")
        assert "so it cannot be continued" in text
        manifest_path(output).write_text('{"format": 1, "complete": true}')
        text = refused(half, "gamma", output, "--resume")
        assert "is not a manifest that a run can be repeated from: it has no 'options'" in text

    def test_words_that_do_not_go_together(self, half):
        output = half.folder / "g.csv"
        text = refused(half, "gamma", output, "--resume", "--force")
        assert "give one of them" in text
        words = half.args("gamma", output, "--resume")
        place = words.index("-o")
        text = run(*words[:place], *words[place + 2 :], code=2).stderr
        assert "--resume needs the file that the run is kept in: --output" in text
        assert "pass --resume to continue it" in refused(half, "gamma", output)

    def test_a_second_writer(self, half):
        output = half.folder / "g.csv"
        with Journal(output).held():
            for word in ("--resume", "--force"):
                text = refused(half, "gamma", output, word)
                assert f"is being written by another run (process {os.getpid()} on " in text
        half.run("gamma", output, "--resume")


class TestStart:
    def test_resume_starts_where_there_is_nothing(self, small, undisturbed):
        small.run("gamma", small.folder / "g.csv", "--resume")
        assert (small.folder / "g.csv").read_bytes() == undisturbed["gamma", ".csv"]

    def test_a_complete_run_is_left_as_it_is(self, small, monkeypatch):
        output = small.folder / "g.csv"
        shown = small.run("gamma", output, "-m", "sgd,ief", "--damping", "1").stdout
        before = {p: p.stat().st_mtime_ns for p in (output, manifest_path(output))}
        stop_after(monkeypatch, 0)
        again = replace(small, more=())
        words = ("--resume", "-m", "sgd,ief", "--damping", "1")
        text = again.run("gamma", output, *words)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert shown == ""  # quiet
        assert "epoch 2" in text.stdout
        assert files(small.folder) == {"g.csv", "g.csv.manifest.json"}

    def test_force_starts_anew(self, small, undisturbed):
        output = small.folder / "g.csv"
        interrupted(small, "gamma", output, 4, "--seed", "1")
        built = mock.Mock(wraps=ngeval.runs.tables.evaluate)
        with mock.patch.object(ngeval.runs.tables, "evaluate", built):
            small.run("gamma", output, "--force")
        assert built.call_count == UNITS
        assert output.read_bytes() == undisturbed["gamma", ".csv"]

    def test_force_keeps_the_old_file_until_there_is_a_row(self, small):
        output = small.folder / "g.csv"
        small.run("gamma", output)
        before = {path: path.read_bytes() for path in (output, manifest_path(output))}
        interrupted(small, "gamma", output, 0, "--force", "--seed", "1")
        assert {path: path.read_bytes() for path in before} == before

    def test_rows_have_nothing_hidden(self, small):
        """What a unit told of itself on the way is not in the table."""
        small.run("gamma", output := small.folder / "g.parquet")
        assert pd.read_parquet(output).attrs == {}


def broken(small: Small, stage: int, how: str) -> None:
    path = small.checkpoint(stage)
    if how == "nan":
        state = safetensors.torch.load_file(path)
        state["bias"][1] = math.nan
        safetensors.torch.save_file(state, path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if how == "torn" else b"\xff" * 300)


class TestFailedUnits:
    @pytest.mark.parametrize(("stage", "how"), [(0, "noise"), (1, "torn"), (1, "nan"), (2, "torn")])
    def test_a_checkpoint_wherever_it_is(self, small, undisturbed, stage, how):
        broken(small, stage, how)
        output = small.folder / "g.csv"
        result = small.run("gamma", output, code=3)
        name = small.checkpoint(stage).name
        assert f"2 of {UNITS} units (checkpoint × batch) could not be graded" in result.stderr
        assert f"{name} batch 0 and 1 more: " in result.stderr
        table = read_results(output)
        lost = table["stage"] == stage
        assert set(table[lost]["status"]) == {"failed"}
        assert table[lost]["reason"].str.contains(name, regex=False).all()
        assert table[lost]["gamma"].isna().all()
        assert table[lost][["method", "damping"]].drop_duplicates().shape == (4, 2)
        assert (table[~lost]["status"] == "ok").all()
        assert len(table) == UNITS * 4
        text = read_manifest(output)
        assert text["failed_units"] == [[stage, 0], [stage, 1]]
        assert text["complete"] is False
        assert Journal(output).exists

        # Once it is mended, only that one is done, and nobody sees that it ever failed.
        if how == "nan":
            again = small.run("gamma", output, "--resume", code=3)
            assert "could not be graded" in again.stderr
        small.save(stage)
        built = mock.Mock(wraps=ngeval.runs.tables.evaluate)
        with mock.patch.object(ngeval.runs.tables, "evaluate", built):
            small.run("gamma", output, "--resume")
        assert built.call_count == BATCHES
        assert output.read_bytes() == undisturbed["gamma", ".csv"]
        assert read_manifest(output)["complete"] is True
        assert files(small.folder) == {"g.csv", "g.csv.manifest.json"}

    def test_of_layers(self, small, undisturbed):
        broken(small, 1, "torn")
        output = small.folder / "t.csv"
        small.run("layers", output, code=3)
        table = read_results(output)
        lost = table[table["stage"] == 1]
        assert set(lost["status"]) == {"failed"}
        assert len(lost) == BATCHES
        small.save(1)
        small.run("layers", output, "--resume")
        assert output.read_bytes() == undisturbed["layers", ".csv"]

    def test_of_samples_there_are_no_rows(self, small, undisturbed):
        broken(small, 0, "torn")
        output = small.folder / "t.csv"
        small.run("imbalance", output, code=3)
        assert sorted(set(read_results(output)["stage"])) == [1, 2]
        small.save(0)
        small.run("imbalance", output, "--resume")
        assert output.read_bytes() == undisturbed["imbalance", ".csv"]

    @pytest.mark.parametrize("command", ["gamma", "layers", "imbalance"])
    def test_all_of_them(self, small, command):
        for stage in range(STAGES):
            broken(small, stage, "torn")
        output = small.folder / "t.csv"
        text = small.run(command, output, code=2).stderr
        assert f"none of {UNITS} units could be graded" in text
        assert files(small.folder) == set()

    def test_one_that_runs_out_of_memory(self, small, undisturbed, monkeypatch):
        output = small.folder / "g.csv"
        calls, make = [], ngeval.runs.tables.evaluate

        def full(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("Tried to allocate 7 TiB")
            return make(*args, **kwargs)

        monkeypatch.setattr(ngeval.runs.tables, "evaluate", full)
        assert "7 TiB" in small.run("gamma", output, code=3).stderr
        table = read_results(output)
        lost = (table["stage"] == 1) & (table["batch"] == 1)
        assert (table["status"] == "failed").tolist() == lost.tolist()
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == undisturbed["gamma", ".csv"]

    def test_an_interrupted_run_with_failed_units(self, small, undisturbed):
        broken(small, 0, "torn")
        output = small.folder / "g.csv"
        interrupted(small, "gamma", output, 2)
        assert len(Journal(output).entries()) == 4
        small.save(0)
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == undisturbed["gamma", ".csv"]

    def test_nan_at_one_damping(self, small, undisturbed, monkeypatch):
        """An update may overflow at one λ: that row is lost, and no other."""
        entry = MethodEntry("NaN at λ = 1", "", "", lambda *_: _Overflowing())
        monkeypatch.setitem(METHODS, "overflowing", entry)
        output = small.folder / "g.csv"
        small.run("gamma", output, "-m", "sgd,overflowing,ief")
        table = read_results(output)
        lost = (table["method"] == "overflowing") & (table["damping"] == 1.0)
        assert (table["status"] != "ok").tolist() == lost.tolist()
        assert table[lost]["gamma"].isna().all()
        (expected := small.folder / "w.csv").write_bytes(undisturbed["gamma", ".csv"])
        others = table[table["method"] != "overflowing"].fillna({"reason": math.nan})
        assert_frame_equal(
            others.drop(columns="reason").reset_index(drop=True),
            read_results(expected).drop(columns="reason"),
            check_exact=True,
        )


class _Overflowing:
    """The natural gradient of the data's own labels, but for one λ."""

    name = "overflowing"

    def prepare(self, problem, kernel, seed=0):
        state = prepared("ief", problem, seed)
        return _OverflowingState(problem, state)


class _OverflowingState(ngeval.methods.ParameterState):
    def __init__(self, problem, state):
        super().__init__(problem, state.largest_curvature)
        self.state = state

    def direction(self, damping):
        return self.state.direction(damping) * (math.nan if damping == 1.0 else 1.0)


class TestAdapters:
    def test_a_broken_one_in_the_middle(self, tmp_path):
        layouts.save_base(tmp_path / "t5", "t5")
        texts = layouts.sentences(12)
        sst2 = tmp_path / "glue" / "sst2"
        sst2.mkdir(parents=True)
        labels = [i % 2 for i in range(12)]
        table = pd.DataFrame({"sentence": texts, "label": labels})
        table.to_parquet(sst2 / "train-00000-of-00001.parquet")
        config = layouts.adapter_config("t5", "lora")
        base = layouts.save_run(tmp_path / "run", tmp_path / "t5", "t5", config)
        first, last = sorted(base.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        middle = tmp_path / "middle"
        shutil.copytree(first, middle)
        weights = middle / "adapter_model.safetensors"
        state = safetensors.torch.load_file(weights)
        name = list(state)[-1]  # the others are in the model by the time this one does not fit
        state = {key: value + 1 for key, value in state.items()}
        safetensors.torch.save_file(state | {name: torch.zeros(9, 9)}, weights)

        def graded(output, *adapters, code=0):
            chosen = [word for path in adapters for word in ("--adapter", path)]
            run(
                "gamma", "--hf-model", tmp_path / "t5", *chosen, "--dataset", "glue", "--subset",
                "sst2", "--data-dir", tmp_path / "glue", "--batch-size", 4, "--num-batches", 1,
                "-m", "sgd,ief", "--damping", "1e-2", "--no-natural", "--quiet", "-o", output,
                code=code,
            )  # fmt: skip
            return read_results(output)

        alone = graded(tmp_path / "a.csv", first, last)
        result = graded(tmp_path / "b.csv", first, middle, last, code=3)
        assert set(result[result["stage"] == 1]["status"]) == {"failed"}
        assert str(middle) in result[result["stage"] == 1]["reason"].iloc[0]
        left, right = (
            t[t["checkpoint"] != str(middle)].drop(columns="stage").reset_index(drop=True)
            for t in (result.drop(columns="reason"), alone.drop(columns="reason"))
        )
        assert_frame_equal(left, right, check_exact=True)
