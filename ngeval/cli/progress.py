"""How far a run is: one progress bar, however many processes do the work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress as Bar
from torch import nn

from ngeval.checkpoints import Checkpoint
from ngeval.cli import console
from ngeval.cli.console import say
from ngeval.errors import NgevalError
from ngeval.runs.ranks import Ranks
from ngeval.runs.run import Run
from ngeval.runs.tables import Work


@dataclass
class Shown:
    """How far a run is: one bar, whoever does the work."""

    ranks: Ranks
    steps: Sequence[str]
    bar: Bar
    task: Any
    before: int
    told: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextlib.contextmanager
    def of(cls, job: Run, work: Work, quiet: bool, done: int) -> Iterator[Shown]:
        """Show it while this lasts.

        Args:
            job: the run.
            work: its steps.
            quiet: show nothing.
            done: units that were done before.
        """
        size = max(1, len(work.steps))
        with console.progress_bar(quiet) as bar:
            task = bar.add_task(work.description, total=job.num_units * size, completed=done * size)
            shown = cls(job.ranks, work.steps, bar, task, done * size)
            watch = threading.Thread(target=shown._watch, daemon=True)
            if job.ranks.count > 1 and not quiet:
                watch.start()
            try:
                yield shown
            finally:
                shown.ended.set()
                if watch.is_alive():
                    watch.join()
                shown._update()

    def advance(self, step: str) -> None:
        """A method of the unit is done."""
        if step in self.steps:
            self._count(1)

    def end_unit(self) -> None:
        """All its steps count as done, told of or not."""
        size = max(1, len(self.steps))
        self._count(size - self.told)
        self.told = 0

    def tell(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """What an adapter leaves trainable."""
        if checkpoint.is_adapter and not self.bar.disable:
            say(self.bar.console, f"{checkpoint.name}: {trainable_line(model)}")

    def _count(self, steps: int) -> None:
        self.told += steps
        self.ranks.count_step(steps)
        self._update()

    def _update(self) -> None:
        if self.bar.disable:
            return
        with contextlib.suppress(NgevalError):  # no bar is worth a run
            self.bar.update(self.task, completed=self.before + self.ranks.steps())

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            self._update()


def trainable_line(model: nn.Module) -> str:
    """How many parameters of a model are trainable."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(size for size, requires_grad in sizes if requires_grad)
    return f"{trainable:,} of {sum(size for size, _ in sizes):,} parameters trainable"
