"""A single process, killed at random moments, started again until its run is done."""

from __future__ import annotations

import json
import time
from random import Random

from tests.faults.processes import CODES, SIGNALS, Place, Started, start, until
from tests.faults.scenario import STARTS, Clock, LostError, Outcome, Scene, guarded

CHECKPOINTS, BATCHES = 10, 10

EARLY = 0.1
"""The part of kills that come before the run's first unit, while Python still imports."""


def sigkill(place: Place, kills: int, random: Random) -> Outcome:
    """SIGKILL."""
    return _killed("sigkill", place, kills, random)


def sigterm(place: Place, kills: int, random: Random) -> Outcome:
    """SIGTERM."""
    return _killed("sigterm", place, kills, random)


def sigint(place: Place, kills: int, random: Random) -> Outcome:
    """Ctrl-C."""
    return _killed("sigint", place, kills, random)


def _killed(name: str, place: Place, kills: int, random: Random) -> Outcome:
    outcome = Outcome(name, f"{name.upper()} at random moments of a run of one process")
    with Clock(outcome):
        scene = Scene(place, outcome, CHECKPOINTS, BATCHES)
        while outcome.faults < kills:
            if not guarded(
                outcome, f"kill {outcome.faults}", lambda: _one_run(scene, kills, random)
            ):
                scene.clear()
    return outcome


def _one_run(scene: Scene, kills: int, random: Random) -> None:
    """A run from its first start to its end, with kills on the way while some are left."""
    name = scene.outcome.name.upper()
    for _ in range(STARTS):
        before = scene.done()
        if scene.outcome.faults >= kills:
            scene.resume(fork=False)
            scene.clear()
            return
        process = start(scene.place, scene.arguments())
        scene.outcome.starts += 1
        early = random.random() < EARLY
        _wait(scene, process, random, before, early=early)
        was_running, done = not process.ended, len(scene.done())
        process.send(SIGNALS[name])
        ended = process.wait()
        if was_running:
            scene.outcome.faults += 1
        scene.check_visible()
        if early and ended.code != 0:  # Python's own end while it imports, before ngeval is there
            continue
        scene.check_quiet(ended, {0, CODES[name]})
        scene.check_remembered(before, ended)
        if ended.code == 0:
            if was_running and done and done < scene.outcome.units - 5:
                raise LostError(f"{name} after {done} units had no effect")
            scene.check_complete()
            scene.clear()
            return
        if scene.journal.exists() and (lost := before - scene.done()):
            raise LostError(f"units that are gone: {lost}")
    raise LostError(f"{STARTS} starts, and the run is not done")


def _is_writing(scene: Scene, process: Started) -> bool:
    """Whether the journal is signed by this process, and not by the one before it."""
    try:
        output = json.loads((scene.journal / "writer.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(output["process"] == process.process.pid)


def _wait(scene: Scene, process: Started, random: Random, before: set[str], *, early: bool) -> None:
    """Until a random moment: of the start, or after as many units more."""
    if early:
        time.sleep(random.uniform(0.0, 4.0))
        return
    more = random.randrange(0, 40)

    def reached() -> bool:
        return process.ended or (_is_writing(scene, process) and len(scene.done() - before) >= more)

    until(reached)
    time.sleep(random.uniform(0.0, 0.05))
