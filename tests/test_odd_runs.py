"""Runs in which something changes on the way: memory, checkpoints, batches, files, folders."""

from __future__ import annotations

import os
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch

import ngeval.grading.evaluate
import ngeval.runs.tables
from ngeval.checkpoints import save_checkpoint
from ngeval.errors import OutputError
from ngeval.methods.sgd import Sgd
from ngeval.results.journal import Journal
from ngeval.results.table_files import read_results
from tests.small_runs import BATCHES, STAGES, TASK, Small, run, stop_after

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

UNITS = STAGES * BATCHES
ALLOCATOR = RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1 TiB")


@pytest.fixture
def small(tmp_path):
    return Small.of(tmp_path)


@pytest.fixture
def whole(small):
    """The table of a run that nothing happens to."""
    small.run("gamma", small.folder / "whole.csv")
    return (small.folder / "whole.csv").read_bytes()


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class TestMemory:
    @pytest.mark.parametrize("error", [ALLOCATOR, MemoryError()], ids=["torch", "python"])
    def test_of_the_least_gamma(self, small, whole, error):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["ngeval.grading.natural"], "natural_solver", failing(error))
            text = small.run("gamma", output, code=3).stderr
        assert "or not by every method" in text
        table = read_results(output)
        assert (table["status"] == "ok").all()
        assert table["gamma_min"].isna().all()
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == whole

    def test_of_the_plain_gradient_that_is_compared_with(self, small):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sgd, "prepare", failing(ALLOCATOR))
            text = small.run("gamma", output, "-m", "ief", code=3).stderr
        assert "no gamma_over_sgd: out of memory" in text
        assert read_results(output)["gamma_over_sgd"].isna().all()

    def test_other_failures_beside_it_are_told(self, small):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sgd, "prepare", failing(ALLOCATOR))
            text = small.run("gamma", output, "-m", "sgd,ief,block-ng:x", code=2).stderr
            assert "block-ng" in text
            kind = type(ngeval.get_method("ief"))
            patch.setattr(kind, "prepare", failing(ValueError("odd")))
            text = small.run("gamma", output, "-m", "sgd,ief,diag", code=3).stderr
        assert f"{UNITS * 2} of {UNITS * 6} rows could not be computed: ValueError: odd" in text
        assert "sgd: out of memory" in text


class TestCheckpoints:
    def test_one_that_is_written_to_in_the_run(self, small, whole, monkeypatch):
        output, real, calls = small.folder / "g.csv", ngeval.runs.tables.evaluate, []

        def evaluate(*args, **kwargs):
            if not calls:
                small.save(2, seed=9)
            calls.append(1)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ngeval.runs.tables, "evaluate", evaluate)
            text = small.run("gamma", output, code=3).stderr
        assert "epoch=2.safetensors was written to since the run began" in text
        table = read_results(output)
        assert table[table["status"] == "failed"]["stage"].unique().tolist() == [2]
        small.run("gamma", output, "--resume")  # as it is now
        changed = output.read_bytes()
        assert changed != whole
        small.run("gamma", small.folder / "again.csv")
        assert changed == (small.folder / "again.csv").read_bytes()

    def test_one_that_is_still_being_written_as_the_run_begins(self, small, whole, monkeypatch):
        path, output = small.checkpoint(2), small.folder / "g.csv"
        content, real = path.read_bytes(), ngeval.runs.tables.evaluate
        path.write_bytes(content[:50])

        def evaluate(*args, **kwargs):
            path.write_bytes(content)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ngeval.runs.tables, "evaluate", evaluate)
            small.run("gamma", output, code=3)
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == whole

    def test_are_written_as_a_whole(self, tmp_path, monkeypatch):
        model, path = torch.nn.Linear(2, 2), tmp_path / "a.safetensors"
        save_checkpoint(model, path, {"epoch": 1})
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", failing(OSError("no space")))
            with pytest.raises(OutputError, match="no space"):
                save_checkpoint(torch.nn.Linear(2, 2), path, {"epoch": 2})
        assert path.read_bytes() == before
        assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


class TestBatches:
    def test_that_are_others_at_every_call(self, small):
        text = TASK.replace("manual_seed(seed)", "seed() and torch.Generator()")
        text = text.replace("generator = torch.Generator().seed() and torch", "generator = torch")
        (small.folder / "mine.py").write_text(text.replace(", generator=generator", ""))
        output = small.run("gamma", small.folder / "g.csv", code=2).stderr
        assert "batch 0 of task mine differs when it is read again" in output
        assert "Traceback" not in output

    def test_also_without_an_output(self, small):
        text = TASK.replace(", generator=generator", "")
        (small.folder / "mine.py").write_text(text)
        words = small.args("gamma", small.folder / "g.csv")
        del words[words.index("-o") : words.index("-o") + 2]
        monkey = pytest.MonkeyPatch()
        monkey.chdir(small.folder)
        try:
            assert (
                "batch 0 of task mine differs when it is read again" in run(*words, code=2).stderr
            )
        finally:
            monkey.undo()


class TestJournal:
    def test_a_unit_under_the_name_of_another(self, small, whole):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3)
            small.run("gamma", output, code=130)
        folder = Journal(output).folder
        shutil.copy(folder / "00000-00000.arrow", folder / "00000-00001.arrow")
        shutil.copy(folder / "00001-00000.arrow", folder / "00002-00001.arrow")
        assert list(Journal(output).entries()) == [(0, 0), (1, 0)]
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == whole


class TestFolder:
    @pytest.mark.parametrize("spec", ["inside/moving.py:task", "inside.moving:task"])
    def test_a_task_that_goes_elsewhere_takes_nothing_with_it(self, small, whole, spec):
        inside = small.folder / "inside"
        inside.mkdir()
        (inside / "__init__.py").touch()
        head = "import os\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
        (inside / "moving.py").write_text(head + TASK)
        here = os.getcwd()  # noqa: PTH109
        small.run("gamma", "g.csv", "-t", spec)
        assert os.getcwd() == here  # noqa: PTH109
        assert (small.folder / "g.csv").read_bytes() == whole
        assert {p.name for p in inside.iterdir()} <= {"moving.py", "__init__.py", "__pycache__"}


class TestTorchrun:
    """Commands whose work cannot be shared, as two processes would start them."""

    COMMANDS = (
        ("train", "--task", "digits-mlp", "--epochs", "1", "--output", "runs"),
        ("plot", "whole.csv", "-o", "p.png"),
        ("report", "whole.csv", "-o", "r.html"),
        ("verify", "whole.csv", "--task", "mine.py:task", "--output", "v.json"),
        ("demo", "--output", "demo"),
        ("methods",),
    )

    @pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
    def test_one_process_does_them(self, tmp_path, monkeypatch, words):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.chdir(tmp_path)
        assert run(*words).output == ""
        assert list(tmp_path.iterdir()) == []

    def test_and_says_so(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        output = run("methods")
        assert "methods runs in one process; the others have nothing to do" in output.stderr
        assert "kfac" in output.stdout


class TestWhatIsSaid:
    @pytest.mark.parametrize("words", [("--seed", "1"), ("--batch-size", "4")])
    def test_of_batches_that_follow_from_an_option(self, small, words):
        output = small.folder / "g.csv"
        small.run("gamma", output)
        text = small.run("gamma", output, "--resume", *words, code=2).stderr
        assert f"settings.{words[0][2:].replace('-', '_')}: " in text
        assert "batches[" not in text

    def test_failed_units_are_of_the_same_run_in_a_report(self, small):
        small.checkpoint(1).write_bytes(b"torn")
        output = small.folder / "g.csv"
        small.run("gamma", output, code=3)
        page = small.folder / "r.html"
        run("report", output, "-o", page)
        text = page.read_text()
        assert "num_parameters" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        assert text.count("Jacobian engine") == 1
