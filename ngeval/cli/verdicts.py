"""The verdicts of ``verify`` on the units of a result file: computed, printed and written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.tables import columns_table
from ngeval.results.journal import Key
from ngeval.results.manifest import machine, plain, versions
from ngeval.runs.identity import MAX_LINES, listed
from ngeval.runs.run import Run
from ngeval.utils.atomic import replace_file
from ngeval.verification.compare import Verdict
from ngeval.verification.recompute import Recorded, verdicts


def report_differences(
    out: Console, recorded: Recorded, changed: list[str], elsewhere: list[str]
) -> None:
    """Print what differs between the run of a file and this one, before any unit is computed."""
    for what, lines in (("made of something else", changed), ("computed elsewhere", elsewhere)):
        if lines:
            say(out, f"{what}:{listed(lines)}")
    if recorded.missing(MAX_LINES) and not recorded.manifest.finished:
        units = f"{len(recorded.units)} of {recorded.num_units} units"
        say(out, f"of a run that is not finished: {units} are in it")


def recompute(
    recorded: Recorded, run: Run, keys: Sequence[Key], tolerance: float | None, quiet: bool
) -> list[Verdict]:
    """Compute units again and compare them, with a progress bar."""
    compared: list[Verdict] = []
    names = recorded.work.methods
    steps = max(1, len(names))
    with console.progress_bar(quiet) as bar:
        task = bar.add_task("recomputing", total=len(keys) * steps)

        def advance(step: str) -> None:
            bar.advance(task, float(step in names))

        for verdict in verdicts(recorded, run, keys, tolerance, advance):
            compared.append(verdict)
            bar.update(task, completed=len(compared) * steps)
    return compared


def write(
    output: Path, recorded: Recorded, compared: Sequence[Verdict], differences: dict[str, Any]
) -> None:
    """Write the verdicts as JSON, with ``differences`` as further entries."""
    record = {
        "results": recorded.path,
        **differences,
        "finished": recorded.manifest.finished,
        "units_there": len(recorded.units),
        "units_of_run": recorded.num_units,
        "first_missing": recorded.missing(MAX_LINES),
        "units": [asdict(verdict) | {"agrees": verdict.agrees} for verdict in compared],
        "versions": versions(),
        "machine": machine(),
    }
    text = json.dumps(plain(record), ensure_ascii=False, indent=2) + "\n"
    replace_file(output, lambda path: path.write_text(text, encoding="utf-8"))


def report_agreement(out: Console, recorded: Recorded, compared: Sequence[Verdict]) -> bool:
    """Print a summary, and return whether all units agree and none is missing."""
    count, total, path = len(compared), len(recorded.units), recorded.path
    differing = sum(not verdict.agrees for verdict in compared)
    if differing:
        console.complain(f"{differing} of {count} units of {path} differ from what it says")
    if lacking := recorded.manifest.finished and bool(recorded.missing(MAX_LINES)):
        console.complain(missing_units(recorded))
    if differing or lacking:
        return False
    more = f"; --units {total} compares the other {total - count}, too" if count < total else ""
    say(out, f"{path}: {count} of {total} units recomputed, all agree{more}")
    return True


def missing_units(recorded: Recorded) -> str:
    """The units of a finished run that its table lacks, for a message."""
    count = recorded.num_units - len(recorded.units)
    first = recorded.missing(MAX_LINES)
    lines = [f"{recorded.names[stage]} batch {batch}" for stage, batch in first]
    return (
        f"{count} of {recorded.num_units} units of the run, which was finished, are missing from "
        f"{recorded.path}:{listed(lines, count)}"
    )


def table(compared: Sequence[Verdict], total: int) -> Table:
    """The verdicts, one row for each unit."""
    shown = columns_table(
        ("checkpoint", "batch", "rows", "largest difference", "allowed", "where", ""),
        left=("checkpoint", "where", ""),
        title=f"{len(compared)} of {total} units, recomputed",
        caption="largest difference: relative, of all numbers, in proportion to the allowed one",
        box=box.SIMPLE_HEAD,
    )
    for verdict in compared:
        shown.add_row(
            escape(verdict.checkpoint[-40:]),
            str(verdict.key[1]),
            str(verdict.rows),
            f"{verdict.difference:.1e}" if math.isfinite(verdict.difference) else "∞",
            f"{verdict.allowed:.1e}",
            escape(_place(verdict)),
            "agrees" if verdict.agrees else "[bold]differs[/bold]",
        )
    return shown


def _place(verdict: Verdict) -> str:
    """Where the largest difference of a unit is."""
    if verdict.problem:
        return verdict.problem
    if verdict.difference == 0:
        return "–"
    keys = {name: value for name, value in verdict.where.items() if name != "column"}
    place = ", ".join([str(verdict.where["column"]), *(f"{k} {v}" for k, v in keys.items())])
    return place if verdict.agrees or not verdict.note else f"{place} ({verdict.note})"
