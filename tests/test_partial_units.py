"""Units that are graded in part, and what a run depends on besides its own batches."""

from __future__ import annotations

import gc
import json
import os
import weakref
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

import ngeval
import ngeval.runs.run
from ngeval.checkpoints import Checkpoint
from ngeval.curvature.kernel import Kernel
from ngeval.methods.sgd import Sgd
from ngeval.results.journal import Entry, Journal
from ngeval.results.manifest import read_manifest
from ngeval.results.table_files import read_results
from ngeval.runs.identity import differences, identity
from ngeval.runs.run import Run
from ngeval.runs.tables import GammaTable
from ngeval.runs.units import Units
from tests.small_runs import BATCHES, STAGES, Small

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

UNITS = STAGES * BATCHES
KINDS = [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("can't allocate memory")]


@pytest.fixture
def small(tmp_path):
    return Small.of(tmp_path)


def without_memory(patch: pytest.MonkeyPatch, calls: set[int], error: Exception) -> None:
    """The method sgd has no memory in these of its calls."""
    real, built = Sgd.prepare, []

    def prepare(self, *args):
        built.append(1)
        if len(built) in calls:
            raise error
        return real(self, *args)

    patch.setattr(Sgd, "prepare", prepare)


class TestMemoryOfOneMethod:
    @pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
    def test_is_done_again(self, small, error):
        small.run("gamma", small.folder / "whole.csv")
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            without_memory(patch, {2, 5}, error)
            text = small.run("gamma", output, code=3).stderr
        assert f"2 of {UNITS} units (checkpoint × batch) could not be graded, or not by" in text
        assert "epoch=0.safetensors batch 1 and 1 more: sgd: out of memory" in text
        assert "rows could not be computed" not in text
        table = read_results(output)
        lost = (table["stage"] * BATCHES + table["batch"]).isin([1, 4]) & (table["method"] == "sgd")
        assert (table["status"] == "failed").tolist() == lost.tolist()
        assert read_manifest(output)["failed_units"] == [[0, 1], [2, 0]]
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == (small.folder / "whole.csv").read_bytes()
        assert not Journal(output).folder.exists()

    def test_in_every_unit_loses_nothing_of_the_others(self, small):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            without_memory(patch, set(range(1, UNITS + 1)), KINDS[0])
            small.run("gamma", output, code=3)
        table = read_results(output)
        assert set(table[table["status"] == "ok"]["method"]) == {"ief"}
        assert len(table) == UNITS * 4
        assert len(Journal(output).entries()) == UNITS

    def test_of_every_method_loses_the_unit(self, small):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            without_memory(patch, {1}, KINDS[0])
            text = small.run("gamma", output, "-m", "sgd", code=3).stderr
        assert f"1 of {UNITS} units (checkpoint × batch) could not be graded, the others" in text
        entries = Journal(output).entries()
        assert [key for key, entry in entries.items() if entry.lost] == [(0, 0)]

    def test_other_failures_of_a_method_are_results(self, small):
        output = small.folder / "g.csv"
        with pytest.MonkeyPatch.context() as patch:
            without_memory(patch, {1}, ValueError("odd"))
            text = small.run("gamma", output).stderr
        assert f"2 of {UNITS * 4} rows could not be computed: ValueError: odd" in text
        assert not Journal(output).folder.exists()

    def test_a_unit_without_rows_is_lost(self):
        assert Entry(pd.DataFrame(), "gone").lost
        assert not Entry(pd.DataFrame()).lost


class TestWhatIsToldOfACheckpoint:
    def test_broken_in_the_middle(self, small):
        small.run("gamma", small.folder / "whole.csv")
        beside = small.checkpoint(1).with_suffix(".json")
        beside.write_text('{"epoch": ')
        output = small.folder / "g.csv"
        text = small.run("gamma", output, code=3).stderr
        assert f"{BATCHES} of {UNITS} units" in text
        assert f"{beside.name} cannot be read as JSON" in text
        table = read_results(output)
        assert table[table["status"] == "failed"]["stage"].unique().tolist() == [1]
        beside.unlink()
        small.run("gamma", output, "--resume")
        assert output.read_bytes() == (small.folder / "whole.csv").read_bytes()


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 2):
        yield torch.randn(batch_size, 4, generator=generator), torch.zeros(batch_size).long()


def other_at_other_seeds(batch_size, num_batches, seed):
    for inputs, targets in batches(batch_size, num_batches, seed):
        yield inputs + (seed > 0), targets


class TestBatchesOfOptimizers:
    @pytest.mark.parametrize(("methods", "same"), [("adamw:2", False), ("adamw:0,sgd", True)])
    def test_are_part_of_what_a_run_depends_on(self, tmp_path, methods, same):
        task = ngeval.Task("mine", lambda: nn.Linear(4, 3), batches, "categorical")
        job = Run(task, [Checkpoint(tmp_path, {}, as_built=True)], batch_size=5, num_batches=2)
        work = GammaTable.of(methods, dampings=[1.0])
        torch.manual_seed(0)
        then = identity(job, work)
        torch.manual_seed(0)
        changed = replace(job, task=replace(task, load_batches=other_at_other_seeds))
        lines = differences(then, identity(changed, work))
        assert all(line.startswith("accumulated_batches") for line in lines)
        assert bool(lines) != same
        assert json.loads(json.dumps(then)) == then


class TestNamesThatAreNotUnicode:
    """A file's name is bytes, and some are no UTF-8."""

    ODD = os.fsdecode(b"\xff\xfe")

    @pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
    def test_of_outputs_and_checkpoints(self, small, kind):
        small.run("gamma", small.folder / f"plain{kind}")
        output = small.folder / f"{self.ODD}{kind}"
        small.run("gamma", output)
        assert output.read_bytes() == (small.folder / f"plain{kind}").read_bytes()
        assert read_manifest(output)["complete"]
        assert len(read_results(output)) == UNITS * 4
        small.checkpoint(1).rename(small.folder / f"epoch={self.ODD}.safetensors")
        text = small.run("gamma", small.folder / f"b{kind}", code=3).stderr
        assert r"epoch=\udcff\udcfe.safetensors batch 0 and 1 more" in text
        table = read_results(small.folder / f"b{kind}")
        lost = table["checkpoint"] == r"epoch=\udcff\udcfe.safetensors"
        assert (table["status"] == "failed").tolist() == lost.tolist()


class TestMemory:
    @pytest.mark.parametrize("command", ["gamma", "layers", "imbalance"])
    def test_of_a_unit_is_free_before_the_next(self, small, monkeypatch, command):
        """Nothing that is computed from a kernel or a problem may refer to it in a circle."""
        kept, real = [], Kernel.__init__

        def made(kernel, problem, **options):
            real(kernel, problem, **options)
            kept.extend([weakref.ref(kernel), weakref.ref(problem)])

        alive, build = [], Units.unit

        def unit(self, key):
            alive.append(sum(ref() is not None for ref in kept))
            return build(self, key)

        monkeypatch.setattr(Kernel, "__init__", made)
        monkeypatch.setattr(Units, "unit", unit)
        gc.disable()
        try:
            small.run(command, small.folder / "g.csv", "-m", "ief,ng,block-ng,ekfac,diag-sf")
        finally:
            gc.enable()
        assert len(kept) >= UNITS
        assert alive == [0] * UNITS
