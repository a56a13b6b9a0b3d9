"""The figures by name, with the models that each is measured on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import fadam, kronecker, memory, products, profiles, sweeps, training
from benchmarks.claims import Measured
from benchmarks.models import build
from benchmarks.timing import Settings


@dataclass(frozen=True)
class Figure:
    """A measurement, its models, and one line on what it is."""

    measure: Callable[[Any, Settings], Measured]
    models: tuple[str, ...]
    title: str


EVERY = ("mlp", "cnn", "vit", "gpt", "t5")

FIGURES: dict[str, Figure] = {
    "sweep50": Figure(
        sweeps.sweep50,
        ("mlp", "cnn", "vit", "t5"),
        "sgd, ef, sf and ief at 50 dampings (Problem included), against the pipeline",
    ),
    "sweep6": Figure(sweeps.sweep6, ("mlp", "cnn", "vit", "t5"), "the same at 6 dampings"),
    "precision": Figure(
        sweeps.precision, ("mlp", "cnn", "vit"), "the same in float64 against float32"
    ),
    "ng": Figure(
        sweeps.natural_gradient,
        ("mlp", "cnn", "vit"),
        "what the exact natural gradient at 50 dampings adds to the four methods' time",
    ),
    "gamma": Figure(products.indicator, EVERY, "γ of one given update"),
    "gram": Figure(products.gram, EVERY, "the Gram matrix K of per-sample gradients"),
    "memory": Figure(memory.memory, EVERY, "peak memory of K over that of a plain gradient"),
    "grading": Figure(
        memory.grading,
        ("gpt", "t5-small"),
        "peak memory of a process that grades ef, ief and sf at three dampings",
    ),
    "kfac": Figure(
        kronecker.kfac, EVERY, "KFAC's factors, their decomposition, solves for 50 dampings"
    ),
    "optimizer": Figure(kronecker.optimizer_step, EVERY, "γ of the step that an AdamW would take"),
    "fadam": Figure(
        fadam.fadam, ("mlp", "vit", "gpt"), "a step of FAdam over a step of AdamW, both foreach"
    ),
    "training-step": Figure(
        training.training_step,
        ("mlp", "cnn", "vit", "gpt"),
        "a step of iEF, EF and SF, from a new batch to moved weights",
    ),
    "theta": Figure(products.theta, ("mlp",), "flop rate of the dense logit kernel Θ"),
    "profile": Figure(profiles.profiled, ("mlp", "cnn", "vit"), "where the time goes, by operator"),
    "growth": Figure(sweeps.growth, ("mlp",), "time of 6 dampings against P and against N"),
}


def measure(name: str, model: str, settings: Settings) -> dict[str, Any]:
    """One figure on one model; a failure is a result too."""
    try:
        workload = build(model, settings.device, quick=settings.quick)
        return FIGURES[name].measure(workload, settings).as_dict()
    except Exception as error:  # one figure's failure must not end a long run
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {frame.name}: {error}"
        return {"failed": text.splitlines()[0], "claims": [], "seconds": {}, "notes": []}
