"""Results on disk: a JSON file that runs add to, and the page written from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.figures import FIGURES
from benchmarks.models import BUILDERS

Results = dict[str, Any]
Entry = dict[str, Any]
COLUMNS = ("figure", "model", "quantity", "measured", "target", "met?", "median times")
FACTS = ("date", "cpu", "gpu", "cores", "threads", "torch", "ngeval", "load before")


def load(path: Path) -> Results:
    """The results so far."""
    if path.exists():
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        return results
    return {"runs": {}, "results": {}}


def add(results: Results, place: tuple[str, str, str], result: Entry, run: dict[str, Any]) -> None:
    """Replace the last measurement in the place (device, figure, model).

    Runs without any result left are removed.
    """
    device, figure, model = place
    label = str(run["date"])
    results["runs"][label] = run
    figures = results["results"].setdefault(device, {})
    figures.setdefault(figure, {})[model] = {**result, "run": label}
    used = {entry["run"] for name in results["results"] for *_, entry in entries(results, name)}
    results["runs"] = {key: facts for key, facts in results["runs"].items() if key in used}


def save(results: Results, folder: Path) -> None:
    """Write both files atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    for name, content in (("results.json", text + "\n"), ("RESULTS.md", page(results))):
        part = folder / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / name)


def entries(results: Results, device: str) -> Iterator[tuple[str, str, Entry]]:
    """All (figure, model, result) of a device, in the order of the tables."""
    measured = results["results"].get(device, {})
    for figure in FIGURES:
        for model in BUILDERS:
            if model in measured.get(figure, {}):
                yield figure, model, measured[figure][model]


def lines(figure: str, model: str, entry: Entry) -> list[tuple[str, ...]]:
    """The rows of a table for one result."""
    if "failed" in entry:
        return [(figure, model, FIGURES[figure].title, "failed", "", "no", "")]
    times = "; ".join(f"{name} {duration(value)}" for name, value in entry["seconds"].items())
    rows = []
    for i, claim in enumerate(entry["claims"]):
        target = "–"
        if claim["reach"] is not None:
            target = f"{claim['bound']} {number(claim['reach'], claim['unit'])}"
        met = {None: "–", True: "yes", False: "**no**"}[claim["met"]]
        measured = number(claim["value"], claim["unit"])
        first = i == 0
        rows.append(
            (figure, model, claim["quantity"], measured, target, met, times if first else "")
        )
    return rows


def rich_table(results: Results, device: str, chosen: set[tuple[str, str]]) -> Table:
    """The results of this run for the terminal."""
    table = Table(title=f"ngeval benchmarks on {device}")
    for column in COLUMNS[:-1]:
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for figure, model, entry in entries(results, device):
        if (figure, model) in chosen:
            for row in lines(figure, model, entry):
                colour = {"yes": "green", "no": "red", "**no**": "red"}.get(row[5], "")
                table.add_row(*row[:5], row[5].strip("*"), style=colour)
            if "failed" in entry:
                table.add_row("", "", escape(entry["failed"]), style="red")
    return table


def page(results: Results) -> str:
    """RESULTS.md."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks` from `results.json`; [README.md](README.md) describes "
        "the figures. GE (gradient equivalent): one plain forward and backward pass of the same "
        "batch, timed alternately with the figure.",
    ]
    for device in results["results"]:
        parts += [f"## On {device}", *_device_page(results, device)]
    return "\n\n".join(parts) + "\n"


def _device_page(results: Results, device: str) -> list[str]:
    measured = list(entries(results, device))
    rows = [row for entry in measured for row in lines(*entry)]
    verdicts = [row[5] for row in rows if row[5] != "–"]
    summary = f"{sum(met == 'yes' for met in verdicts)} of {len(verdicts)} targets met."
    notes = []
    for figure, model, entry in measured:
        texts = [*entry["notes"], *([entry["failed"]] if "failed" in entry else [])]
        if texts:
            notes.append(f"- `{figure}`, {model}: " + "; ".join(texts) + ".")
    runs = {entry["run"]: results["runs"][entry["run"]] for *_, entry in measured}
    return [summary, markdown(COLUMNS, rows), "Notes:", "\n".join(notes), *_runs(runs, measured)]


def _runs(runs: dict[str, Any], measured: list[tuple[str, str, Entry]]) -> list[str]:
    rows = []
    for label, facts in sorted(runs.items()):
        rates = f"{facts['float32 GF/s']} / {facts['float64 GF/s']}"
        figures = [
            f"{figure} {model}" for figure, model, entry in measured if entry["run"] == label
        ]
        values = [str(facts.get(name, "–")) for name in FACTS]
        rows.append((*values, rates, f"`{facts['command']}`", ", ".join(figures)))
    head = (*FACTS, "gemm GF/s, float32 / float64", "command", "measured in it")
    return ["Runs:", markdown(head, rows)]


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    table = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def number(value: float, unit: str) -> str:
    """Three digits, with at most three decimals, and the unit."""
    if not math.isfinite(value):
        return str(value)
    digits = min(3, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0
    text = f"{value:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}{'' if unit in ('×', '') else ' '}{unit}"


def duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
