"""The exceptions that ngeval raises, and the helper that suggests a nearby name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MAX_TEXT = 1_000
"""Characters of a message of code that is not ngeval's; some libraries list every tensor."""


class NgevalError(Exception):
    """Base class of every error that ngeval raises on purpose.

    The command line prints it as one message and exits with code 2.
    """


class InputError(NgevalError, ValueError):
    """An argument (inputs, targets, damping, direction, ...) cannot be used."""


class ModelError(NgevalError):
    """The model cannot be graded in its present state."""


class EngineError(NgevalError):
    """No Jacobian engine supports the model, or the problem does not fit in memory."""


class NumericalError(NgevalError, ArithmeticError):
    """A quantity is not finite or not defined for this problem."""


class CheckpointError(NgevalError):
    """A checkpoint cannot be read or does not fit the model."""


class TaskError(NgevalError):
    """A task does not exist or does not keep its contract."""


class DependencyError(NgevalError, ImportError):
    """An optional package is needed but not installed."""


class OutputError(NgevalError):
    """A result cannot be written or read."""


@contextlib.contextmanager
def foreign_errors(kind: type[Exception], what: str, advice: str = "") -> Iterator[None]:
    """Turn any error of code that is not ngeval's into an error that says what failed.

    Args:
        kind: the class of the error; ngeval's own errors stay as they are.
        what: the beginning of its message, before the original error.
        advice: the end of its message.
    """
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:  # the code of a user or of another package can raise anything
        text = " ".join(str(error).split())[:MAX_TEXT]
        raise kind(f"{what}: {type(error).__name__}: {text}{advice}") from error


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Check that a value is one of the known names; ``what`` names it in the `InputError`."""
    names = list(known)
    if value not in names:
        raise InputError(f"unknown {what} {value!r}; {nearest_name(str(value), names)}")


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name.

    Args:
        name: the name that a user typed.
        known: the names that exist.

    Returns:
        ``"did you mean 'x'? "`` if a name is close, then the list of all names.

    >>> nearest_name("cosin", ["linear", "cosine"])
    "did you mean 'cosine'? known: cosine, linear"
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
