"""The code blocks of the pages of docs/, and how the tests run them."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

from typer.testing import CliRunner

from ngeval.cli.app import app

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each code block."""
    return re.findall(r"```(\w+)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def in_folder(folder: Path, command: list[str]) -> None:
    """A command in a folder; ``ngeval`` in this process, which has imported torch."""
    if command[:2] == ["-m", "ngeval"]:
        with contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a process of its own
            run_here(command)
        return
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def shell_lines(text: str) -> list[list[str]]:
    """The commands of a block, with ngeval as a module."""
    joined = text.replace("\\\n", " ").strip().splitlines()
    parts = [shlex.split(line) for line in joined]
    return [["-m", *p] if p[0] == "ngeval" else p[1:] for p in parts]


def run_here(command: list[str], *more: str) -> None:
    """A command of ``ngeval`` in this process and folder: torch is imported already."""
    assert command[:2] == ["-m", "ngeval"]
    done = CliRunner().invoke(app, [*command[2:], *more])
    assert done.exit_code == 0, (command, done.output[-2000:], done.exception)


def run_python(page: str) -> dict[str, object]:
    """The Python of a page, one block after the other; the names that it leaves."""
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
    return names
