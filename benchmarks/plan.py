"""``python -m benchmarks.plan``: what ``ngeval plan`` says of the models here, against the truth.

The truth is the wall time of the run itself, from building the model to the last unit's table.
Plans and runs have a fresh process each, in turns, so that none finds what another has warmed and
all meet the same neighbours on the machine.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import ngeval
from benchmarks.models import BUILDERS, Inputs, build
from benchmarks.sweeps import dampings
from ngeval.checkpoints import Checkpoint
from ngeval.planning import plan
from ngeval.planning.footprint import watch_memory
from ngeval.runs.run import Grading, Run

METHODS = ("sgd", "ef", "sf", "ief", "diag", "ng")

LIGHT = ("sgd", "ef", "sf", "ief")
"""Of models on which the exact natural gradient takes hours here."""

HEAVY = ("gpt", "t5", "t5-small")

PARTS = {"N/4": 4, "N": 1}
"""What part of a batch the probe may reach."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a machine that others use too, the processor time of a process with one thread is what it
would take alone."""


def make_run(name: str, units: int, device: str, quick: bool) -> Run:
    """A run of a benchmark model, as it is built, on its batch again and again."""
    workload = build(name, device, quick=quick)

    def batches(size: int, count: int | None, seed: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
        return itertools.repeat((workload.inputs, workload.targets), count or 1)

    task = ngeval.Task(name, lambda: workload.model, batches, workload.likelihood)
    return Run(
        task,
        [Checkpoint(Path(name), {}, as_built=True)],
        batch_size=len(workload.targets),
        num_batches=units,
        device=device,
    )


def settings(
    name: str, count: int, natural: bool
) -> tuple[tuple[str, ...], list[float], str, Grading]:
    """Methods, dampings, their scale and the grading."""
    light = name in HEAVY if natural is None else not natural
    return LIGHT if light else METHODS, dampings(count), "absolute", Grading(natural=not light)


def planned(
    name: str,
    units: int,
    device: str,
    quick: bool,
    count: int,
    natural: bool | None,
    clock: str,
    part: int,
) -> tuple[float, float, int]:
    """The plan's seconds for the run and its peak memory, and the samples that it reached."""
    run = make_run(name, units, device, quick)
    most = max(1, run.batch_size // part)
    made = plan(run, *settings(name, count, natural), max_samples=most, clock=CLOCKS[clock])
    return made.seconds(), made.peak_bytes, made.rungs[-1].samples


def true(
    name: str, units: int, device: str, quick: bool, count: int, natural: bool | None, clock: str
) -> tuple[float, float, int]:
    """The run's seconds and its process's peak memory."""
    run = make_run(name, units, device, quick)
    with watch_memory(device) as peak:
        start = CLOCKS[clock]()
        for table in run.gammas(*settings(name, count, natural)):
            if (table["status"] == "failed").any():
                raise SystemExit(f"{name}: {table['reason'].iloc[0]}")
        seconds = CLOCKS[clock]() - start
    return seconds, peak.bytes, run.batch_size


def afresh(job: Callable[..., tuple[float, float, int]], *args: object) -> tuple[float, float, int]:
    """Call it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(job, args)


def main(
    models: Annotated[str, typer.Option(help="Comma list.")] = "mlp,cnn,vit",
    units: Annotated[int, typer.Option(min=2, help="Batches of the run.")] = 3,
    count: Annotated[int, typer.Option("--dampings", help="How many.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Ratios are medians of so many.")] = 3,
    natural: Annotated[
        bool | None,
        typer.Option(help="With the exact natural gradient; default: but of gpt and t5."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    clock: Annotated[
        str, typer.Option(help="wall, or cpu (with OMP_NUM_THREADS=1) on a busy machine.")
    ] = "wall",
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes.")] = False,
) -> None:
    """Hold plans against runs: one where the probe may use a quarter of the batch, one of all."""
    title = (
        f"planned over true, medians of {repeats}; {units} units, {count} dampings, {clock} clock"
    )
    table = Table(title=title)
    columns = (
        "model",
        "probe",
        "reached",
        "planned",
        "true",
        "ratio",
        "from",
        "to",
        "memory ratio",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "probe") else "right")
    if clock not in CLOCKS:
        raise typer.BadParameter(f"unknown clock {clock}; wall or cpu")
    for name in models.split(","):
        if name not in BUILDERS:
            raise typer.BadParameter(f"unknown model {name}; one of {', '.join(BUILDERS)}")
        arguments = (name, units, device, quick, count, natural, clock)
        found: dict[str, list[tuple[float, ...]]] = {label: [] for label in PARTS}
        for _ in range(repeats):
            runs = [afresh(true, *arguments)]
            plans = {label: afresh(planned, *arguments, part) for label, part in PARTS.items()}
            runs.append(afresh(true, *arguments))
            seconds, memory = (statistics.mean(run[i] for run in runs) for i in (0, 1))
            for label, (guess, peak, reached) in plans.items():
                found[label].append((guess, seconds, guess / seconds, peak / memory, reached))
                print(f"{name} {label} load {os.getloadavg()[0]:.1f}", found[label][-1], flush=True)
        for label, rows in found.items():
            middle = [statistics.median(column) for column in zip(*rows, strict=True)]
            each = [row[2] for row in rows]
            table.add_row(
                *(name, label, f"{middle[4]:.0f}", f"{middle[0]:.3g} s", f"{middle[1]:.3g} s"),
                *(f"{value:.2f}" for value in (middle[2], min(each), max(each), middle[3])),
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
