"""Checkpoint files: finding them in order, reading them without running code, loading strictly."""

from ngeval.checkpoints.finding import Checkpoint, find_checkpoints
from ngeval.checkpoints.loading import CheckpointLoader, load_checkpoint, save_checkpoint
from ngeval.checkpoints.names import renamed
from ngeval.checkpoints.optimizers import SavedOptimizer, read_optimizer, save_optimizer
from ngeval.checkpoints.reading import read_state

__all__ = [
    "Checkpoint",
    "CheckpointLoader",
    "SavedOptimizer",
    "find_checkpoints",
    "load_checkpoint",
    "read_optimizer",
    "read_state",
    "renamed",
    "save_checkpoint",
    "save_optimizer",
]
