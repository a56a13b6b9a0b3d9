"""What ``compare`` writes: rankings of methods, and tables of tuned optimizers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ngeval.analysis.ranking import ranking
from ngeval.analysis.training_results import checked_rows, performance
from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.tables import ranking_tables
from ngeval.cli.training_tables import performance_tables
from ngeval.errors import InputError, OutputError
from ngeval.plots import (
    FIGURE_SUFFIXES,
    kfac_figure,
    performance_figure,
    ranking_figure,
    save_figure,
)
from ngeval.plots.ranking import KFAC_METHODS
from ngeval.results.table_files import ResultFile, check_output, read_results

TRAINED = "training.parquet"
"""The table of tuned trainings in its folder."""

TABLES = (".csv", ".parquet", ".jsonl")
"""The endings of an ``--output`` that is a file for the table."""


def ranking_files(folder: Path, methods: list[str], overwrite: bool) -> dict[str, Path]:
    """The files of a ranking by kind; ``kfac`` is the figure of KFAC's variants, if there are any.

    Raises:
        InputError: the folder is the name of a file.
        OutputError: a file exists (unless ``overwrite``), or cannot be written.
    """
    if folder.suffix in (*TABLES, *FIGURE_SUFFIXES) and not folder.is_dir():
        raise InputError(f"output {folder}: a grading writes several files; give a folder")
    files = {"ranking": folder / "ranking.csv", "figure": folder / "ranking.png"}
    if set(methods) & set(KFAC_METHODS):
        files["kfac"] = folder / "kfac.png"
    for path in files.values():
        check_output(path, (*FIGURE_SUFFIXES, ".csv"), force=overwrite)
    return {"results": folder / "results.parquet"} | files  # which the run checks


def write_ranking(
    table: pd.DataFrame, files: dict[str, Path], damping: float | None, quiet: bool
) -> None:
    """Rank the methods of a γ table, and write and print the ranking and its figures."""
    ranked = ranking(table)
    with ResultFile(files["ranking"], force=True) as target:
        target.append(ranked)
    written = [files["results"], files["ranking"]]
    if table["gamma_over_ng"].notna().any():  # the figure ranks by γ/γ_min
        save_figure(ranking_figure(table), files["figure"])
        written.append(files["figure"])
    usable = table[table["method"].isin(KFAC_METHODS) & (table["status"] == "ok")]
    if "kfac" in files and not usable.empty:
        save_figure(kfac_figure(table, damping), files["kfac"])
        written.append(files["kfac"])
    out = console.table_console(quiet)
    for part in ranking_tables(ranked, table):
        out.print(part)
    say(out, "written: " + ", ".join(map(str, written)))


def compare_trained(paths: list[Path], output: Path | None, force: bool, quiet: bool) -> None:
    """Print the table of tuned optimizers, and write it, its figure, or both into a folder.

    Raises:
        InputError: see `read_trained`.
        OutputError: a file cannot be read, or the output exists (without ``force``).
    """
    files = _trained_files(output)
    for path in files.values():
        if path.resolve() in [read.resolve() for read in paths]:
            raise OutputError(f"output {path} holds the rows that are compared; give another")
        check_output(path, (*TABLES, *FIGURE_SUFFIXES), force=force)
    rows = read_trained(paths)
    table = performance(rows)
    if "table" in files and not table["seeds"].any():
        files.pop("figure", None)  # it would be empty
    if "table" in files:
        with ResultFile(files["table"], force=force) as target:
            target.append(table)
    if "figure" in files:
        save_figure(performance_figure(rows), files["figure"])
    out = console.table_console(quiet)
    for part in performance_tables(table, out.width):
        out.print(part)
    if files:
        say(out, "written: " + ", ".join(str(path) for path in files.values()))


def _trained_files(output: Path | None) -> dict[str, Path]:
    """The files that ``--trained`` writes: a table, a figure, or both in a folder."""
    if output is None:
        return {}
    if output.suffix in TABLES and not output.is_dir():
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
        file = path / TRAINED if path.is_dir() else path
        if not file.exists():
            where = f"{path} holds no {TRAINED}" if path.is_dir() else f"{path} does not exist"
            raise InputError(f"--trained: {where}; give a table of tuned trainings")
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
