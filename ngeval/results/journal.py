"""The journal of a run: a file for each unit that is done, so that no unit is computed twice.

While ``gamma.csv`` is being computed, ``gamma.csv.journal/`` lies beside it. A unit's rows are one
file in it (Arrow, which keeps all types), which appears whole or not at all and is on the disk
before the next unit begins. Units may come in any order and from any number of processes; the
table is assembled from the files in the order of the units, so that it does not depend on which
process computed them, when, or how often the run was stopped on the way.
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
"""The files of a journal; the last kind are temporary ones."""

Key = tuple[int, int]
"""A unit: the number of its checkpoint, and of its batch."""


@dataclass(frozen=True)
class Entry:
    """The result of a unit.

    Attributes:
        table: its rows.
        failure: why it has to be computed again (its checkpoint cannot be read, a method lacked
            memory, …); empty if it was graded, even if single methods failed in other ways.
    """

    table: pd.DataFrame
    failure: str = ""

    @property
    def lost(self) -> bool:
        """Whether it has no row that could be computed."""
        if not self.failure or "status" not in self.table:
            return bool(self.failure)
        return bool((self.table["status"] == "failed").all())


class Journal:
    """The units of one output file that are done.

    Its methods raise `OutputError` where the folder cannot be read or written.

    Attributes:
        run: a name of the run that is written with each of its units, so that a process that
            outlives its run, after torchrun was killed, cannot add to the next run of the same
            output. Empty: units of any run are read.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + SUFFIX)
        self.run = ""
        self._read: dict[Key, Entry] = {}

    @property
    def exists(self) -> bool:
        """Whether a run was begun and has not finished without failures."""
        return (self.folder / RUN).is_file()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only run that writes this output.

        The lock is the operating system's, which releases it when the process is killed.
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
            since = datetime.now(UTC).isoformat(timespec="seconds")
            who = {"process": os.getpid(), "machine": platform.node(), "since": since}
            self._replace(WRITER, json.dumps(who))
            yield
        finally:
            if not self.exists:  # nothing but the lock, which is still held
                self.remove()
                with contextlib.suppress(OSError):
                    (self.folder / LOCK).unlink(missing_ok=True)
                    self.folder.rmdir()
            lock.release()

    def check(self) -> None:
        """Refuse a folder that holds other files than a journal's, which would be lost."""
        folder = self.folder
        with _reported(folder):
            if folder.is_dir() and not folder.is_symlink():
                free = all(OWN.fullmatch(path.name) for path in folder.iterdir())
            else:
                free = not (folder.exists() or folder.is_symlink())
        if not free:
            raise OutputError(
                f"{folder} is where the journal of {self.output} would be, and is not a "
                "journal; move it away, or give another output"
            )

    def begin(self, description: str) -> None:
        """Start with no unit done; see `describe`."""
        self.forget(map(_key, self._files()))
        self.describe(description)

    def describe(self, description: str) -> None:
        """Replace the description of the run, which `description` returns when it is resumed."""
        self._replace(RUN, description)

    def description(self) -> str:
        """The description of the run."""
        with _reported(self.folder):
            return (self.folder / RUN).read_text(encoding="utf-8", errors="replace")

    def write(self, key: Key, entry: Entry) -> None:
        """Put a unit on the disk."""
        table = pa.Table.from_pandas(entry.table, preserve_index=False)
        path = self._path(key)
        metadata = {
            **(table.schema.metadata or {}),
            FAILURE: entry.failure.encode(),
            OF_RUN: self.run.encode(),
            OF_UNIT: path.stem.encode(),  # a file that was renamed does not count
        }
        table = table.replace_schema_metadata(metadata)

        def write(place: Path) -> None:
            with place.open("wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        replace_file(path, write)

    def entries(self) -> dict[Key, Entry]:
        """All units that are done, in their order; one whose file cannot be read is not."""
        paths = {_key(path): path for path in self._files()}
        for key in paths.keys() - self._read.keys():
            if (entry := _read_entry(paths[key], self.run)) is not None:
                self._read[key] = entry
        return {key: self._read[key] for key in sorted(paths) if key in self._read}

    def size(self) -> int:
        """The bytes of all units; an `OSError` if a file disappears meanwhile."""
        return sum(path.stat().st_size for path in self._files())

    def forget(self, keys: Iterable[Key]) -> None:
        """Remove units, which are to be computed again."""
        with _reported(self.folder):
            for key in keys:
                self._read.pop(key, None)
                self._path(key).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything but a lock that is held: all units are in the output."""
        with contextlib.suppress(OSError):
            (self.folder / RUN).unlink(missing_ok=True)  # first: from here on there is no run
            for path in self.folder.iterdir():
                if OWN.fullmatch(path.name) and path.name != LOCK:
                    path.unlink()
            self.folder.rmdir()

    def _replace(self, name: str, text: str) -> None:
        replace_file(self.folder / name, lambda place: place.write_text(text, encoding="utf-8"))

    def _files(self) -> list[Path]:
        """Those of units; none if the folder is gone."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if UNIT.fullmatch(path.name)]

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key[0]:05d}-{key[1]:05d}.arrow"

    def _writer(self) -> str:
        """The process that is writing, for the message that a second one shows."""
        try:
            who = json.loads((self.folder / WRITER).read_text(encoding="utf-8"))
            return f"process {who['process']} on {who['machine']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "one that has just begun"


def rows_by_unit(table: pd.DataFrame) -> dict[Key, list[int]]:
    """The places of each unit's rows in a table with whole numbers in ``stage`` and ``batch``."""
    places: dict[Key, list[int]] = {}
    keys = zip(table["stage"].astype(int), table["batch"].astype(int), strict=True)
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    return places


def table_of(entries: Iterable[Entry]) -> pd.DataFrame:
    """The rows of all units, in the order of the units."""
    frames = [entry.table for entry in entries if not entry.table.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _read_entry(path: Path, run: str) -> Entry | None:
    """None if it is damaged or belongs to a different run or unit: it is computed again."""
    try:
        with path.open("rb") as source:  # pyarrow's own takes no name that is not UTF-8
            rows = pa.ipc.open_file(source).read_all()
        metadata = rows.schema.metadata or {}
        other_run = run and metadata.get(OF_RUN, b"").decode() != run
        other_unit = metadata.get(OF_UNIT, b"").decode() != path.stem
        if other_run or other_unit or len(set(rows.column_names)) < len(rows.column_names):
            return None
        # The metadata of pandas is not needed, and may be anything: the types are Arrow's.
        table = rows.to_pandas(ignore_metadata=True)
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
