"""Processes of ngeval: started as a user starts them, watched, and ended by force."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.faults.injections import Injection, forked, forks

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds after which a process that has not ended is one that hangs."""


class HangingError(Exception):
    """A process that should have ended has not."""


@dataclass(frozen=True)
class Ended:
    """What a process came to.

    Attributes:
        code: its exit code; minus the signal's number where that ended it.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """Where runs of a scenario lie.

    Attributes:
        folder: the processes' working folder; all that they write has to be in ``out``.
        logs: what the harness writes.
        code: the folder that ``ngeval`` and ``faults`` are imported from.
    """

    folder: Path
    logs: Path
    code: Path = ROOT

    @classmethod
    def new(cls, work: Path, name: str, code: Path = ROOT) -> Place:
        """An empty one."""
        place = cls(work / name / "work", work / name / "logs", code)
        shutil.rmtree(work / name, ignore_errors=True)
        for folder in (place.folder / "out", place.logs):
            folder.mkdir(parents=True)
        return place

    def environment(self, injections: Sequence[Injection] = (), **more: str) -> dict[str, str]:
        """Of a process with faults in it."""
        local = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.code), "COLUMNS": "160"}
        return os.environ | local | {"FAULTS": json.dumps(list(injections))} | more


class Started:
    """A process, and its children where it is torchrun."""

    def __init__(self, place: Place, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start it, in a session of its own.

        Args:
            place: where.
            command: program and arguments.
            environment: all of it.
        """
        self.logs = [place.logs / "out", place.logs / "err"]
        out, err = (log.open("wb") for log in self.logs)
        self.process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=place.folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
        out.close()
        err.close()

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.process.poll() is not None

    def send(self, number: int) -> None:
        """A signal; nothing where it has ended."""
        if not self.ended:
            self.process.send_signal(number)

    def ranks(self) -> dict[int, psutil.Process]:
        """Torchrun's children by rank, as far as they have been started."""
        result = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                rank = child.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None and "--resume" in child.cmdline():  # and no helper of its own
                result[int(rank)] = child
        return result

    def wait(self, limit: float = LIMIT) -> Ended:
        """Its end, and that of its children.

        Raises:
            HangingError: it does not end.
        """
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired as error:
            self.end()
            text = self.logs[1].read_text(errors="replace")[-2000:]
            raise HangingError(f"still running after {limit:.0f} s: {text}") from error
        return Ended(code, *(log.read_text(errors="replace") for log in self.logs))

    def end(self) -> None:
        """By force, with all its children."""
        if self.ended:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue


def start(
    place: Place,
    arguments: Sequence[str],
    injections: Sequence[Injection] = (),
    *,
    ranks: int = 0,
    restarts: int = 0,
    **environment: str,
) -> Started:
    """``python -m ngeval`` with arguments; with injections, ngeval in the harness's own shell.

    Args:
        place: where.
        arguments: of the command ``ngeval``.
        injections: what goes wrong in it.
        ranks: processes of torchrun; 0: without torchrun.
        restarts: torchrun's ``--max-restarts``.
        environment: more variables of it.
    """
    module = ["-m", "tests.faults.injections" if injections else "ngeval", *arguments]
    command = [sys.executable, *module]
    if ranks:
        head = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts)]
        command = [sys.executable, *head, "--nproc-per-node", str(ranks), *module]
    return Started(place, command, place.environment(injections, **environment))


def run(
    place: Place,
    arguments: Sequence[str],
    injections: Sequence[Injection] = (),
    *,
    ranks: int = 0,
    restarts: int = 0,
    **environment: str,
) -> Ended:
    """Likewise, to its end."""
    return start(place, arguments, injections, ranks=ranks, restarts=restarts, **environment).wait()


def run_forked(
    place: Place, arguments: Sequence[str], injections: Sequence[Injection] = ()
) -> Ended:
    """Likewise, in a process that has imported everything before it began.

    Raises:
        HangingError: it does not end.
    """
    log = str(place.logs / "fork")
    with _environment(place):
        process: BaseProcess = forks().Process(
            target=_forked, args=(str(place.folder), list(arguments), list(injections), log)
        )
        process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise HangingError(f"still running after {LIMIT:.0f} s")
    texts = [Path(f"{log}.{name}").read_text(errors="replace") for name in ("out", "err")]
    return Ended(process.exitcode, *texts)


def _forked(
    folder: str, arguments: Sequence[str], injections: Sequence[Injection], log: str
) -> None:
    os.chdir(folder)
    forked(arguments, injections, log)


@contextlib.contextmanager
def _environment(place: Place) -> Iterator[None]:
    """The first fork starts the server, which keeps the environment of that moment."""
    before = dict(os.environ)
    os.environ.update(place.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def until(true: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait for something.

    Raises:
        HangingError: it does not come.
    """
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > limit:
            raise HangingError(f"waited {limit:.0f} s for what never came")
        time.sleep(0.01)


SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
"""The exit codes that signals lead to, once ngeval is up."""
