"""Settings of the whole suite: one thread, seeds, Hypothesis, which tests run by default."""

import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ngeval",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ngeval")


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread, no terminal's width; child processes import tests and studies as we do."""
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # which pytest-xdist sets in its workers
    paths = [str(config.rootpath), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # tests and studies are not installed
    # Tests look at what a command leaves behind, and Python's own caches are not ngeval's.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


BROWSER = ("chromium", "chromedriver")
"""What the tests with the marker ``browser`` start."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow and second-stage tests without a -m expression, browser tests without one."""
    left_out = [] if config.getoption("-m") else ["slow", "second_stage"]
    if not all(shutil.which(program) for program in BROWSER):
        left_out.append("browser")
    lost = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if lost:
        config.hook.pytest_deselected(items=lost)
        kept = set(items) - set(lost)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same global seed and leaves the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
