"""What no input may cause: the judge of all targets and engines.

Allowed are success and ngeval's own errors with a message. Findings are any other exception, an
error without a message, more than `PATIENCE` seconds, and these of Python's audit events: a file
written, moved or removed outside the input's folder, a process, a connection, a class that an
unpickler looks up, a call of the canary that hostile pickles name.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngeval.errors import NgevalError

PATIENCE = 10.0
"""Seconds for one input."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

IN_FOLDER = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
"""Events of one path, and which of their arguments is the folder that it is relative to."""

CHANGES = {
    "os.truncate": 1,
    "os.chmod": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "shutil.rmtree": 1,
    "shutil.move": 2,
}
"""Events that change the file system, and how many of their arguments are paths."""

FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open", "fuzz.canary"),
)
"""Events that no input may cause."""

ALLOWED_CLASSES = frozenset(
    {
        *("numpy", "numpy.core", "numpy._core", "_codecs"),
        *("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"),
    }
)
"""Packages whose arrays the reader of CIFAR's original files makes, and those whose records torch
writes into ``.metadata``; each reader has its own list."""

ALLOWED_NAMES = re.compile(
    r"torch\.(Size|device|(u?int|float|bfloat|complex|q|bits)\w*|bool)|torch\.serialization\._get_layout|"
    r"pathlib(\._local)?\.(Pure)?PosixPath|collections\.OrderedDict"
)
"""Other values in such a ``.metadata``."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        kind: ``exception``, ``no message``, ``slow``, ``event`` or ``crash``.
        text: what it was.
        where: the innermost line of ngeval, which tells findings apart.
    """

    kind: str
    text: str
    where: str

    @property
    def key(self) -> str:
        """Findings with the same key are the same."""
        return f"{self.kind} {self.text.partition(':')[0]} {self.where}"


class Late(BaseException):
    """The time for an input has passed."""


def canary(name: str = "") -> dict[str, Any]:
    """The function that hostile pickles call: audit hooks are notified of it."""
    sys.audit("fuzz.canary", name)
    return {}


class _Events:
    """The audit hook: it cannot be removed, so there is one, active while it has a folder."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.heard: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            self._opened(*arguments)
        elif event in IN_FOLDER or event in CHANGES:
            for path in _changed_paths(event, arguments):
                if not self._inside(path):
                    self.heard.append(f"{event}: {path!r}")
        elif event in FORBIDDEN and arguments[:1] != ("uname",):  # of Python's `platform`
            self.heard.append(f"{event}: {arguments!r}"[:300])
        elif event == "pickle.find_class":
            module = str(arguments[0])
            known = any(f"{module}.".startswith(f"{name}.") for name in ALLOWED_CLASSES)
            if not known and not ALLOWED_NAMES.fullmatch(f"{module}.{arguments[1]}"):
                self.heard.append(f"{event}: {arguments!r}")

    def _opened(self, path: object, _: object, flags: int) -> None:
        if isinstance(path, str | bytes) and flags & WRITES and not self._inside(path):
            self.heard.append(f"open for writing: {path!r}")

    def _inside(self, path: str | bytes | os.PathLike[str]) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or f"{real}{os.sep}".startswith(f"{self.folder}{os.sep}")


def _changed_paths(
    event: str, arguments: tuple[Any, ...]
) -> Iterator[str | bytes | os.PathLike[str]]:
    """The paths that an event of the file system changes."""
    if event in IN_FOLDER:
        base, path = arguments[IN_FOLDER[event]], os.fsdecode(arguments[0])
        yield path if base in (-1, None) else f"/proc/self/fd/{base}/{path}"
    else:
        paths = arguments[: CHANGES[event]]
        yield from (path for path in paths if isinstance(path, str | bytes | os.PathLike))


_EVENTS = _Events()


def listen() -> None:
    """Install the audit hook, once in a process."""
    if not getattr(listen, "done", False):
        sys.addaudithook(_EVENTS)
        listen.done = True  # type: ignore[attr-defined]


def judged(attempt: Callable[[bytes, Path], None], data: bytes, folder: Path) -> Finding | None:
    """Try an input and judge the result.

    Args:
        attempt: of a target.
        data: the input.
        folder: the only one that may be written in.
    """
    _EVENTS.folder, _EVENTS.heard = os.path.realpath(folder), []
    start = time.monotonic()
    result: Finding | None = None
    try:
        with warnings.catch_warnings(), _within(PATIENCE), _temporary(folder):
            warnings.simplefilter("ignore")
            attempt(data, folder)
    except NgevalError as error:
        if not str(error).strip():
            result = Finding("no message", type(error).__name__, _place(error))
    except Late as error:
        result = Finding("slow", f"Late: more than {PATIENCE:g} s", _place(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = Finding("exception", f"{type(error).__name__}: {error}"[:400], _place(error))
    finally:
        _EVENTS.folder = None
    if _EVENTS.heard:
        return Finding("event", _EVENTS.heard[0], _EVENTS.heard[0].partition(":")[0])
    if result is None and time.monotonic() - start > PATIENCE:
        return Finding("slow", f"Late: {time.monotonic() - start:.0f} s", "native code")
    return result


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    local = [frame for frame in frames if f"{os.sep}ngeval{os.sep}" in frame.filename] or frames
    return f"{Path(local[-1].filename).name}:{local[-1].name}"


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Interrupt an input that takes longer."""

    def late(number: int, frame: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Temporary files go into the input's folder as well."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
