"""What a step of the exact optimizers costs: from a new batch to moved weights."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.claims import Claim, Measured
from benchmarks.models import Workload
from benchmarks.pipeline import problem_of
from benchmarks.timing import Job, Settings, gradient_job, interleave
from ngeval.optim import EF, SF, iEF
from ngeval.optim.base import ExactOptimizer

REACH = 3.0
"""Gradient equivalents for a step of iEF."""

RATE = 1e-9
"""A learning rate that leaves the weights, and so the work, as they are."""


def training_step(workload: Workload, settings: Settings) -> Measured:
    """iEF's step, with_batch included; EF's and SF's for information."""
    first = problem_of(workload)
    parameters = [p for p in workload.model.parameters() if p.requires_grad]

    def stepping(optimizer: ExactOptimizer) -> Callable[[object], object]:
        return lambda _: optimizer.step(first.with_batch(workload.inputs, workload.targets))

    def clean() -> None:
        workload.model.zero_grad(True)

    optimizers = {cls.__name__: cls(parameters, lr=RATE) for cls in (iEF, EF, SF)}
    jobs = {"gradient": gradient_job(workload)}
    jobs["with_batch"] = Job(lambda _: first.with_batch(workload.inputs, workload.targets), clean)
    for name, optimizer in optimizers.items():
        jobs[name] = Job(stepping(optimizer), clean)
    timings = interleave(jobs, settings)
    claims = [
        Claim(
            f"a step of {name}",
            timings[name] / timings["gradient"],
            "GE",
            "≤",
            REACH if name == "iEF" else None,
        )
        for name in optimizers
    ]
    size = f"{workload.num_parameters:,} trainable parameters, N = {len(workload.targets)}"
    return Measured(
        claims,
        timings.seconds,
        {"parameters": workload.num_parameters, "engine": first.engine},
        [size, *timings.notes(settings.repeats)],
    )
