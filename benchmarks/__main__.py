"""``python -m benchmarks``: measure, print a table, update results.json and RESULTS.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import results as store
from benchmarks.figures import FIGURES, measure
from benchmarks.machine import facts
from benchmarks.models import BUILDERS
from benchmarks.timing import Settings

HERE = Path(__file__).resolve().parent
Pair = tuple[str, str]


def main(
    models: Annotated[
        str, typer.Option(help="Comma list; t5 is for a GPU.", show_default="all that fit")
    ] = "",
    figures: Annotated[str, typer.Option(help="Comma list.", show_default="all")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians of this many.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results.", show_default="benchmarks"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy sizes, one repeat; writes only with --output.")
    ] = False,
) -> None:
    """Measure ngeval's speed and memory against their targets.

    Earlier results stay in results.json until they are measured again, so that a long run can be
    split.
    """
    usual = [name for name in BUILDERS if name != "t5" or device == "cuda"]
    pairs = chosen_pairs(
        _names(models, "model", list(BUILDERS), usual),
        _names(figures, "figure", list(FIGURES), list(FIGURES)),
    )
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"no device {device!r} here", param_hint="--device")
    if any(model == "t5" for _, model in pairs) and device == "cpu" and not quick:
        raise typer.BadParameter("t5 needs --device cuda", param_hint="--models")
    settings = Settings(device=device, repeats=1 if quick else repeats, quick=quick)
    folder = output if output is not None or quick else HERE
    results = store.load(folder / "results.json") if folder else {"runs": {}, "results": {}}
    console = Console()
    run_all(pairs, settings, results, folder, console)
    console.print(store.rich_table(results, device, set(pairs)))
    if folder:
        console.print(f"results.json and RESULTS.md are in {folder}")


def chosen_pairs(models: list[str], figures: list[str]) -> list[Pair]:
    """Pairs of a figure and a model, one model after the other."""
    return [
        (figure, model)
        for model in BUILDERS
        for figure in FIGURES
        if model in models and figure in figures and model in FIGURES[figure].models
    ]


def run_all(
    pairs: list[Pair],
    settings: Settings,
    results: store.Results,
    folder: Path | None,
    console: Console,
) -> None:
    """Measure, and save after every figure, so that an interrupted run keeps its results."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rates of matrix products", total=len(pairs))
        run = {**facts(settings), "quick": settings.quick}
        for figure, model in pairs:

            def show(step: str, name: str = f"{figure}, {model}") -> None:
                progress.update(task, description=f"{name}: {step}")

            result = measure(figure, model, replace(settings, on_step=show))
            if settings.quick:
                result["notes"].append("toy sizes, one repeat: no measure of speed")
                # The targets are for the full sizes.
                result["claims"] = [
                    {**claim, "reach": None, "met": None} for claim in result["claims"]
                ]
            store.add(results, (settings.device, figure, model), result, run)
            if folder:
                store.save(results, folder)
            for row in store.lines(figure, model, result):
                progress.console.print(
                    "  ".join(row[:6]).replace("*", ""), highlight=False, markup=False
                )
            if not result["claims"]:
                for note in result["notes"]:
                    progress.console.print(
                        f"{figure}  {model}  {note}", highlight=False, markup=False
                    )
            progress.advance(task)


def _names(text: str, kind: str, known: list[str], default: list[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or default
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}",
            param_hint=f"--{kind}s",
        )
    return names


if __name__ == "__main__":
    typer.run(main)
