"""What a run reports while it goes on; how that is shown is the business of whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ngeval.runs.ranks import Ranks


class Progress:
    """A listener that ignores everything: subclasses override what they show."""

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def warn(self, text: str) -> None:
        """Show a line to the user, even if only errors are wanted."""

    def begin(self, description: str, total: int, completed: Callable[[], int]) -> None:
        """Show that ``completed()`` of a run's ``total`` steps are done, by all processes."""

    def advance(self) -> None:
        """Show that this process has completed steps."""

    def end(self) -> None:
        """Show that no more units follow; called after `begin` in any case."""


class Steps:
    """Counts the steps of a run: each unit has one for each of its methods, or a single one."""

    def __init__(
        self, ranks: Ranks, methods: Sequence[str], units_before: int, progress: Progress
    ) -> None:
        self.ranks, self.methods, self.progress = ranks, frozenset(methods), progress
        self.in_unit = max(1, len(methods))
        self.before = units_before * self.in_unit
        self._counted = 0

    def completed(self) -> int:
        """The steps that all processes have completed, in earlier starts too."""
        return self.before + self.ranks.steps()

    def method_done(self, name: str) -> None:
        """Count a method of the unit."""
        if name in self.methods:
            self._count(1)

    def unit_done(self) -> None:
        """Count the steps of the unit that are not counted yet, as of one that failed."""
        self._count(self.in_unit - self._counted)
        self._counted = 0

    def _count(self, steps: int) -> None:
        self._counted += steps
        self.ranks.count_steps(steps)
        self.progress.advance()
