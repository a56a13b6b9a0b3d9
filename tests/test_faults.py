"""Killed, starved and misled runs lose nothing; the long run is ``python -m tests.faults``."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from tests.faults.injections import Injection
from tests.faults.page import PAGE, RESULTS, page
from tests.faults.processes import CODES, Place
from tests.faults.scenario import LostError, Outcome, Scene
from tests.faults.scenarios import BIG, SCENARIOS, units
from tests.faults.scenarios.points import kill_at
from tests.faults.scenarios.ranks import kill_one

pytestmark = pytest.mark.second_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three checkpoints × two batches, and their table."""
    place = Place.new(tmp_path_factory.mktemp("faults"), "test")
    return Scene(place, Outcome("test", ""), 3, 2)


@pytest.fixture
def scene(made):
    made.clear()
    return made


class TestKills:
    @pytest.mark.parametrize(
        ("point", "action"),
        [
            (("replace", 4, "before"), "SIGKILL"),
            (("replace", 7, "after"), "SIGKILL"),
            (("fsync", 11, "before"), "power"),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
    )
    def test_at_a_call_of_the_file_system(self, scene, point, action):
        kill_at(scene, point, action)

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_the_units_so_far_are_in_the_table(self, scene, name):
        ended = scene.fork([("at_unit", 4, name)])
        assert ended.code == CODES[name]
        assert len(scene.done()) == 3
        assert "3 of 6 units are done; the same command with --resume continues" in ended.err
        scene.check_visible()
        whole = scene.undisturbed.splitlines()
        assert scene.output.read_bytes().splitlines() == whole[: 1 + len(whole) // 2]
        scene.resume()

    def test_a_rank(self, scene):
        assert kill_one(scene, "another rank", 2, Random(0), units=3) != 0
        assert scene.outcome.faults > 0
        scene.resume()


class TestDisks:
    @pytest.mark.parametrize(
        ("call", "error", "said"),
        [
            (("fsync", 8), "ENOSPC", "No space left on device"),
            (("replace", 5), "EROFS", "Read-only file system"),
        ],
        ids=["full", "read-only"],
    )
    def test_a_call_that_fails_from_then_on(self, scene, call, error, said):
        ended = scene.fork([("at_call", *call, "before", error)])
        scene.check_quiet(ended, {2})
        scene.check_visible()
        assert said in ended.err
        scene.resume()


class TestUnits:
    def test_out_of_memory_in_one(self, scene):
        ended = scene.fork([("at_unit", 3, "raise", "OutOfMemoryError")])
        units.check_failed(scene, ended, lambda rows: (rows["stage"] == 1) & (rows["batch"] == 0))
        assert "1 of 6 units (checkpoint × batch) could not be graded" in ended.err
        assert "out of memory" in scene.output.read_text()
        scene.resume(failed=1)

    def test_a_checkpoint_in_the_middle(self, scene):
        path = scene.folder / "checkpoints" / "epoch-01.pt"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        ended = scene.fork()
        units.check_failed(scene, ended, lambda rows: rows["stage"] == 1)
        assert "epoch-01.pt" in ended.err
        path.write_bytes(whole)
        scene.resume(failed=2)

    def test_a_unit_of_another_run_is_not_taken(self, scene):
        """A process may outlive torchrun, and write into the next run's journal."""
        scene.fork([("at_unit", 2, "SIGKILL")])
        other = (scene.journal / "00000-00000.arrow").read_bytes()
        scene.clear()
        ended = scene.fork([("put", str(scene.journal / "00002-00001.arrow"), other.hex())])
        scene.check_quiet(ended, {2})
        assert "1 of 6 units are not in" in ended.err
        scene.resume(failed=1)


class TestHarness:
    """Checks that could not fail would find nothing."""

    def test_a_lost_unit_is_noticed(self, scene):
        scene.fork([("at_unit", 4, "SIGTERM")])
        before = scene.done()
        (scene.journal / "00000-00001.arrow").unlink()
        with pytest.raises(LostError, match="3 units were done"):
            scene.check_remembered(before, scene.fork())

    def test_half_a_table_is_noticed(self, scene):
        scene.output.write_bytes(scene.undisturbed[:-100])
        with pytest.raises(LostError, match="a table of"):
            scene.check_visible()

    def test_a_file_elsewhere_is_noticed(self, scene):
        path = scene.folder / "core"
        path.touch()
        with pytest.raises(LostError, match=r"outside the output's folder: \['core'\]"):
            scene.check_visible()
        path.unlink()

    def test_writing_before_it_is_on_the_disk_is_noticed(self, scene):
        faults: list[Injection] = [("at_call", "replace", 5, "after", "power"), ("no_sync",)]
        scene.fork(faults)

        def check() -> None:
            scene.check_visible()
            scene.resume()

        with pytest.raises((LostError, ValueError)):
            check()


class TestPage:
    def test_page_and_figures_agree(self):
        """``python -m tests.faults.page`` writes it."""
        assert PAGE.read_text(encoding="utf-8") == page()

    def test_every_scenario_has_its_figures_and_nothing_was_lost(self):
        output = json.loads(RESULTS.read_text(encoding="utf-8"))["scenarios"]
        assert output.keys() == SCENARIOS.keys() | BIG.keys()
        for name, figures in output.items():
            assert figures["lost"] == [], name
            assert figures["faults"] > 0, name
            assert re.search(rf"--only {name}$", figures["command"])
        random = sum(output[name]["faults"] for name in ("sigkill", "sigterm", "sigint"))
        assert random >= 50
        assert all(output[name]["faults"] == 10 for name in BIG)
