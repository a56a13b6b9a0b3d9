"""Disks that are full, read-only or gone, and two runs that want the same file."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.faults.processes import Place, start, until
from tests.faults.scenario import Clock, LostError, Outcome, Scene, guarded

MOUNT, UMOUNT, CHATTR = (shutil.which(name) for name in ("mount", "umount", "chattr"))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size in memory, at a folder.

    Raises:
        PermissionError: only root may have one.
    """
    if MOUNT is None or UMOUNT is None or os.getuid() != 0:
        raise PermissionError("only root can mount a small disk")
    _call(MOUNT, "-t", "tmpfs", "-o", f"size={size}", "ngeval-faults", str(folder))
    try:
        yield
    finally:
        _call(UMOUNT, str(folder))


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


@contextlib.contextmanager
def immutable(*folders: Path) -> Iterator[None]:
    """Folders in which nobody, not even root, can make, rename or delete a file."""
    for folder in folders:
        _call(CHATTR or "chattr", "+i", str(folder))
    try:
        yield
    finally:
        for folder in folders:
            _call(CHATTR or "chattr", "-i", str(folder))


def can_mount(outcome: Outcome) -> bool:
    """Whether small disks can be had; told in the outcome where not."""
    allowed = MOUNT is not None and CHATTR is not None and os.getuid() == 0
    if not allowed:
        outcome.told["left out"] = "only root can mount a small disk, or make a folder immutable"
    return allowed


def full_disk(place: Place, kills: int, random: Random) -> Outcome:
    """A disk that becomes full as unit n begins; then there is room again."""
    outcome = Outcome("full-disk", "a disk of 400 kB that becomes full in the middle of a run")
    with Clock(outcome):
        scene = Scene(place, outcome, 3, 3)
        if not can_mount(outcome):
            return outcome
        for number in (1, 2, 5, 9):
            with small_disk(scene.folder / "out", "400k"):
                guarded(outcome, f"unit {number}", lambda n=number: _full_at(scene, n))  # type: ignore[misc]
    return outcome


def _full_at(scene: Scene, number: int) -> None:
    out = scene.folder / "out"
    ended = scene.fork([("flush_often",), ("at_unit", number, "fill", str(out))])
    scene.outcome.faults += 1
    scene.check_quiet(ended, {2})
    if "No space left on device" not in ended.err:
        raise LostError(f"what is told is not that the disk is full: {ended.err}")
    if len(before := scene.done()) != number - 1:
        raise LostError(f"{len(before)} units are on the disk, not {number - 1}")
    again = scene.fork()  # while it is still full
    scene.check_quiet(again, {2})
    (out / "filler").unlink()
    scene.check_visible()
    if scene.done() != before:
        raise LostError(f"units that are gone: {before - scene.done()}")
    scene.resume()


def failing_disk(place: Place, kills: int, random: Random) -> Outcome:
    """Calls that fail from one on: no space, no right, an error of the disk itself."""
    outcome = Outcome("failing-disk", "calls to the file system that fail from one on")
    with Clock(outcome):
        scene = Scene(place, outcome, 2, 2)
        for error in ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT"):
            for name in ("fsync", "replace", "open"):
                where = (name, random.randrange(1, 12), "before", error)
                guarded(outcome, f"{where}", lambda w=where: _fails(scene, w))  # type: ignore[misc]
                scene.clear()
    return outcome


def _fails(scene: Scene, where: tuple[str, int, str, str]) -> None:
    ended = scene.fork([("flush_often",), ("at_call", *where)])
    scene.outcome.faults += 1
    scene.check_quiet(ended, {2})
    scene.check_visible()
    scene.resume()


def read_only(place: Place, kills: int, random: Random) -> Outcome:
    """An output on a read-only disk, and one that becomes so."""
    outcome = Outcome("read-only", "an output folder that is read-only, or becomes so in a run")
    with Clock(outcome):
        scene = Scene(place, outcome, 5, 5)
        if not can_mount(outcome):
            return outcome
        out = scene.folder / "out"
        guarded(outcome, "from the start", lambda: _read_only_start(scene, out))
        for more in (1, 7):
            scene.clear()
            guarded(outcome, f"after {more}", lambda m=more: _immutable_after(scene, out, m))  # type: ignore[misc]
    return outcome


def _read_only_start(scene: Scene, out: Path) -> None:
    with small_disk(out, "2m"):
        _call(MOUNT or "mount", "-o", "remount,ro", str(out))
        ended = scene.fork()
        scene.outcome.faults += 1
        scene.check_quiet(ended, {2})
        if "Read-only file system" not in ended.err:
            raise LostError(f"the message is not that it is read-only: {ended.err}")
    scene.resume()


def _immutable_after(scene: Scene, out: Path, more: int) -> None:
    process = start(scene.place, scene.arguments(), [("slow", 0.2)])
    scene.outcome.starts += 1
    until(lambda: process.ended or len(scene.done()) >= more)
    with immutable(scene.journal, out):
        ended = process.wait()
        before = scene.done()
        scene.outcome.faults += 1
        scene.check_quiet(ended, {2})
        scene.check_visible()
        scene.check_quiet(scene.fork(), {2})
    if len(before) < more:
        raise LostError(f"{more} units were done, {len(before)} are")
    scene.resume()


def output_removed(place: Place, kills: int, random: Random) -> Outcome:
    """The output's folder, or its journal, is deleted during the run."""
    outcome = Outcome("output-removed", "the output's folder or the journal is deleted in a run")
    with Clock(outcome):
        scene = Scene(place, outcome, 2, 3)
        for what in (scene.folder / "out", scene.journal):
            guarded(outcome, what.name, lambda w=what: _removed(scene, w))  # type: ignore[misc]
            scene.clear()
    return outcome


def _removed(scene: Scene, what: Path) -> None:
    ended = scene.fork([("flush_often",), ("at_unit", 4, "remove", str(what))])
    scene.outcome.faults += 1
    scene.check_quiet(ended, {2})
    (scene.folder / "out").mkdir(exist_ok=True)
    scene.check_visible()
    if scene.output.exists():  # the table without its journal: no run can continue it
        again = scene.fork()
        scene.check_quiet(again, {2})
        scene.clear()
    scene.resume()


def second_writer(place: Place, kills: int, random: Random) -> Outcome:
    """A second run of the same output, continued or from scratch."""
    outcome = Outcome("second-writer", "a second run that writes the same output")
    with Clock(outcome):
        scene = Scene(place, outcome, 4, 4)
        guarded(outcome, "second", lambda: _second(scene))
    return outcome


def _second(scene: Scene) -> None:
    first = start(scene.place, scene.arguments(), [("slow", 0.5)])
    scene.outcome.starts += 1
    until(lambda: first.ended or len(scene.done()) >= 2)
    force = [word for word in scene.arguments() if word != "--resume"] + ["--force"]
    for arguments in (scene.arguments(), force):
        ended = scene.fork_other(arguments)
        scene.outcome.faults += 1
        scene.check_quiet(ended, {2})
        if "is being written by another run (process" not in ended.err:
            raise LostError(f"the message does not name the first: {ended.err}")
    scene.check_quiet(first.wait(), {0})
    scene.check_complete()
