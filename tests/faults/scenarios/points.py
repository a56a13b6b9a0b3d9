"""Every point at which a run asks something of the file system, one after the other.

A run of four units is killed at its first call, at its second, and so on to its last, and resumed
after each: in whatever order a run writes in, no moment between two calls is left out.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from tests.faults.injections import CALLS, Injection
from tests.faults.processes import CODES, Place
from tests.faults.scenario import Clock, LostError, Outcome, Scene, guarded

CHECKPOINTS, BATCHES = 2, 2


def crash_points(place: Place, kills: int, random: Random) -> Outcome:
    """SIGKILL before each call, and after each that puts a file in its place."""
    outcome = Outcome("crash-points", "SIGKILL at every call to the file system")
    return _at_points(outcome, place, "SIGKILL", ("before", "after"), None)


def power_cuts(place: Place, kills: int, random: Random) -> Outcome:
    """Likewise around what makes a file last, and what was not synchronised is empty."""
    what = "SIGKILL at calls to the file system, files emptied that were not yet synchronised"
    return _at_points(Outcome("power-cuts", what), place, "power", ("before", "after"), None)


def signal_points(place: Place, kills: int, random: Random) -> Outcome:
    """SIGTERM and Ctrl-C at some of them."""
    outcome = Outcome("signal-points", "SIGTERM or Ctrl-C at calls to the file system")
    _at_points(outcome, place, "SIGTERM", ("before",), random)
    return _at_points(outcome, place, "SIGINT", ("after",), random)


def _at_points(
    outcome: Outcome, place: Place, action: str, times: tuple[str, ...], random: Random | None
) -> Outcome:
    place = Place.new(place.logs.parent, action, place.code)
    with Clock(outcome):
        scene = Scene(place, outcome, CHECKPOINTS, BATCHES)
        counts = count_calls(scene)
        outcome.told["calls"] = dict(counts)
        points = [
            (name, number, when)
            for name in CALLS
            for number in range(1, counts[name] + 1)
            for when in times
            if when == "before" or name == "replace"
            if action != "power" or name in ("fsync", "replace")
        ]
        if random is not None:
            points = random.sample(points, min(len(points), 20))
        for point in points:
            guarded(outcome, f"{action} at {point}", lambda p=point: kill_at(scene, p, action))  # type: ignore[misc]
            scene.clear()
    return outcome


def count_calls(scene: Scene) -> Counter[str]:
    """How often an undisturbed run calls which of `CALLS`."""
    log = scene.place.logs / "calls"
    ended = scene.fork([("flush_often",), ("count_calls", str(log))])
    scene.check_quiet(ended, {0})
    scene.check_complete()
    scene.clear()
    return Counter(log.read_text().split())


def kill_at(scene: Scene, point: tuple[str, int, str], action: str) -> None:
    """Kill a run at a point, and go on with it.

    Raises:
        LostError: something was lost.
    """
    output = scene.place.logs / "units"
    output.unlink(missing_ok=True)
    faults: list[Injection] = [
        ("flush_often",),
        ("note_units", str(output)),
        ("at_call", *point, action),
    ]
    ended = scene.fork(faults)
    scene.outcome.faults += 1
    signal = "SIGKILL" if action == "power" else action
    scene.check_quiet(ended, {CODES[signal]})
    scene.check_visible()
    noted = set(output.read_text().split()) if output.exists() else set()
    done = {f"{int(name[:5])}-{int(name[6:11])}" for name in scene.done()}
    if scene.journal.joinpath("run.json").exists() and noted - done:
        raise LostError(f"units that were done are not on the disk: {noted - done}")
    if scene.journal.joinpath("run.json").exists():
        before = scene.done()
        again = scene.fork()
        scene.check_quiet(again, {0})
        if len(noted) < scene.outcome.units:
            scene.check_remembered({name for name in before if _key(name) in noted}, again)
        scene.check_complete()
    else:
        scene.resume()


def _key(name: str) -> str:
    return f"{int(name[:5])}-{int(name[6:11])}"
