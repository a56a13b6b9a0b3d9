"""Training a task with any optimizer, and the search for the settings that each does best with."""

from ngeval.training.grids import default_grids
from ngeval.training.measure import DivergedError, EpochReport, call_model
from ngeval.training.optimizers import EXACT, SCHEDULES, Settings
from ngeval.training.run import Training
from ngeval.training.search import COLUMNS, Search

__all__ = [
    "COLUMNS",
    "EXACT",
    "SCHEDULES",
    "DivergedError",
    "EpochReport",
    "Search",
    "Settings",
    "Training",
    "call_model",
    "default_grids",
]
