"""What every command shares: errors as one message, exit codes, consoles and progress bars."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from ngeval.errors import NgevalError
from ngeval.runs import progress
from ngeval.utils import torchrun
from ngeval.utils.text import message

PIPE_WIDTH = 160
"""Characters in a line of a file or a pipe."""

REFRESH_SECONDS = 0.5
"""Between looks at how far the other processes of a run are."""

ROWS_ARE_SAFE = "finished rows are in the output file, if there is one"

SHARED = ("gamma", "sweep", "layers", "imbalance", "compare")
"""The commands whose work the processes of torchrun share."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: the program ends as it does after Ctrl-C, with another exit code."""


def terminate(*_: object) -> None:
    """The handler of SIGTERM."""
    raise Terminated


class Commands(TyperGroup):
    """The group of commands, which turns errors into one message and an exit code.

    The exit code is 2 for an error of ngeval, 130 for Ctrl-C and 143 for SIGTERM.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; one that processes cannot share runs in the first of them alone."""
        name, command, rest = super().resolve_command(ctx, args)
        if torchrun.world_size() > 1 and name not in SHARED:
            if torchrun.rank():
                raise typer.Exit
            complain(f"{name} runs in one process; the others have nothing to do")
            del os.environ["RANK"]  # and what it calls waits for no others
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NgevalError as error:
            complain(str(error))
            raise typer.Exit(2) from error
        except Terminated:
            if os.environ.get("RANK", "0") == "0":  # torchrun terminates every process
                complain(f"terminated; {ROWS_ARE_SAFE}")
            raise typer.Exit(143) from None
        except KeyboardInterrupt:
            complain(f"interrupted; {ROWS_ARE_SAFE}")
            raise typer.Exit(130) from None


def complain(text: str) -> None:
    """Print a message to standard error, with the rank of any process but the first."""
    rank = os.environ.get("RANK", "0")
    name = "ngeval" if rank == "0" else f"ngeval (rank {rank})"
    say(Console(stderr=True), f"{name}: {text}")


def say(out: Console, text: str) -> None:
    """Print a text as it is: a path may hold brackets or escape sequences."""
    out.print(message(text), highlight=False, markup=False, soft_wrap=True)


def table_console(quiet: bool = False) -> Console:
    """Standard output, wide enough for any table where it is not a terminal."""
    out = Console(quiet=quiet)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = max(out.width, PIPE_WIDTH)
    return out


def progress_bar(quiet: bool) -> Progress:
    """A progress bar on standard error, with the time elapsed and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )


class ProgressBar(progress.Progress):
    """Shows a run: one bar, however many processes do the work, and lines above it."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar = progress_bar(quiet)
        self.out = self.bar.console
        self.ended = threading.Event()
        self.completed: Callable[[], int] = lambda: 0

    def note(self, text: str) -> None:
        if not self.quiet:
            say(self.out, text)

    def warn(self, text: str) -> None:
        say(Console(stderr=True), text)

    def begin(self, description: str, total: int, completed: Callable[[], int]) -> None:
        self.completed = completed
        self.task = self.bar.add_task(description, total=total, completed=completed())
        self.bar.start()
        if torchrun.world_size() > 1 and not self.quiet:  # the others do not call advance() here
            threading.Thread(target=self._watch, daemon=True).start()

    def advance(self) -> None:
        if not self.quiet:
            with contextlib.suppress(NgevalError):  # a bar must not end a run
                self.bar.update(self.task, completed=self.completed())

    def end(self) -> None:
        self.ended.set()
        self.advance()
        self.bar.stop()

    def _watch(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS):
            self.advance()
