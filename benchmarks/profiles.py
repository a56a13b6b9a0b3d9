"""Shares of operators in the time of each of ngeval's costs, and the rest outside operators."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.claims import Measured
from benchmarks.models import Workload
from benchmarks.pipeline import METHODS, problem_of
from benchmarks.products import gradient_gram, random_direction
from benchmarks.sweeps import grade
from benchmarks.timing import Settings, fresh_problem, plain_gradient

SHOWN = 6
"""Number of operators to name."""

REPEATS = 3
"""Wall-clock times are medians of this many repeats without the profiler, which slows them down."""


def profiled(workload: Workload, settings: Settings) -> Measured:
    """Shares of self time by operator, of a gradient, γ, K, a `Problem`, sweeps and ng."""
    problem = problem_of(workload)
    direction = random_direction(workload)
    tasks: dict[str, Callable[[], object]] = {
        "gradient": lambda: plain_gradient(workload),
        "γ": lambda: problem.gamma(direction),
        "K": lambda: gradient_gram(problem),
        "Problem": lambda: problem_of(workload),
    }
    tasks["evaluate, 6 dampings"] = lambda: grade(fresh_problem(workload), METHODS, 6)
    if workload.name in ("mlp", "cnn"):
        methods = (*METHODS, "ng")
        tasks["evaluate with ng, 6 dampings"] = lambda: grade(fresh_problem(workload), methods, 6)
    seconds, notes = {}, []
    for name, run in tasks.items():
        settings.on_step(name)
        seconds[name] = _wall(run)
        notes.append(f"{name}: {_shares(run)}")
    times = ", ".join(f"{name} {taken:.3g} s" for name, taken in seconds.items())
    return Measured([], seconds, {}, [times, *notes])


def _wall(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _shares(run: Callable[[], object]) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    times: Counter[str] = Counter()
    for event in watched.key_averages():
        if event.key.startswith(("aten::", "prims::", "mkldnn")):
            times[event.key.removeprefix("aten::")] += event.self_cpu_time_total / 1e6
    shares = [f"{name} {100 * spent / wall:.0f} %" for name, spent in times.most_common(SHOWN)]
    rest = 100 * max(0.0, 1 - sum(times.values()) / wall)
    return f"{', '.join(shares)}, outside operators {rest:.0f} %"
