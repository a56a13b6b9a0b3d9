"""The command ngeval with a fault in it: ``python -m tests.faults.injections``.

The environment variable ``FAULTS`` says what goes wrong: a list in JSON of names and arguments;
see `INJECTIONS`. Everything else is the command ``ngeval`` as it is.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

Injection = tuple[str | float | int, ...]
"""A name of `INJECTIONS` and its arguments."""

CALLS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "open")
"""The calls of a run to the file system, by their names in ``os``."""


def flush_often() -> None:
    """The table is written after each unit, not every five seconds."""
    from ngeval.runs import execute  # noqa: PLC0415  # imports are ngeval's own, and late

    execute.FLUSH_SECONDS, execute.FLUSH_SHARE = 0.0, 1e9


def count_calls(log: str) -> None:
    """Log each call to the file system, which shows at how many points a run can be killed."""

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or _writes(args):
                _append(log, name)
            return real(*args, **kwargs)

        setattr(os, name, called)

    _append(log, "begin")
    for name in CALLS:
        wrap(name)


def at_call(name: str, number: int, when: str, action: str) -> None:
    """Do something at the n-th call of ``os.<name>``, or at that one and all after it.

    Args:
        name: see `CALLS`.
        number: n, from 1.
        when: ``"before"`` or ``"after"`` the call.
        action: ``"SIGKILL"``, ``"SIGTERM"`` or ``"SIGINT"``; ``"power"``: what was not written to
            the disk is gone as well; or the name of an error, which stays, as ``"ENOSPC"``.
    """
    synced = _watch_syncs() if action == "power" else set()
    real, calls = getattr(os, name), [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and not _writes(args):
            return real(*args, **kwargs)
        calls[0] += 1
        if when == "after":
            built = real(*args, **kwargs)
        if hasattr(errno, action):
            if calls[0] >= number:
                raise OSError(
                    getattr(errno, action), os.strerror(getattr(errno, action)), *args[:1]
                )
        elif calls[0] == number:
            if action == "power":
                _cut_power(synced)
            signal.raise_signal(getattr(signal, "SIGKILL" if action == "power" else action))
        return built if when == "after" else real(*args, **kwargs)

    setattr(os, name, called)


def at_unit(number: int, action: str, argument: str = "") -> None:
    """Do something as the n-th unit of this process begins.

    Args:
        number: n, from 1.
        action: ``"raise"`` an exception of torch or Python, which the argument names; ``"remove"``
            a file or folder; ``"fill"`` a folder's disk; ``"SIGKILL"``, …
        argument: see there.
    """
    import torch  # noqa: PLC0415

    from ngeval.runs import tables  # noqa: PLC0415

    real, calls = tables.evaluate, [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != number:
            return real(*args, **kwargs)
        if action == "raise":
            kind = getattr(torch, argument, None) or getattr(__import__("builtins"), argument)
            raise kind(
                "injected: [enforce fail] can't allocate memory: you tried to allocate 1 TiB"
            )
        if action == "remove":
            import shutil  # noqa: PLC0415

            place = Path(argument)
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        elif action == "fill":
            fill(Path(argument))
        else:
            signal.raise_signal(getattr(signal, action))
        return real(*args, **kwargs)

    tables.evaluate = called


def nan_at(method: str, damping: float) -> None:
    """The update of a method is NaN at one λ."""
    from ngeval import evaluate  # noqa: PLC0415
    from ngeval.grading.prepare import prepare as real  # noqa: PLC0415

    module = sys.modules[evaluate.__module__]

    def prepare(kernel: Any, one: Any, dampings: Sequence[float], *rest: Any) -> Any:
        prepared = real(kernel, one, dampings, *rest)
        if one.name == method:
            prepared.updates.coefficients[list(dampings).index(damping)] = float("nan")
        return prepared

    module.prepare = prepare  # type: ignore[attr-defined]


def slow(seconds: float) -> None:
    """Each unit takes that many seconds longer."""
    from ngeval.runs import tables  # noqa: PLC0415

    real = tables.evaluate

    def called(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)

    tables.evaluate = called


def note_units(log: str) -> None:
    """Log each unit that was written to the journal."""
    from ngeval.results.journal import Journal  # noqa: PLC0415

    real = Journal.write

    def write(self: Journal, key: tuple[int, int], entry: Any) -> None:
        real(self, key, entry)
        if not entry.failure:
            _append(log, f"{key[0]}-{key[1]}")

    Journal.write = write  # type: ignore[method-assign]


def no_sync() -> None:
    """Leave it to the system when files reach the disk, which ngeval must not do."""
    os.fsync = lambda _: None


def put(path: str, content: str) -> None:
    """As the last unit ends, another program writes a file of the journal (bytes in hex)."""
    from ngeval.runs.ranks import Ranks  # noqa: PLC0415

    def finish(self: Ranks, meanwhile: Callable[[], None]) -> None:
        Path(path).write_bytes(bytes.fromhex(content))

    Ranks.finish = finish  # type: ignore[method-assign]


INJECTIONS: dict[str, Callable[..., None]] = {
    one.__name__: one
    for one in (flush_often, count_calls, at_call, at_unit, nan_at, slow, note_units, no_sync, put)
}


def fill(folder: Path) -> None:
    """Write until the disk is full; only on a small disk made for it."""
    total = os.statvfs(folder)
    if total.f_blocks * total.f_frsize > 2**24:
        raise ValueError(f"{folder} is on a real disk")
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 1024):
                pass
        except OSError:
            return


def main(injections: Sequence[Injection] | None = None) -> None:
    """The command ``ngeval`` with the faults of ``FAULTS``."""
    from ngeval.cli.app import main as ngeval_main  # noqa: PLC0415

    output = json.loads(os.environ.get("FAULTS", "[]")) if injections is None else injections
    for name, *arguments in output:
        INJECTIONS[str(name)](*arguments)
    ngeval_main()


def forks() -> ForkServerContext:
    """Processes that start at once: all that ngeval imports was imported before they began."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    return context


def forked(arguments: Sequence[str], injections: Sequence[Injection], log: str) -> None:
    """In such a process: ``ngeval`` with its output in files, exit codes as a shell sees them."""
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["ngeval", *arguments]
    main(injections)


def _writes(args: Sequence[Any]) -> bool:
    return len(args) > 1 and bool(args[1] & (os.O_WRONLY | os.O_RDWR))


def _append(log: str, line: str) -> None:
    with Path(log).open("a", buffering=1) as file:  # a pipe of one write each
        file.write(line + "\n")


def _watch_syncs() -> set[tuple[int, int]]:
    """The files whose contents are on the disk, by device and inode."""
    real, synced = os.fsync, set()

    def fsync(handle: int) -> None:
        real(handle)
        result = os.fstat(handle)
        synced.add((result.st_dev, result.st_ino))

    os.fsync = fsync
    return synced


def _cut_power(synced: set[tuple[int, int]]) -> None:
    """Empty the files below the working directory that this process wrote and did not sync."""
    started = Path(f"/proc/{os.getpid()}").stat().st_mtime
    for path in Path.cwd().rglob("*"):
        if path.is_file():
            result = path.stat()
            if result.st_mtime >= started and (result.st_dev, result.st_ino) not in synced:
                os.truncate(path, 0)


if __name__ == "__main__":
    main()
