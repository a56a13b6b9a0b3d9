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
)
from ngeval.cli.spread_options import takes_options
from ngeval.dampings import parse_dampings
from ngeval.errors import InputError
from ngeval.runs.options import (
    GradingOptions,
    HubOptions,
    OutputOptions,
    RunOptions,
    StepOptions,
)
from ngeval.utils import torchrun

METHODS = (
    "sgd,ef,ief,sf,diag,diag-ef:0.5,kfac,kfac-sf,kfac-ef,kfac-ief,ekfac,momentum:20,adam:20,"
    "adamw:20,nadam:20,rmsprop:20,adagrad:20,adafactor:20,muon:20"
)
"""The methods that are compared by default. Optimizers take a state of 20 batches at the
checkpoint's weights, which is available for any checkpoint, whatever it was trained with."""


@takes_options
def compare(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    grading: GradingOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder; with --trained also a file for the table or picture."
        ),
    ] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(
            help="Table of tuned trainings (training.parquet), or its folder; repeat or list "
            "several. In place of --task and --checkpoint."
        ),
    ] = None,
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
    """Rank many methods over a training run by γ/γ_min, or trained optimizers by test performance.

    Writes results.parquet (every row), ranking.csv and ranking.png (an early, a middle and a late
    checkpoint) and kfac.png (iEF and the variants of KFAC over training) into the folder.

    With --trained: tuned optimizers side by side, from the rows of their trainings, as means over
    seeds with 95 % intervals; performance.csv and performance.png go into the folder, if any.

    [bold]Examples:[/bold]

    ngeval compare --task digits-mlp --checkpoint runs/mlp --output compared

    ngeval compare --task my.py:task -c runs/a --methods sgd,kfac,adamw,pytorch_optimizer.SOAP:20
    --output compared

    ngeval compare --trained runs/tuned --trained runs/cnn/training.parquet --output table.csv
    """
    if trained:
        if torchrun.rank() == 0:  # one process writes the table
            _refuse_grading(run, hub)
            from ngeval.cli.comparison import compare_trained

            compare_trained([*trained, *map(Path, run.more or ())], output, force, quiet)
        return
    if output is None:
        raise InputError("give a folder for the results (--output)")
    values = parse_dampings(dampings) + ([] if damping is None else [damping])
    work = gamma_work(methods, values, grading)
    from ngeval.cli.comparison import ranking_files, write_ranking

    files = ranking_files(output, work.methods, force or resume)
    out = OutputOptions(files["results"], force, resume, stop_after, quiet)
    result = execute_work(work, (run, hub, step), out)
    if result.num_done == result.num_units:
        write_ranking(result.table, files, damping, quiet)
    else:  # a ranking of some of the units would be taken for that of all
        console.say(console.table_console(quiet), "the ranking is written when all units are done")
    finish(result)


def _refuse_grading(run: RunOptions, hub: HubOptions) -> None:
    options = {"--task": run.task, "--checkpoint": run.checkpoint, "--hf-model": hub.hf_model}
    for name, value in options.items():
        if value:
            raise InputError(
                f"--trained compares finished trainings, {name} grades a run's checkpoints; give "
                "one or the other"
            )
