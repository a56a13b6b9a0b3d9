"""The journal: files of units that appear whole, in any order, of one writer."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import ngeval.utils.atomic
from ngeval import OutputError
from ngeval.results.journal import Entry, Journal, table_of

KEYS = [(stage, batch) for stage in range(3) for batch in range(2)]


def rows(stage: int, batch: int) -> pd.DataFrame:
    """Of every kind of column: text, whole numbers, numbers, ±∞, NaN, nothing."""
    return pd.DataFrame(
        {
            "checkpoint": [f"<é>\n{stage}", "b"],
            "stage": stage,
            "batch": batch,
            "gamma": [1 / 3 + stage, math.nan],
            "floor": [math.inf, -0.0],
            "reason": ["", None],
        }
    )


@pytest.fixture
def journal(tmp_path):
    built = Journal(tmp_path / "g.csv")
    built.folder.mkdir()
    built.begin("{}")
    return built


class TestUnits:
    def test_a_unit_is_read_as_it_was_written(self, journal):
        journal.write((1, 0), Entry(rows(1, 0)))
        journal.write((0, 1), Entry(rows(0, 1), "NaN weights: ‘é’"))
        for reader in (journal, Journal(journal.output)):
            entries = reader.entries()
            assert list(entries) == [(0, 1), (1, 0)]
            assert [entry.failure for entry in entries.values()] == ["NaN weights: ‘é’", ""]
            assert_frame_equal(entries[1, 0].table, rows(1, 0), check_exact=True)

    def test_a_unit_without_rows(self, journal):
        journal.write((0, 0), Entry(pd.DataFrame(), "gone"))
        journal.write((0, 1), Entry(rows(0, 1)))
        entries = Journal(journal.output).entries()
        assert entries[0, 0].failure == "gone"
        assert_frame_equal(table_of(entries.values()), rows(0, 1))
        assert table_of([entries[0, 0]]).empty

    @settings(max_examples=15)
    @given(order=st.permutations(KEYS))
    def test_the_table_does_not_depend_on_the_order(self, order):
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "g.csv")
            journal.folder.mkdir()
            seen = set()
            for key in order:  # read in between, as a growing table is
                journal.write(key, Entry(rows(*key)))
                seen.add(key)
                assert list(journal.entries()) == sorted(seen)
            expected = pd.concat([rows(*key) for key in KEYS], ignore_index=True)
            assert_frame_equal(table_of(journal.entries().values()), expected)

    def test_a_torn_file_is_not_done(self, journal):
        journal.write((0, 0), Entry(rows(0, 0)))
        journal.write((0, 1), Entry(rows(0, 1)))
        path = journal.folder / "00000-00001.arrow"
        whole = path.read_bytes()
        for length in {0, 1, 8, len(whole) // 2, len(whole) - 1, *range(0, len(whole), 97)}:
            path.write_bytes(whole[:length])
            assert list(Journal(journal.output).entries()) == [(0, 0)]
        path.write_bytes(whole)
        assert list(Journal(journal.output).entries()) == [(0, 0), (0, 1)]

    def test_a_file_of_something_else_is_not_done(self, journal):
        for name in ("00000-00000.arrow", ".tmpa1b2.arrow", "notes.arrow", "0-0.arrow.bak"):
            (journal.folder / name).write_text("what is this")
        (journal.folder / "00001-00000.arrow").mkdir()
        assert Journal(journal.output).entries() == {}

    def test_what_is_forgotten_is_not_done(self, journal):
        for key in KEYS:
            journal.write(key, Entry(rows(*key)))
        journal.forget([(0, 1), (2, 0), (7, 7)])
        left = [key for key in KEYS if key not in ((0, 1), (2, 0))]
        assert list(journal.entries()) == list(Journal(journal.output).entries()) == left
        journal.write((0, 1), Entry(rows(0, 1), "again"))
        assert journal.entries()[0, 1].failure == "again"

    def test_begin_starts_with_nothing(self, journal):
        journal.write((0, 0), Entry(rows(0, 0)))
        assert journal.exists
        journal.begin("again")
        assert journal.description() == "again"
        assert journal.entries() == {}

    def test_removed(self, journal):
        journal.write((0, 0), Entry(rows(0, 0)))
        journal.remove()
        assert not journal.exists
        assert not journal.folder.exists()


class TestFullDisk:
    def test_a_unit_that_does_not_fit_leaves_nothing(self, journal, monkeypatch):
        journal.write((0, 0), Entry(rows(0, 0)))
        before = {path: path.read_bytes() for path in journal.folder.iterdir()}

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ngeval.utils.atomic.os, "fsync", full)
        for key in ((0, 0), (0, 1)):
            with pytest.raises(OutputError, match=rf"00000-0000{key[1]}.*No space left"):
                journal.write(key, Entry(rows(9, 9)))
        with pytest.raises(OutputError, match="No space left"):
            journal.describe("more")
        assert {path: path.read_bytes() for path in journal.folder.iterdir()} == before

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        journal = Journal(tmp_path / "file" / "g.csv")
        with pytest.raises(OutputError, match="cannot be written"), journal.held():
            pytest.fail("it is not held")
        with pytest.raises(OutputError, match="cannot be read or written"):
            journal.description()


HOLDER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


class TestLock:
    def test_the_second_writer_is_told_who_is_first(self, tmp_path):
        first, second = (Journal(tmp_path / "g.csv") for _ in range(2))
        with first.held():
            who = rf"g\.csv is being written by another run \(process {os.getpid()} on .* since 2"
            with pytest.raises(OutputError, match=who), second.held():
                pytest.fail("two hold it")
            with Journal(tmp_path / "other.csv").held():  # which is nobody's business
                pass
        with second.held():
            pass

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\0"])
    def test_one_that_has_not_signed_yet(self, tmp_path, text):
        first, second = (Journal(tmp_path / "g.csv") for _ in range(2))
        with first.held():
            (first.folder / "writer.json").write_text(text)
            with pytest.raises(OutputError, match="one that has just begun"), second.held():
                pytest.fail("two hold it")

    def test_nothing_is_left_of_a_run_that_did_not_begin(self, tmp_path):
        with Journal(tmp_path / "g.csv").held():
            pass
        assert list(tmp_path.iterdir()) == []

    def test_what_was_begun_is_left(self, tmp_path):
        journal = Journal(tmp_path / "g.csv")
        with contextlib.suppress(KeyboardInterrupt), journal.held():
            journal.begin("run")
            raise KeyboardInterrupt
        assert journal.exists
        with journal.held():
            assert json.loads((journal.folder / "writer.json").read_text())["process"]

    def test_a_killed_process_holds_it_no_longer(self, journal):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, journal.folder / "lock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(OutputError, match="being written"), journal.held():
                pytest.fail("two hold it")
            holder.kill()
            holder.wait()
            with journal.held():
                assert journal.exists
