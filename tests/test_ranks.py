"""Processes that share a run: who does what, one table, one bar, one voice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ngeval.runs.ranks
from ngeval import InputError, NgevalError
from ngeval.cli.app import app
from ngeval.results.manifest import read_manifest
from ngeval.runs.ranks import ManyProcesses, Ranks, joined, own_device
from ngeval.tasks import get_task
from ngeval.utils.torchrun import rank, world_size

UNITS = [(stage, batch) for stage in range(5) for batch in range(4)]


def processes(count: int) -> list[ManyProcesses]:
    store = dist.HashStore()
    return [ManyProcesses(store, rank, count) for rank in range(count)]


class TestUnits:
    @settings(max_examples=50)
    @given(
        missing=st.lists(st.sampled_from(UNITS), unique=True).map(sorted),
        turns=st.lists(st.integers(0, 3), max_size=40),
    )
    def test_each_is_done_once_whoever_is_fast(self, missing, turns):
        together = processes(4)
        iterators = [ranks.share(missing) for ranks in together]
        done = [key for who in turns if (key := next(iterators[who], None)) is not None]
        for iterator in iterators:
            done += iterator
        assert Counter(done) == Counter(missing)

    def test_processes_start_at_different_checkpoints(self):
        firsts = [next(ranks.share(UNITS)) for ranks in processes(5)]
        assert firsts == [(stage, 0) for stage in range(5)]

    def test_a_process_goes_through_a_checkpoint_before_the_next(self):
        first, _ = processes(2)
        assert list(first.share(UNITS)) == UNITS
        second = processes(2)[1]
        assert [key[0] for key in second.share(UNITS)][::4] == [2, 3, 4, 0, 1]

    def test_one_process_does_all_in_order(self):
        assert list(Ranks().share(UNITS)) == UNITS

    def test_no_unit_is_missing(self):
        assert [list(ranks.share([])) for ranks in processes(2)] == [[], []]


class TestTalk:
    def test_all_hear_what_the_first_one_says_in_order(self):
        first, second = processes(2)
        assert [first.broadcast(lambda: {"a": [1]}), first.broadcast(lambda: "b")] == [
            {"a": [1]},
            "b",
        ]
        wrong = "only the first one makes it"
        assert second.broadcast(lambda: pytest.fail(wrong)) == {"a": [1]}
        assert second.broadcast(lambda: pytest.fail(wrong)) == "b"

    def test_where_the_store_is_gone_the_message_says_so(self):
        class Gone:
            def add(self, *_):
                raise dist.DistNetworkError("Connection reset by peer\nat …")

            set = check = add

        for ranks in (ManyProcesses(Gone(), 0, 2), ManyProcesses(Gone(), 1, 2)):
            ranks.count_steps(1)  # no bar is worth a run
            for ask in (
                lambda one=ranks: next(one.share(UNITS)),
                lambda one=ranks: one.broadcast(lambda: 1),
                lambda one=ranks: one.finish(lambda: None),
            ):
                with pytest.raises(
                    NgevalError, match=r"--resume continues \(Connection reset by peer\)"
                ):
                    ask()

    def test_steps_are_counted_together(self):
        first, second = processes(2)
        first.count_steps(2)
        second.count_steps(3)
        assert first.steps() == second.steps() == 5

    def test_the_first_one_waits_for_the_others(self):
        first, second = processes(2)
        seen = []

        def meanwhile():
            seen.append(1)
            if len(seen) == 2:
                second.finish(lambda: pytest.fail("only the first one waits"))

        waiting = threading.Thread(target=first.finish, args=(meanwhile,), daemon=True)
        waiting.start()
        waiting.join(60)
        assert not waiting.is_alive()
        assert len(seen) == 2


class TestEnvironment:
    def test_without_torchrun_there_is_one(self, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("WORLD_SIZE", "4")  # which other launchers leave behind
        assert (world_size(), rank()) == (1, 0)
        with joined("cpu", together=False, warn=pytest.fail) as ranks:
            assert (ranks.rank, ranks.count, ranks.group) == (0, 1, None)

    def test_cuda_is_the_gpu_of_the_process(self, monkeypatch):
        for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert own_device("cuda") == "cuda:1"
        assert own_device("cuda:3") == "cuda:3"
        assert own_device("cpu") == "cpu"
        assert rank() == 5

    def test_a_restart_finds_nothing_claimed(self, monkeypatch):
        """torchrun's store outlives its processes, what they had claimed is not done."""
        store = dist.HashStore()
        monkeypatch.setattr(ngeval.runs.ranks, "rendezvous", lambda _: iter([(store, 0, 2)]))
        for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        for restarts in ("0", "1", "2"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
            with joined("cpu", together=False, warn=pytest.fail) as ranks:
                assert ranks.broadcast(lambda now=restarts: now) == restarts
                assert list(ranks.share(UNITS)) == UNITS
                assert ranks.steps() == 0
                ranks.count_steps(1)

    def test_nonsense_is_named(self, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "many")
        with pytest.raises(InputError, match="WORLD_SIZE is 'many'"):
            world_size()

    def test_nobody_there(self, monkeypatch):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(InputError, match="cannot be reached"):
            joined("cpu", together=False, warn=pytest.fail).__enter__()

    def test_rows_of_several_processes_need_a_file(self, run, monkeypatch):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, ["gamma", *map(str, run[1])])
        assert result.exit_code == 2
        assert "a run of several processes needs a file for its rows" in result.stderr

    def test_unknown_shard(self):
        args = ["gamma", "-t", "digits-mlp", "-c", "x.pt", "--shard", "unit"]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 2
        assert "unknown shard 'unit'; did you mean 'units'" in result.stderr


def torchrun(count: int, folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count]
    return subprocess.run(
        [*map(str, command), "-m", "ngeval", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, and the options of a run that takes the time of its processes' start."""
    folder = tmp_path_factory.mktemp("run")
    for epoch in range(2):
        torch.manual_seed(epoch)
        torch.save(get_task("digits-mlp").model().state_dict(), folder / f"epoch-{epoch}.pt")
    args = ["-t", "digits-mlp", "-c", folder, "--batch-size", 8, "--dtype", "float64"]
    return folder, [*args, "-m", "sgd,ief,sf:2,ng", "--damping", "0,1e-3"]


@pytest.mark.second_stage
class TestTorchrun:
    def test_units_over_three_processes_make_the_table_of_one(self, run, tmp_path):
        _, args = run
        args = ["gamma", *args, "--num-batches", "3"]
        alone = CliRunner().invoke(app, [*map(str, args), "-o", str(tmp_path / "one.csv")])
        assert alone.exit_code == 0, alone.output
        done = torchrun(3, tmp_path, *args, "-o", "three.csv")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "three.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
        names = sorted(path.name for path in tmp_path.iterdir() if "three" in path.name)
        assert names == ["three.csv", "three.csv.manifest.json"]
        output = read_manifest(tmp_path / "three.csv")
        assert output is not None
        assert (output["run"]["ranks"], output["complete"]) == (3, True)
        assert done.stderr.count("grading updates") == 1  # one bar
        assert done.stderr.count("written:") == 1
        assert done.stdout.count("λ = 0:") == 1  # and one table
