"""The command ``ngeval``: parsing and printing; the work is done in the modules it calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import ngeval
from ngeval import console
from ngeval.assemble import make_run
from ngeval.checkpoints import Checkpoint
from ngeval.demo import Demo
from ngeval.errors import InputError, nearest_name
from ngeval.evaluate import check_dampings
from ngeval.methods import METHODS, get_methods
from ngeval.options import (
    DeviceOption,
    ForceOption,
    GradingOptions,
    HubOptions,
    MethodsOption,
    OutputOptions,
    QuietOption,
    RunOptions,
    SeedOption,
    parse_dampings,
    parse_metric,
    takes_options,
)
from ngeval.plots import (
    FIGURE_SUFFIXES,
    damping_figure,
    imbalance_figure,
    save_figure,
    stages_figure,
)
from ngeval.results import ResultFile, check_output, read_results
from ngeval.runs import Grading, Run
from ngeval.tasks import BUILTIN_TASKS, get_task
from ngeval.training import OPTIMIZERS, Training

app = typer.Typer(
    cls=console.Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="How close is the update an optimizer makes to the exact natural gradient?",
    epilog="Start with [bold]ngeval demo[/bold]. Every command has --help with examples.",
)


def main() -> None:
    """Entry point of the command ``ngeval``."""
    mpl.use("Agg")
    app()


def _print_version(value: bool) -> None:
    if value:
        print(f"ngeval {ngeval.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("ngeval-demo"),
    epochs: Annotated[int, typer.Option(help="Training epochs.")] = Demo.epochs,
    batch_size: Annotated[
        int, typer.Option(help="N, samples in a graded batch.")
    ] = Demo.batch_size,
    num_batches: Annotated[
        int, typer.Option(help="Graded batches for each checkpoint.")
    ] = Demo.num_batches,
    seed: SeedOption = 0,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on real digits and grade six update rules at every stage of training.

    Nothing to prepare, nothing downloaded; one to two minutes on two cores.

    [bold]Example:[/bold] ngeval demo --output ngeval-demo
    """
    job = Demo(output, epochs, batch_size, num_batches, seed, force)
    out = console.table_console(quiet)
    with console.progress_bar(quiet) as bar:
        bars: dict[str, Any] = {}

        def advance(step: str, total: int) -> None:
            if step not in bars:
                bars[step] = bar.add_task(step, total=total)
            bar.advance(bars[step])

        gammas, samples = job.run(lambda r: out.print(console.training_line(r)), advance)
    out.print(console.stages_table(gammas, gammas["damping"].min()))
    out.print(console.imbalance_table(samples))
    written = [output / "results.parquet", output / "imbalance.parquet", *job.figures.values()]
    _say(out, "written: " + ", ".join(str(path) for path in written))


@app.command()
def train(
    task: Annotated[
        str,
        typer.Option(
            "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints.")],
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")] = "adamw",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    lr: Annotated[float | None, typer.Option(help="Learning rate for the mean loss.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 64,
    num_batches: Annotated[
        int | None, typer.Option(help="Steps in an epoch; default: one pass over the data.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a task, writing a safetensors checkpoint and a JSON for every epoch from 0 on.

    [bold]Example:[/bold] ngeval train --task digits-cnn --optimizer adamw --epochs 10 -o runs/cnn
    """
    training = Training(
        get_task(task), output, optimizer, epochs, lr, batch_size, num_batches, seed, device, force
    )
    out = Console(quiet=quiet)
    with console.progress_bar(quiet) as bar:
        step = bar.add_task("training", total=epochs + 1)
        for report in training.run():
            out.print(console.training_line(report))
            bar.advance(step)
    _say(out, f"written: {output}/epoch-*.safetensors")


@app.command()
@takes_options
def gamma(
    run: RunOptions,
    hub: HubOptions,
    grading: GradingOptions,
    out: OutputOptions,
    methods: MethodsOption = "sgd,ef,sf,ief,diag,ng",
    damping: Annotated[str, typer.Option(help="λ: a comma list, or low:high:count.")] = "1e-6,1e-3",
) -> None:
    """Grade update rules at every checkpoint: γ against the exact natural gradient.

    [bold]Examples:[/bold]

    ngeval gamma --task digits-mlp --checkpoint runs/mlp --output gamma.csv

    ngeval gamma --task my.py:task -c a.safetensors b.safetensors --methods sgd,ief,sf:4

    ngeval gamma --hf-model t5-base --adapter lora-run --dataset glue --subset sst2 -m sgd,ief
    """
    table = _grade(run, hub, grading, out, methods, damping)
    for value in list(dict.fromkeys(table["damping"]))[:3]:
        console.table_console(out.quiet).print(console.stages_table(table, value))


@app.command()
@takes_options
def sweep(
    run: RunOptions,
    hub: HubOptions,
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
    table = _grade(run, hub, grading, out, methods, dampings)
    console.table_console(out.quiet).print(console.sweep_table(table))


@app.command()
@takes_options
def imbalance(
    run: RunOptions,
    hub: HubOptions,
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
    _check_output(out)
    job = make_run(run, hub)
    table = _collect(job, lambda job: job.imbalances(names, damping), "gradient norms", out)
    console.table_console(out.quiet).print(console.imbalance_table(table))


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="Result file of gamma, sweep or imbalance.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf.")],
    kind: Annotated[str, typer.Option(help="stages, damping or imbalance.")] = "stages",
    damping: Annotated[
        float | None, typer.Option(help="λ of the stages picture; default: the smallest.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option("--checkpoint", "-c", help="Panels of the damping picture.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Draw a result file.

    [bold]Example:[/bold] ngeval plot gamma.csv --kind stages --output stages.pdf
    """
    check_output(output, FIGURE_SUFFIXES, force=force)
    table = read_results(results)
    if kind == "stages":
        figure = stages_figure(table, None if damping is None else [damping])
    elif kind == "damping":
        figure = damping_figure(table, checkpoint)
    elif kind == "imbalance":
        figure = imbalance_figure(table)
    else:
        kinds = ("stages", "damping", "imbalance")
        raise InputError(f"unknown picture {kind!r}; {nearest_name(kind, kinds)}")
    save_figure(figure, output)


@app.command()
def tasks() -> None:
    """List the built-in tasks.

    [bold]Example:[/bold] ngeval tasks
    """
    shown = Table("task", "what it is", "parameters")
    for name in BUILTIN_TASKS:
        task = get_task(name)
        count = sum(parameter.numel() for parameter in task.model().parameters())
        shown.add_row(name, task.description, f"{count:,}")
    console.table_console().print(shown)


@app.command()
def methods() -> None:
    """List the methods, with their formulas and parameters.

    [bold]Example:[/bold] ngeval methods
    """
    shown = Table("method", "d(λ)", "labels from", "after a colon")
    for name, entry in METHODS.items():
        shown.add_row(name, entry.formula, entry.labels, entry.parameter or "–")
    console.table_console().print(shown)
    Console().print("example: --methods sgd,ief,sf:4,diag-ef:0.5", highlight=False)


def _say(out: Console, text: str) -> None:
    """Print as it is: a path may hold brackets."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def _grade(
    run: RunOptions,
    hub: HubOptions,
    grading: GradingOptions,
    out: OutputOptions,
    methods: str,
    dampings: str,
) -> pd.DataFrame:
    """What ``gamma`` and ``sweep`` share; returns the table of all rows."""
    names = [method.name for method in get_methods(methods)]
    values = check_dampings(parse_dampings(dampings))
    _check_output(out)
    how = Grading(parse_metric(grading.metric_batches), grading.natural, grading.gap)
    job = make_run(run, hub)

    def tables(job: Run) -> Iterator[pd.DataFrame]:
        return job.gammas(names, values, grading.damping_scale, how)

    table = _collect(job, tables, "grading updates", out)
    failed = table[table["status"] != "ok"]
    if len(failed):
        reasons = "; ".join(dict.fromkeys(failed["reason"]))
        message = f"{len(failed)} of {len(table)} rows could not be computed: {reasons}"
        if len(failed) == len(table):
            raise InputError(message)
        print(f"ngeval: {message}", file=sys.stderr)
    return table


def _check_output(out: OutputOptions) -> None:
    """Before any work."""
    if out.output is not None:
        ResultFile(out.output, force=out.force)


def _collect(
    job: Run,
    tables: Callable[[Run], Iterator[pd.DataFrame]],
    description: str,
    out: OutputOptions,
) -> pd.DataFrame:
    """Run through the units with a progress bar; what is finished reaches the output file."""
    target = ResultFile(out.output, force=out.force) if out.output is not None else None
    frames = []
    with console.progress_bar(out.quiet) as bar, target or contextlib.nullcontext():
        step = bar.add_task(description, total=job.num_units)

        def say(checkpoint: Checkpoint, model: nn.Module) -> None:
            if checkpoint.is_adapter and not out.quiet:
                _say(bar.console, f"{checkpoint.name}: {console.trainable_line(model)}")

        for table in tables(replace(job, on_model=say)):
            frames.append(table)
            if target is not None:
                target.append(table)
            bar.advance(step)
    if target is not None and not out.quiet:
        print(f"written: {target.path} ({target.rows} rows)", file=sys.stderr)
    return pd.concat(frames, ignore_index=True)
