"""``train``: a checkpoint for every epoch of a training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.options import TASK, DeviceOption, ForceOption, QuietOption, SeedOption
from ngeval.methods.optimizer.catalogue import OPTIMIZERS

if TYPE_CHECKING:
    from ngeval.training import EpochReport, Training

EXACT = "ef, ief, sf, ng"
"""The optimizers of `ngeval.training.EXACT`, for ``--help``."""

_setting: Any = functools.partial(typer.Option, rich_help_panel="The optimizer")
_stopping: Any = functools.partial(typer.Option, rich_help_panel="Early stopping")


def train(
    task: Annotated[str, TASK],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoints.")],
    optimizer: Annotated[
        str, typer.Option(help=f"{', '.join(OPTIMIZERS)}, {EXACT}, or the path of a class.")
    ] = "adamw",
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; default: the optimizer's.")
    ] = None,
    damping: Annotated[float | None, typer.Option(help=f"λ of {EXACT}, absolute.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 64,
    num_batches: Annotated[
        int | None, typer.Option(help="Steps in an epoch; default: one pass over the data.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    momentum: Annotated[float | None, _setting(help="Of the optimizers that have one.")] = None,
    weight_decay: Annotated[
        float | None, _setting(help="Decoupled for ef, ief, sf and ng.")
    ] = None,
    max_norm: Annotated[
        float | None,
        _setting(help="Longest update of ef, ief, sf and ng, longest mean gradient of the others."),
    ] = None,
    schedule: Annotated[
        str, _setting(help="Of the learning rate: constant, or linear or cosine decay to 0.")
    ] = "constant",
    patience: Annotated[
        int | None,
        _stopping(help="Stop after this many epochs without a better one on the validation data."),
    ] = None,
    monitor: Annotated[str, _stopping(help="What is better: loss or accuracy.")] = "loss",
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a task: a safetensors checkpoint and a JSON for every epoch from 0 on.

    [bold]Examples:[/bold]

    ngeval train --task digits-cnn --optimizer adamw --epochs 10 -o runs/cnn

    ngeval train --task digits-mlp --optimizer ief --lr 0.3 --damping 1e-6 --patience 3 -o runs/ief
    """
    from ngeval.tasks import get_task
    from ngeval.training import Training

    out, notes = Console(quiet=quiet), Console(stderr=True, quiet=quiet)
    training = Training(
        get_task(task),
        output,
        optimizer=optimizer,
        epochs=epochs,
        learning_rate=lr,
        batch_size=batch_size,
        num_batches=num_batches,
        seed=seed,
        device=device,
        force=force,
        damping=damping,
        momentum=momentum,
        weight_decay=weight_decay,
        max_norm=max_norm,
        schedule=schedule,
        patience=patience,
        monitor=monitor,
        on_note=lambda note: say(notes, f"note: {note}"),
    )
    training.check()
    show_training(training, out, quiet)
    say(out, f"written: {output}/epoch-*.safetensors")


def show_training(training: Training, out: Console, quiet: bool) -> None:
    """Train with a progress bar and a line for each epoch."""
    with console.progress_bar(quiet) as bar:
        epoch = bar.add_task("training", total=training.epochs + 1)
        for report in training.run():
            out.print(epoch_line(report))
            bar.advance(epoch)


def epoch_line(report: EpochReport) -> str:
    """One line about an epoch: mean losses in nats, and accuracies if there are any."""
    line = f"epoch {report.epoch:3d}  train loss {report.train_loss:.4g}"
    if report.train_accuracy is not None:
        line += f" ({report.train_accuracy:.1%})"
    if report.validation_loss is not None:
        line += f"  validation loss {report.validation_loss:.4g}"
    if report.validation_accuracy is not None:
        line += f" ({report.validation_accuracy:.1%})"
    return line
