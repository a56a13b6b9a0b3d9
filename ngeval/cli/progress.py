"""How far a run is: one progress bar, however many processes do the work, and lines above it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from rich.console import Console

from ngeval.cli import console
from ngeval.errors import NgevalError
from ngeval.runs import progress
from ngeval.utils import torchrun

REFRESH_SECONDS = 0.5


class ProgressBar(progress.Progress):
    """Shows a run on standard error."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar = console.progress_bar(quiet)
        self.out = self.bar.console
        self.ended = threading.Event()
        self.completed: Callable[[], int] = lambda: 0

    def note(self, text: str) -> None:
        if not self.quiet:
            console.say(self.out, text)

    def warn(self, text: str) -> None:
        console.say(Console(stderr=True), text)

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
