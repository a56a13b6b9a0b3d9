"""The run of 20 checkpoints × 20 batches that survives ten kills."""

from __future__ import annotations

import time
from random import Random

from tests.faults.processes import CODES, SIGNALS, Place, start, until
from tests.faults.scenario import Clock, Outcome, Scene, guarded
from tests.faults.scenarios.ranks import VICTIMS, kill_one

CHECKPOINTS, BATCHES, KILLS = 20, 20, 10


def one_process(place: Place, kills: int, random: Random) -> Outcome:
    """SIGKILL, SIGTERM and Ctrl-C in turns."""
    what = f"{CHECKPOINTS} checkpoints × {BATCHES} batches, ten kills, one process"
    outcome = Outcome("big", what)
    with Clock(outcome):
        scene = Scene(place, outcome, CHECKPOINTS, BATCHES)
        guarded(outcome, "one process", lambda: _killed(scene, random))
    return outcome


def _killed(scene: Scene, random: Random) -> None:
    for kill in range(KILLS):
        _kill(scene, list(SIGNALS)[kill % len(SIGNALS)], random)
        scene.outcome.told[f"units after kill {kill + 1}"] = len(scene.done())
    scene.resume(fork=False)


def _kill(scene: Scene, name: str, random: Random) -> None:
    before = scene.done()
    process = start(scene.place, scene.arguments())
    scene.outcome.starts += 1
    expected = len(before) + 1 + random.randrange(30)
    until(lambda: process.ended or len(scene.done()) >= expected)
    time.sleep(random.uniform(0, 0.1))
    process.send(SIGNALS[name])
    ended = process.wait()
    scene.outcome.faults += 1
    scene.check_quiet(ended, {CODES[name]})
    scene.check_remembered(before, ended)
    scene.check_visible()


def two_ranks(place: Place, kills: int, random: Random) -> Outcome:
    """A rank or torchrun itself, in turns."""
    what = f"{CHECKPOINTS} checkpoints × {BATCHES} batches, ten kills, torchrun with 2 ranks"
    outcome = Outcome("big-torchrun", what)
    with Clock(outcome):
        scene = Scene(place, outcome, CHECKPOINTS, BATCHES)
        guarded(outcome, "two ranks", lambda: _ranks_killed(scene, random))
    return outcome


def _ranks_killed(scene: Scene, random: Random) -> None:
    for kill in range(KILLS):
        kill_one(scene, VICTIMS[kill % len(VICTIMS)], 2, random, units=30)
        scene.outcome.told[f"units after kill {kill + 1}"] = len(scene.done())
    scene.resume(fork=False, ranks=2)
