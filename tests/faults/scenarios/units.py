"""Units that cannot be graded: no memory, no checkpoint, no numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pandas as pd
import torch

from tests.faults.processes import Ended, Place
from tests.faults.scenario import Clock, LostError, Outcome, Scene, guarded


def out_of_memory(place: Place, kills: int, random: Random) -> Outcome:
    """One unit has no memory: it is failed rows, and is done again later."""
    what = "an out-of-memory error in one unit, of the kinds that Python and torch raise"
    outcome = Outcome("out-of-memory", what)
    with Clock(outcome):
        scene = Scene(place, outcome, 3, 3)
        for kind in ("MemoryError", "OutOfMemoryError", "RuntimeError"):
            guarded(outcome, kind, lambda k=kind: _no_memory(scene, k))  # type: ignore[misc]
            scene.clear()
    return outcome


def _no_memory(scene: Scene, kind: str) -> None:
    ended = scene.fork([("at_unit", 5, "raise", kind)])
    scene.outcome.faults += 1
    check_failed(scene, ended, lambda rows: (rows["stage"] == 1) & (rows["batch"] == 1))
    scene.resume(failed=1)


def check_failed(
    scene: Scene, ended: Ended, lost: Callable[[pd.DataFrame], pd.Series[bool]]
) -> None:
    """Exit code 3; these rows are failed, the others are those of the undisturbed run.

    Raises:
        LostError: it is not so.
    """
    scene.check_quiet(ended, {3})
    scene.check_visible()
    built = scene.output.read_text().splitlines()
    whole = scene.undisturbed.decode().splitlines()
    table = pd.read_csv(scene.output)
    wrong = lost(table)
    if len(built) != len(whole) or not wrong.any():
        raise LostError(f"{len(built) - 1} rows, of which {wrong.sum()} are of what failed")
    if set(table["status"][wrong]) != {"failed"} or table["reason"][wrong].isna().any():
        raise LostError("what failed is not told so in the table")
    for one, other, failed in zip(built[1:], whole[1:], wrong, strict=True):
        if not failed and one != other:
            raise LostError(f"another unit's row is {one}, not {other}")


def bad_checkpoint(place: Place, kills: int, random: Random) -> Outcome:
    """One in the middle of the list that cannot be used; then it is fixed."""
    outcome = Outcome("bad-checkpoint", "a checkpoint in the middle of the list that is damaged")
    with Clock(outcome):
        scene = Scene(place, outcome, 3, 2)
        for name, damage in DAMAGE.items():
            guarded(outcome, name, lambda d=damage: _damaged(scene, d))  # type: ignore[misc]
            shutil.rmtree(scene.folder / "checkpoints")
            shutil.copytree(scene.place.logs / "kept" / "checkpoints", scene.folder / "checkpoints")
            scene.clear()
        path = scene.folder / "checkpoints" / "epoch-01.pt"
        guarded(outcome, "vanishes", lambda: _vanishes(scene, path))
    return outcome


def _damaged(scene: Scene, damage: Callable[[Path], None]) -> None:
    path = scene.folder / "checkpoints" / "epoch-01.pt"
    damage(path)
    ended = scene.fork()
    scene.outcome.faults += 1
    check_failed(scene, ended, lambda rows: rows["stage"] == 1)
    again = scene.fork()  # still damaged
    check_failed(scene, again, lambda rows: rows["stage"] == 1)
    shutil.copy(scene.place.logs / "kept" / "checkpoints" / path.name, path)
    scene.resume(failed=scene.batches)


def _vanishes(scene: Scene, path: Path) -> None:
    ended = scene.fork([("at_unit", 1, "remove", str(path))])
    scene.outcome.faults += 1
    check_failed(scene, ended, lambda rows: rows["stage"] == 1)
    again = scene.fork()  # a folder with one checkpoint less is another run
    scene.check_quiet(again, {2})
    if "epoch-01.pt" not in again.err:
        raise LostError(f"what is told is not that a checkpoint is missing: {again.err}")
    shutil.copy(scene.place.logs / "kept" / "checkpoints" / path.name, path)
    scene.resume(failed=scene.batches)


def _half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = b"\xff" * 64
    path.write_bytes(data)


def _nan(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor * float("nan") for name, tensor in state.items()}, path)


def _shapes(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor[:-1] for name, tensor in state.items()}, path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": _half,
    "garbage": lambda path: path.write_bytes(b"\x80\x02garbage" * 100) and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "flipped": _middle,
    "NaN": _nan,
    "shapes": _shapes,
}
"""What is done to a checkpoint."""


def bad_batch(place: Place, kills: int, random: Random) -> Outcome:
    """One batch that the model raises an error for, at every checkpoint."""
    outcome = Outcome("bad-batch", "a batch that the model cannot take")
    with Clock(outcome):
        scene = Scene(place, outcome, 3, 3)
        guarded(outcome, "batch 1", lambda: _wide(scene))
    return outcome


def _wide(scene: Scene) -> None:
    ended = scene.run(FAULTS_BATCH="1")
    scene.outcome.faults += 1
    check_failed(scene, ended, lambda rows: rows["batch"] == 1)
    again = scene.fork()  # other data: that is another run
    scene.check_quiet(again, {2})
    if "batches[1].sha256" not in again.err:
        raise LostError(f"what is told is not that the batch is another: {again.err}")


def nan(place: Place, kills: int, random: Random) -> Outcome:
    """A direction that is NaN at one λ only."""
    outcome = Outcome("nan", "NaN at one λ of one method")
    with Clock(outcome):
        scene = Scene(place, outcome, 2, 2)
        guarded(outcome, "λ = 1", lambda: _nan_at(scene))
    return outcome


def _nan_at(scene: Scene) -> None:
    ended = scene.fork([("nan_at", "ief", 1.0)])
    scene.outcome.faults += 1
    scene.check_quiet(ended, {0})
    if "rows could not be computed" not in ended.err:
        raise LostError(f"nothing is said of it: {ended.err}")
    table = pd.read_csv(scene.output)
    wrong = (table["method"] == "ief") & (table["damping"] == 1.0)
    if not (wrong == (table["status"] != "ok")).all():
        raise LostError(f"failed rows are {table.loc[table['status'] != 'ok']}")
    built, whole = scene.output.read_text().splitlines(), scene.undisturbed.decode().splitlines()
    for one, other, failed in zip(built[1:], whole[1:], wrong, strict=True):
        if not failed and one != other:
            raise LostError(f"another row is {one}, not {other}")
