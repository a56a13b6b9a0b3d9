"""``study``: the papers' experiments, each as rows, a figure and findings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.cli.spread_options import ForceOption, QuietOption, SeedOption
from ngeval.errors import InputError, OutputError
from ngeval.plots import save_figure
from ngeval.results.manifest import manifest
from ngeval.results.table_files import ResultFile, check_output, read_results
from ngeval.utils.optional import optional_module
from studies import STUDIES, Finding, Study, get_study
from studies.base import QUICK, Size, check_rows, identified, report

DEFAULT_FOLDER = Path("ngeval-studies")
COLOURS = {"confirmed": "green", "not confirmed": "red", "under conditions": "yellow"}


def study(
    name: Annotated[str | None, typer.Argument(help="Which; none: list them.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds' size, to see that it works.")
    ] = False,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=f"Folder; default: {DEFAULT_FOLDER}, or that of --from."
        ),
    ] = None,
    rows_from: Annotated[
        Path | None,
        typer.Option("--from", help="Rows of an earlier run: figure and findings again."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the study's data, where it takes any.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run an experiment of the two papers: NAME.parquet, NAME.png and NAME.md with the verdicts.

    [bold]Examples:[/bold]

    ngeval study

    ngeval study why-ef-fails --quick --output studies

    ngeval study diagonal --from studies/diagonal.parquet --force
    """
    if name is None:
        _list(quiet)
        return
    chosen = get_study(name)
    if data_dir is not None and not chosen.data:
        raise InputError(f"the study {name!r} makes its own data; leave --data-dir out")
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder")
    beside = rows_from.parent if rows_from else DEFAULT_FOLDER
    files = Files.of(output or beside, chosen.name, force)
    if rows_from is None:
        for package in chosen.needs:
            optional_module(package)  # what is missing is told now, not in the midst of the work
        size: Size = "quick" if quick else "full"
        told = manifest({"study": name, "size": size, "seed": seed})
        target = ResultFile(files.rows, force=force, told=told)
        rows = _run(chosen, size, seed, data_dir, target, quiet)
    else:
        rows = check_rows(read_results(rows_from), chosen)
    findings = files.write(chosen, rows)
    out = console.table_console(quiet)
    out.print(findings_table(chosen, findings))
    if rows["size"].iloc[0] == "quick":
        say(out, QUICK)
    written = [files.figure, files.findings] if rows_from else list(vars(files).values())
    say(out, "written: " + ", ".join(map(str, written)))


@dataclass(frozen=True)
class Files:
    """What is written into the folder."""

    rows: Path
    figure: Path
    findings: Path

    @classmethod
    def of(cls, folder: Path, name: str, force: bool) -> Files:
        """Check before any work that figure and findings can be written.

        Raises:
            OutputError: one exists (without ``force``), or the folder cannot be written.
        """
        rows, figure, findings = (folder / f"{name}.{end}" for end in ("parquet", "png", "md"))
        for path in (figure, findings):
            check_output(path, (path.suffix,), force=force)
        return cls(rows, figure, findings)

    def write(self, study: Study, rows: pd.DataFrame) -> list[Finding]:
        """Make figure and findings of the rows, and write both.

        Raises:
            OutputError: the disk is full or the folder cannot be written any more.
        """
        findings = study.findings(rows)
        save_figure(study.figure(rows), self.figure)
        try:
            self.findings.write_text(report(study, rows, findings), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self.findings} cannot be written: {error}") from error
        return findings


def _run(
    study: Study, size: Size, seed: int, data_dir: Path | None, target: ResultFile, quiet: bool
) -> pd.DataFrame:
    """Run a study with a progress bar for each part; what is finished reaches the file."""
    bars: dict[str, Any] = {}
    options = {"data_dir": data_dir} if study.data else {}
    with console.progress_bar(quiet) as bar, target:

        def advance(step: str, total: int) -> None:
            if step not in bars:
                bars[step] = bar.add_task(step, total=total)
            bar.advance(bars[step])

        for rows in study.run(size, seed, advance, **options):
            target.append(identified(rows, study, size, seed))
    return target.table()


def findings_table(study: Study, findings: list[Finding]) -> Table:
    """Claims with their verdicts and numbers."""
    shown = Table("claim", "verdict", "evidence", title=study.title, show_lines=True)
    for finding in findings:
        colour = COLOURS[finding.verdict]
        shown.add_row(
            escape(finding.claim), f"[{colour}]{finding.verdict}[/]", escape(finding.evidence)
        )
    return shown


def _list(quiet: bool) -> None:
    shown = Table("study", "what it is", "minutes on one core", "needs")
    for name, entry in STUDIES.items():
        needs = ", ".join(entry.needs) or "–"
        shown.add_row(name, entry.title, f"{entry.minutes:g}", needs)
    console.table_console(quiet).print(shown)
