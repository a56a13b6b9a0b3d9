"""Whether the numbers of a result file can be had again: some of its units, computed anew.

The manifest beside the file tells what was computed of what. It may be anybody's, so that nothing
in it is trusted: values of another kind than options have are refused, and whatever runs code (a
task of one's own, an optimizer's class by its path, pickles, code of a model's repository) has to
be asked for again by whoever verifies.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import pandas as pd

from ngeval.dampings import check_dampings
from ngeval.errors import CheckpointError, InputError, OutputError, TaskError
from ngeval.grading.evaluate import Progress
from ngeval.methods import get_methods
from ngeval.results.journal import Key
from ngeval.results.manifest import machine, manifest_path, read_manifest
from ngeval.results.table_files import read_results, write_results
from ngeval.runs.from_options import make_run
from ngeval.runs.identity import differences, identity, listed
from ngeval.runs.options import HubOptions, RunOptions, StepOptions
from ngeval.runs.run import Run
from ngeval.runs.tables import DESCRIPTIONS, Work
from ngeval.tasks.builtin import BUILTIN_TASKS
from ngeval.verification.compare import Verdict, compare
from ngeval.verification.manifest_checks import (
    check_kind,
    check_run_sizes,
    check_table,
    check_work_sizes,
    malformed,
    members,
    part,
    read_end,
)

T = TypeVar("T")

MOST_LETTERS = 300
"""Of what a manifest says of a folder."""

ELSEWHERE = ("code.", "machine.", "settings.device:")
"""Where and by what it was computed: a difference there is told, and should make none."""

AS_TYPED = (
    "The manifest names files as they were typed: verify in the folder that the run was started in"
)

OPTIONS: dict[str, dict[str, Any]] = {
    "gamma": {
        **{"methods": list[str], "dampings": list[float], "damping_scale": str},
        **{"metric_batches": int | str | None, "natural": bool, "gap": float},
    },
    "layers": {
        **{"methods": list[str], "dampings": list[float], "damping_scale": str},
        **{"metric_batches": int | str | None, "natural": bool, "groups": int | str},
    },
    "imbalance": {"methods": list[str], "damping": float},
}
"""What a `Work` of each kind is made of."""


@dataclass(frozen=True)
class Trust:
    """What the one who verifies allows, whatever a manifest says.

    Attributes:
        task: the run's task, where it is not ngeval's own: its file is run.
        methods: optimizers' classes by their paths, which are imported.
        allow_pickle: unpickle checkpoints with code.
        trust_remote_code: run code of the model's repository.
    """

    task: str | None = None
    methods: Sequence[str] = ()
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Recorded:
    """A result file and what its manifest says of it, checked.

    Attributes:
        path: the result file.
        table: its rows.
        groups: the options of the run.
        work: what was made of each unit.
        identity: what its numbers depended on.
        machine: on which it was computed.
        finished: whether the run came to its end.
        failed: its units that failed, which may have no rows.
        directory: in which it was started, as the manifest says.
    """

    path: Path
    table: pd.DataFrame
    groups: tuple[RunOptions, HubOptions, StepOptions]
    work: Work
    identity: dict[str, Any]
    machine: dict[str, Any]
    finished: bool
    failed: frozenset[Key]
    directory: str = ""

    @property
    def num_units(self) -> int:
        """How many units the run has."""
        return len(self.identity["checkpoints"]) * len(self.identity["batches"])

    @property
    def units(self) -> list[Key]:
        """Those that the file tells of, in their order."""
        return sorted(self.rows.keys() | self.failed)

    def missing(self, most: int) -> list[Key]:
        """The first few of the others."""
        there = set(self.units)
        every = itertools.product(
            range(len(self.identity["checkpoints"])), range(len(self.identity["batches"]))
        )
        return list(itertools.islice((key for key in every if key not in there), most))

    @property
    def rows(self) -> dict[Key, list[int]]:
        """The places of each unit's rows in the table."""
        keys = zip(self.table["stage"].astype(int), self.table["batch"].astype(int), strict=True)
        found: dict[Key, list[int]] = {}
        for row, key in enumerate(keys):
            found.setdefault(key, []).append(row)
        return found


def read_recorded(path: Path, trust: Trust, device: str | None = None) -> Recorded:
    """Read a result file with its manifest.

    Args:
        path: the result file.
        trust: what may run code.
        device: where to compute; None: where the run did.

    Raises:
        OutputError: one of them is not there, or is not what a run writes.
        InputError: something that runs code was not allowed.
    """
    table = read_results(path)
    told = read_manifest(path)
    if told is None:
        raise OutputError(
            f"{path} has no manifest beside it ({manifest_path(path).name}), so that nobody knows "
            "what it was computed of; ngeval writes one with every result file"
        )
    place = manifest_path(path)
    found = part(told, "identity", place)
    options = part(told, "options", place)
    work = _work(part(found, "options", place), place)
    trusted: dict[str, Any] = {
        "allow_pickle": trust.allow_pickle,
        "trust_remote_code": trust.trust_remote_code,
    }
    given = {"task": trust.task, "device": device}
    trusted |= {name: value for name, value in given.items() if value is not None}
    own = options.get("task")
    if own not in (None, *BUILTIN_TASKS) and trust.task is None:
        raise InputError(
            f"{path} is of the task {own!r}, which is code that would be run: a manifest may name "
            "any file; look at it, and pass it with --task"
        )
    _check_work(work, trust)
    groups = (
        _group(RunOptions, options | trusted, place),
        _group(HubOptions, options | trusted, place),
        _group(StepOptions, options, place),
    )
    for name in ("checkpoints", "settings", "code", "task"):
        part(found, name, place)
    check_run_sizes(groups[0], work.options, found, place)
    finished, failed = read_end(told, found, place)
    check_table(table, found, path)
    machine_then = told.get("machine")
    return Recorded(
        path,
        table,
        groups,
        work,
        found,
        machine_then if isinstance(machine_then, dict) else {},
        finished,
        failed,
        str(told.get("directory", "")),
    )


def rebuild(recorded: Recorded) -> Run:
    """The run that made a file, as far as it is still there.

    Raises:
        NgevalError: its task or a checkpoint is not.
    """
    names = list(recorded.identity["checkpoints"])
    try:
        job = make_run(*recorded.groups)
        found = {checkpoint.name: checkpoint for checkpoint in job.checkpoints}
    except (CheckpointError, TaskError) as error:
        raise type(error)(f"{error}\n{_where(recorded)}") from error
    if lost := [name for name in names if name not in found]:
        raise CheckpointError(f"checkpoint {lost[0]!r} of the run is not there\n{_where(recorded)}")
    return replace(job, checkpoints=[found[name] for name in names])


def _where(recorded: Recorded) -> str:
    return f"{AS_TYPED}{f' ({recorded.directory[:MOST_LETTERS]})' if recorded.directory else ''}"


def changes(recorded: Recorded, job: Run) -> tuple[list[str], list[str]]:
    """What is not as it was when a file was made.

    Returns:
        What makes other numbers (checkpoints, data, settings), and what should make none (code,
        versions, the machine), a line each.

    Raises:
        OutputError: the manifest is malformed.
        TaskError: the task's model or batches cannot be had.
    """
    work, hardware = recorded.work, ("cpu", "gpus", "threads")
    now = identity(job, {"kind": work.kind, **work.options})
    now["machine"] = {name: machine()[name] for name in hardware}
    then = dict(recorded.identity)
    then["machine"] = {name: recorded.machine.get(name) for name in hardware}
    try:
        lines = differences(then, now)
    except RecursionError as error:
        raise malformed(manifest_path(recorded.path), "it is nested too deep") from error
    elsewhere = [line for line in lines if line.startswith(ELSEWHERE)]
    return [line for line in lines if line not in elsewhere], elsewhere


def check_unchanged(path: Path, changed: list[str]) -> None:
    """Refuse to compare what cannot agree.

    Raises:
        InputError: something makes other numbers now.
    """
    if changed:
        raise InputError(
            f"{path} cannot be had again, for what it was made of is not the same:"
            f"{listed(changed)}\nRestore what it was; --anyway computes nevertheless"
        )


def choose(recorded: Recorded, count: int, seed: int) -> list[Key]:
    """Random units of a file, in their order; one with failed rows among them if there is any.

    Args:
        recorded: the file.
        count: how many; all, if there are fewer.
        seed: for the choice.
    """
    rows = recorded.rows
    keys = recorded.units
    shuffled = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    chosen = shuffled[:count]
    failed = np.zeros(len(recorded.table), dtype=bool)
    if "status" in recorded.table:
        failed = (recorded.table["status"] == "failed").to_numpy()
    lost = [key for key in shuffled if key in recorded.failed or failed[rows[key]].any()]
    if lost and not set(lost) & set(chosen):
        chosen.append(lost[0])
    return sorted(chosen)


def verdicts(
    recorded: Recorded,
    job: Run,
    keys: Sequence[Key],
    tolerance: float | None = None,
    on_step: Progress | None = None,
) -> Iterator[Verdict]:
    """Compute units anew and compare them, one after the other.

    Args:
        recorded: the file.
        job: the run that made it.
        keys: of units that the file tells of.
        tolerance: the relative difference of numbers that is allowed; None: see
            `ngeval.agreement.DIGITS`.
        on_step: called with the names of methods that are done.

    Raises:
        NgevalError: the task's model or batches cannot be had, or a method is unknown.
    """
    rows = recorded.rows
    gap = recorded.work.options.get("gap", 0.0)
    for table in recorded.work.tables(replace(job, keys=keys), on_step):
        key = table.attrs["unit"]
        table.attrs = {}
        then = recorded.table.iloc[rows.get(key, [])]
        now = _through_file(table, recorded.path.suffix)
        verdict = compare(key, job.checkpoints[key[0]].name, then, now, tolerance, gap)
        if key in recorded.failed and not verdict.agrees:
            verdict = replace(verdict, note="it failed in the run: --resume does it again")
        yield verdict


def _through_file(table: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """A table as it is after it was written and read: CSV has no ∞ in whole numbers, JSON none."""
    if table.empty:
        return table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        write_results(table, path)
        return read_results(path)


def _work(told: dict[str, Any], place: Path) -> Work:
    kind = told.get("kind")
    if not isinstance(kind, str) or kind not in DESCRIPTIONS:
        raise malformed(place, f"unknown kind of work {str(kind)[:40]!r}")
    given = {name: value for name, value in told.items() if name != "kind"}
    wanted = OPTIONS[kind]
    if given.keys() != wanted.keys():
        odd = sorted(given.keys() ^ wanted.keys())
        raise malformed(place, f"options of {kind} that are missing or too many: {odd[:4]}")
    for name, hint in wanted.items():
        check_kind(name, given[name], hint, place)
    check_work_sizes(given, place)
    return Work(kind, given)


def _group(group: type[T], told: Mapping[str, Any], place: Path) -> T:
    """A dataclass of options; those that the manifest does not tell are as when not typed."""
    hints = get_type_hints(group)
    given = {f.name: told[f.name] for f in fields(group) if f.name in told}  # type: ignore[arg-type]
    for name, value in given.items():
        check_kind(name, value, hints[name], place)
    paths = {
        name: [Path(one) for one in value] if isinstance(value, list) else Path(value)
        for name, value in given.items()
        if value is not None and Path in (hints[name], *members(hints[name]))
    }
    return group(**given | paths)


def _check_work(work: Work, trust: Trust) -> None:
    """The methods and dampings; a name with a dot is a class, whose module is imported.

    Raises:
        InputError: a class of other packages than torch's, without having been asked for; an
            unknown method, or a damping that is none.
    """
    names = work.options["methods"]
    for name in names:
        family = name.strip().partition(":")[0]
        foreign = "." in family and not family.startswith("torch.optim.")
        if foreign and name not in trust.methods:
            raise InputError(
                f"the run's method {name!r} is a class that would be imported, and a manifest may "
                f"name any; pass --methods {name} if you trust it"
            )
    if names or work.kind != "imbalance":
        get_methods(names)
    check_dampings(work.options.get("dampings", [work.options.get("damping")]))
