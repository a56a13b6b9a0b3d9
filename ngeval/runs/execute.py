"""A run from its first unit to its file: each unit is kept once it is done, by any process."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ngeval.errors import InputError, OutputError
from ngeval.results.journal import Entry, Journal, Key, rows_by_unit, table_of
from ngeval.results.manifest import (
    RunManifest,
    first_problem,
    manifest,
    manifest_path,
    read_run_manifest,
    write_manifest,
)
from ngeval.results.table_files import SUFFIXES, check_output, read_results, write_results
from ngeval.runs.estimate import forecast_note, size_note
from ngeval.runs.identity import check_same, identity
from ngeval.runs.options import OutputOptions
from ngeval.runs.outcome import Outcome, units_by_reason
from ngeval.runs.progress import Progress, Steps
from ngeval.runs.ranks import Ranks, joined
from ngeval.runs.run import Run
from ngeval.runs.tables import Work, unit_tables
from ngeval.runs.units import Units
from ngeval.utils import torchrun
from ngeval.utils.text import counted

FLUSH_SECONDS = 5.0
"""The table is written again at most this often while a run goes on."""

FLUSH_SHARE = 0.05
"""The part of the time that this may take."""


def check_result(out: OutputOptions) -> None:
    """Refuse, before any work, options that contradict each other and files that would be lost."""
    if out.force and out.resume:
        raise InputError("--resume continues a run, --force starts it again: give one of them")
    if out.stop_after is not None and out.stop_after < 1:
        raise InputError("--stop-after needs a number of units from 1 on")
    if out.output is None:
        if out.resume or out.stop_after is not None:
            option = "--resume" if out.resume else "--stop-after"
            raise InputError(f"{option} needs the file that the run is kept in: --output")
        if torchrun.world_size() > 1:
            raise InputError("a run of several processes needs a file for its rows: --output")
        return
    if torchrun.rank():  # the first process has checked it, and may have begun to write
        return
    check_output(out.output, SUFFIXES, force=True)
    journal = Journal(out.output)
    journal.check()
    if manifest_path(out.output).is_dir():
        raise OutputError(f"{manifest_path(out.output)}, where the manifest goes, is a folder")
    if journal.exists and not (out.force or out.resume):
        raise OutputError(
            f"output {out.output} belongs to a run that is not finished; pass --resume to continue "
            "it, or --force to start again"
        )
    check_output(out.output, SUFFIXES, force=out.force or out.resume)


def execute(
    run: Run,
    work: Work,
    out: OutputOptions,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> Outcome | None:
    """Compute the units of a run; each that is done is kept.

    Beside the output file lie its manifest, which records the ``options`` of the command, and,
    until all units are done, its journal. The result is None in all processes but the first.

    Raises:
        InputError: no unit could be graded.
        OutputError: the output cannot be written, another run is writing it, or the run that is
            to be resumed is a different one.
    """
    progress = progress or Progress()
    with joined(run.device, together=run.together, warn=progress.warn) as ranks:
        execution = _Execution(run, work, ranks, Progress() if ranks.rank else progress)
        if out.output is None:
            entries = dict(execution.tables(run.keys))
        else:
            entries = execution.into_file(out.output, out, options)
    if ranks.rank:
        return None
    failures = {key: entry.failure for key, entry in entries.items() if entry.failure}
    names = [checkpoint.name for checkpoint in run.checkpoints]
    if entries and all(entry.lost for entry in entries.values()):
        reasons = [
            failures[units[0]] + _likewise(len({stage for stage, _ in units}) - 1)
            for units in units_by_reason(failures, names)
        ]
        raise InputError(f"none of {len(entries)} units could be graded: {'; '.join(reasons)}")
    return Outcome(table_of(entries.values()), failures, run.num_units, len(entries), names)


def _likewise(others: int) -> str:
    """How many other checkpoints have failed for the same reason."""
    return f" (and likewise {counted(others, 'other checkpoint')})" if others else ""


class _Execution:
    """A run and its work in one of the processes that share it."""

    def __init__(self, run: Run, work: Work, ranks: Ranks, progress: Progress) -> None:
        self.run, self.work, self.ranks, self.progress = run, work, ranks, progress

    def tables(
        self,
        missing: Sequence[Key],
        count: int | None = None,
        identity: Mapping[str, Any] | None = None,
        disk: Callable[[], int] = lambda: 0,
    ) -> Iterator[tuple[Key, Entry]]:
        """Compute the first ``count`` of the units that are not done.

        ``disk()`` is the bytes that a unit takes on the disk, once one is there.
        """
        run, work, ranks, progress = self.run, self.work, self.ranks, self.progress
        keys = missing[:count]
        progress.note(size_note(run, len(keys), len(work.methods), work.num_dampings))
        steps = Steps(ranks, work.methods, run.num_units - len(missing), progress)
        units = Units(run, work.resolved, ranks=ranks, progress=progress, identity=identity)
        progress.begin(work.description, run.num_units * steps.in_unit, steps.completed)
        start, left = time.monotonic(), len(missing) - 1
        tables = unit_tables(units, work, ranks.share(keys), steps.method_done)
        try:
            for number, (key, entry) in enumerate(tables):
                steps.unit_done()
                yield key, entry
                if number == 0 and left:
                    seconds = time.monotonic() - start
                    progress.note(forecast_note(run, ranks, left, seconds, disk()))
        finally:
            progress.end()

    def into_file(
        self, output: Path, out: OutputOptions, options: Mapping[str, Any]
    ) -> dict[Key, Entry]:
        """Compute what is missing of a file, unit by unit onto the disk."""
        run, ranks, journal = self.run, self.ranks, Journal(output)
        first = ranks.rank == 0
        with journal.held() if first else contextlib.nullcontext():
            record, missing = ranks.broadcast(lambda: self._start(journal, out, options))
            journal.run = record.get("id", "")
            missing = [(stage, batch) for stage, batch in missing]  # JSON has no tuples
            if not missing and not journal.exists:  # the table is complete
                return _finished(run, output, record) if first else {}
            file = _Table(journal, record, run.num_units, self.progress)
            try:
                if done := run.num_units - len(missing):
                    self.progress.note(f"{done} of {run.num_units} units were done before")
                units = self.tables(missing, out.stop_after, record["identity"], file.bytes_each)
                for key, entry in units:
                    if first or ranks.group is None:
                        journal.write(key, entry)
                    if first:
                        file.flush_if_due()
                ranks.finish(file.flush_if_due)
            except BaseException:
                if first:
                    with contextlib.suppress(OutputError):  # the journal has what fits on the disk
                        file.pause(self.progress.warn)
                raise
            if not first:
                return {}
            paused = out.stop_after is not None and out.stop_after < len(missing)
            return file.pause(self.progress.note) if paused else file.finish()

    def _start(
        self, journal: Journal, out: OutputOptions, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Key]]:
        """The manifest, and which units are missing; in the first process alone."""
        run, progress = self.run, self.progress
        progress.note(f"hashing {counted(len(run.checkpoints), 'checkpoint')}")
        now = identity(run, self.work)
        record = manifest(options, facts=facts(run, self.ranks))
        record |= {"identity": now, "id": secrets.token_hex(8)}
        check_result(out)  # again, now that no other run can write
        if out.resume and journal.exists:
            return self._resume(journal, record)
        if out.resume and journal.output.exists():
            saved = read_run_manifest(journal.output)
            if saved is None or not saved.complete:
                raise OutputError(
                    f"{journal.output} has no journal and no manifest of a complete run beside it, "
                    "so it cannot be continued; give another output, or --force to replace it"
                )
            check_same(journal.output, saved.identity.plain(), now, set())
            progress.note(f"all {counted(run.num_units, 'unit')} had been done before")
            return saved.plain(), []
        journal.begin(json.dumps(record, ensure_ascii=False))
        return record, run.keys

    def _resume(self, journal: Journal, record: dict[str, Any]) -> tuple[dict[str, Any], list[Key]]:
        """Likewise, of a run that was interrupted."""
        saved = _read_run(journal)
        journal.run = saved.id
        entries = journal.entries()
        good = {key for key, entry in entries.items() if not entry.failure}
        names = list(saved.identity.checkpoints)
        untouched = set(names) - {names[stage] for stage, _ in good if stage < len(names)}
        check_same(journal.output, saved.identity.plain(), record["identity"], untouched)
        good &= set(self.run.keys)
        journal.forget(entries.keys() - good)
        again = {name: record[name] for name in ("created", "command", "directory", "machine")}
        resumed = {"resumed": [*saved.resumed, again], "identity": record["identity"]}
        record = saved.plain() | resumed
        journal.describe(json.dumps(record, ensure_ascii=False))
        return record, [key for key in self.run.keys if key not in good]


def _read_run(journal: Journal) -> RunManifest:
    """The manifest of the run that a journal belongs to."""
    try:
        saved = RunManifest.model_validate_json(journal.description())
        if saved.id:
            return saved
        problem = "it has no 'id'"
    except ValidationError as error:
        problem = first_problem(error)
    raise OutputError(
        f"{journal.folder} is damaged and does not record which run it belongs to ({problem}); "
        "--force starts again"
    )


def _finished(run: Run, output: Path, record: Mapping[str, Any]) -> dict[Key, Entry]:
    """The units of a table that is complete and unchanged since."""
    table = read_results(output)
    try:
        places = rows_by_unit(table)
    except (KeyError, TypeError, ValueError):
        places = {}
    if places.keys() != set(run.keys) or record.get("rows", len(table)) != len(table):
        raise OutputError(
            f"{output} was changed since its run: it has {len(table)} rows of {len(places)} units, "
            f"and the run had {record.get('rows', 'others')} of {run.num_units}; give another "
            "output, or --force to compute it again"
        )
    return {key: Entry(table.iloc[rows]) for key, rows in places.items()}


class _Table:
    """The output file while it grows; one process writes it."""

    def __init__(
        self, journal: Journal, record: dict[str, Any], num_units: int, progress: Progress
    ) -> None:
        self.journal, self.output, self.record = journal, journal.output, record
        self.num_units, self.progress = num_units, progress
        self.due = 0.0
        self.written: frozenset[Key] = frozenset()

    def bytes_each(self) -> int:
        """What a unit takes on the disk, in the table and in the journal."""
        try:
            return (self.output.stat().st_size + self.journal.size()) // len(self.written)
        except (OSError, ZeroDivisionError):  # no table yet: the units so far have failed
            return 0

    def flush_if_due(self) -> None:
        """Write the table, unless that was just done."""
        if time.monotonic() >= self.due:
            self.flush()

    def flush(self) -> dict[Key, Entry]:
        """Write the units so far to the output, once one of them is graded."""
        entries, start = self.journal.entries(), time.monotonic()
        if entries.keys() != self.written and not all(entry.lost for entry in entries.values()):
            first = not self.written
            write_results(table_of(entries.values()), self.output, self.journal.folder)
            self.written = frozenset(entries)
            if first:  # after the rows, so that it never lies beside those of another run
                write_manifest(self.output, self.record, self.journal.folder)
        now = time.monotonic()
        self.due = now + max(FLUSH_SECONDS, (now - start) / FLUSH_SHARE)
        return entries

    def pause(self, report: Callable[[str], None]) -> dict[Key, Entry]:
        """Keep what is done of a run that stops early; if nothing is, remove all traces of it."""
        entries = self.flush()
        if all(entry.lost for entry in entries.values()):
            self.journal.remove()
        else:
            done = f"{len(entries)} of {self.num_units} units are done"
            report(f"{done}; the same command with --resume continues")
        return entries

    def finish(self) -> dict[Key, Entry]:
        """All units are done; the journal stays if one of them has failed."""
        entries = self.flush()
        if lost := self.num_units - len(entries):
            raise OutputError(
                f"{lost} of {self.num_units} units are not in {self.journal.folder} any more; "
                "the same command with --resume computes them again"
            )
        failed = [list(key) for key, entry in entries.items() if entry.failure]
        if all(entry.lost for entry in entries.values()):
            self.journal.remove()
            return entries
        rows = sum(len(entry.table) for entry in entries.values())
        self.record |= {
            "complete": not failed,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
            "failed_units": failed,
        }
        write_manifest(self.output, self.record, self.journal.folder)
        if not failed:
            self.journal.remove()
        self.progress.note(f"written: {self.output} ({rows} rows)")
        return entries


def facts(run: Run, ranks: Ranks) -> dict[str, Any]:
    """What a run's options resulted in, for its manifest."""
    settings = ("batch_size", "num_batches", "seed", "device", "engine")
    return {
        "task": run.task.name,
        "description": run.task.description,
        "likelihood": repr(run.task.resolved_likelihood()),
        "checkpoints": [checkpoint.name for checkpoint in run.checkpoints],
        **{name: getattr(run, name) for name in settings},
        "dtype": str(run.dtype).removeprefix("torch."),
        "ranks": ranks.count,
    }
