"""The long run: ``python -m tests.fuzz --inputs 100000 --seed 0``; see ``README.md``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tests.fuzz.targets import TARGETS

ENGINES = {"hypothesis": 0.3, "atheris": 0.7}
"""The engines, and how they share inputs: Hypothesis takes longer to make one."""

REGRESSIONS = Path(__file__).parent / "corpus" / "regressions"
COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")
RESTARTS = 20
"""Times that a job is started again after an input ended its process."""


@dataclass
class Job:
    """One target with one engine.

    Attributes:
        target: its name.
        engine: likewise.
        wanted: inputs to try.
        seed: of the engine.
        inputs: how many were tried.
        seconds: that it took.
        edges: that the coverage-guided engine saw, None where there is none.
        features: likewise.
        findings: what was found.
    """

    target: str
    engine: str
    wanted: int
    seed: int
    inputs: int = 0
    seconds: float = 0.0
    edges: int | None = None
    features: int | None = None
    findings: list[dict[str, str]] = field(default_factory=list)


def main() -> int:
    """Run all jobs; exit code 1 where something was found, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: both"
    )
    parser.add_argument("--findings", type=Path, default=REGRESSIONS, help="where inputs go")
    parser.add_argument("--output", type=Path, help="the table as JSON")
    options = parser.parse_args()
    engines = [name for name in options.engines if name == "hypothesis" or _has_atheris()]
    for name in set(options.engines) - set(engines):
        print(f'{name} is not installed (pip install ".[fuzz]"); left out', file=sys.stderr)
    parts = sum(ENGINES[name] for name in engines)
    whole = sum(TARGETS[name].share for name in options.targets)
    jobs = [
        Job(
            name,
            engine,
            max(1, round(options.inputs * TARGETS[name].share / whole * ENGINES[engine] / parts)),
            options.seed,
        )
        for name in options.targets
        for engine in engines
    ]
    interrupted = False
    try:
        _run(jobs, options.findings)
    except KeyboardInterrupt:
        interrupted = True
    Console().print(_table(jobs))
    result = [
        f"{job.target}: {finding['text']} at {finding['where']}"
        for job in jobs
        for finding in job.findings
    ]
    for line in dict.fromkeys(result):
        print(line.encode("unicode_escape").decode()[:300])
    if options.output is not None:
        options.output.write_text(json.dumps(_summary(jobs, options), indent=2) + "\n")
    return 130 if interrupted else 1 if result else 0


def _has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _run(jobs: list[Job], findings: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as bar:
        shown = bar.add_task("fuzzing", total=sum(job.wanted for job in jobs))
        done = 0
        for job in jobs:
            bar.update(shown, description=f"{job.target}, {job.engine}")
            start = time.monotonic()
            for _ in range(RESTARTS):
                try:
                    _start(
                        job, findings, lambda n, done=done: bar.update(shown, completed=done + n)
                    )
                finally:
                    job.seconds = time.monotonic() - start
                if job.inputs >= job.wanted:
                    break
            done += job.wanted


def _start(job: Job, findings: Path, tell: Any) -> None:
    """A process for what is left of a job; where an input ends it, that is a finding."""
    folder = Path(tempfile.mkdtemp(prefix="ngeval-fuzz-"))
    command = [sys.executable, "-m", "tests.fuzz.engines", job.target, job.engine]
    command += ["--inputs", str(job.wanted - job.inputs), "--seed", str(job.seed + job.inputs)]
    command += ["--folder", str(folder), "--findings", str(findings.absolute())]
    before, known = job.inputs, list(job.findings)
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=root, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                _update(job, before, known, folder)
                tell(job.inputs)
        finally:
            process.kill()
            process.wait()
    _update(job, before, known, folder)
    text = log.read_text(errors="replace")
    for edges, features in COVERAGE.findall(text)[-1:]:
        job.edges = max(job.edges or 0, int(edges))
        job.features = max(job.features or 0, int(features))
    if process.returncode != 0 and job.inputs < job.wanted:
        job.inputs += 1  # the one that ended it
        place = findings / f"{job.target}-crash-{job.engine}-{job.inputs}.bin"
        findings.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            shutil.copy(folder / "last", place)
        ending = " | ".join(text.strip().splitlines()[-3:])
        printed = {"kind": "crash", "where": f"exit code {process.returncode}", "input": place.name}
        job.findings.append(printed | {"text": f"the process ended: {ending}"[:600]})
    shutil.rmtree(folder, ignore_errors=True)


def _update(job: Job, before: int, known: list[dict[str, str]], folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        output = json.loads((folder / "status.json").read_text())
        job.inputs = before + output["inputs"]
        job.findings = [*known, *output["findings"]]


def _table(jobs: list[Job]) -> Table:
    shown = Table("target", "engine", "inputs", "seconds", "edges", "features", "findings")
    for job in jobs:
        counts = [job.inputs, round(job.seconds), job.edges, job.features, len(job.findings)]
        cells = ["–" if count is None else f"{count:,}" for count in counts]
        shown.add_row(job.target, job.engine, *cells)
    total = (sum(job.inputs for job in jobs), round(sum(job.seconds for job in jobs)))
    shown.add_section()
    shown.add_row(
        "all", "", *(f"{n:,}" for n in total), "", "", str(sum(len(j.findings) for j in jobs))
    )
    return shown


def _summary(jobs: list[Job], told: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": f"python -m tests.fuzz --inputs {told.inputs} --seed {told.seed}",
        "inputs": sum(job.inputs for job in jobs),
        "findings": sum(len(job.findings) for job in jobs),
        "jobs": [asdict(job) for job in jobs],
    }


if __name__ == "__main__":
    sys.exit(main())
