"""``verify``: some units of a result file are computed again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ngeval.cli import console
from ngeval.cli.options import ForceOption, QuietOption
from ngeval.errors import OutputError

DISAGREES = 1
"""The exit code where a unit differs from the file; 2: it could not be verified."""


def verify(
    results: Annotated[
        Path, typer.Argument(help="Result file of gamma, sweep, layers, imbalance or compare.")
    ],
    units: Annotated[int, typer.Option(min=1, help="How many are computed again.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="For the choice of units.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Relative; default: half the digits, 1.5e-8 in float64."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="The run's task again, if it is yours: its code is run."),
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
        Path | None, typer.Option("--output", "-o", help="The verdicts, as .json.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute a few random units of a result file again and compare every row.

    The manifest beside the file records what it was made of; paths in it are as they were typed,
    so verify where the run was started. Nothing in it is trusted: what runs code (a task of your
    own, an optimizer's class, pickles, a repository's code) you pass again. Changed checkpoints,
    data or settings are refused, other versions or hardware are reported.

    The units are counted, too: a table that lacks units of a finished run does not agree.

    Exit code 0: all agree; 1: some differ or are missing; 2: the file cannot be verified.

    [bold]Examples:[/bold]

    ngeval verify gamma.csv

    ngeval verify runs/sweep.parquet --task my.py:task --units 10 --output verified.json
    """
    from ngeval.cli import verdicts
    from ngeval.results.table_files import check_output
    from ngeval.verification.recompute import (
        Trust,
        changes,
        check_unchanged,
        choose,
        read_recorded,
        rebuild,
    )

    if output is not None:
        check_output(output, (".json",), force=force)
        if output.resolve() == results.resolve():
            raise OutputError(f"output {output} is the file that is verified; give another")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    recorded = read_recorded(results, Trust(task, names, allow_pickle, trust_remote_code), device)
    run = rebuild(recorded)
    changed, elsewhere = changes(recorded, run)
    if not anyway:
        check_unchanged(results, changed)
    out = console.table_console(quiet)
    verdicts.report_differences(out, recorded, changed, elsewhere)
    keys = choose(recorded, units, seed)
    compared = verdicts.recompute(recorded, run, keys, tolerance, quiet)
    if output is not None:
        differences = {"seed": seed, "changed": changed, "elsewhere": elsewhere}
        verdicts.write(output, recorded, compared, differences)
    out.print(verdicts.table(compared, len(recorded.units)))
    if not verdicts.report_agreement(out, recorded, compared):
        raise typer.Exit(DISAGREES)
