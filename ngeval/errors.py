"""The exceptions that ngeval raises, and the helper that suggests a nearby name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NgevalError(Exception):
    """Base class of every error that ngeval raises on purpose.

    The command line turns one into a single message and exit code 2.
    """


class InputError(NgevalError, ValueError):
    """An argument (inputs, targets, damping, direction, ...) cannot be used as given."""


class ModelError(NgevalError):
    """The model cannot be graded in the state it is in."""


class EngineError(NgevalError):
    """No Jacobian engine can treat this model, or the problem does not fit in memory."""


class NumericalError(NgevalError, ArithmeticError):
    """A quantity is not finite or not defined for this problem."""


class CheckpointError(NgevalError):
    """A checkpoint cannot be read, or does not fit the model."""


class TaskError(NgevalError):
    """A task cannot be found or does not keep its contract."""


class DependencyError(NgevalError, ImportError):
    """An optional package is needed and not installed."""


class OutputError(NgevalError):
    """A result cannot be written where it was asked for, or read back."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        ``"did you mean 'x'? "`` where one name is close, then the list of all names.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
