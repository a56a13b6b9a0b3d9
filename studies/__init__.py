"""The experiments of the two source papers at a size that two cores carry, with their verdicts.

Each study is a module with a ``STUDY``; it is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from ngeval.errors import InputError, nearest_name
from studies.base import Finding, Study

__all__ = ["STUDIES", "Finding", "Study", "get_study"]


class _Studies(Mapping[str, Study]):
    """Studies by name; a module is imported when its study is looked up."""

    def __init__(self, entries: dict[str, str]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Study:
        module, _, attribute = self._entries[name].partition(":")
        study: Study = getattr(importlib.import_module(module), attribute)
        return study

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


STUDIES: Mapping[str, Study] = _Studies(
    {
        "optimization": "studies.optimization:STUDY",
        "why-ef-fails": "studies.why_ef_fails:STUDY",
        "convergence": "studies.convergence:STUDY",
        "fadam": "studies.fadam:STUDY",
        "diagonal": "studies.diagonal:STUDY",
        "preconditioners": "studies.preconditioners:STUDY",
    }
)
"""The studies by name."""


def get_study(name: str) -> Study:
    """Find a study.

    Raises:
        InputError: there is none of that name.
    """
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}; {nearest_name(name, STUDIES)}")
    return STUDIES[name]
