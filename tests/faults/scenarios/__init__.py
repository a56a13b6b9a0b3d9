"""The scenarios, by name: functions of a place, a number of kills and a random generator."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.faults.processes import Place
from tests.faults.scenario import Outcome
from tests.faults.scenarios import big, disks, kills, points, ranks, units

Scenario = Callable[[Place, int, Random], Outcome]

SCENARIOS: dict[str, Scenario] = {
    "sigkill": kills.sigkill,
    "sigterm": kills.sigterm,
    "sigint": kills.sigint,
    "crash-points": points.crash_points,
    "power-cuts": points.power_cuts,
    "signal-points": points.signal_points,
    "torchrun": ranks.torchrun,
    "torchrun-restarts": ranks.restarts,
    "torchrun-samples": ranks.samples,
    "full-disk": disks.full_disk,
    "failing-disk": disks.failing_disk,
    "read-only": disks.read_only,
    "output-removed": disks.output_removed,
    "second-writer": disks.second_writer,
    "out-of-memory": units.out_of_memory,
    "bad-checkpoint": units.bad_checkpoint,
    "bad-batch": units.bad_batch,
    "nan": units.nan,
}
RANDOM = ("sigkill", "sigterm", "sigint")
"""Those that share the kills at random moments."""

BIG: dict[str, Scenario] = {"big": big.one_process, "big-torchrun": big.two_ranks}
"""The run of 400 units."""
