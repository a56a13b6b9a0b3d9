"""What commands share: output that is checked before work, progress, failures in one message."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from rich.console import Console
from torch import nn

from ngeval import console
from ngeval.checkpoints import Checkpoint
from ngeval.errors import InputError
from ngeval.evaluate import Progress
from ngeval.manifest import manifest
from ngeval.options import OutputOptions
from ngeval.results import ResultFile
from ngeval.runs import Run

Tables = Callable[[Run, Progress], Iterator[pd.DataFrame]]
"""The tables of a run, one for each unit; methods that are done are told on the way."""


def say(out: Console, text: str) -> None:
    """Print as it is: a path may hold brackets."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def check_result(out: OutputOptions) -> None:
    """Before any work.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    if out.output is not None:
        ResultFile(out.output, force=out.force)


def collect(
    job: Run,
    tables: Tables,
    description: str,
    out: OutputOptions,
    steps: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Run through the units with a progress bar; what is finished reaches the output file.

    Beside the output file its manifest is written, with the first rows.

    Args:
        job: the run.
        tables: makes a table for each unit.
        description: of the work.
        out: where the rows go.
        steps: the methods that are told of in each unit; none where a unit is one step.
        options: the command's, for the manifest.
    """
    target = None
    if out.output is not None:
        told = manifest(options or {}, facts=facts(job))
        target = ResultFile(out.output, force=out.force, told=told)
    size = max(1, len(steps))
    frames: list[pd.DataFrame] = []
    with console.progress_bar(out.quiet) as bar, target or contextlib.nullcontext():
        task = bar.add_task(description, total=job.num_units * size)

        def tell(checkpoint: Checkpoint, model: nn.Module) -> None:
            if checkpoint.is_adapter and not out.quiet:
                say(bar.console, f"{checkpoint.name}: {console.trainable_line(model)}")

        def advance(step: str) -> None:
            if step in steps:
                bar.advance(task)

        for table in tables(replace(job, on_model=tell), advance):
            frames.append(table)
            if target is not None:
                target.append(table)
            bar.update(task, completed=len(frames) * size)
    if target is not None and not out.quiet:
        print(f"written: {target.path} ({target.rows} rows)", file=sys.stderr)
    return pd.concat(frames, ignore_index=True)


def facts(job: Run) -> dict[str, Any]:
    """What a run's options came to, for its manifest."""
    return {
        "task": job.task.name,
        "description": job.task.description,
        "likelihood": repr(job.task.resolved_likelihood()),
        "checkpoints": [checkpoint.name for checkpoint in job.checkpoints],
        "batch_size": job.batch_size,
        "num_batches": job.num_batches,
        "seed": job.seed,
        "device": job.device,
        "dtype": "the model's" if job.dtype is None else str(job.dtype).removeprefix("torch."),
        "engine": job.engine,
    }


def report_failures(table: pd.DataFrame) -> None:
    """Say how many rows could not be computed, and why.

    Raises:
        InputError: none could.
    """
    lost = table[table["status"] != "ok"]
    if lost.empty:
        return
    reasons = "; ".join(dict.fromkeys(lost["reason"]))
    message = f"{len(lost)} of {len(table)} rows could not be computed: {reasons}"
    if len(lost) == len(table):
        raise InputError(message)
    print(f"ngeval: {message}", file=sys.stderr)
