"""Interleaved timing, and the yardsticks: one plain gradient, and the rate of matrix products."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import ngeval
from benchmarks.models import Workload, sum_loss
from benchmarks.pipeline import problem_of

SLOW_SECONDS = 15.0
SLOW_REPEATS = 2
"""A job that takes longer than `SLOW_SECONDS` is repeated this often only."""

SHORT_SECONDS = 2.0
MOST_REPEATS = 40
"""Short jobs are repeated until they have taken `SHORT_SECONDS` or this often: they vary more."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """Something to time: ``run`` of what ``setup``, which is not timed, has made afresh."""

    run: Callable[[Any], object]
    setup: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Settings:
    """How a run measures."""

    device: str = "cpu"
    repeats: int = 5
    quick: bool = False
    on_step: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True)
class Timings:
    """Medians of interleaved repeats, and the notes on how often."""

    seconds: dict[str, float]
    repeats: dict[str, int]

    def __getitem__(self, name: str) -> float:
        return self.seconds[name]

    def notes(self, asked: int) -> list[str]:
        few = {name: count for name, count in self.repeats.items() if count < asked}
        text = ", ".join(f"{name} (median of {count})" for name, count in few.items())
        return [f"over {SLOW_SECONDS:.0f} s, so repeated less: {text}"] if few else []


def interleave(jobs: dict[str, Job], settings: Settings) -> Timings:
    """Time all jobs in turns, after one unrecorded turn each, so that ratios are fair."""
    clock = _Clock(settings.device)
    started = time.perf_counter()
    warm: dict[str, float] = {}
    for name, job in jobs.items():
        settings.on_step(f"{name}: warm-up")
        warm[name] = clock.time(job)
    rounds = settings.repeats
    if not settings.quick:
        cheap = math.ceil(SHORT_SECONDS / (time.perf_counter() - started))
        rounds = max(rounds, min(MOST_REPEATS, cheap))
    counts = {
        name: min(rounds, SLOW_REPEATS) if seconds > SLOW_SECONDS else rounds
        for name, seconds in warm.items()
    }
    measured: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name, job in jobs.items():
            if turn < counts[name]:
                settings.on_step(f"{name}: {turn + 1}/{counts[name]}")
                measured[name].append(clock.time(job))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return Timings(medians, counts)


class _Clock:
    def __init__(self, device: str) -> None:
        self.device = device

    def time(self, job: Job) -> float:
        prepared = job.setup()
        with _collected():
            self._wait()
            start = time.perf_counter()
            result = job.run(prepared)
            self._wait()
            seconds = time.perf_counter() - start
        del prepared, result
        return seconds

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Garbage of earlier jobs is gone, and none is collected while the clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def plain_gradient(workload: Workload) -> None:
    """Forward and backward of the summed loss, into the trainable parameters' ``.grad``."""
    sum_loss(workload.model(*workload.arguments), workload.targets).backward()


def gradient_job(workload: Workload) -> Job:
    """One gradient equivalent (GE)."""
    return Job(lambda _: plain_gradient(workload), lambda: workload.model.zero_grad(True))


def fresh_problem(workload: Workload) -> ngeval.Problem:
    """A problem that remembers nothing but what its construction must keep."""
    workload.model.zero_grad(True)
    problem = problem_of(workload)
    problem.use_rows(problem.rows)
    return problem


def product_job(size: int, device: str, dtype: torch.dtype) -> Job:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    matrix = matrix.to(device, dtype)
    return Job(lambda _: matrix @ matrix)


def product_rates(settings: Settings) -> dict[str, float]:
    """Measured GF/s of square matrix products in float32 and float64."""
    size = 256 if settings.quick else 8192 if settings.device == "cuda" else 2048
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    jobs = {name: product_job(size, settings.device, dtype) for name, dtype in dtypes.items()}
    timings = interleave(jobs, settings)
    return {name: 2e-9 * size**3 / timings[name] for name in dtypes}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time against log size, by least squares over the larger half."""
    count = len(sizes) - len(sizes) // 2
    logs = [[math.log(value) for value in values[-count:]] for values in (sizes, seconds)]
    return float(statistics.linear_regression(*logs).slope)
