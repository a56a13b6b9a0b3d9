"""Optimizers as methods: the step that a ``torch.optim.Optimizer`` would take now."""

from ngeval.methods.optimizer.by_name import NamedOptimizer
from ngeval.methods.optimizer.catalogue import OPTIMIZERS, OptimizerEntry, optimizer_entry
from ngeval.methods.optimizer.load_state import load_optimizer_state
from ngeval.methods.optimizer.step import OptimizerState, OptimizerStep

__all__ = [
    "OPTIMIZERS",
    "NamedOptimizer",
    "OptimizerEntry",
    "OptimizerState",
    "OptimizerStep",
    "load_optimizer_state",
    "optimizer_entry",
]
