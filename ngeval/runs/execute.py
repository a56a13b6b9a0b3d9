"""A run from its first unit to its file: what is done is kept, and shared among processes."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from ngeval.cli import console
from ngeval.cli.progress import Shown
from ngeval.errors import InputError, OutputError
from ngeval.results.hashes import weight_files
from ngeval.results.journal import Entry, Journal, Key, table_of
from ngeval.results.manifest import manifest, manifest_path, read_manifest, write_manifest
from ngeval.results.table_files import SUFFIXES, check_output, read_results, write_results
from ngeval.runs.identity import check_same, identity, is_identity
from ngeval.runs.options import OutputOptions
from ngeval.runs.outcome import Collected
from ngeval.runs.ranks import joined
from ngeval.runs.run import Run
from ngeval.runs.tables import Work
from ngeval.utils import torchrun

FLUSH_SECONDS = 5.0
"""How often the table is put together anew while a run goes on, at most."""

FLUSH_SHARE = 0.05
"""And what part of the time that may take."""

LARGE = 2**31
"""Bytes of checkpoints whose hashing is worth a bar."""


def check_result(out: OutputOptions) -> None:
    """Before any work.

    Raises:
        OutputError: the file exists, or cannot be written.
        InputError: --force and --resume together.
    """
    if out.force and out.resume:
        raise InputError("--resume goes on with a run, --force starts it anew: give one of them")
    if out.output is None:
        if out.resume:
            raise InputError("--resume needs the --output that is to be gone on with")
        if torchrun.world_size() > 1:
            raise InputError("a run of several processes needs a file for its rows: --output")
        return
    if torchrun.rank():  # the first process has it, and may have begun to write
        return
    check_output(out.output, SUFFIXES, force=True)
    journal = Journal(out.output)
    journal.check()
    if manifest_path(out.output).is_dir():
        raise OutputError(f"{manifest_path(out.output)}, where the manifest goes, is a folder")
    if journal.exists and not (out.force or out.resume):
        raise OutputError(
            f"output {out.output} is of a run that is not finished; pass --resume to go on with "
            "it, or --force to start anew"
        )
    check_output(out.output, SUFFIXES, force=out.force or out.resume)


def collect(job: Run, work: Work, out: OutputOptions, asked: Mapping[str, Any]) -> Collected:
    """Do the units of a run, with a progress bar; each that is done is kept.

    Beside the output file lie its manifest and, until all is done, its journal.

    Args:
        job: the run.
        work: what is made of each unit.
        out: where the rows go.
        asked: the command's options, for the manifest.

    Raises:
        InputError: no unit could be graded.
        OutputError: the output cannot be written, another run is writing it, or ``--resume``
            finds a run of something else.
    """
    with joined(job.device, together=job.together) as ranks:
        quiet = out.quiet or ranks.rank > 0
        job = replace(job, ranks=ranks)
        if out.output is None:
            entries = _in_memory(job, work, quiet)
        else:
            entries = _in_journal(job, work, replace(out, quiet=quiet), asked)
    if ranks.rank:
        raise typer.Exit
    return _checked(job, entries)


def _checked(job: Run, entries: Mapping[Key, Entry]) -> Collected:
    failures = {key: entry.failure for key, entry in entries.items() if entry.failure}
    if entries and all(entry.lost for entry in entries.values()):
        reasons = "; ".join(dict.fromkeys(failures.values()))
        raise InputError(f"none of {len(entries)} units could be graded: {reasons}")
    names = [checkpoint.name for checkpoint in job.checkpoints]
    return Collected(table_of(entries.values()), failures, job.num_units, names)


def _in_memory(job: Run, work: Work, quiet: bool) -> dict[Key, Entry]:
    """Where there is no output, nothing outlives the process."""
    with Shown.of(job, work, quiet, 0) as shown:
        return dict(_made(job, work, job.all_keys(), shown))


def _in_journal(
    job: Run, work: Work, out: OutputOptions, asked: Mapping[str, Any]
) -> dict[Key, Entry]:
    """Unit by unit onto the disk."""
    output = out.output or Path()
    journal, ranks = Journal(output), job.ranks
    with journal.held() if ranks.rank == 0 else contextlib.nullcontext():
        started = ranks.told(lambda: _start(job, work, journal, out, asked))
        journal.run = started["manifest"].get("id", "")
        missing = [(stage, batch) for stage, batch in started["missing"]]
        made_of = started["manifest"]["identity"]
        job = replace(
            job,
            checkpoint_hashes=made_of["checkpoints"],
            batch_hashes=[batch["sha256"] for batch in made_of["batches"]],
        )
        if not missing and not journal.exists:  # the table is complete
            return _finished(job, output, started["manifest"]) if ranks.rank == 0 else {}
        file = _Table(journal, output, started["manifest"])
        done = job.num_units - len(missing)
        try:
            with Shown.of(job, work, out.quiet, done) as shown:
                if done and not out.quiet:
                    print(f"{done} of {job.num_units} units were done before", file=sys.stderr)
                for key, entry in _made(job, work, ranks.keys(missing), shown):
                    if ranks.rank == 0 or ranks.group is None:
                        journal.write(key, entry)
                    if ranks.rank == 0:
                        file.flush_if_due()
                ranks.finish(file.flush_if_due)
        except BaseException:
            if ranks.rank == 0:
                file.leave(job.num_units)
            raise
        return file.finish(out.quiet, job.num_units) if ranks.rank == 0 else {}


def _made(
    job: Run, work: Work, keys: Iterator[Key] | Sequence[Key], shown: Shown
) -> Iterator[tuple[Key, Entry]]:
    for table in work.tables(replace(job, keys=keys, on_model=shown.tell), shown.advance):
        key, failure = table.attrs["unit"], table.attrs["failure"]
        table.attrs = {}
        shown.end_unit()
        yield key, Entry(table, failure)


def _start(
    job: Run, work: Work, journal: Journal, out: OutputOptions, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What is missing, and the manifest; only the first process comes here."""
    now = _identity(job, work, out.quiet)
    told = manifest(asked, facts=facts(job)) | {"identity": now, "id": secrets.token_hex(8)}
    check_result(out)  # again, now that nobody else writes
    if out.resume and journal.exists:
        saved = _read(journal)
        journal.run = saved.get("id", "")
        entries = journal.entries()
        good = {key for key, entry in entries.items() if not entry.failure}
        names = list(saved["identity"]["checkpoints"])
        loose = set(names) - {names[stage] for stage, _ in good if stage < len(names)}
        check_same(journal.output, saved["identity"], now, loose)
        good &= set(job.all_keys())
        journal.forget(entries.keys() - good)
        told = _resumed(saved, told)
        journal.tell(json.dumps(told, ensure_ascii=False))
        return {"missing": [key for key in job.all_keys() if key not in good], "manifest": told}
    if out.resume and journal.output.exists():
        saved = read_manifest(journal.output) or {}
        if saved.get("complete") is not True or not is_identity(saved.get("identity")):
            raise OutputError(
                f"{journal.output} has no journal and no manifest of a complete run beside it, so "
                "it cannot be gone on with; give another output, or --force to replace it"
            )
        check_same(journal.output, saved["identity"], now, set())
        return {"missing": [], "manifest": saved}
    journal.begin(json.dumps(told, ensure_ascii=False))
    return {"missing": job.all_keys(), "manifest": told}


def _identity(job: Run, work: Work, quiet: bool) -> dict[str, Any]:
    """With a bar of its own where reading the checkpoints takes a while."""
    files = [
        path for one in job.checkpoints if one.path.exists() for path in weight_files(one.path)
    ]
    small = sum(path.stat().st_size for path in files) < LARGE
    with console.progress_bar(quiet or small) as bar:
        task = bar.add_task("reading checkpoints", total=len(job.checkpoints))
        options = {"kind": work.kind, **work.options}
        return identity(job, options, lambda: bar.advance(task))


def _read(journal: Journal) -> dict[str, Any]:
    try:
        saved = json.loads(journal.told())
        if is_identity(saved["identity"]) and isinstance(saved["id"], str):
            return dict(saved)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise OutputError(
        f"{journal.folder} is damaged: it does not tell what run it is of; --force starts anew"
    )


def _resumed(saved: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the first start, with a line for every later one."""
    again = {name: now[name] for name in ("created", "command", "directory", "machine")}
    known = saved.get("resumed")
    saved["resumed"] = [*(known if isinstance(known, list) else []), again]
    return saved | {"identity": now["identity"]}


def _finished(job: Run, output: Path, told: Mapping[str, Any]) -> dict[Key, Entry]:
    """A finished table as if its units had just been made.

    Raises:
        OutputError: it is not all there any more.
    """
    table, where = read_results(output), dict[Key, list[int]]()
    try:
        keys = zip(table["stage"].astype(int), table["batch"].astype(int), strict=True)
        for row, key in enumerate(keys):
            where.setdefault(key, []).append(row)
    except (KeyError, TypeError, ValueError):
        where = {}
    if where.keys() != set(job.all_keys()) or told.get("rows", len(table)) != len(table):
        raise OutputError(
            f"{output} was changed since its run: it has {len(table)} rows of {len(where)} units, "
            f"and the run had {told.get('rows', 'others')} of {job.num_units}; give another "
            "output, or --force to make it anew"
        )
    return {key: Entry(table.iloc[rows]) for key, rows in where.items()}


class _Table:
    """The output file while it grows; one process writes it."""

    def __init__(self, journal: Journal, output: Path, told: dict[str, Any]) -> None:
        self.journal, self.output, self.told = journal, output, told
        self.due = 0.0
        self.shown: frozenset[Key] = frozenset()

    def flush_if_due(self) -> None:
        """Put the table together, unless that was just done."""
        if time.monotonic() >= self.due:
            self.flush()

    def flush(self) -> dict[Key, Entry]:
        """The units so far, in the output; nothing is written before one of them is graded."""
        entries, start = self.journal.entries(), time.monotonic()
        if entries.keys() != self.shown and not all(one.lost for one in entries.values()):
            first = not self.shown
            write_results(table_of(entries.values()), self.output, self.journal.folder)
            self.shown = frozenset(entries)
            if first:  # after the rows: it never lies beside another run's
                write_manifest(self.output, self.told, self.journal.folder)
        now = time.monotonic()
        self.due = now + max(FLUSH_SECONDS, (now - start) / FLUSH_SHARE)
        return entries

    def leave(self, num_units: int) -> None:
        """Before the end: what is there is kept; where there is nothing, no trace of a run is."""
        with contextlib.suppress(OutputError):  # a full disk; the journal has all that fitted
            entries = self.flush()
            if not entries:
                self.journal.remove()
                return
            print(
                f"{len(entries)} of {num_units} units are done; the same command with --resume "
                "goes on",
                file=sys.stderr,
            )

    def finish(self, quiet: bool, num_units: int) -> dict[Key, Entry]:
        """All units are there. The journal stays where one of them has failed.

        Raises:
            OutputError: one that was done is not there, since somebody deleted its file.
        """
        entries = self.flush()
        if len(entries) < num_units:
            raise OutputError(
                f"{num_units - len(entries)} of {num_units} units are not in {self.journal.folder} "
                "any more; the same command with --resume does them again"
            )
        failed = [list(key) for key, entry in entries.items() if entry.failure]
        if all(entry.lost for entry in entries.values()):
            self.journal.remove()
            return entries
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        rows = sum(len(entry.table) for entry in entries.values())
        self.told |= {"complete": not failed, "ended": ended, "rows": rows, "failed_units": failed}
        write_manifest(self.output, self.told, self.journal.folder)
        if not failed:
            self.journal.remove()
        if not quiet:
            print(f"written: {self.output} ({rows} rows)", file=sys.stderr)
        return entries


def facts(job: Run) -> dict[str, Any]:
    """What a run's options came to, for its manifest."""
    return {
        "task": job.task.name,
        "description": job.task.description,
        "likelihood": repr(job.task.resolved_likelihood()),
        "checkpoints": [checkpoint.name for checkpoint in job.checkpoints],
        "batch_size": job.batch_size,
        "num_batches": job.num_batches,
        "seed": job.seed,
        "device": job.device,
        "dtype": "the model's" if job.dtype is None else str(job.dtype).removeprefix("torch."),
        "engine": job.engine,
        "ranks": job.ranks.count,
    }
