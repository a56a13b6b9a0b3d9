"""``compare``: many methods over a training run, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ngeval.cli import console
from ngeval.cli.grade import execute_work, finish, gamma_work
from ngeval.cli.options import (
    ForceOption,
    MethodsOption,
    QuietOption,
    ResumeOption,
    StopAfterOption,
    takes_options,
)
from ngeval.dampings import parse_dampings
from ngeval.runs.options import GradingOptions, OutputOptions, RunOptions

METHODS = (
    "sgd,ef,ief,sf,diag,diag-ef:0.5,kfac,kfac-sf,kfac-ef,kfac-ief,ekfac,momentum:20,adam:20,"
    "adamw:20,nadam:20,rmsprop:20,adagrad:20,adafactor:20,muon:20"
)
"""The methods that are compared by default. Optimizers take a state of 20 batches at the
checkpoint's weights, which is available for any checkpoint, whatever it was trained with."""


@takes_options
def compare(
    run: RunOptions,
    grading: GradingOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    methods: MethodsOption = METHODS,
    dampings: Annotated[
        str, typer.Option(help="λ: a comma list, or low:high:count; each method takes its best.")
    ] = "1e-8:1e2:11",
    damping: Annotated[
        float | None, typer.Option(help="λ for all in kfac.png; default: the smallest.")
    ] = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    stop_after: StopAfterOption = None,
    quiet: QuietOption = False,
) -> None:
    """Rank many methods over a training run by γ/γ_min.

    Writes results.parquet (every row), ranking.csv and ranking.png (an early, a middle and a late
    checkpoint) and kfac.png (iEF and the variants of KFAC over training) into the folder.

    [bold]Examples:[/bold]

    ngeval compare --task digits-mlp --checkpoint runs/mlp --output compared

    ngeval compare --task my.py:task -c runs/a --methods sgd,kfac,adamw,pytorch_optimizer.SOAP:20
    --output compared
    """
    values = parse_dampings(dampings) + ([] if damping is None else [damping])
    work = gamma_work(methods, values, grading)
    from ngeval.cli.comparison import ranking_files, refuse_tables, write_ranking

    refuse_tables(map(Path, (*(run.checkpoint or ()), *(run.more or ()))))
    files = ranking_files(output, work.methods, force or resume)
    out = OutputOptions(files["results"], force, resume, stop_after, quiet)
    result = execute_work(work, run, out)
    if result.num_done == result.num_units:
        write_ranking(result.table, files, damping, quiet)
    else:  # a ranking of some of the units would be taken for that of all
        console.say(console.table_console(quiet), "the ranking is written when all units are done")
    finish(result)
