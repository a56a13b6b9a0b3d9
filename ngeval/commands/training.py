"""``demo`` and ``train``: the commands that train a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ngeval import console
from ngeval.commands.common import say
from ngeval.demo import Demo
from ngeval.methods.optimizer import OPTIMIZERS
from ngeval.options import DeviceOption, ForceOption, QuietOption, SeedOption
from ngeval.tasks import get_task
from ngeval.training import Training


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
    say(out, f"written: {output}/epoch-*.safetensors")
