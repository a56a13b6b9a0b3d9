"""``compare``: many methods over a training run, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from ngeval import console
from ngeval.commands.common import say
from ngeval.commands.grading import grade
from ngeval.comparison import ranking
from ngeval.methods import get_methods
from ngeval.options import (
    ForceOption,
    GradingOptions,
    HubOptions,
    MethodsOption,
    OutputOptions,
    QuietOption,
    RunOptions,
    StepOptions,
    parse_dampings,
    takes_options,
)
from ngeval.plots import FIGURE_SUFFIXES, kfac_figure, ranking_figure, save_figure
from ngeval.plots.comparison import KFAC_METHODS
from ngeval.prepared import check_dampings
from ngeval.results import ResultFile, check_output

METHODS = (
    "sgd,ef,ief,sf,diag,diag-ef:0.5,kfac,kfac-sf,kfac-ef,kfac-ief,ekfac,momentum:20,adam:20,"
    "adamw:20,nadam:20,rmsprop:20,adagrad:20,adafactor:20,muon:20"
)
"""What is compared by default: optimizers with a state of 20 batches at the checkpoint's weights,
which every checkpoint has, whatever it was trained with."""


@takes_options
def compare(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    grading: GradingOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")],
    methods: MethodsOption = METHODS,
    dampings: Annotated[
        str, typer.Option(help="λ: a comma list, or low:high:count; each method takes its best.")
    ] = "1e-8:1e2:11",
    damping: Annotated[
        float | None, typer.Option(help="λ for all in kfac.png; default: the smallest.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rank many methods and optimizers over a training run by γ/γ_min.

    Writes results.parquet (every row), ranking.csv and ranking.png (an early, a middle and a late
    checkpoint) and kfac.png (iEF and KFAC's kinds over training) into the folder.

    [bold]Examples:[/bold]

    ngeval compare --task digits-mlp --checkpoint runs/mlp --output compared

    ngeval compare --task my.py:task -c runs/a --methods sgd,kfac,adamw,pytorch_optimizer.SOAP:20
    --output compared
    """
    names = [method.name for method in get_methods(methods)]
    values = check_dampings(parse_dampings(dampings))
    files = _files(output, names)
    for path in files.values():
        check_output(path, (*FIGURE_SUFFIXES, ".csv", ".parquet"), force=force)
    if damping is not None:
        values = check_dampings([*values, damping])
    out = OutputOptions(files["results"], force, quiet)
    table = grade((run, hub, step), grading, out, methods, values)
    ranked = ranking(table)
    with ResultFile(files["ranking"], force=force) as target:
        target.append(ranked)
    _draw(table, files, damping)
    shown = console.table_console(quiet)
    for part in console.ranking_tables(ranked, table):
        shown.print(part)
    say(shown, "written: " + ", ".join(str(path) for path in files.values()))


def _files(folder: Path, methods: list[str]) -> dict[str, Path]:
    """What is written; the picture of KFAC's kinds where one of them is asked for."""
    files = {"results": folder / "results.parquet", "ranking": folder / "ranking.csv"}
    files["figure"] = folder / "ranking.png"
    if set(methods) & set(KFAC_METHODS):
        files["kfac"] = folder / "kfac.png"
    return files


def _draw(table: pd.DataFrame, files: dict[str, Path], damping: float | None) -> None:
    if table["gamma_over_ng"].notna().any():
        save_figure(ranking_figure(table), files["figure"])
    else:  # without γ_min there is nothing to rank by in the picture
        files.pop("figure")
    if "kfac" not in files:
        return
    usable = table[table["method"].isin(KFAC_METHODS) & (table["status"] == "ok")]
    if usable.empty:
        files.pop("kfac")
    else:
        save_figure(kfac_figure(table, damping), files["kfac"])
