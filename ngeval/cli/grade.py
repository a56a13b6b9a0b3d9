"""``gamma``, ``sweep``, ``layers`` and ``imbalance``: checkpoints × batches → a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ngeval.cli import console
from ngeval.cli.spread_options import DampingScaleOption, MethodsOption, MetricOption, takes_options
from ngeval.grading.prepare import check_dampings
from ngeval.methods import get_methods
from ngeval.results.manifest import as_options
from ngeval.runs.execute import check_result, collect
from ngeval.runs.from_options import make_run
from ngeval.runs.options import (
    GradingOptions,
    HubOptions,
    OutputOptions,
    RunOptions,
    StepOptions,
    parse_dampings,
    parse_groups,
    parse_metric,
)
from ngeval.runs.outcome import Collected
from ngeval.runs.tables import Work


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
    made = grade((run, hub, step), grading, out, methods, _dampings(damping))
    for value in list(dict.fromkeys(made.table["damping"]))[:3]:
        console.table_console(out.quiet).print(console.stages_table(made.table, value))
    made.finish()


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
    made = grade((run, hub, step), grading, out, methods, _dampings(dampings))
    console.table_console(out.quiet).print(console.sweep_table(made.table))
    made.finish()


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
    names = [method.name for method in get_methods(methods)]
    work = {
        **{"methods": names, "dampings": _dampings(damping), "groups": parse_groups(groups)},
        **{"damping_scale": damping_scale, "metric_batches": parse_metric(metric_batches)},
        "natural": natural,
    }
    made = _do("layers", work, (run, hub, step), out, {"groups": groups})
    made.report_failures()
    for shown in console.layer_tables(made.table):
        console.table_console(out.quiet).print(shown)
    made.finish()


@takes_options
def imbalance(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    out: OutputOptions,
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Also each one's loss change per sample.")
    ] = "",
    damping: Annotated[float, typer.Option(help="λ of those updates, absolute.")] = 0.0,
) -> None:
    """Per-sample gradient norms at every checkpoint: one row for each sample.

    [bold]Example:[/bold] ngeval imbalance --task digits-mlp -c runs/mlp --methods ef,ief -o i.csv
    """
    names = [method.name for method in get_methods(methods)] if methods else []
    check_dampings([damping])
    made = _do("imbalance", {"methods": names, "damping": damping}, (run, hub, step), out, {})
    console.table_console(out.quiet).print(console.imbalance_table(made.table))
    made.finish()


def _dampings(text: str) -> list[float]:
    return check_dampings(parse_dampings(text))


def _groups(run: RunOptions, hub: HubOptions, step: StepOptions) -> list[object]:
    """The options that a manifest tells: those of the hub where a model of it is asked for."""
    return [run, step] if hub.hf_model is None else [run, hub, step]


def grade(
    which: tuple[RunOptions, HubOptions, StepOptions],
    grading: GradingOptions,
    out: OutputOptions,
    methods: str,
    dampings: Sequence[float],
) -> Collected:
    """What ``gamma``, ``sweep`` and ``compare`` share."""
    names = [method.name for method in get_methods(methods)]
    work = {"methods": names, "dampings": list(dampings)} | asdict(grading)
    work["metric_batches"] = parse_metric(grading.metric_batches)
    made = _do("gamma", work, which, out, {})
    made.report_failures()
    return made


def _do(
    kind: str,
    options: dict[str, Any],
    which: tuple[RunOptions, HubOptions, StepOptions],
    out: OutputOptions,
    as_typed: dict[str, Any],
) -> Collected:
    """A run from its options to its rows."""
    check_result(out)
    job, work = make_run(*which), Work(kind, options)
    return collect(job, work, out, as_options(*_groups(*which), options, as_typed))
