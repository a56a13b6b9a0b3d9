"""What ``compare`` writes: rankings of methods."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ngeval.analysis.ranking import ranking
from ngeval.analysis.tables import kind_of
from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.tables import ranking_tables
from ngeval.errors import InputError
from ngeval.plots import FIGURE_SUFFIXES, kfac_figure, ranking_figure, save_figure
from ngeval.plots.ranking import KFAC_METHODS
from ngeval.results.table_files import SUFFIXES, check_output, read_results, write_results


def refuse_tables(paths: Iterable[Path]) -> None:
    """Refuse result tables in place of checkpoints, before any work."""
    for path in paths:
        if path.suffix in SUFFIXES and path.is_file():
            kind = kind_of(read_results(path), str(path))
            raise InputError(f"{path} holds a table of {kind}; compare grades checkpoints")


def ranking_files(folder: Path, methods: list[str], overwrite: bool) -> dict[str, Path]:
    """The files of a ranking by kind, which can be written; ``kfac`` only if there is a variant."""
    if folder.suffix in (*SUFFIXES, *FIGURE_SUFFIXES) and not folder.is_dir():
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
    write_results(ranked, files["ranking"])
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
