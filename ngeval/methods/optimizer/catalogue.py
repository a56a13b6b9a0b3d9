"""The table of optimizers by name, as plain data: importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerEntry:
    """A row of the table of optimizers.

    Attributes:
        kind: the name of the class, in `torch.optim` except for FAdam.
        learning_rate: the default, for the mean loss.
        description: the update, in one line.
        options: further arguments of the class.
    """

    kind: str
    learning_rate: float
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry("SGD", 0.1, "ḡ"),
    "momentum": OptimizerEntry("SGD", 0.05, "m, with m ← 0.9 m + ḡ", {"momentum": 0.9}),
    "nesterov": OptimizerEntry("SGD", 0.05, "ḡ + 0.9 m", {"momentum": 0.9, "nesterov": True}),
    "adam": OptimizerEntry("Adam", 1e-3, "m̂ / (√v̂ + ε)"),
    "adamw": OptimizerEntry("AdamW", 1e-3, "m̂ / (√v̂ + ε), decoupled weight decay"),
    "nadam": OptimizerEntry("NAdam", 2e-3, "as adam, with Nesterov's momentum"),
    "radam": OptimizerEntry("RAdam", 1e-3, "as adam, its second moment trusted by degrees"),
    "adamax": OptimizerEntry("Adamax", 2e-3, "m̂ / max of past |ḡ|"),
    "adagrad": OptimizerEntry("Adagrad", 1e-2, "ḡ / (√Σ ḡ² + ε)"),
    "adadelta": OptimizerEntry("Adadelta", 1.0, "ḡ √(EMA of steps²) / √(EMA of ḡ²)"),
    "rmsprop": OptimizerEntry("RMSprop", 1e-3, "ḡ / (√v + ε)"),
    "rprop": OptimizerEntry("Rprop", 1e-3, "sign ḡ, with a step size for every parameter"),
    "asgd": OptimizerEntry("ASGD", 0.1, "ḡ, with averaged weights"),
    "adafactor": OptimizerEntry("Adafactor", 1e-2, "ḡ / √(rank-one v̂), clipped"),
    "fadam": OptimizerEntry(
        "FAdam", 1e-3, "EMA of ḡ / (√v̂ + ε), clipped; its weight decay over √v̂"
    ),
    "muon": OptimizerEntry("Muon", 1e-3, "matrices: m orthogonalised; the rest: adamw"),
}
"""Optimizers by name; ḡ is the gradient of the training loss, m and v its running moments."""
