"""The experiments of the two source papers at a size that two cores carry, with their verdicts.

`python -m studies` lists them. Each is a module with a ``STUDY``.
"""

from __future__ import annotations

from ngeval.errors import InputError, nearest_name
from studies import (
    convergence,
    diagonal,
    fadam,
    optimization,
    preconditioners,
    why_ef_fails,
)
from studies.base import Finding, Study

__all__ = ["STUDIES", "Finding", "Study", "get_study"]

_MODULES = (optimization, why_ef_fails, convergence, fadam, diagonal, preconditioners)

STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}
"""The studies by name."""


def get_study(name: str) -> Study:
    """Find a study.

    Raises:
        InputError: there is no study of that name.
    """
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}; {nearest_name(name, STUDIES)}")
    return STUDIES[name]
