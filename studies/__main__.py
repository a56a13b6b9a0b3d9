"""``python -m studies``: the experiments as rows, figures and findings; the toy; trainings."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from ngeval.cli import console
from ngeval.cli.options import ForceOption, QuietOption, SeedOption
from ngeval.errors import InputError, OutputError
from ngeval.plots import save_figure
from ngeval.results.manifest import manifest, write_manifest
from ngeval.results.table_files import SUFFIXES, check_output, read_results, write_results
from studies import STUDIES, Finding, Study, get_study
from studies.base import QUICK, Size, check_packages, check_rows, identified, report
from studies.toy.command import toy
from studies.trained import trained

OTHERS: dict[str, Callable[..., None]] = {"toy": toy, "trained": trained}
"""The commands that are not studies."""

DEFAULT_FOLDER = Path("ngeval-studies")
COLOURS = {"confirmed": "green", "not confirmed": "red", "under conditions": "yellow"}


class Programs(console.Commands):
    """The first word of the command line is a key of `OTHERS` or the name of a study."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in OTHERS else ["study", *args])


app = typer.Typer(
    cls=Programs,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=f"`python -m studies NAME` runs a study: {', '.join(STUDIES)}. "
    "`python -m studies` describes them, `python -m studies toy` draws two parameters and two "
    "samples, and `python -m studies trained` compares tuned optimizers.",
)
for command in OTHERS.values():
    app.command()(command)


@app.callback(invoke_without_command=True)
def list_studies(context: typer.Context) -> None:
    """List the studies, unless one is given."""
    if context.invoked_subcommand is not None:
        return
    table = Table("study", "what it is", "minutes on one core", "needs")
    for name, entry in STUDIES.items():
        needs = ", ".join(entry.needs) or "–"
        table.add_row(name, entry.title, f"{entry.minutes:g}", needs)
    console.table_console().print(table)


@app.command(hidden=True)
def study(
    name: Annotated[str, typer.Argument(help="`python -m studies` lists them.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A small size of a few seconds, to try the study.")
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
        typer.Option("--from", help="Rows of an earlier run, for its figure and findings."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data of a study that reads any.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run an experiment of the two papers: NAME.parquet, NAME.png and NAME.md with the verdicts.

    [bold]Examples:[/bold]

    python -m studies

    python -m studies why-ef-fails --quick --output studies

    python -m studies diagonal --from studies/diagonal.parquet --force
    """
    chosen = get_study(name)
    if data_dir is not None and not chosen.data:
        raise InputError(f"the study {name!r} makes its own data; leave --data-dir out")
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder")
    beside = rows_from.parent if rows_from else DEFAULT_FOLDER
    files = Files.of(output or beside, chosen.name, force)
    if rows_from is None:
        check_packages(chosen)
        size: Size = "quick" if quick else "full"
        check_output(files.rows, SUFFIXES, force=force)
        rows = _run(chosen, size, seed, data_dir, files.rows, quiet)
    else:
        rows = check_rows(read_results(rows_from), chosen)
    findings = files.write(chosen, rows)
    out = console.table_console(quiet)
    out.print(findings_table(chosen, findings))
    if rows["size"].iloc[0] == "quick":
        console.say(out, QUICK)
    written = [files.figure, files.findings] if rows_from else list(vars(files).values())
    console.say(out, "written: " + ", ".join(map(str, written)))


@dataclass(frozen=True)
class Files:
    """The files of a study in a folder."""

    rows: Path
    figure: Path
    findings: Path

    @classmethod
    def of(cls, folder: Path, name: str, force: bool) -> Files:
        """Check that the figure and the findings can be written, before any work.

        Raises:
            OutputError: one exists (without ``force``), or the folder cannot be written.
        """
        rows, figure, findings = (folder / f"{name}.{end}" for end in ("parquet", "png", "md"))
        for path in (figure, findings):
            check_output(path, (path.suffix,), force=force)
        return cls(rows, figure, findings)

    def write(self, study: Study, rows: pd.DataFrame) -> list[Finding]:
        """Write the figure and the findings of some rows.

        Raises:
            OutputError: the disk is full, or the folder can no longer be written.
        """
        findings = study.findings(rows)
        save_figure(study.figure(rows), self.figure)
        try:
            self.findings.write_text(report(study, rows, findings), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self.findings} cannot be written: {error}") from error
        return findings


def _run(
    study: Study, size: Size, seed: int, data_dir: Path | None, output: Path, quiet: bool
) -> pd.DataFrame:
    """Run a study with a progress bar for each part, writing the rows of a part when it ends."""
    bars: dict[str, Any] = {}
    options = {"data_dir": data_dir} if study.data else {}
    record = manifest({"study": study.name, "size": size, "seed": seed})
    parts: list[pd.DataFrame] = []
    with console.progress_bar(quiet) as bar:

        def advance(step: str, total: int) -> None:
            if step not in bars:
                bars[step] = bar.add_task(step, total=total)
            bar.advance(bars[step])

        for rows in study.run(size, seed, advance, **options):
            parts.append(identified(rows, study, size, seed))
            write_results(pd.concat(parts, ignore_index=True), output)
            if len(parts) == 1:  # after the rows, so that it never lies beside older ones
                write_manifest(output, record)
    return pd.concat(parts, ignore_index=True)


def findings_table(study: Study, findings: list[Finding]) -> Table:
    """Claims with their verdicts and the numbers behind them."""
    table = Table("claim", "verdict", "evidence", title=study.title, show_lines=True)
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(
            escape(finding.claim), f"[{colour}]{finding.verdict}[/]", escape(finding.evidence)
        )
    return table


def main() -> None:
    """Entry point of ``python -m studies``."""
    mpl.use("Agg")
    signal.signal(signal.SIGTERM, console.terminate)
    app(prog_name="python -m studies")


if __name__ == "__main__":
    main()
