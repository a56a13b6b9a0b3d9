"""A scenario of faults: a small run, the table that it has when nobody disturbs it, and checks."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tests.faults.injections import Injection
from tests.faults.processes import Ended, HangingError, Place, run, run_forked
from tests.faults.task import save_checkpoints

STARTS = 60
"""Starts after which a run that is never done is one that gets nowhere."""


class LostError(Exception):
    """A promise that was not kept."""


@dataclass
class Outcome:
    """What a scenario came to.

    Attributes:
        name: its name.
        what: what was done, in a sentence.
        faults: how many there were.
        starts: how often ngeval was started.
        units: how many units (checkpoint × batch) an undisturbed run has.
        lost: what was lost or went otherwise than promised, a line each.
        seconds: that all of it took.
        told: other figures.
    """

    name: str
    what: str
    faults: int = 0
    starts: int = 0
    units: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"seconds": round(self.seconds)}


class Scene:
    """A small run in a folder of its own."""

    def __init__(
        self, place: Place, outcome: Outcome, checkpoints: int, batches: int, seed: int = 0
    ) -> None:
        """Make the checkpoints and the undisturbed table.

        Args:
            place: where.
            outcome: what is counted.
            checkpoints: how many.
            batches: for each.
            seed: of the run.
        """
        self.place, self.outcome = place, outcome
        self.checkpoints, self.batches = checkpoints, batches
        outcome.units = checkpoints * batches
        self.folder = place.folder
        save_checkpoints(self.folder / "checkpoints", checkpoints)
        (place.logs / "kept").mkdir()
        shutil.copytree(self.folder / "checkpoints", place.logs / "kept" / "checkpoints")
        self.seed = seed
        self.undisturbed = self._undisturbed()

    @property
    def output(self) -> Path:
        """The result file."""
        return self.folder / "out" / "gamma.csv"

    @property
    def journal(self) -> Path:
        """The folder of what is done."""
        return self.folder / "out" / "gamma.csv.journal"

    def arguments(self, output: str = "out/gamma.csv", *more: str) -> list[str]:
        """Of the command ``ngeval``; the same at every start."""
        task = Path(__file__).parent / "task.py"
        return [
            *("gamma", "--task", f"{task}:task", "--checkpoint", "checkpoints", "--resume"),
            *("--batch-size", "16", "--num-batches", str(self.batches), "--seed", str(self.seed)),
            *("--methods", "sgd,ief,sf:2", "--damping", "1e-3,1", "--no-natural"),
            *("--dtype", "float64", "--output", output, *more),
        ]

    def _undisturbed(self) -> bytes:
        ended = run_forked(self.place, self.arguments("out/gamma.csv"))
        if ended.code != 0:
            raise LostError(f"the undisturbed run failed: {ended.err}")
        table = self.output.read_bytes()
        self.clear()
        return table

    def clear(self) -> None:
        """As before the first start."""
        shutil.rmtree(self.folder / "out")
        (self.folder / "out").mkdir()

    def run(self, injections: Sequence[Injection] = (), **options: Any) -> Ended:
        """A start of ngeval as its users start it."""
        self.outcome.starts += max(1, options.get("ranks", 0))
        return run(self.place, self.arguments(), injections, **options)

    def fork(self, injections: Sequence[Injection] = (), *more: str) -> Ended:
        """A start that takes no time."""
        self.outcome.starts += 1
        return run_forked(self.place, self.arguments("out/gamma.csv", *more), injections)

    def run_other(self, arguments: Sequence[str], **options: Any) -> Ended:
        """A start with other arguments."""
        self.outcome.starts += max(1, options.get("ranks", 0))
        return run(self.place, arguments, **options)

    def fork_other(self, arguments: Sequence[str]) -> Ended:
        """Likewise, at once; its output does not replace that of a process that is running."""
        self.outcome.starts += 1
        return run_forked(self.place, arguments)

    def done(self) -> set[str]:
        """The units that are on the disk, where there is a run to go on with."""
        if not (self.journal / "run.json").exists():
            return set()
        names = (path.stem for path in self.journal.glob("*.arrow"))
        return {name for name in names if re.match(r"\d", name)}

    def check_visible(self) -> None:
        """What a reader finds is a whole table, or none yet; nothing lies where it should not.

        Raises:
            LostError: it is not so.
        """
        allowed = {"gamma.csv", "gamma.csv.manifest.json", "gamma.csv.journal"}
        result = {path.name for path in (self.folder / "out").iterdir()}
        if strange := result - allowed:
            raise LostError(f"beside the output: {sorted(strange)}")
        if strange := {path.name for path in self.folder.iterdir()} - {"out", "checkpoints"}:
            raise LostError(f"outside the output's folder: {sorted(strange)}")
        if self.output.exists():
            table = pd.read_csv(self.output)
            sizes = table.groupby(["stage", "batch"]).size()
            if not self.output.read_bytes().endswith(b"\n") or set(sizes) != {6}:
                raise LostError(f"a table of {len(table)} rows with units of {set(sizes)} rows")
        manifest = self.output.with_name("gamma.csv.manifest.json")
        if manifest.exists():
            json.loads(manifest.read_text())

    def check_quiet(self, ended: Ended, codes: Iterable[int]) -> None:
        """An exit code that is documented, and no traceback.

        Raises:
            LostError: it is not so.
        """
        if ended.code not in codes:
            raise LostError(f"exit code {ended.code}, not {codes}: {ended.err[-1500:]}")
        for place in re.finditer(r"Traceback|Exception ignored|Warning:", ended.err):
            text = ended.err[max(0, place.start() - 300) : place.start() + 2500]
            if "torch/distributed/run.py" not in text and "torch/distributed/elastic" not in text:
                raise LostError(f"a traceback on standard error: {text}")

    def check_remembered(self, before: set[str], ended: Ended) -> None:
        """A start that says how many units it has not to do: all that were on the disk.

        One that was ended before it could say so says nothing.

        Raises:
            LostError: fewer.
        """
        output = re.search(r"(\d+) of \d+ units were done before", ended.err)
        if before and (output is None or int(output[1]) < len(before)):
            nothing_to_do = len(before) == self.outcome.units
            if output is None and (nothing_to_do or ended.code != 0):
                return
            raise LostError(f"{len(before)} units were done, but: {ended.err[-800:]}")

    def check_complete(self) -> None:
        """The table is the undisturbed one's, byte for byte, and the journal is gone.

        Raises:
            LostError: it is not so.
        """
        names = {path.name for path in (self.folder / "out").iterdir()}
        if names != {"gamma.csv", "gamma.csv.manifest.json"}:
            raise LostError(f"in the end there is {sorted(names)}")
        output = json.loads(self.output.with_name("gamma.csv.manifest.json").read_text())
        if output.get("complete") is not True:
            raise LostError("the manifest does not say that the run is complete")
        if self.output.read_bytes() != self.undisturbed:
            raise LostError("the table is not that of the undisturbed run")

    def check_close(self) -> None:
        """As `check_complete`, of sums over samples in another order: to 1e-10, relatively.

        Raises:
            LostError: it is not so.
        """
        built, whole = pd.read_csv(self.output), pd.read_csv(io.BytesIO(self.undisturbed))
        try:
            pd.testing.assert_frame_equal(built, whole, rtol=1e-10, atol=1e-14)
        except AssertionError as error:
            raise LostError(f"the table is not that of the undisturbed run: {error}") from error

    def resume(self, *, fork: bool = True, failed: int = 0, **options: Any) -> None:
        """Start once more; then all is done.

        Args:
            fork: in a process that starts at once.
            failed: so many of the units on the disk had failed, and are done again.
            **options: of the start.

        Raises:
            LostError: it is not, or not as it should be.
        """
        before = sorted(self.done())
        ended = self.fork() if fork else self.run(**options)
        self.check_quiet(ended, {0})
        self.check_remembered(set(before[failed:]), ended)
        self.check_complete()


def guarded(outcome: Outcome, where: str, do: Callable[[], None]) -> bool:
    """Do something; what is lost by it is written down.

    Returns:
        whether nothing was.
    """
    try:
        do()
    except (LostError, HangingError, OSError, ValueError) as error:
        outcome.lost.append(f"{where}: {error}")
        print(f"LOST {outcome.name}, {where}: {error}", flush=True)
        return False
    return True


class Clock:
    """Adds the time that a scenario takes to its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        """Of that outcome."""
        self.outcome = outcome

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.outcome.seconds = time.monotonic() - self.start
