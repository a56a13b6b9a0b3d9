"""The verdicts in docs/what-we-found.md, from the committed rows: ``python -m figures.findings``.

The rows in figures/data were made by ``python -m studies NAME``; ``--figures`` draws the
figures as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import pandas as pd
import typer

from ngeval.plots import save_figure
from ngeval.results.table_files import read_results
from studies import STUDIES, Finding, Study
from studies.base import check_rows
from studies.training_results import average_ranks, performance

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-we-found.md"
DATA = ROOT / "figures" / "data"

BEGIN = "<!-- from here on made by figures/findings.py -->\n"
END = "<!-- up to here -->\n"


def main(
    figures: Annotated[bool, typer.Option("--figures", help="Draw the figures, too.")] = False,
) -> None:
    """Write the page."""
    mpl.use("Agg")
    PAGE.write_text(page(), encoding="utf-8")
    for name in STUDIES if figures else ():
        save_figure(STUDIES[name].figure(rows_of(STUDIES[name])), ROOT / "figures" / f"{name}.png")


def rows_of(study: Study) -> pd.DataFrame:
    """The committed rows."""
    return check_rows(read_results(DATA / f"{study.name}.parquet"), study)


def page() -> str:
    """The page, with the part between the marks written again."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    rows = {name: rows_of(study) for name, study in STUDIES.items()}
    findings = {name: STUDIES[name].findings(table) for name, table in rows.items()}
    sections = [section(STUDIES[name], rows[name], findings[name]) for name in STUDIES]
    return "".join([before, BEGIN, "\n".join([overview(findings), *sections]), END, after])


def overview(findings: dict[str, list[Finding]]) -> str:
    """One line for each claim."""
    lines = ["| claim | source | verdict | study |", "|---|---|---|---|"]
    lines += [
        f"| {each.claim} | {each.source} | **{each.verdict}** | [{name}](#{name}) |"
        for name, of_study in findings.items()
        for each in of_study
    ]
    return "\n".join(lines) + "\n"


def section(study: Study, rows: pd.DataFrame, findings: list[Finding]) -> str:
    """A study with its figure, its command, and the numbers behind each verdict."""
    seed = rows["study_seed"].iloc[0]
    lines = [
        f"## {study.name}",
        "",
        f"{study.title}. `python -m studies {study.name} --seed {seed} --output studies` "
        f"({len(rows):,} rows, about {study.minutes:g} minutes on one core).",
        "",
        f"![{study.title}](../figures/{study.name}.png)",
        "",
    ]
    if study.name == "optimization":
        lines += [*performance_table(rows), ""]
    for each in findings:
        rule = f" *Rule:* {each.rule}." if each.rule else ""
        lines += [f"- **{each.claim}: {each.verdict}.** {each.evidence.rstrip('.')}.{rule}"]
    return "\n".join(lines) + "\n"


def performance_table(rows: pd.DataFrame) -> list[str]:
    """The table of ``python -m studies trained``: test accuracy and final training loss by task."""
    table = performance(rows)
    names = list(dict.fromkeys(table["optimizer"]))
    ranks = average_ranks(table)
    lines = [
        "Test accuracy at the best validation epoch (%) and training loss after the last epoch "
        "(nats), mean over 5 seeds ± half the 95 % t-interval; "
        "`python -m studies trained figures/data/optimization.parquet` prints it:",
        "",
        f"| task | | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for task, part in table.groupby("task", sort=False):
        by_name = part.set_index("optimizer")
        for what, scale, form in (("test_accuracy", 100, ".2f"), ("train_loss", 1, ".3g")):
            mean, high = by_name[f"{what}_mean"] * scale, by_name[f"{what}_high"] * scale
            best = mean.idxmax() if what == "test_accuracy" else mean.idxmin()
            cells = {n: f"{mean[n]:{form}} ± {high[n] - mean[n]:{form}}" for n in names}
            cells[best] = f"**{cells[best]}**"
            label = "test" if what == "test_accuracy" else "train"
            lines.append(f"| {task} | {label} | {' | '.join(cells[n] for n in names)} |")
    lines.append(f"| average rank | test | {' | '.join(f'{ranks[n]:.2g}' for n in names)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
