"""``demo``: a network is trained on real digits, and graded at every stage of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ngeval.cli import console
from ngeval.cli.grade import execute_work
from ngeval.cli.options import ForceOption, QuietOption, ResumeOption, SeedOption
from ngeval.cli.train import show_training
from ngeval.runs.options import OutputOptions, RunOptions

METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("ngeval-demo"),
    epochs: Annotated[int, typer.Option(help="Training epochs.")] = 12,
    batch_size: Annotated[int, typer.Option(help="N, samples in a graded batch.")] = 160,
    num_batches: Annotated[int, typer.Option(help="Graded batches for each checkpoint.")] = 4,
    seed: SeedOption = 0,
    force: ForceOption = False,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on real digits and grade six update rules at every stage of training.

    Nothing to prepare, nothing downloaded; one to two minutes on two cores.

    [bold]Example:[/bold] ngeval demo --output ngeval-demo
    """
    import numpy as np

    from ngeval.analysis.stages import three_stages
    from ngeval.cli.tables import imbalance_table, stages_table
    from ngeval.plots import (
        FIGURE_SUFFIXES,
        damping_figure,
        norms_figure,
        save_figure,
        stages_figure,
    )
    from ngeval.results.journal import Journal
    from ngeval.results.table_files import check_output
    from ngeval.runs.execute import check_result
    from ngeval.runs.run import Run
    from ngeval.runs.tables import GammaTable, SampleTable
    from ngeval.tasks import get_task
    from ngeval.training import Training

    run = RunOptions(
        task="digits-mlp",
        checkpoint=[str(output / "checkpoints")],
        batch_size=batch_size,
        num_batches=num_batches,
        seed=seed,
    )
    results, norms = (
        OutputOptions(output / name, force, resume, quiet=quiet)
        for name in ("results.parquet", "imbalance.parquet")
    )
    figures = {kind: output / f"{kind}.png" for kind in ("stages", "damping", "imbalance")}
    # A run of the table exists only once the training is over.
    table = output / "results.parquet"
    trained = resume and (table.exists() or Journal(table).exists)
    training = Training(
        get_task("digits-mlp"),
        output / "checkpoints",
        epochs=epochs,
        seed=seed,
        force=force or resume,
    )
    # Before the training, what would otherwise fail after it.
    for path in figures.values():
        check_output(path, FIGURE_SUFFIXES, force=training.force)
    for out_options in (results, norms):
        check_result(out_options)
    Run(training.task, (), batch_size, num_batches, seed)
    next(training.task.batches(batch_size, num_batches, seed))
    training.check()
    out = console.table_console(quiet)
    if not trained:
        show_training(training, out, quiet)
    dampings = np.logspace(-8, 4, 50)
    gammas = execute_work(GammaTable.of(METHODS, dampings=dampings), run, results).table
    samples = execute_work(SampleTable.of(()), run, norms).table
    save_figure(stages_figure(gammas), figures["stages"])
    save_figure(damping_figure(gammas, three_stages(gammas)), figures["damping"])
    save_figure(norms_figure(samples), figures["imbalance"])
    out.print(stages_table(gammas, gammas["damping"].min()))
    out.print(imbalance_table(samples))
    written = [results.output, norms.output, *figures.values()]
    console.say(out, "written: " + ", ".join(map(str, written)))
