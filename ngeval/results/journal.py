"""The journal of a run: a file for each unit that is done, so that nothing done is done again.

While ``gamma.csv`` is made, ``gamma.csv.journal/`` lies beside it. A unit's rows are one file in
it (Arrow, with every type as it was), which appears whole or not at all and is on the disk before
the next unit begins. Units may come in any order and from any number of processes; the table is
put together from the files in the order of the units, so that it does not depend on who made
them, when, or how often the run was stopped on the way.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import filelock
import pandas as pd
import pyarrow as pa

from ngeval.errors import OutputError
from ngeval.utils.atomic import replace_file

SUFFIX = ".journal"
RUN = "run.json"
WRITER = "writer.json"
LOCK = "lock"
FAILURE = b"ngeval.failure"
OF_RUN = b"ngeval.run"
OF_UNIT = b"ngeval.unit"

UNIT = re.compile(r"\d{5,}-\d{5,}\.arrow")

OWN = re.compile(rf"{UNIT.pattern}|{RUN}|{WRITER}|{LOCK}|\.\w+\.\w+")
"""What lies in a journal's folder; the last are files that were not yet whole."""

Key = tuple[int, int]
"""A unit: the number of its checkpoint, and of its batch."""


@dataclass(frozen=True)
class Entry:
    """What a unit came to.

    Attributes:
        table: its rows.
        failure: why it is to be done again: its checkpoint cannot be read, a method had no memory,
            …; empty where it was graded, whatever else became of single methods.
    """

    table: pd.DataFrame
    failure: str = ""

    @property
    def lost(self) -> bool:
        """Whether there is nothing of it."""
        if not self.failure or "status" not in self.table:
            return bool(self.failure)
        return bool((self.table["status"] == "failed").all())


class Journal:
    """The units of one output file that are done.

    Attributes:
        output: the result file.
        folder: where the units lie.
        run: a name of the run that is told with each of its units. A process that outlives its
            run, since torchrun was killed, cannot add to the next one of the same output. Empty:
            units of any run are read.
    """

    def __init__(self, output: Path) -> None:
        """Nothing is read or written yet.

        Args:
            output: the result file that it is of.
        """
        self.output = output
        self.folder = output.with_name(output.name + SUFFIX)
        self.run = ""
        self._read: dict[Key, Entry] = {}

    @property
    def exists(self) -> bool:
        """Whether a run was begun, and not finished or not without failures."""
        return (self.folder / RUN).is_file()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only run that writes this output.

        The lock is the operating system's: one that is killed holds it no longer.

        Raises:
            OutputError: another run is writing it, or the folder cannot be made.
        """
        lock = filelock.FileLock(self.folder / LOCK, timeout=0)
        self.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(
                f"{self.output} is being written by another run ({self._writer()}); wait for it, "
                "or give another output"
            ) from error
        except OSError as error:
            raise OutputError(f"{self.output} cannot be written: {error}") from error
        try:
            self._sign()
            yield
        finally:
            if not self.exists:  # nothing but the lock, which still holds
                self.remove()
                with contextlib.suppress(OSError):
                    (self.folder / LOCK).unlink(missing_ok=True)
                    self.folder.rmdir()
            lock.release()

    def check(self) -> None:
        """Find out whether the folder is a journal's, or can be made.

        Raises:
            OutputError: it is somebody else's, who would lose what is in it.
        """
        taken = self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir())
        with _reported(self.folder):
            strange = not taken and self.folder.is_dir() and self._strange()
        if taken or strange:
            raise OutputError(
                f"{self.folder} is where the journal of {self.output} would be, and it is not "
                "ngeval's; move it away, or give another output"
            )

    def _strange(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if not OWN.fullmatch(path.name)]

    def begin(self, told: str) -> None:
        """Start with no unit done.

        Args:
            told: of the run, for `told` when it is resumed.

        Raises:
            OutputError: the folder cannot be written.
        """
        with _reported(self.folder):
            for path in self._files():
                path.unlink()
        self._read = {}
        self.tell(told)

    def tell(self, told: str) -> None:
        """Say something else of the run.

        Raises:
            OutputError: the folder cannot be written.
        """
        replace_file(self.folder / RUN, lambda place: place.write_text(told, encoding="utf-8"))

    def told(self) -> str:
        """What was told of the run.

        Raises:
            OutputError: it cannot be read.
        """
        with _reported(self.folder):
            return (self.folder / RUN).read_text(encoding="utf-8", errors="replace")

    def write(self, key: Key, entry: Entry) -> None:
        """Put a unit on the disk.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        made = pa.Table.from_pandas(entry.table, preserve_index=False)
        path = self._path(key)
        told = {
            FAILURE: entry.failure.encode(),
            OF_RUN: self.run.encode(),
            OF_UNIT: path.stem.encode(),  # a file that was renamed is none of the unit's
        }
        metadata = {**(made.schema.metadata or {}), **told}
        made = made.replace_schema_metadata(metadata)

        def write(place: Path) -> None:
            with place.open("wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
                writer.write_table(made)

        replace_file(path, write)

    def entries(self) -> dict[Key, Entry]:
        """All units that are done, in their order; a file that cannot be read is not done."""
        found = {_key(path): path for path in self._files()}
        for key in found.keys() - self._read.keys():
            if (entry := _read_entry(found[key], self.run)) is not None:
                self._read[key] = entry
        return {key: self._read[key] for key in sorted(found) if key in self._read}

    def forget(self, keys: Iterable[Key]) -> None:
        """These are to be done again.

        Raises:
            OutputError: the folder cannot be written.
        """
        with _reported(self.folder):
            for key in keys:
                self._read.pop(key, None)
                self._path(key).unlink(missing_ok=True)

    def remove(self) -> None:
        """All units are done and in the output; a lock that is held stays as long as it is."""
        with contextlib.suppress(OSError):
            (self.folder / RUN).unlink(missing_ok=True)  # first: from here on there is no run
            for path in self.folder.iterdir():
                if OWN.fullmatch(path.name) and path.name != LOCK:
                    path.unlink()
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        """Of units; none where the folder is gone."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if UNIT.fullmatch(path.name)]

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key[0]:05d}-{key[1]:05d}.arrow"

    def _sign(self) -> None:
        """Leave word of who is writing, for those who come second."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"process": os.getpid(), "machine": platform.node(), "since": since}
        replace_file(self.folder / WRITER, lambda place: place.write_text(json.dumps(who)))

    def _writer(self) -> str:
        try:
            who = json.loads((self.folder / WRITER).read_text(encoding="utf-8"))
            return f"process {who['process']} on {who['machine']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "which has just begun"


def table_of(entries: Iterable[Entry]) -> pd.DataFrame:
    """The rows of units, one after the other."""
    frames = [entry.table for entry in entries if not entry.table.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _read_entry(path: Path, run: str) -> Entry | None:
    """None where it is damaged, another run's or another unit's: the unit is done again."""
    try:
        with path.open("rb") as source:  # pyarrow's own takes no name that is not UTF-8
            made = pa.ipc.open_file(source).read_all()
        metadata = made.schema.metadata or {}
        if run and metadata.get(OF_RUN, b"").decode() != run:
            return None
        if metadata.get(OF_UNIT, b"").decode() != path.stem:
            return None
        if len(set(made.column_names)) < len(made.column_names):
            return None
        # What pandas has told of itself there is not needed: the types are Arrow's.
        table = made.to_pandas(ignore_metadata=True)
        return Entry(table, metadata.get(FAILURE, b"").decode())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, pa.ArrowException):
        return None


def _key(path: Path) -> Key:
    stage, batch = path.stem.split("-")
    return int(stage), int(batch)


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder} cannot be read or written: {error}") from error
