"""``demo`` and ``train``: the commands that train a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from ngeval.analysis.training_results import performance
from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.demo import Demo
from ngeval.cli.spread_options import (
    DeviceOption,
    ForceOption,
    QuietOption,
    SeedOption,
    takes_options,
)
from ngeval.cli.training_tables import performance_tables, trained_line
from ngeval.errors import InputError
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.runs.options import parse_numbers
from ngeval.tasks import Task, get_task
from ngeval.training import EXACT, Search
from ngeval.training.run import RESULTS

TRAIN = "The optimizer"
SEARCH = "Search, seeds and early stopping"
"""The panels of ``--help`` for training."""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer's settings in training; see `ngeval.training.Settings`."""

    momentum: Annotated[
        float | None, typer.Option(help="Of the optimizers that have one.", rich_help_panel=TRAIN)
    ] = None
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Decoupled for ef, ief, sf and ng.", rich_help_panel=TRAIN),
    ] = None
    max_norm: Annotated[
        float | None,
        typer.Option(
            help="Longest update of ef, ief, sf and ng, longest mean gradient of the others.",
            rich_help_panel=TRAIN,
        ),
    ] = None
    schedule: Annotated[
        str,
        typer.Option(
            help="Of the learning rate: constant, or linear or cosine decay to 0.",
            rich_help_panel=TRAIN,
        ),
    ] = "constant"


@dataclass(frozen=True)
class SearchOptions:
    """How settings are found and judged; see `ngeval.training.Search`."""

    search: Annotated[
        str | None,
        typer.Option(
            help="grid, or random (log-uniform between the ends of --lr and --damping). Without "
            "--lr and --damping: between the ends of each optimizer's own grid.",
            rich_help_panel=SEARCH,
        ),
    ] = None
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trainings for each optimizer; default: as many as the largest grid.",
            rich_help_panel=SEARCH,
        ),
    ] = None
    seeds: Annotated[
        int,
        typer.Option(
            help="Trainings with the best settings, from --seed on.", rich_help_panel=SEARCH
        ),
    ] = 1
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better one on the validation data.",
            rich_help_panel=SEARCH,
        ),
    ] = None
    monitor: Annotated[
        str, typer.Option(help="What is better: loss or accuracy.", rich_help_panel=SEARCH)
    ] = "loss"


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
    say(out, "written: " + ", ".join(str(path) for path in written))


@takes_options
def train(
    task: Annotated[
        str,
        typer.Option(
            "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints and training.parquet.")
    ],
    settings: OptimizerSettings,
    search: SearchOptions,
    optimizer: Annotated[
        str, typer.Option(help=f"One, or a comma list: {', '.join((*OPTIMIZERS, *EXACT))}.")
    ] = "adamw",
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate: one, a comma list, or low:high:count. Default: the optimizer's."
        ),
    ] = None,
    damping: Annotated[
        str | None, typer.Option(help=f"λ of {', '.join(EXACT)}, absolute: as --lr.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 64,
    num_batches: Annotated[
        int | None, typer.Option(help="Steps in an epoch; default: one pass over the data.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a task: a safetensors checkpoint and a JSON for every epoch from 0 on.

    With several optimizers, learning rates, dampings or seeds: every optimizer is tried with as
    many settings, the best by the validation data trained from each seed. DIR/training.parquet
    has a row for each epoch of every training, DIR/OPTIMIZER/seed-0/ the checkpoints.

    [bold]Examples:[/bold]

    ngeval train --task digits-cnn --optimizer adamw --epochs 10 -o runs/cnn

    ngeval train --task digits-mlp --optimizer ief --lr 0.3 --damping 1e-6 --patience 3 -o runs/ief

    ngeval train --task digits-mlp --optimizer sgd,adamw,ief --search grid --seeds 5 -o runs/tuned
    """
    job = _search(
        get_task(task),
        output,
        settings,
        search,
        [name.strip() for name in optimizer.split(",") if name.strip()],
        (parse_numbers("--lr", lr), parse_numbers("--damping", damping)),
        Schedule(epochs, batch_size, num_batches, seed, device, force),
    )
    notes = Console(stderr=True, quiet=quiet)
    job = replace(job, on_note=lambda note: say(notes, f"note: {note}"))
    if _is_single(job, search):
        _train_once(job, quiet)
    else:
        _train_all(job, quiet)


@dataclass(frozen=True)
class Schedule:
    """What every training of a command has in common."""

    epochs: int
    batch_size: int
    num_batches: int | None
    seed: int
    device: str
    force: bool


def _search(
    task: Task,
    output: Path,
    settings: OptimizerSettings,
    search: SearchOptions,
    names: list[str],
    values: tuple[list[float] | None, list[float] | None],
    common: Schedule,
) -> Search:
    """The command's options as a search; of one training, where nothing is to be found.

    What is not given is the optimizer's own: its grid, if a search is asked for without saying
    over what, and otherwise its default.
    """
    own = None if _asked(search) and values == (None, None) else (None,)
    return Search(
        task,
        names,
        own if values[0] is None else values[0],
        own if values[1] is None else values[1],
        search.search or "grid",
        search.trials,
        search.seeds,
        patience=search.patience,
        monitor=search.monitor,
        output=output,
        **vars(settings),
        **vars(common),
    )


def _asked(search: SearchOptions) -> bool:
    return search.search is not None or search.trials is not None


def _is_single(job: Search, search: SearchOptions) -> bool:
    """One training alone, whose checkpoints lie in the folder itself."""
    one = all(
        values is not None and len(values) == 1 for values in (job.learning_rates, job.dampings)
    )
    return one and len(job.optimizers) == 1 and job.seeds == 1 and not _asked(search)


def _train_once(job: Search, quiet: bool) -> None:
    out = Console(quiet=quiet)
    training = job.alone()
    training.check()
    with console.progress_bar(quiet) as bar:
        step = bar.add_task("training", total=job.epochs + 1)
        for report in training.run():
            out.print(console.training_line(report))
            bar.advance(step)
    say(out, f"written: {job.output}/epoch-*.safetensors")


def _train_all(job: Search, quiet: bool) -> None:
    job.check()
    out = console.table_console(quiet)
    frames: list[pd.DataFrame] = []
    size = job.epochs + 1
    with console.progress_bar(quiet) as bar:
        step = bar.add_task("training", total=job.num_trainings * size)
        for rows in job.run(lambda report: bar.advance(step)):
            frames.append(rows)
            say(out, trained_line(rows))
            bar.update(step, completed=len(frames) * size)  # also where it stopped early
    rows = pd.concat(frames, ignore_index=True)
    table = performance(rows)
    if not table["seeds"].any():
        reasons = "; ".join(dict.fromkeys(filter(None, rows["reason"])))
        raise InputError(f"no training came to its end: {reasons}")
    for part in performance_tables(table, out.width):
        out.print(part)
    say(out, f"written: {job.output}/{RESULTS} ({len(rows)} rows)")
