"""``verify``: some units of a result file are computed anew and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.spread_options import ForceOption, QuietOption
from ngeval.errors import OutputError
from ngeval.results.manifest import machine, plain, versions
from ngeval.results.table_files import check_output
from ngeval.runs.identity import MANY, listed
from ngeval.utils.atomic import replace_file
from ngeval.verification.compare import Verdict, as_record
from ngeval.verification.recompute import (
    Recorded,
    Trust,
    changes,
    check_unchanged,
    choose,
    read_recorded,
    rebuild,
    verdicts,
)

DISAGREES = 1
"""The exit code where a unit is not what the file says; 2: it could not be verified."""


def verify(
    results: Annotated[
        Path, typer.Argument(help="Result file of gamma, sweep, layers, imbalance or compare.")
    ],
    units: Annotated[int, typer.Option(min=1, help="How many are computed anew.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="For the choice of units.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Relative; default: half the digits, 1.5e-8 in float64."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="The run's task again, if its own: its code is run."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option("--methods", "-m", help="Its pytorch_optimizer.SOAP:20 and the like again."),
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: the run's.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Run code in checkpoints; for files you trust.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model's repository.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also where checkpoints, data or settings changed.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="What was found, as .json.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute a random few units of a result file anew, and compare every row.

    The manifest beside the file tells what it was made of; paths in it are as they were typed, so
    verify where the run was started. It is trusted in nothing: what runs code (a task of your own,
    an optimizer's class, pickles, a repository's code) you pass again. Changed checkpoints, data or
    settings are refused, other versions or hardware are told.

    The units are counted, too: a table that lacks some of a run that came to its end does not
    agree.

    Exit code 0: all agree; 1: some do not, or are missing; 2: it cannot be verified.

    [bold]Examples:[/bold]

    ngeval verify gamma.csv

    ngeval verify runs/sweep.parquet --task my.py:task --units 10 --output verified.json
    """
    if output is not None:
        check_output(output, (".json",), force=force)
        if output.resolve() == results.resolve():
            raise OutputError(f"output {output} is the file that is verified; give another")
    allowed = [name.strip() for name in methods.split(",") if name.strip()]
    trust = Trust(task, allowed, allow_pickle, trust_remote_code)
    recorded = read_recorded(results, trust, device)
    job = rebuild(recorded)
    changed, elsewhere = changes(recorded, job)
    if not anyway:
        check_unchanged(results, changed)
    out = console.table_console(quiet)
    for what, lines in (("made of something else", changed), ("computed elsewhere", elsewhere)):
        if lines:
            say(out, f"{what}:{listed(lines)}")
    missing, there = recorded.missing(MANY), len(recorded.units)
    if missing and not recorded.finished:
        say(out, f"of a run that is not finished: {there} of {recorded.num_units} units are in it")
    keys, found = choose(recorded, units, seed), list[Verdict]()
    steps = max(1, len(recorded.work.steps))
    with console.progress_bar(quiet) as bar:
        shown = bar.add_task("computing anew", total=len(keys) * steps)

        def advance(step: str) -> None:
            bar.advance(shown, float(step in recorded.work.steps))

        for verdict in verdicts(recorded, job, keys, tolerance, advance):
            found.append(verdict)
            bar.update(shown, completed=len(found) * steps)
    if output is not None:
        told = {
            **{"results": results, "seed": seed, "changed": changed, "elsewhere": elsewhere},
            **{"finished": recorded.finished, "units_there": there},
            **{"units_of_run": recorded.num_units, "first_missing": missing},
            **{"units": [as_record(verdict) for verdict in found]},
            **{"versions": versions(), "machine": machine()},
        }
        text = json.dumps(plain(told), ensure_ascii=False, indent=2) + "\n"
        replace_file(output, lambda place: place.write_text(text, encoding="utf-8"))
    out.print(_table(found, there))
    wrong = sum(not verdict.agrees for verdict in found)
    if wrong:
        console.complain(f"{wrong} of {len(found)} units of {results} are not what it says")
    lost = bool(missing) and recorded.finished
    if lost:
        console.complain(_lost(recorded, there))
    if wrong or lost:
        raise typer.Exit(DISAGREES)
    rest = f"; --units {there} looks at the other {there - len(found)}, too"
    more = rest if len(found) < there else ""
    say(out, f"{results}: {len(found)} of {there} units computed anew, all agree{more}")


def _lost(recorded: Recorded, there: int) -> str:
    """Which units of a run that came to its end are not in its table."""
    names, lost = list(recorded.identity["checkpoints"]), recorded.num_units - there
    shown = [f"\n  {names[stage]} batch {batch}" for stage, batch in recorded.missing(MANY)]
    more = f"\n  and {lost - len(shown)} more" if lost > len(shown) else ""
    return (
        f"{lost} of {recorded.num_units} units of the run, which came to its end, are not in "
        f"{recorded.path}:{''.join(shown)}{more}"
    )


def _table(found: list[Verdict], count: int) -> Table:
    shown = Table(
        title=f"{len(found)} of {count} units, computed anew",
        caption="largest difference: relative, of all numbers, measured by what is allowed for it",
        box=box.SIMPLE_HEAD,
    )
    for name in ("checkpoint", "batch", "rows", "largest difference", "allowed", "where", ""):
        left = name in ("checkpoint", "where", "")
        shown.add_column(name, justify="left" if left else "right", overflow="fold")
    for one in found:
        shown.add_row(
            escape(one.checkpoint[-40:]),
            str(one.key[1]),
            str(one.rows),
            f"{one.difference:.1e}" if math.isfinite(one.difference) else "∞",
            f"{one.allowed:.1e}",
            escape(_place(one)),
            "agrees" if one.agrees else "[bold]differs[/bold]",
        )
    return shown


def _place(one: Verdict) -> str:
    if one.problem:
        return one.problem
    if one.difference == 0:
        return "–"
    told: dict[str, Any] = dict(one.where)
    place = ", ".join([str(told.pop("column")), *(f"{k} {v}" for k, v in told.items())])
    return place if one.agrees or not one.note else f"{place} ({one.note})"
