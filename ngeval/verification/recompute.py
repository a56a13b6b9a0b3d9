"""Whether the numbers of a result file can be reproduced: some of its units, computed again.

The manifest beside the file records what was computed. Anybody may have written it, so nothing in
it is trusted: values of the wrong type or beyond their bounds are refused, and whatever runs code
(a task of the user, an optimizer's class by its path, pickles, code of a model's repository) has
to be passed again by whoever verifies.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError

from ngeval.errors import CheckpointError, InputError, OutputError, TaskError
from ngeval.grading.prepare import Progress as OnMethod
from ngeval.results.journal import Key, rows_by_unit
from ngeval.results.manifest import (
    RunManifest,
    first_problem,
    machine,
    malformed,
    manifest_path,
    read_run_manifest,
)
from ngeval.results.table_files import read_results, write_results
from ngeval.runs.from_options import make_run
from ngeval.runs.identity import differences, identity, listed
from ngeval.runs.options import MAX_SEED, RunOptions, parse_bytes
from ngeval.runs.run import Run
from ngeval.runs.tables import KINDS, Work, unit_tables
from ngeval.runs.units import Units
from ngeval.tasks import BUILTIN_TASKS
from ngeval.tasks.base import MAX_SAMPLES
from ngeval.verification.compare import Verdict, compare, is_number

ELSEWHERE = ("code.", "machine.", "settings.device:")
"""Where and with which code it was computed: a difference there is reported, and should not change
a number."""

MAX_UNITS = 10_000_000
"""Checkpoints × batches of a run that is verified."""

T = TypeVar("T")


@dataclass(frozen=True)
class Trust:
    """The code that may be run, whatever a manifest says; ``methods`` are paths of classes."""

    task: str | None = None
    methods: Sequence[str] = ()
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Recorded:
    """A result file and its manifest, checked."""

    path: Path
    table: pd.DataFrame
    manifest: RunManifest
    options: RunOptions
    work: Work

    @property
    def names(self) -> list[str]:
        """The names of the checkpoints, by their place."""
        return list(self.manifest.identity.checkpoints)

    @property
    def num_units(self) -> int:
        """The number of units of the run."""
        return len(self.names) * len(self.manifest.identity.batches)

    @property
    def units(self) -> list[Key]:
        """The units that the file has rows of, or that failed, in their order."""
        return sorted(self.rows.keys() | set(self.manifest.failed_units))

    def missing(self, count: int) -> list[Key]:
        """The first few of the other units."""
        present, batches = set(self.units), len(self.manifest.identity.batches)
        keys = itertools.product(range(len(self.names)), range(batches))
        return list(itertools.islice((key for key in keys if key not in present), count))

    @cached_property
    def rows(self) -> dict[Key, list[int]]:
        """The places of each unit's rows in the table."""
        return rows_by_unit(self.table)


def read_recorded(path: Path, trust: Trust, device: str | None = None) -> Recorded:
    """Read a result file with its manifest; ``device``: where to compute, None: as in the run."""
    table, place = read_results(path), manifest_path(path)
    manifest = read_run_manifest(path)
    if manifest is None:
        raise OutputError(
            f"{path} has no manifest beside it ({place.name}), which would record what it was "
            "computed from; ngeval writes one with every result file"
        )
    work = read_work(manifest.identity.options, place)
    task = manifest.options.get("task")
    if task not in (None, *BUILTIN_TASKS) and trust.task is None:
        raise InputError(
            f"{path} belongs to the task {task!r}, which is code that would be run: a manifest may "
            "name any file; look at it, and pass it with --task"
        )
    _check_methods(work, trust)
    options: dict[str, Any] = manifest.options | {
        "allow_pickle": trust.allow_pickle,
        "trust_remote_code": trust.trust_remote_code,
        "task": task if trust.task is None else trust.task,
    }
    if device is not None:
        options["device"] = device
    run_options = read_options(options, place)
    check_sizes(run_options, work, manifest, place)
    check_end(manifest, place)
    check_table(table, manifest, path)
    return Recorded(path, table, manifest, run_options, work)


def read_options(options: Mapping[str, Any], place: Path) -> RunOptions:
    """The options of a run among those of its command; missing ones have the default."""
    return _validated(RunOptions, options, place)


def read_work(options: Mapping[str, Any], place: Path) -> Work:
    """What was computed of each unit."""
    values = dict(options)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise malformed(place, f"unknown kind of work {repr(kind)[:40]}")
    return _validated(KINDS[kind], values, place)


def _validated(group: type[T], values: Mapping[str, Any], place: Path) -> T:
    try:
        return TypeAdapter(group).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise malformed(place, first_problem(error)) from error


def check_sizes(run: RunOptions, work: Work, manifest: RunManifest, place: Path) -> None:
    """Refuse samples, batches, units, a seed or memory beyond bounds, or in contradiction."""
    metric_batches = work.options.get("metric_batches")
    for name, count in (("num_batches", run.num_batches), ("metric_batches", metric_batches)):
        if isinstance(count, int) and run.batch_size * count > MAX_SAMPLES:
            size = f"{name} × batch_size is {run.batch_size * count:.1e} samples"
            raise malformed(place, f"{size}; at most {MAX_SAMPLES:.0e} are verified")
    batches, checkpoints = len(manifest.identity.batches), len(manifest.identity.checkpoints)
    if batches != run.num_batches:
        raise malformed(
            place, f"it records {batches} batches, and num_batches is {run.num_batches}"
        )
    if checkpoints * batches > MAX_UNITS:
        raise malformed(place, f"it records more than {MAX_UNITS} units")
    if not 0 <= run.seed <= MAX_SEED:
        raise malformed(place, f"seed is {run.seed}")
    parse_bytes(run.memory)


def check_end(manifest: RunManifest, place: Path) -> None:
    """Refuse failed units that are not in the run, or in a complete one."""
    identity, failed = manifest.identity, manifest.failed_units
    for stage, batch in failed:
        if stage >= len(identity.checkpoints) or batch >= len(identity.batches):
            raise malformed(place, f"a failed unit is [{stage}, {batch}], which is not in the run")
    if manifest.finished and manifest.complete == bool(failed):
        raise malformed(place, f"complete is {manifest.complete}, with {len(failed)} failed units")


def check_table(table: pd.DataFrame, manifest: RunManifest, path: Path) -> None:
    """Refuse a table of other units than the manifest records."""
    if not table.columns.is_unique:
        raise OutputError(f"{path} has a column twice")
    identity = manifest.identity
    for name, end in {"stage": len(identity.checkpoints), "batch": len(identity.batches)}.items():
        values = table[name] if name in table else pd.Series([math.nan])
        whole = is_number(values) and bool((values % 1 == 0).all())
        if not whole or not bool(values.between(0, end - 1).all()):
            raise OutputError(
                f"{path} and its manifest belong to different runs: its column {name!r} is not "
                f"always one of the {end} of the run"
            )


def _check_methods(work: Work, trust: Trust) -> None:
    """Resolve the methods; a name with a dot is a class, whose module is imported."""
    for name in work.methods:
        family = name.strip().partition(":")[0]
        foreign = "." in family and not family.startswith("torch.optim.")
        if foreign and name not in trust.methods:
            raise InputError(
                f"the run's method {name!r} is a class that would be imported, and a manifest may "
                f"name any; pass --methods {name} if you trust it"
            )
    work.resolved  # noqa: B018  # raises for an unknown method


def rebuild(recorded: Recorded) -> Run:
    """The run that computed a file; an error if its task or checkpoints do not exist any more."""
    try:
        run = make_run(recorded.options)
    except (CheckpointError, TaskError) as error:
        raise type(error)(f"{error}\n{_where(recorded)}") from error
    checkpoints = {checkpoint.name: checkpoint for checkpoint in run.checkpoints}
    if lost := [name for name in recorded.names if name not in checkpoints]:
        raise CheckpointError(
            f"checkpoint {lost[0]!r} of the run does not exist\n{_where(recorded)}"
        )
    return replace(run, checkpoints=[checkpoints[name] for name in recorded.names])


def _where(recorded: Recorded) -> str:
    folder = f" ({recorded.manifest.directory[:300]})" if recorded.manifest.directory else ""
    return (
        "The manifest names files as they were typed: verify in the folder that the run was "
        f"started in{folder}"
    )


def changes(recorded: Recorded, run: Run) -> tuple[list[str], list[str]]:
    """What differs from then and changes numbers, and what should not (code, the machine)."""
    hardware = ("cpu", "gpus", "threads")
    now, then = identity(run, recorded.work), recorded.manifest.identity.plain()
    here = machine()
    now["machine"] = {name: here[name] for name in hardware}
    then["machine"] = {name: recorded.manifest.machine.get(name) for name in hardware}
    lines = differences(then, now)
    elsewhere = [line for line in lines if line.startswith(ELSEWHERE)]
    return [line for line in lines if line not in elsewhere], elsewhere


def check_unchanged(path: Path, changed: list[str]) -> None:
    """Refuse, with an `InputError`, to compare numbers that cannot agree."""
    if changed:
        raise InputError(
            f"{path} cannot be reproduced, since what it was computed from has changed:"
            f"{listed(changed)}\nRestore what it was; --anyway computes nevertheless"
        )


def choose(recorded: Recorded, count: int, seed: int) -> list[Key]:
    """Up to ``count`` random units, in their order; one with failed rows if there is one."""
    rows, keys = recorded.rows, recorded.units
    shuffled = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    chosen = shuffled[:count]
    failed = np.zeros(len(recorded.table), dtype=bool)
    if "status" in recorded.table:
        failed = (recorded.table["status"] == "failed").to_numpy()
    whole = set(recorded.manifest.failed_units)
    lost = [key for key in shuffled if key in whole or failed[rows[key]].any()]
    if lost and not set(lost) & set(chosen):
        chosen.append(lost[0])
    return sorted(chosen)


def verdicts(
    recorded: Recorded,
    run: Run,
    keys: Sequence[Key],
    tolerance: float | None = None,
    on_method: OnMethod | None = None,
) -> Iterator[Verdict]:
    """Compute units of a file again and compare them, one after the other; see `compare`.

    ``on_method`` is called with the name of each method that is done.
    """
    work = recorded.work
    gap = work.options.get("gap", 0.0)
    for key, entry in unit_tables(Units(run, work.resolved), work, keys, on_method):
        then = recorded.table.iloc[recorded.rows.get(key, [])]
        now = _through_file(entry.table, recorded.path.suffix)
        verdict = compare(key, run.checkpoints[key[0]].name, then, now, tolerance, gap)
        if key in recorded.manifest.failed_units and not verdict.agrees:
            verdict = replace(verdict, note="it failed in the run: --resume computes it again")
        yield verdict


def _through_file(table: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """A table after it was written and read: CSV has no ∞ in whole numbers, JSON has none."""
    if table.empty:
        return table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        write_results(table, path)
        return read_results(path)
