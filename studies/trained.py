"""``python -m studies trained``: the table and the picture of tuned optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from ngeval.cli import console
from ngeval.cli.options import ForceOption, QuietOption
from ngeval.errors import InputError, OutputError
from ngeval.plots import FIGURE_SUFFIXES, save_figure
from ngeval.results.table_files import SUFFIXES, check_output, read_results, write_results
from studies.training_picture import performance_figure
from studies.training_results import checked_rows, performance
from studies.training_tables import performance_tables

FILE_NAME = "training.parquet"
"""The table of tuned trainings in its folder."""


def trained(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER...",
            help="Tables of tuned trainings (training.parquet), or the folders that hold them.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder, or a file for the table or the picture."),
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare tuned optimizers: test performance and training loss, means with 95 % intervals.

    The intervals are over the seeds of the final trainings. performance.csv and performance.png go
    into the folder, if one is given.

    [bold]Examples:[/bold]

    python -m studies trained runs/tuned

    python -m studies trained runs/tuned runs/cnn/training.parquet --output table.csv
    """
    files = _output_files(output)
    for path in files.values():
        if path.resolve() in [read.resolve() for read in results]:
            raise OutputError(f"output {path} holds the rows that are compared; give another file")
        check_output(path, (*SUFFIXES, *FIGURE_SUFFIXES), force=force)
    rows = read_trained(results)
    table = performance(rows)
    if "table" in files and not table["seeds"].any():
        files.pop("figure", None)  # it would be empty
    if "table" in files:
        write_results(table, files["table"])
    if "figure" in files:
        save_figure(performance_figure(rows), files["figure"])
    out = console.table_console(quiet)
    for part in performance_tables(table, out.width):
        out.print(part)
    if files:
        console.say(out, "written: " + ", ".join(str(path) for path in files.values()))


def _output_files(output: Path | None) -> dict[str, Path]:
    """The files to write: a table, a figure, or both in a folder."""
    if output is None:
        return {}
    if output.suffix in SUFFIXES and not output.is_dir():
        return {"table": output}
    if output.suffix in FIGURE_SUFFIXES and not output.is_dir():
        return {"figure": output}
    return {"table": output / "performance.csv", "figure": output / "performance.png"}


def read_trained(paths: list[Path]) -> pd.DataFrame:
    """The rows of tuned trainings in several files.

    Args:
        paths: the files, or the folders that hold a ``training.parquet``.

    Raises:
        InputError: a file does not exist or holds a different kind of rows, or an optimizer on a
            task is in several files.
        OutputError: a file cannot be read.
    """
    frames: list[pd.DataFrame] = []
    seen: dict[tuple[str, str], Path] = {}
    for path in paths:
        file = path / FILE_NAME if path.is_dir() else path
        if not file.exists():
            where = f"{path} holds no {FILE_NAME}" if path.is_dir() else f"{path} does not exist"
            raise InputError(f"{where}; give a table of tuned trainings")
        frame = checked_rows(read_results(file), str(file))
        for task, optimizer in frame[["task", "optimizer"]].drop_duplicates().to_numpy():
            if (task, optimizer) in seen:
                raise InputError(
                    f"{optimizer} on {task} is in {seen[task, optimizer]} and in {file}; its seeds "
                    "would be mixed: give one of them"
                )
            seen[task, optimizer] = file
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
