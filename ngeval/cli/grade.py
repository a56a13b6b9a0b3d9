"""``gamma``, ``sweep``, ``layers`` and ``imbalance``: checkpoints × batches → a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ngeval.cli import console
from ngeval.cli.options import DampingScaleOption, MethodsOption, MetricOption
from ngeval.cli.spread_options import takes_options
from ngeval.dampings import check_dampings, parse_dampings
from ngeval.methods import get_methods
from ngeval.runs.options import (
    GradingOptions,
    HubOptions,
    OutputOptions,
    RunOptions,
    StepOptions,
    parse_groups,
    parse_metric,
)

if TYPE_CHECKING:
    from ngeval.runs.outcome import Collected

Groups = tuple[RunOptions, HubOptions, StepOptions]


@takes_options
def gamma(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
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
    result = grade((run, hub, step), grading, out, methods, read_dampings(damping))
    from ngeval.cli.tables import stages_table

    for value in list(dict.fromkeys(result.table["damping"]))[:3]:
        console.table_console(out.quiet).print(stages_table(result.table, value))
    result.finish()


@takes_options
def sweep(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
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
    result = grade((run, hub, step), grading, out, methods, read_dampings(dampings))
    from ngeval.cli.tables import sweep_table

    console.table_console(out.quiet).print(sweep_table(result.table))
    result.finish()


@takes_options
def layers(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    out: OutputOptions,
    methods: MethodsOption = "sgd,ef,ief",
    damping: Annotated[str, typer.Option(help="λ: a comma list, or low:high:count.")] = "1e-3",
    groups: Annotated[
        str,
        typer.Option(help="layer, parameter, or how many components of a name make a group."),
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
    work = {
        "methods": _names(methods),
        "dampings": read_dampings(damping),
        "groups": parse_groups(groups),
        "damping_scale": damping_scale,
        "metric_batches": parse_metric(metric_batches),
        "natural": natural,
    }
    result = _execute("layers", work, (run, hub, step), out, {"groups": groups})
    from ngeval.cli.tables import layer_tables

    result.report_failures()
    for table in layer_tables(result.table):
        console.table_console(out.quiet).print(table)
    result.finish()


@takes_options
def imbalance(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    out: OutputOptions,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Also each method's loss change per sample.")
    ] = "",
    damping: Annotated[float, typer.Option(help="λ of those updates, absolute.")] = 0.0,
) -> None:
    """Per-sample gradient norms at every checkpoint: one row for each sample.

    [bold]Example:[/bold] ngeval imbalance --task digits-mlp -c runs/mlp --methods ef,ief -o i.csv
    """
    check_dampings([damping])
    work = {"methods": _names(methods) if methods else [], "damping": damping}
    result = _execute("imbalance", work, (run, hub, step), out, {})
    from ngeval.cli.tables import imbalance_table

    console.table_console(out.quiet).print(imbalance_table(result.table))
    result.finish()


def grade(
    groups: Groups,
    grading: GradingOptions,
    out: OutputOptions,
    methods: str,
    dampings: list[float],
) -> Collected:
    """Grade the methods on every unit, as ``gamma``, ``sweep`` and ``compare`` do."""
    work = {"methods": _names(methods), "dampings": dampings} | asdict(grading)
    work["metric_batches"] = parse_metric(grading.metric_batches)
    result = _execute("gamma", work, groups, out, {})
    result.report_failures()
    return result


def _names(methods: str) -> list[str]:
    return [method.name for method in get_methods(methods)]


def read_dampings(text: str) -> list[float]:
    """The dampings of an option's text: a comma list, or ``low:high:count``.

    Raises:
        InputError: the text is something else, or a damping is negative or infinite.
    """
    return check_dampings(parse_dampings(text))


def _execute(
    kind: str,
    work: dict[str, Any],
    groups: Groups,
    out: OutputOptions,
    as_typed: dict[str, Any],
) -> Collected:
    """Do all units of a run, and write them with a manifest of the options.

    Args:
        kind: which table is computed for each unit.
        work: the options of that table.
        groups: the options of the run.
        out: where the rows go.
        as_typed: the options whose text the manifest records in place of their value in ``work``.
    """
    from ngeval.results.manifest import as_options
    from ngeval.runs.execute import check_result, collect
    from ngeval.runs.from_options import make_run
    from ngeval.runs.tables import Work

    check_result(out)
    run, hub, step = groups
    recorded = (run, step) if hub.hf_model is None else groups
    return collect(make_run(*groups), Work(kind, work), out, as_options(*recorded, work, as_typed))
