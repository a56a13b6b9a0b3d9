"""Entry points by which other packages add methods and likelihoods."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ngeval.errors import InputError, foreign_errors


@functools.cache
def plugins(group: str, taken: frozenset[str]) -> dict[str, EntryPoint]:
    """The entry points of a group by name; none of them is imported.

    The result is cached, because the metadata of every installed package is read for it. An entry
    point whose name is taken, by ngeval or by another package, is left out with a warning.
    """
    kind = _kind(group)
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        if point.name in taken or point.name in points:
            owner = "ngeval" if point.name in taken else package_of(points[point.name])
            warnings.warn(
                f"the {kind} {point.name!r} of {package_of(point)} is ignored, because {owner} has "
                f"a {kind} of that name; rename the entry point",
                stacklevel=2,
            )
        else:
            points[point.name] = point
    return points


def package_of(point: EntryPoint) -> str:
    """The name and version of the package that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def load_plugin(point: EntryPoint) -> Any:
    """Import the object that an entry point names; an `InputError` names its package."""
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # the import of another package can raise anything
        raise InputError(
            f"{_kind(point.group)} {point.name!r} of {package_of(point)} cannot be loaded from "
            f"{point.value!r}: {type(error).__name__}: {error}"
        ) from error


def plugin_errors(point: EntryPoint, name: str) -> AbstractContextManager[None]:
    """Turn any error of a plug-in that builds a method or likelihood into an `InputError`."""
    what = f"{_kind(point.group)} {name!r} of {package_of(point)} cannot be built"
    return foreign_errors(InputError, what)


def _kind(group: str) -> str:
    """What a group registers: ``"ngeval.methods"`` → ``"method"``."""
    return group.rpartition(".")[2].removesuffix("s")
