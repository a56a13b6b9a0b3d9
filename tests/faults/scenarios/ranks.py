"""Runs that torchrun shares among processes, of which one dies, or torchrun itself."""

from __future__ import annotations

import time
from random import Random

import psutil

from tests.faults.injections import Injection
from tests.faults.processes import SIGNALS, Ended, Place, Started, start, until
from tests.faults.scenario import STARTS, Clock, LostError, Outcome, Scene, guarded

SLOW: Injection = ("slow", 0.05)
VICTIMS = ("rank 0", "another rank", "torchrun", "torchrun, SIGTERM", "torchrun, SIGINT")


def torchrun(place: Place, kills: int, random: Random) -> Outcome:
    """A random process dies; a different number of processes continues."""
    what = "SIGKILL of a rank or of torchrun, SIGTERM or SIGINT to torchrun, with 2 to 4 ranks"
    outcome = Outcome("torchrun", what)
    with Clock(outcome):
        scene = Scene(place, outcome, 8, 8)
        victims = [VICTIMS[index % len(VICTIMS)] for index in range(max(kills // 3, 5))]
        while victims:
            if not guarded(outcome, victims[0], lambda: _one_run(scene, victims, random)):
                scene.clear()
    return outcome


def _one_run(scene: Scene, victims: list[str], random: Random) -> None:
    """A run with kills until it is done."""
    for _ in range(STARTS):
        if not victims:
            scene.resume(fork=False, ranks=2)
            scene.clear()
            return
        count = random.choice((2, 3, 4))
        if kill_one(scene, victims.pop(0), count, random) == 0:
            scene.check_complete()
            scene.clear()
            return
    raise LostError(f"{STARTS} starts, and the run is not done")


def kill_one(
    scene: Scene, victim: str, count: int, random: Random, *more: str, units: int = 20
) -> int:
    """Start a run of several processes, and end one at a random moment.

    Returns:
        torchrun's exit code.

    Raises:
        LostError: something was lost.
    """
    before = scene.done()
    process = start(scene.place, [*scene.arguments(), *more], [SLOW], ranks=count)
    scene.outcome.starts += count
    expected = len(before) + random.randrange(units)
    begun = (scene.journal / "writer.json").exists
    until(lambda: process.ended or (begun() and len(process.ranks()) == count))
    until(lambda: process.ended or len(scene.done()) >= expected)
    time.sleep(random.uniform(0, 0.1))
    ranks = process.ranks() if not process.ended else {}
    if ranks:
        scene.outcome.faults += 1
        _send(process, victim, ranks, random)
    ended = process.wait()
    _, left = psutil.wait_procs(list(ranks.values()), timeout=120)
    if left:
        process_ids = [one.pid for one in left]
        for one in left:
            one.kill()
        raise LostError(
            f"processes that outlive torchrun ({victim}): {process_ids}: {_text(process)}"
        )
    ended = Ended(ended.code, *(log.read_text(errors="replace") for log in process.logs))
    scene.check_visible()
    scene.check_quiet(ended, {0} if ended.code == 0 else _codes(victim))
    scene.check_remembered(before, ended)
    if scene.journal.exists() and (lost := before - scene.done()):
        raise LostError(f"units that are gone: {lost}")
    return ended.code


def _send(process: Started, victim: str, ranks: dict[int, psutil.Process], random: Random) -> None:
    if victim.startswith("torchrun"):
        process.send(SIGNALS[victim.partition(", ")[2] or "SIGKILL"])
        return
    number = 0 if victim == "rank 0" else random.choice([rank for rank in ranks if rank])
    try:
        ranks[number].kill()
    except psutil.NoSuchProcess:
        return


def _codes(victim: str) -> set[int]:
    if victim == "torchrun":
        return {-9}
    return {1, -15, -2, 130, 143}


def _text(process: Started) -> str:
    return process.logs[1].read_text(errors="replace")[-1500:]


def restarts(place: Place, kills: int, random: Random) -> Outcome:
    """Torchrun starts all processes again by itself, and they go on with the run."""
    what = "SIGKILL of a rank under torchrun --max-restarts 3 with --resume: it goes on by itself"
    outcome = Outcome("torchrun-restarts", what)
    with Clock(outcome):
        scene = Scene(place, outcome, 8, 8)
        for _ in range(max(1, kills // 25)):
            guarded(outcome, "restarts", lambda: _restarted(scene, random))
            scene.clear()
    return outcome


def _restarted(scene: Scene, random: Random) -> None:
    process = start(scene.place, scene.arguments(), [SLOW], ranks=2, restarts=3)
    scene.outcome.starts += 2
    for expected in (6, 20):
        _kill_at(scene, process, expected, random.choice((0, 1)))
    ended = process.wait()
    scene.check_quiet(ended, {0})
    scene.check_complete()


def _kill_at(scene: Scene, process: Started, wanted: int, rank: int) -> None:
    """A rank, when so many units are done; then all are started again."""
    until(lambda: process.ended or (len(scene.done()) >= wanted and len(process.ranks()) == 2))
    if process.ended:
        return
    ranks = process.ranks()
    if len(ranks) == 2:
        ranks[rank].kill()
        scene.outcome.faults += 1
        scene.outcome.starts += 2
        until(lambda: process.ended or not any(one.is_running() for one in ranks.values()))


def samples(place: Place, kills: int, random: Random) -> Outcome:
    """Processes that share the samples of every unit, of which one dies."""
    what = "SIGKILL of a rank or SIGTERM to torchrun with --shard samples, 2 ranks"
    outcome = Outcome("torchrun-samples", what)
    with Clock(outcome):
        scene = Scene(place, outcome, 4, 4)
        for victim in ("rank 0", "another rank", "torchrun, SIGTERM"):
            guarded(outcome, victim, lambda v=victim: _shared(scene, v, random))  # type: ignore[misc]
            scene.clear()
    return outcome


def _shared(scene: Scene, victim: str, random: Random) -> None:
    kill_one(scene, victim, 2, random, "--shard", "samples", units=8)
    if not scene.journal.exists():
        return
    again = scene.run_other([*scene.arguments(), "--shard", "samples"], ranks=2)
    scene.check_quiet(again, {0})
    scene.check_close()
