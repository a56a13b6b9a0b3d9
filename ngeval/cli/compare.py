"""``compare``: many methods over a training run, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from ngeval.analysis.ranking import ranking
from ngeval.analysis.training_results import checked_rows, performance
from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.grade import grade
from ngeval.cli.spread_options import (
    ForceOption,
    MethodsOption,
    QuietOption,
    ResumeOption,
    takes_options,
)
from ngeval.cli.training_tables import performance_tables
from ngeval.errors import InputError, OutputError
from ngeval.grading.prepare import check_dampings
from ngeval.methods import get_methods
from ngeval.plots import (
    FIGURE_SUFFIXES,
    kfac_figure,
    performance_figure,
    ranking_figure,
    save_figure,
)
from ngeval.plots.ranking import KFAC_METHODS
from ngeval.results.table_files import ResultFile, check_output, read_results
from ngeval.runs.options import (
    GradingOptions,
    HubOptions,
    OutputOptions,
    RunOptions,
    StepOptions,
    parse_dampings,
)
from ngeval.runs.ranks import own_rank
from ngeval.training.run import RESULTS

METHODS = (
    "sgd,ef,ief,sf,diag,diag-ef:0.5,kfac,kfac-sf,kfac-ef,kfac-ief,ekfac,momentum:20,adam:20,"
    "adamw:20,nadam:20,rmsprop:20,adagrad:20,adafactor:20,muon:20"
)
"""What is compared by default: optimizers with a state of 20 batches at the checkpoint's weights,
which every checkpoint has, whatever it was trained with."""

TABLES = (".csv", ".parquet", ".jsonl")
"""What ``--output`` ends in where it is a file for the table of ``--trained``."""


@takes_options
def compare(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    grading: GradingOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder; with --trained also a file for the table or picture."
        ),
    ] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(
            help="training.parquet of `ngeval train`, or its folder; repeat or list several. In "
            "place of --task and --checkpoint."
        ),
    ] = None,
    methods: MethodsOption = METHODS,
    dampings: Annotated[
        str, typer.Option(help="λ: a comma list, or low:high:count; each method takes its best.")
    ] = "1e-8:1e2:11",
    damping: Annotated[
        float | None, typer.Option(help="λ for all in kfac.png; default: the smallest.")
    ] = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rank many methods over a training run by γ/γ_min, or trained optimizers by test performance.

    Writes results.parquet (every row), ranking.csv and ranking.png (an early, a middle and a late
    checkpoint) and kfac.png (iEF and KFAC's kinds over training) into the folder.

    With --trained: the tuned optimizers of `ngeval train` side by side, means over seeds with
    95 % intervals; performance.csv and performance.png go into the folder, if one is given.

    [bold]Examples:[/bold]

    ngeval compare --task digits-mlp --checkpoint runs/mlp --output compared

    ngeval compare --task my.py:task -c runs/a --methods sgd,kfac,adamw,pytorch_optimizer.SOAP:20
    --output compared

    ngeval compare --trained runs/tuned --trained runs/cnn/training.parquet --output table.csv
    """
    if trained:
        if own_rank():  # a table is made by one process
            return
        _refuse_grading(run, hub)
        compare_trained([*trained, *map(Path, run.more or ())], output, force, quiet)
        return
    if output is None:
        raise InputError("give a folder for the results (--output)")
    if output.suffix in (*TABLES, *FIGURE_SUFFIXES) and not output.is_dir():
        raise InputError(f"output {output}: a grading writes several files; give a folder")
    names = [method.name for method in get_methods(methods)]
    values = check_dampings(parse_dampings(dampings))
    files = _files(output, names)
    for name, path in files.items():
        if name != "results":  # which is looked at by itself: it may be gone on with
            check_output(path, (*FIGURE_SUFFIXES, ".csv", ".parquet"), force=force or resume)
    if damping is not None:
        values = check_dampings([*values, damping])
    out = OutputOptions(files["results"], force, resume, quiet)
    made = grade((run, hub, step), grading, out, methods, values)
    table = made.table
    ranked = ranking(table)
    with ResultFile(files["ranking"], force=force or resume) as target:
        target.append(ranked)
    _draw(table, files, damping)
    shown = console.table_console(quiet)
    for part in console.ranking_tables(ranked, table):
        shown.print(part)
    say(shown, "written: " + ", ".join(str(path) for path in files.values()))
    made.finish()


def _refuse_grading(run: RunOptions, hub: HubOptions) -> None:
    given = {"--task": run.task, "--checkpoint": run.checkpoint, "--hf-model": hub.hf_model}
    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise InputError(
            f"--trained compares finished trainings, {wrong[0]} grades a run's checkpoints; give "
            "one or the other"
        )


def compare_trained(paths: list[Path], output: Path | None, force: bool, quiet: bool) -> None:
    """Print the table of tuned optimizers; write it, or the picture, or into a folder both.

    Raises:
        InputError: no such rows, or an optimizer on a task in several files.
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
        files.pop("figure", None)  # which would be empty
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
    """What ``--trained`` writes: a table, a picture, or both in a folder."""
    if output is None:
        return {}
    if output.suffix in TABLES and not output.is_dir():
        return {"table": output}
    if output.suffix in FIGURE_SUFFIXES and not output.is_dir():
        return {"figure": output}
    return {"table": output / "performance.csv", "figure": output / "performance.png"}


def read_trained(paths: list[Path]) -> pd.DataFrame:
    """The rows of several searches, each of its own optimizers or tasks.

    Args:
        paths: result files of `ngeval train`, or the folders that hold them.

    Raises:
        InputError: there is no such file, the rows are of another kind, or an optimizer on a task
            is in several files.
        OutputError: a file cannot be read.
    """
    frames: list[pd.DataFrame] = []
    seen: dict[tuple[str, str], Path] = {}
    for path in paths:
        file = path / RESULTS if path.is_dir() else path
        if not file.exists():
            where = f"{path} holds no {RESULTS}" if path.is_dir() else f"{path} does not exist"
            raise InputError(f"--trained: {where}; give a result file of `ngeval train`")
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
