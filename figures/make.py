"""Every figure of the README and of docs/: ``python -m figures.make [NAME …]`` in a clone.

A figure is drawn from rows in figures/data; ``--rows`` first runs the commands that make the rows
(an hour for all figures). figures/structure.json has the structure of each figure, the labels,
scales and series of its panels, which a test compares with figures of quick rows.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ngeval import plots
from ngeval.analysis.stages import three_stages
from ngeval.errors import InputError, nearest_name
from ngeval.results.manifest import manifest_path
from studies import STUDIES
from studies.toy.least_squares import LeastSquares
from studies.toy.picture import toy_figure

HERE = Path(__file__).parent
DATA = HERE / "data"
STRUCTURE = HERE / "structure.json"


@dataclass(frozen=True)
class Rows:
    """The command behind some rows of figures/data, which is run in an empty folder.

    Attributes:
        command: for the full size.
        quick: further options for a size of seconds, for the test.
        files: the files that it writes, by the name in figures/data.
        after: the name of the command whose output it reads.
    """

    command: str
    quick: str
    files: dict[str, str]
    after: str | None = None


CHECKPOINTS = "--task digits-mlp -c demo/checkpoints"
SOME = f"{CHECKPOINTS}/epoch-*2.safetensors"  # includes the last one of a quick run, too
ROWS = {
    "demo": Rows(
        "ngeval demo --output demo",
        "--epochs 2 --batch-size 16 --num-batches 1",
        {"digits": "demo/results.parquet", "digits-norms": "demo/imbalance.parquet"},
    ),
    "compare": Rows(
        f"ngeval compare {CHECKPOINTS} --output compare",
        "--batch-size 8 --num-batches 1 --dampings 1e-6,1 "
        "--methods sgd,ief,kfac,kfac-sf,kfac-ef,kfac-ief",
        {"digits-compare": "compare/results.parquet"},
        after="demo",
    ),
    "layers": Rows(
        f"ngeval layers {SOME} --methods sgd,adam:20,kfac,ief --damping 1e-3 -o layers.parquet",
        "--batch-size 8 --num-batches 1",
        {"digits-layers": "layers.parquet"},
        after="demo",
    ),
    "docstrings": Rows(
        "python -m figures.docstrings --output docstrings",
        "--quick",
        {
            f"docstrings-{name}{end}": f"docstrings/docstrings-{name}{end}.parquet"
            for name in ("lora", "prompt")
            for end in ("", "-norms")
        },
    ),
} | {
    name: Rows(
        f"python -m studies {name} --output studies", "--quick", {name: f"studies/{name}.parquet"}
    )
    for name in STUDIES
}
"""The commands behind figures/data, by name."""

TASKS = {
    "digits": "MLP on digits",
    "docstrings-lora": "T5 with LoRA",
    "docstrings-prompt": "T5 with prompt tuning",
}
"""The training runs of the figure *tasks*."""

Read = Callable[[str], pd.DataFrame]
"""Gives rows by their name in figures/data."""


def draw_damping(read: Read) -> Figure:
    """γ against λ at the first, the middle and the last epoch."""
    rows = read("digits")
    return plots.damping_figure(rows, three_stages(rows))


def draw_tasks(read: Read) -> Figure:
    """γ over training of three models, with the imbalance of gradient norms below."""

    def together(end: str) -> pd.DataFrame:
        parts = [read(f"{name}{end}").assign(task=title) for name, title in TASKS.items()]
        return pd.concat(parts, ignore_index=True)

    gammas = together("")
    shown = gammas[gammas["method"].isin(["sgd", "ef", "ief", "sf"])]
    return plots.stages_figure(shown, samples=together("-norms"))


PICTURES: dict[str, Callable[[Read], Figure]] = {
    "stages": lambda read: plots.stages_figure(read("digits")),
    "damping": draw_damping,
    "imbalance": lambda read: plots.norms_figure(read("digits-norms")),
    "tasks": draw_tasks,
    "kfac": lambda read: plots.kfac_figure(read("digits-compare")),
    "ranking": lambda read: plots.ranking_figure(read("digits-compare")),
    "layers": lambda read: plots.layers_figure(read("digits-layers")),
    "toy": lambda _: toy_figure(LeastSquares()),
} | {name: lambda read, name=name: STUDIES[name].figure(read(name)) for name in STUDIES}
"""The function that draws each figure."""


def committed(name: str) -> pd.DataFrame:
    """The rows in figures/data."""
    return pd.read_parquet(DATA / f"{name}.parquet")


def structure(figure: Figure) -> list[dict[str, Any]]:
    """The panels of a figure: labels, scales, series and legend; numbers in texts become #."""
    panels = [_panel(axes) for axes in figure.axes]
    legends = [legend_texts(legend) for legend in figure.legends]
    return [*panels, *({"legend": texts} for texts in legends)]


def _panel(axes: Axes) -> dict[str, Any]:
    legend = axes.get_legend()
    return {
        "title": _plain(axes.get_title() or axes.get_title(loc="left")),
        "x": [_plain(axes.get_xlabel()), axes.get_xscale()],
        "y": [_plain(axes.get_ylabel()), axes.get_yscale()],
        "series": sorted({_plain(label) for label in axes.get_legend_handles_labels()[1]}),
        "legend": legend_texts(legend) if legend else [],
    }


def legend_texts(legend: Any) -> list[str]:
    """The distinct texts of a legend, sorted."""
    return sorted({_plain(text.get_text()) for text in legend.get_texts()})


def _plain(text: str) -> str:
    """The text without numbers and line breaks, which differ between a quick and a full run."""
    numbers = r"[−-]?\d+(\.\d+)?(e[−+-]?\d+)?[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]*"
    return re.sub(numbers, "#", " ".join(text.split()))


def make_rows(name: str, folder: Path, *, quick: bool) -> dict[str, Path]:
    """Run the command behind some rows, after the one that it needs; return its files."""
    rows = ROWS[name]
    if rows.after is not None and not all(
        (folder / file).exists() for file in ROWS[rows.after].files.values()
    ):
        make_rows(rows.after, folder, quick=quick)
    words = shlex.split(f"{rows.command} {rows.quick}" if quick else rows.command)
    words = ["-m", *words] if words[0] == "ngeval" else words[1:]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}  # the studies are not installed
    subprocess.run(  # noqa: S603  # the commands are those above
        [sys.executable, *words], cwd=folder, check=True, env=environment
    )
    return {name: folder / file for name, file in rows.files.items()}


def behind(picture: str) -> list[str]:
    """The names of the commands that make a figure's rows."""
    names_read: list[str] = []

    def read(name: str) -> pd.DataFrame:
        names_read.append(name)
        return committed(name)

    PICTURES[picture](read)
    plt.close("all")
    return [name for name, rows in ROWS.items() if set(rows.files) & set(names_read)]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Figures; default: all.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="First make their rows again.")] = False,
) -> None:
    """Draw figures, and write their structure."""
    mpl.use("Agg")
    chosen = names or list(PICTURES)
    for name in chosen:
        if name not in PICTURES:
            raise InputError(f"unknown figure {name!r}; {nearest_name(name, PICTURES)}")
    if rows:
        renew(dict.fromkeys(command for name in chosen for command in behind(name)))
    structures = json.loads(STRUCTURE.read_text(encoding="utf-8")) if STRUCTURE.exists() else {}
    read = cache(committed)
    for name in chosen:
        figure = PICTURES[name](read)
        structures[name] = structure(figure)
        plots.save_figure(figure, HERE / f"{name}.png")
        print(f"{name}.png")
    ordered = {name: structures[name] for name in PICTURES if name in structures}
    text = json.dumps(ordered, indent=1, ensure_ascii=False)
    STRUCTURE.write_text(text + "\n", encoding="utf-8")


def renew(commands: Sequence[str] | dict[str, None]) -> None:
    """Make rows at full size in a temporary folder and copy them to figures/data."""
    with tempfile.TemporaryDirectory() as folder:
        for name in commands:
            for file, path in make_rows(name, Path(folder), quick=False).items():
                target = DATA / f"{file}.parquet"
                shutil.copy(path, target)
                if (manifest := manifest_path(path)).exists():
                    shutil.copy(manifest, manifest_path(target))


if __name__ == "__main__":
    typer.run(main)
