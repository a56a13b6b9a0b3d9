"""Training a task with any optimizer, with a checkpoint for every epoch."""

from ngeval.training.measure import DivergedError, EpochReport, call_model
from ngeval.training.optimizers import EXACT, SCHEDULES, Settings
from ngeval.training.run import Training

__all__ = [
    "EXACT",
    "SCHEDULES",
    "DivergedError",
    "EpochReport",
    "Settings",
    "Training",
    "call_model",
]
