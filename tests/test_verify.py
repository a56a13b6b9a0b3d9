"""``ngeval verify``: what agrees, what does not, and what a manifest is not trusted with."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

import ngeval.runs.identity
import ngeval.tasks.base
import ngeval.verification.recompute
from ngeval import NgevalError
from ngeval.cli.verdicts import missing_units
from ngeval.results.manifest import manifest_path
from ngeval.results.table_files import read_results, write_results
from ngeval.runs.run import Run
from ngeval.tasks import get_task
from ngeval.verification.compare import DIGITS, MAX_GAP, compare
from ngeval.verification.recompute import (
    Trust,
    changes,
    check_unchanged,
    choose,
    read_recorded,
    rebuild,
)
from tests.small_runs import BATCH, BATCHES, STAGES, Small, run

# The first forward-mode product imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

UNITS = STAGES * BATCHES
CODE = {"ngeval": "0", "ngeval_files": "a" * 64}
OUTPUTS = ("gamma.csv", "gamma.parquet", "sweep.jsonl", "layers.csv", "imbalance.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a result file of each command."""
    small = Small.of(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngeval.runs.identity, "code", lambda: dict(CODE))
        for name in OUTPUTS:
            small.run(name.partition(".")[0], small.folder / name)
    return small.folder


@pytest.fixture
def small(made, tmp_path, monkeypatch):
    """Such a folder of one's own, which is the working one."""
    monkeypatch.setattr(ngeval.runs.identity, "code", lambda: dict(CODE))
    folder = shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(folder)
    return Small(folder)


def verify(name: object, *more: object, code: int = 0, task: bool = True):
    words = ["-t", "mine.py:task"] if task else []
    return run("verify", name, *words, *more, code=code)


def edit(name: str, **columns) -> None:
    """Change a file's first row, and leave the rows of its first checkpoint only, as of a run that
    is not finished."""
    table = read_results(Path(name))
    table = table[table["stage"] == 0].reset_index(drop=True)
    for column, value in columns.items():
        kept = table[column].astype(object if isinstance(value, str) else float)
        kept.iloc[0] = value
        table[column] = kept
    write_results(table, Path(name))
    tell(name, unfinish)


def tell(name: str, change) -> None:
    """Change a file's manifest."""
    place = manifest_path(Path(name))
    output = json.loads(place.read_text())
    change(output)
    place.write_text(json.dumps(output))


def unfinish(told: dict) -> None:
    """What the manifest of a run that goes on does not tell yet."""
    for key in ("complete", "ended", "failed_units"):
        told.pop(key, None)


def begin(name: str) -> None:
    """All that is done before anything is computed."""
    recorded = read_recorded(Path(name), Trust("mine.py:task"))
    changed, _ = changes(recorded, rebuild(recorded))
    check_unchanged(Path(name), changed)


class TestAgrees:
    @pytest.mark.parametrize("name", OUTPUTS)
    def test_every_command_and_format(self, small, name):
        result = verify(name, "--units", "2", "-q")
        assert (result.stdout, result.stderr) == ("", "")

    def test_what_is_shown_and_written(self, small):
        result = verify("gamma.csv", "-o", "report.json")
        assert f"3 of {UNITS} units recomputed, all agree; --units {UNITS} " in result.stdout
        assert result.stdout.count(" agrees") == 3
        output = json.loads(Path("report.json").read_text())
        assert [unit["agrees"] for unit in output["units"]] == [True] * 3
        assert {unit["rows"] for unit in output["units"]} == {4}
        assert (output["changed"], output["elsewhere"]) == ([], [])
        assert "exists; pass --force" in verify("gamma.csv", "-o", "report.json", code=2).stderr

    def test_rows_in_another_order(self, small):
        table = read_results(Path("layers.csv"))
        write_results(table.sample(frac=1, random_state=0), Path("layers.csv"))
        verify("layers.csv", "--units", UNITS)

    def test_a_run_that_is_not_finished(self, small):
        edit("gamma.csv")
        shown = verify("gamma.csv", "--units", "9", "-o", "report.json").stdout
        assert f"of a run that is not finished: {BATCHES} of {UNITS} units are in it" in shown
        assert f"{BATCHES} of {BATCHES} units recomputed, all agree" in shown
        output = json.loads(Path("report.json").read_text())
        assert (output["finished"], output["units_there"], output["units_of_run"]) == (
            False,
            2,
            UNITS,
        )

    def test_a_unit_that_failed_and_fails(self, small):
        path = small.checkpoint(1)
        path.write_bytes(path.read_bytes()[:-5])
        small.run("gamma", small.folder / "lost.csv", code=3)
        recorded = read_recorded(Path("lost.csv"), Trust("mine.py:task"))
        for seed in range(4):  # one that failed is among them whatever is drawn
            assert any(key[0] == 1 for key in choose(recorded, 1, seed))
        assert "agrees" in verify("lost.csv", "--units", "1").stdout

    def test_a_unit_that_failed_and_has_no_rows(self, small):
        path, whole = small.checkpoint(1), small.checkpoint(1).read_bytes()
        path.write_bytes(whole[:-5])
        small.run("imbalance", small.folder / "lost.csv", code=3)
        recorded = read_recorded(Path("lost.csv"), Trust("mine.py:task"))
        assert (recorded.manifest.finished, recorded.missing(9)) == (True, [])
        verify("lost.csv", "--units", UNITS)
        path.write_bytes(whole)  # it could have been had
        shown = verify("lost.csv", "--units", "1", "--anyway", code=1).stdout
        assert f"0 rows in the file, {BATCH} now" in shown

    def test_the_choice(self, small):
        recorded = read_recorded(Path("gamma.csv"), Trust("mine.py:task"))
        drawn = [choose(recorded, 2, seed) for seed in range(20)]
        assert drawn[3] == choose(recorded, 2, 3)
        assert all(len(set(keys)) == 2 and keys == sorted(keys) for keys in drawn)
        assert {key for keys in drawn for key in keys} == set(recorded.rows)
        assert choose(recorded, 99, 0) == sorted(recorded.rows)


class TestDiffers:
    CHANGES: ClassVar = {
        "number": ({"gamma": 1.5}, "gamma"),
        "small": ({"curvature": 0.0}, "curvature"),
        "nothing": ({"gamma_floor": math.nan}, "gamma_floor"),
        "status": ({"status": "failed"}, "status: 'failed' in the file, 'ok' now"),
        "method": ({"method": "ef"}, "method: 'ef'"),
        "damping": ({"damping": 0.5}, "damping"),
        "checkpoint": ({"checkpoint": "<script>[b]"}, "<script>[b]"),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_row(self, small, change):
        name = "gamma.parquet" if change in ("number", "nothing") else "gamma.csv"
        columns, output = self.CHANGES[change]
        edit(name, **columns)
        result = verify(name, "--units", UNITS, "-o", "report.json", code=1)
        assert f"1 of {BATCHES} units of {name} differ from what it says" in result.stderr
        units = json.loads(Path("report.json").read_text())["units"]
        assert [unit["agrees"] for unit in units] == [False] + [True] * (BATCHES - 1)
        assert output in f"{units[0]['problem']} {units[0]['where']}"

    @pytest.mark.parametrize("stages", [[0, 1], [2]])
    def test_whole_units_are_missing(self, small, stages):
        table = read_results(Path("gamma.csv"))
        write_results(table[~table["stage"].isin(stages)], Path("gamma.csv"))
        message = verify("gamma.csv", "--units", "1", "-o", "report.json", code=1).stderr
        lost = len(stages) * BATCHES
        assert (
            f"{lost} of {UNITS} units of the run, which was finished, are missing from" in message
        )
        for stage in stages:
            assert f"epoch={stage}.safetensors batch 1" in message
        output = json.loads(Path("report.json").read_text())
        assert output["first_missing"] == [[s, b] for s in stages for b in range(BATCHES)]
        assert all(unit["agrees"] for unit in output["units"])

    def test_many_units_are_missing(self, small):
        recorded = read_recorded(Path("gamma.csv"), Trust("mine.py:task"))
        more = {f"c{i}": "" for i in range(20)}
        recorded.manifest.identity.checkpoints.update(more)
        message = missing_units(recorded)
        assert message.startswith("40 of 46 units")
        assert message.endswith("c5 batch 1\n  and 28 more")

    def test_no_rows(self, small):
        write_results(read_results(Path("gamma.parquet")).iloc[:0], Path("gamma.parquet"))
        assert "has no rows" in verify("gamma.parquet", code=2).stderr

    def test_a_gap_and_iterations_that_would_excuse_anything(self, small):
        table = read_results(Path("gamma.csv"))
        for name in ("gamma_ng_upper", "gamma_min"):
            table[name] *= 100
        write_results(table.assign(iterations=1), Path("gamma.csv"))
        tell("gamma.csv", lambda told: told["identity"]["options"].update(gap=1e9))
        message = verify("gamma.csv", "--units", UNITS, code=1).stderr
        assert f"{UNITS} of {UNITS} units of gamma.csv differ from what it says" in message

    def test_rows_missing_or_too_many(self, small):
        tell("gamma.csv", unfinish)
        table = read_results(Path("gamma.csv")).iloc[:4]
        write_results(table.iloc[1:], Path("gamma.csv"))
        assert "3 rows in the file, 4 now" in verify("gamma.csv", code=1).stdout
        write_results(pd.concat([table, table.iloc[:1]]), Path("gamma.csv"))
        assert "5 rows in the file, 4 now" in verify("gamma.csv", code=1).stdout

    def test_a_column_more_or_less(self, small):
        table = read_results(Path("imbalance.parquet"))
        write_results(table.assign(loss_change_sf=1.0), Path("imbalance.parquet"))
        verify("imbalance.parquet", code=1)
        write_results(table.drop(columns="loss"), Path("imbalance.parquet"))
        verify("imbalance.parquet", code=1)

    def test_a_tolerance(self, small):
        small.run("gamma", Path("f.csv"), "--dtype", "float32")
        for name in ("gamma.csv", "f.csv"):
            gamma = read_results(Path(name))["gamma"].iloc[0]
            edit(name, gamma=gamma * (1 + 1e-5))
        verify("gamma.csv", "-q", code=1)
        words = ("f.csv", "-q")
        verify(*words)  # float32: half the digits
        verify(*words, "--tolerance", "1e-6", code=1)
        verify(*words, "--tolerance", "1e-4")


class TestChanged:
    def refused(self, told: str, name: str = "gamma.csv") -> None:
        message = verify(name, code=2).stderr
        assert "cannot be reproduced" in message
        assert told in message

    def test_a_checkpoint(self, small):
        small.save(1, seed=9)
        self.refused("checkpoints.epoch=1.safetensors: ")
        assert (
            "made of something else" in verify("gamma.csv", "--anyway", "--units", 9, code=1).stdout
        )

    def test_data(self, small):
        path = Path("mine.py")
        path.write_text(path.read_text().replace("torch.randn", "2 * torch.randn"))
        shutil.rmtree("__pycache__", ignore_errors=True)
        self.refused("batches[0].sha256: ")

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [("seed", 3, "settings.seed: 0 then, 3 now"), ("engine", "loop", "settings.engine")],
    )
    def test_settings_of_the_manifest_itself(self, small, name, value, told):
        tell("gamma.csv", lambda m: m["options"].update({name: value}))
        self.refused(told)

    def test_code_and_machine_are_told(self, small, monkeypatch):
        monkeypatch.setattr(ngeval.runs.identity, "code", lambda: CODE | {"ngeval": "1"})
        tell("gamma.csv", lambda m: m["machine"].update(cpu="abacus"))
        shown = verify("gamma.csv").stdout
        assert '\n  code.ngeval: "0" then, "1" now\n  machine.cpu: "abacus" then, ' in shown
        lines = shown[shown.index("computed elsewhere:") :].splitlines()
        assert lines[0] == "computed elsewhere:"
        assert [line.split(":")[0] for line in lines[1:3]] == ["  code.ngeval", "  machine.cpu"]

    def test_more_checkpoints_since(self, small):
        shutil.copy(small.checkpoint(0), "epoch=00.safetensors")
        verify("gamma.csv", "--units", UNITS)

    def test_a_checkpoint_that_is_gone(self, small):
        small.checkpoint(0).unlink()
        message = verify("gamma.csv", code=2).stderr
        assert "checkpoint 'epoch=0.safetensors' of the run does not exist" in message
        assert "verify in the folder that the run was started in" in message

    def test_elsewhere(self, small, monkeypatch, tmp_path):
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        message = verify(small.folder / "gamma.csv", "-t", small.folder / "mine.py:task", code=2)
        assert "verify in the folder that the run was started in" in message.stderr


class TestTrust:
    def test_a_task_is_code(self, small, monkeypatch):
        def ran(*_):
            pytest.fail("it was run")

        monkeypatch.setattr("ngeval.runs.from_options.get_task", ran)
        message = verify("gamma.csv", task=False, code=2).stderr
        assert "belongs to the task 'mine.py:task', which is code that would be run" in message

    def test_an_optimizer_is_code(self, small, monkeypatch):
        Path("evil_module_v.py").write_text("raise SystemExit('imported')\n")
        monkeypatch.syspath_prepend(small.folder)
        name = "evil_module_v.Evil:2"
        tell("gamma.csv", lambda m: m["identity"]["options"].update(methods=["sgd", name]))
        message = verify("gamma.csv", code=2).stderr
        assert f"pass --methods {name}" in message
        assert "evil_module_v" not in sys.modules

    def test_pickles_and_remote_code_are_not_taken_over(self, small, monkeypatch):
        output = {"allow_pickle": True, "trust_remote_code": True}
        tell("gamma.csv", lambda m: m["options"].update(output))
        options = read_recorded(Path("gamma.csv"), Trust("mine.py:task")).options
        assert (options.allow_pickle, options.trust_remote_code) == (False, False)
        made = []
        start = Run.__post_init__
        monkeypatch.setattr(Run, "__post_init__", lambda run: (start(run), made.append(run))[0])
        verify("gamma.csv", "--units", "1")
        assert made
        assert not any(one.allow_pickle for one in made)

    ODD: ClassVar = {
        "identity": [None, [], 7, {}],
        "options": [None, "x", {}],
        "options.batch_size": ["5", 5.0, True, None, 0, 6, -5, 10**15],
        "options.num_batches": [10**12, -1, 3, 0],
        "options.seed": [-1, 2**70],
        "options.checkpoint": ["epoch", [1], [["a"]], []],
        "options.device": ["nowhere", 3],
        "options.memory": [5, "much", True, ["1GiB"], "9" * 400, "9" * 5000 + "GiB"],
        "options.optimizer_state": ["x", [None], ["nowhere.pt"]],
        "identity.options": [None, {}, []],
        "identity.options.kind": ["study", None, ["gamma"]],
        "identity.options.methods": ["sgd", [], [None], ["nothing"], [["sgd"]], ["sgd"] * 1001],
        "identity.options.dampings": [[], [-1.0], ["x"], 1.0, [True], [10**400], [0.5] * 10_001],
        "identity.options.gap": ["x", None, 0, -1e-4, math.nan, math.inf, 10**400],
        "identity.options.metric_batches": [0, -1, 10**12, "every", 2.0, True],
        "identity.options.more": [1],
        "identity.checkpoints": [None, [], {}, {"x": 1}],
        "identity.batches": [None, {}, [], [1], 10**9],
        "identity.settings": [None, [1]],
        "complete": [None, 1, "yes", False],
        "failed_units": [
            None,
            3,
            [3],
            [[0]],
            [[0, 9]],
            [[-1, 0]],
            [[0, 0, 0]],
            [["0", 0]],
            [[0, 0]],
        ],
    }

    @pytest.mark.parametrize("name", ODD)
    def test_a_malformed_manifest(self, small, name):
        *path, last = name.split(".")
        for value in self.ODD[name]:
            shutil.copy(manifest_path(Path("gamma.csv")), "kept.json")

            def change(told, value=value):
                for key in path:
                    told = told[key]
                told[last] = value

            tell("gamma.csv", change)
            with pytest.raises(NgevalError):
                begin("gamma.csv")
            shutil.copy("kept.json", manifest_path(Path("gamma.csv")))

    def test_more_units_than_there_can_be(self, small, monkeypatch):
        monkeypatch.setattr(ngeval.verification.recompute, "MAX_UNITS", UNITS - 1)
        with pytest.raises(NgevalError, match="more than 5 units"):
            begin("gamma.csv")

    def test_a_batch_of_10_to_the_15_is_refused_before_it_is_made(self, small, monkeypatch):
        monkeypatch.setattr(
            ngeval.verification.recompute, "make_run", lambda *_: pytest.fail("made")
        )
        tell("gamma.csv", lambda told: told["options"].update(batch_size=10**15))
        message = verify("gamma.csv", code=2).stderr
        assert "num_batches × batch_size is 2.0e+15 samples; at most 1e+07 are" in message

    @pytest.mark.parametrize("told", [lambda *_: [range(10**15)], lambda *_: [itertools.count()]])
    def test_indices_without_end(self, monkeypatch, told):
        monkeypatch.setattr(ngeval.tasks.base, "MAX_SAMPLES", 1000)
        task = replace(get_task("digits-mlp"), load_indices=told)
        assert task.indices(10, 1, 0) is None  # whatever the task says of ten
        assert task.indices(10**15, 1, 0) is None
        monkeypatch.setattr(ngeval.tasks.base, "MAX_SAMPLES", 10)
        assert replace(task, load_indices=lambda *_: [range(10)]).indices(10, 1, 0) == [
            [*range(10)]
        ]

    def test_no_manifest_or_none_of_a_run(self, small):
        place = manifest_path(Path("gamma.csv"))
        for text, output in (("{", "cannot be read as a manifest"), ("{}", "it has no 'options'")):
            place.write_text(text)
            assert output in verify("gamma.csv", code=2).stderr
        place.unlink()
        assert "has no manifest beside it" in verify("gamma.csv", code=2).stderr

    def test_another_runs_manifest(self, small):
        edit("gamma.csv", stage=7)
        assert "belong to different runs" in verify("gamma.csv", code=2).stderr

    def test_the_results_are_never_written_over(self, small):
        before = Path("gamma.csv").read_bytes()
        verify("gamma.csv", "-o", "gamma.csv", "--force", code=2)
        assert Path("gamma.csv").read_bytes() == before


def rows(**columns) -> pd.DataFrame:
    """Two rows of ``ng`` and ``sgd``, found by a Krylov run."""
    output = {"method": ["ng", "sgd"], "damping": 0.1, "gamma": [1.0, 2.0], "gamma_min": 1.0}
    output |= {
        "decrease": 3.0,
        "cosine_sgd": 1e-9,
        "iterations": 12,
        "reason": "",
        "engine": "vmap",
    }
    output |= {"status": "ok", "dtype": "float64"}
    return pd.DataFrame(output | columns)


class TestCompare:
    def agrees(self, now: pd.DataFrame, then: pd.DataFrame | None = None) -> bool:
        then = rows() if then is None else then
        return compare((0, 0), "c", then, now, None, gap=1e-4).agrees

    def test_how_it_came_about_is_no_result(self):
        assert self.agrees(rows(engine="loop", reason="less memory", iterations=11))

    @pytest.mark.parametrize("dtype", DIGITS)
    def test_half_the_digits(self, dtype):
        then = rows(dtype=dtype, iterations=0)
        for factor, expected in ((0.9, True), (1.2, False)):
            gamma = [1.0, 2 * (1 + factor * DIGITS[dtype])]
            now = rows(dtype=dtype, iterations=0, gamma=gamma)
            assert self.agrees(now, then) is expected

    def test_a_krylov_runs_gap(self):
        assert self.agrees(rows(gamma_min=1 + 9e-5, gamma=[1 + 9e-5, 2.0]))
        assert not self.agrees(rows(gamma_min=1 + 2e-4))
        assert not self.agrees(rows(gamma=[1 + 2e-4, 2.0]))
        assert not self.agrees(rows(gamma=[1.0, 2 + 1e-6]))  # sgd's own: no run is behind it
        assert self.agrees(rows(decrease=[3 * (1 + 9e-3), 3.0]))  # √gap: γ is stationary there
        assert not self.agrees(rows(decrease=[3.0, 3 * (1 + 9e-3)]))
        assert not self.agrees(rows(iterations=0, gamma_min=1 + 9e-5), rows(iterations=0))

    def test_a_gap_has_an_end(self):
        for factor, expected in ((0.9, True), (1.1, False)):
            now = rows(gamma_min=1 / (1 - factor * MAX_GAP))
            assert compare((0, 0), "c", rows(), now, None, gap=1e9).agrees is expected

    def test_the_file_does_not_say_what_is_a_krylov_runs(self):
        now = rows(iterations=0)
        for change in ({"gamma_min": 1 + 9e-5}, {"decrease": [3 * (1 + 9e-3), 3.0]}):
            verdict = compare((0, 0), "c", rows(iterations=1, **change), now, None, gap=1e-4)
            assert not verdict.agrees
            assert "if it had less memory, pass a --tolerance" in verdict.note
        far = compare((0, 0), "c", rows(iterations=1, gamma_min=2.0), now, None, gap=1e-4)
        assert (far.agrees, far.note) == (False, "")
        assert self.agrees(now, rows(iterations=1))
        assert self.agrees(rows(gamma_min=1 + 9e-5), rows(iterations=0))

    def test_a_cosine_is_of_one(self):
        assert self.agrees(rows(cosine_sgd=2e-9))
        assert not self.agrees(rows(cosine_sgd=1e-6))

    def test_nan_is_nan_and_infinity_is_infinity(self):
        for value in (math.nan, math.inf, -math.inf, 0.0):
            assert self.agrees(rows(gamma=[value, 2.0]), rows(gamma=[value, 2.0]))
            assert not self.agrees(rows(gamma=[value, 2.0]))
            assert not self.agrees(rows(), rows(gamma=[value, 2.0]))

    def test_parts_of_a_sum_may_cancel(self):
        then = rows(method="sgd", layer=["a", "b"], iterations=0, decrease=[5.0, 1e-12])
        assert self.agrees(then.assign(decrease=[5.0, -1e-12]), then)
        assert not self.agrees(then.assign(decrease=[5.0, 1e-6]), then)

    def test_noise_of_an_undefined_row(self):
        lost = {"status": ["ok", "undefined"], "gamma": [1.0, math.nan]}
        assert self.agrees(
            rows(decrease=[3.0, 1e-17], **lost), rows(decrease=[3.0, -4e-17], **lost)
        )

    def test_text_that_reads_like_numbers(self):
        then = rows(layer=["0.1", "0.10"])
        assert self.agrees(then.iloc[::-1], then)
        assert not self.agrees(rows(layer=["0.1", "0.100"]), then)

    def test_what_cannot_be_compared(self):
        odd = rows(damping=pd.Series([0.1, "x"], dtype=object), method=pd.Series([1, "sgd"]))
        assert not self.agrees(rows(), odd)
        assert not self.agrees(rows(gamma_min=2.0), rows(iterations=["many", "few"]))
        assert not self.agrees(rows(), rows(gamma=[np.array([1.0]), "z"]))
