"""A step of FAdam against one of torch's AdamW, on the tensors of whole models."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from benchmarks.claims import Claim, Measured
from benchmarks.models import Workload
from benchmarks.timing import Job, Settings, interleave
from ngeval.optim import FAdam

SINGLE = (3200, 3200)
"""One matrix of 10 million entries, which the small model's figure has besides."""


def fadam(workload: Workload, settings: Settings) -> Measured:
    """Both with ``foreach``, their states full, on all of the model's parameters."""
    shapes = [tuple(parameter.shape) for parameter in workload.model.parameters()]
    sets = {f"{workload.name}'s tensors": shapes}
    if workload.name == "mlp":
        sets["one matrix"] = [(64, 64) if settings.quick else SINGLE]
    jobs, sizes = {}, {}
    for name, each in sets.items():
        makers = {"FAdam": FAdam, "AdamW": torch.optim.AdamW}
        for kind, make in makers.items():
            jobs[f"{kind}, {name}"] = _step_job(_stepped(make, each, settings.device))
        sizes[name] = sum(torch.Size(shape).numel() for shape in each)
    timings = interleave(jobs, settings)
    claims = [
        Claim(
            f"FAdam over AdamW, {name}, {sizes[name]:,} parameters",
            timings[f"FAdam, {name}"] / timings[f"AdamW, {name}"],
            "×",
            "≤",
            1.5,
        )
        for name in sets
    ]
    return Measured(
        claims,
        timings.seconds,
        {f"parameters, {name}": size for name, size in sizes.items()},
        ["both with foreach=True", *timings.notes(settings.repeats)],
    )


def _stepped(make: type[Optimizer], shapes: list[tuple[int, ...]], device: str) -> Optimizer:
    """An optimizer on tensors of these shapes with gradients, after a first step."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device))
        for shape in shapes
    ]
    for parameter in parameters:
        gradient = 1e-3 * torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(device)
    optimizer = make(parameters, foreach=True)
    optimizer.step()
    return optimizer


def _step_job(optimizer: Optimizer) -> Job:
    return Job(lambda _: optimizer.step())
