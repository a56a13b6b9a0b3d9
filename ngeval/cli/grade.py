"""``gamma``, ``sweep``, ``layers`` and ``imbalance``: checkpoints × batches → a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ngeval.cli import console
from ngeval.cli.options import DampingScaleOption, MethodsOption, MetricOption, takes_options
from ngeval.dampings import parse_dampings
from ngeval.methods import get_methods
from ngeval.runs.options import (
    GradingOptions,
    OutputOptions,
    RunOptions,
    parse_groups,
    parse_metric,
)

if TYPE_CHECKING:
    from ngeval.runs.outcome import Outcome
    from ngeval.runs.tables import GammaTable, Work

INCOMPLETE = 3
"""The exit code of a run in which units could not be graded."""


@takes_options
def gamma(
    run: RunOptions,
    grading: GradingOptions,
    out: OutputOptions,
    methods: MethodsOption = "sgd,ef,sf,ief,diag,ng",
    damping: Annotated[str, typer.Option(help="λ: a comma list, or low:high:count.")] = "1e-6,1e-3",
) -> None:
    """Grade update rules at every checkpoint: γ against the exact natural gradient.

    [bold]Examples:[/bold]

    ngeval gamma --task digits-mlp --checkpoint runs/mlp --output gamma.csv

    ngeval gamma --task my.py:task -c a.safetensors b.safetensors --methods sgd,ief,sf:4

    ngeval gamma --task digits-mlp -c runs/mlp --methods sgd,kfac,adamw,muon:20

    ngeval gamma --hf-model t5-base --adapter lora-run --dataset glue --subset sst2 -m sgd,ief
    """
    work = gamma_work(methods, parse_dampings(damping), grading)
    from ngeval.cli.tables import stages_table

    result = execute_work(work, run, out)
    for value in list(dict.fromkeys(result.table["damping"]))[:3]:
        console.table_console(out.quiet).print(stages_table(result.table, value))
    finish(result)


@takes_options
def sweep(
    run: RunOptions,
    grading: GradingOptions,
    out: OutputOptions,
    methods: MethodsOption = "sgd,ef,sf,ief,diag,ng",
    dampings: Annotated[
        str, typer.Option(help="λ: log-spaced low:high:count, or a comma list.")
    ] = "1e-8:1e4:50",
) -> None:
    """Grade update rules over a range of dampings; one factorisation serves them all.

    [bold]Example:[/bold] ngeval sweep --task digits-mlp -c runs/mlp/epoch-010.safetensors -o s.csv
    """
    work = gamma_work(methods, parse_dampings(dampings), grading)
    from ngeval.cli.tables import sweep_table

    result = execute_work(work, run, out)
    console.table_console(out.quiet).print(sweep_table(result.table))
    finish(result)


@takes_options
def layers(
    run: RunOptions,
    out: OutputOptions,
    methods: MethodsOption = "sgd,ef,ief",
    damping: Annotated[str, typer.Option(help="λ: a comma list, or low:high:count.")] = "1e-3",
    groups: Annotated[
        str, typer.Option(help="layer, parameter, or how many components of a name make a group.")
    ] = "layer",
    damping_scale: DampingScaleOption = "absolute",
    metric_batches: MetricOption = None,
    natural: Annotated[
        bool, typer.Option(help="Also over the least γ in each layer, by its exact Fisher.")
    ] = True,
) -> None:
    """What each layer of an update buys and spends: where does an optimizer lose its quality?

    [bold]Examples:[/bold]

    ngeval layers --task digits-mlp -c runs/mlp --methods sgd,ief,adamw --output layers.csv

    ngeval layers --task my.py:task -c last.pt -m sgd,kfac --groups 2 && ngeval plot layers.csv
    --kind layers --output layers.png
    """
    resolved, values = get_methods(methods), parse_dampings(damping)
    from ngeval.cli.tables import layer_tables
    from ngeval.runs.tables import LayerTable

    work = LayerTable.of(
        resolved,
        dampings=values,
        groups=parse_groups(groups),
        damping_scale=damping_scale,
        metric_batches=parse_metric(metric_batches),
        natural=natural,
    )
    result = execute_work(work, run, out)
    for table in layer_tables(result.table):
        console.table_console(out.quiet).print(table)
    finish(result)


@takes_options
def imbalance(
    run: RunOptions,
    out: OutputOptions,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Also each method's loss change per sample.")
    ] = "",
    damping: Annotated[float, typer.Option(help="λ of those updates, absolute.")] = 0.0,
) -> None:
    """Per-sample gradient norms at every checkpoint: one row for each sample.

    [bold]Example:[/bold] ngeval imbalance --task digits-mlp -c runs/mlp --methods ef,ief -o i.csv
    """
    resolved = get_methods(methods) if methods else []
    from ngeval.cli.tables import imbalance_table
    from ngeval.runs.tables import SampleTable

    work = SampleTable.of(resolved, damping=damping)
    result = execute_work(work, run, out)
    console.table_console(out.quiet).print(imbalance_table(result.table))
    finish(result)


def gamma_work(methods: str, dampings: list[float], grading: GradingOptions) -> GammaTable:
    """What ``gamma``, ``sweep`` and ``compare`` compute for each unit."""
    resolved = get_methods(methods)
    from ngeval.runs.tables import GammaTable

    options = vars(grading) | {"metric_batches": parse_metric(grading.metric_batches)}
    return GammaTable.of(resolved, dampings=dampings, **options)


def execute_work(work: Work, run: RunOptions, out: OutputOptions) -> Outcome:
    """Compute the units of a run, and write them with a manifest; only the first one returns."""
    from ngeval.runs.execute import check_result, execute
    from ngeval.runs.from_options import make_run

    check_result(out)
    options = run.recorded() | work.options
    result = execute(make_run(run), work, out, options, console.ProgressBar(out.quiet))
    if result is None:
        raise typer.Exit
    for text in (result.lost_rows(), result.doubtful_rows()):
        if text:
            console.complain(text)
    return result


def finish(result: Outcome) -> None:
    """Report the units that could not be graded, and exit with code 3 if there is one."""
    if missing := result.missing_units():
        console.complain(missing)
        raise typer.Exit(INCOMPLETE)
