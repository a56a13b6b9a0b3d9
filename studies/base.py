"""`Study` and `Finding`: an experiment, and what its rows say about a claim.

Figure and findings are computed from the rows alone, so that a file of rows is enough for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from ngeval.errors import DependencyError, InputError

Size = Literal["quick", "full"]
SIZES: tuple[Size, ...] = ("quick", "full")

QUICK = "The quick size shows that the study runs; it is too small to judge by."

Verdict = Literal["confirmed", "not confirmed", "under conditions"]

Advance = Callable[[str, int], None]
"""Called after every step of the work with the name of the part and its number of steps."""


@dataclass(frozen=True)
class Finding:
    """What the rows of a study say about one claim.

    Attributes:
        claim: the claim in a sentence.
        source: the paper and its section.
        verdict: follows from the numbers by ``rule``.
        evidence: the numbers, with intervals.
        rule: how the verdict follows from the numbers.
    """

    claim: str
    source: str
    verdict: Verdict
    evidence: str
    rule: str = ""


@dataclass(frozen=True)
class Study:
    """An experiment: rows, and a figure and findings that are computed from the rows alone.

    Attributes:
        name: of the study on the command line.
        title: one line on what it is.
        run: ``(size, seed, progress) -> iterator of tables``, the rows of each part as soon as the
            part has ended; the same rows for the same size and seed. Where ``data`` is not empty it
            also takes ``data_dir``, a folder or None.
        figure: draws rows.
        findings: judges every claim by rows.
        minutes: that the full size takes on one core, roughly.
        data: the files that ``--data-dir`` may hold; empty for a study that makes its own data.
        needs: optional packages that the study needs.
    """

    name: str
    title: str
    run: Callable[..., Iterator[pd.DataFrame]]
    figure: Callable[[pd.DataFrame], Figure]
    findings: Callable[[pd.DataFrame], list[Finding]]
    minutes: float
    data: str = ""
    needs: tuple[str, ...] = ()


def identified(rows: pd.DataFrame, study: Study, size: Size, seed: int) -> pd.DataFrame:
    """Put ``study, size, study_seed`` in front of some rows."""
    front = {"study": study.name, "size": size, "study_seed": seed}
    return pd.concat([pd.DataFrame(front, index=rows.index), rows], axis=1)


def check_packages(study: Study) -> None:
    """Check before any work that a study's optional packages are installed.

    Raises:
        DependencyError: one is not.
    """
    for package in study.needs:
        if find_spec(package) is None:
            raise DependencyError(
                f"the study {study.name!r} needs {package}, which is not installed; in a clone, "
                "pip install '.[hf,studies]' installs it"
            )


def check_rows(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Return the rows of a file, if they are this study's.

    Raises:
        InputError: they are a different study's, or no study's.
    """
    names = sorted(map(str, rows["study"].unique())) if "study" in rows else []
    if names != [study.name]:
        content = f"rows of {', '.join(names)}" if names else "no column 'study'"
        raise InputError(
            f"these are not the rows of the study {study.name!r}: the file has {content}"
        )
    return rows


def decide(outcomes: Sequence[bool]) -> Verdict:
    """``confirmed`` if every case holds, ``not confirmed`` if none does, else ``under conditions``.

    Raises:
        InputError: there is no case.
    """
    if not outcomes:
        raise InputError("the rows hold no case to judge the claim by; was the run interrupted?")
    if all(outcomes):
        return "confirmed"
    return "under conditions" if any(outcomes) else "not confirmed"


def report(study: Study, rows: pd.DataFrame, findings: Sequence[Finding]) -> str:
    """The findings as a page of Markdown, with the command behind them."""
    size, seed = rows["size"].iloc[0], rows["study_seed"].iloc[0]
    command = f"python -m studies {study.name}{' --quick' * (size == 'quick')} --seed {seed}"
    lines = [
        f"# {study.title}",
        "",
        f"Made by `{command}` (the {size} size, {len(rows)} rows; findings by ngeval "
        f"{version('ngeval')}).",
        f"`python -m studies {study.name} --from {study.name}.parquet` makes figure and findings "
        "from the rows.",
        "",
        f"![{study.title}]({study.name}.png)",
        "",
        "*Confirmed*: in every case that the rule asks for; *under conditions*: in some; *not "
        "confirmed*: in none. Numbers in brackets are 95 % intervals.",
    ]
    if size == "quick":
        lines += ["", f"**{QUICK}**"]
    for number, finding in enumerate(findings, 1):
        lines += ["", f"## {number}. {finding.claim}", ""]
        lines += [f"**{finding.verdict}** ({finding.source})", "", finding.evidence]
        if finding.rule:
            lines += ["", f"Rule: {finding.rule}"]
    return "\n".join(lines) + "\n"
