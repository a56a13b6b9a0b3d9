"""Sweeps over dampings: against the straightforward pipeline, with ``ng``, and as sizes grow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

import ngeval
from benchmarks.claims import Claim, Measured
from benchmarks.models import SEED, Workload, digits, mlp
from benchmarks.pipeline import METHODS, Pipeline, check, problem_of, sampled_labels
from benchmarks.timing import Job, Settings, exponent, fresh_problem, gradient_job, interleave

REACH = {
    50: {"mlp": 200.0, "cnn": 30.0, "vit": 10.0},
    6: {"mlp": 25.0, "cnn": 5.0, "vit": 4.0},
}
_checked: dict[tuple[str, str], float] = {}


class UngradedError(Exception):
    """ngeval could not grade a method that the figure needs."""


def dampings(count: int) -> list[float]:
    """Log-spaced from 1e-8 to 1e4."""
    return np.logspace(-8, 4, count).tolist()


def grade(problem: ngeval.Problem, methods: Sequence[str], count: int) -> pd.DataFrame:
    """Evaluate, and raise where a row has failed.

    Raises:
        UngradedError: a row is not ``"ok"``.
    """
    # γ_min and the bounds belong to ng: the four methods are graded without.
    natural = "ng" in methods
    table = ngeval.evaluate(problem, methods, dampings(count), seed=0, natural=natural)
    failed = table[table["status"] == "failed"]
    if len(failed):
        first = failed.iloc[0]
        raise UngradedError(f"{first['method']} failed: {first['reason']}")
    return table


def sweep50(workload: Workload, settings: Settings) -> Measured:
    """50 dampings of four methods against the pipeline."""
    return _sweep(workload, settings, 50)


def sweep6(workload: Workload, settings: Settings) -> Measured:
    """Six dampings of four methods against the pipeline."""
    return _sweep(workload, settings, 6)


def _sweep(workload: Workload, settings: Settings, count: int) -> Measured:
    gap = _agreement(workload, settings)
    pipeline = Pipeline(workload, sampled_labels(problem_of(workload)))
    # Every repeat has a different damping, from all over the range.
    order = itertools.cycle(np.roll(dampings(count), count // 2)[:: max(1, count // 5)].tolist())
    jobs = {
        "gradient": gradient_job(workload),
        "pipeline, one damping": Job(lambda _: pipeline.gammas(next(order))),
        "Problem and its checks": Job(lambda _: problem_of(workload)),
        "evaluate": Job(
            lambda problem: grade(problem, METHODS, count), lambda: fresh_problem(workload)
        ),
    }
    timings = interleave(jobs, settings)
    whole = timings["pipeline, one damping"] * count
    together = timings["Problem and its checks"] + timings["evaluate"]
    return Measured(
        [
            Claim("speed-up", whole / together, "×", "≥", REACH[count].get(workload.name)),
            Claim("speed-up, Problem made before", whole / timings["evaluate"], "×", "≥"),
        ],
        timings.seconds,
        {
            "dampings": count,
            "pipeline seconds for all dampings": whole,
            "evaluate in GE": timings["evaluate"] / timings["gradient"],
            "largest relative gap in float64": gap,
        },
        [
            f"the pipeline's time is its median for one damping × {count}: every damping costs "
            f"it the same; γ of both agree to {gap:.0e} in float64",
            f"evaluate takes {timings['evaluate'] / timings['gradient']:.3g} GE, Problem with its "
            f"checks {timings['Problem and its checks'] / timings['gradient']:.3g} GE",
            *timings.notes(settings.repeats),
        ],
    )


def _agreement(workload: Workload, settings: Settings) -> float:
    """The check, once for each model and process."""
    key = (workload.name, settings.device)
    if key not in _checked:
        settings.on_step("checking that both agree")
        _checked[key] = check(workload)
    return _checked[key]


def natural_gradient(workload: Workload, settings: Settings) -> Measured:
    """The extra time of ``ng`` at 50 dampings, over the four methods."""
    tables: list[pd.DataFrame] = []

    def with_ng(problem: ngeval.Problem) -> None:
        tables.append(grade(problem, (*METHODS, "ng"), 50))

    jobs = {
        "gradient": gradient_job(workload),
        "four methods": Job(
            lambda problem: grade(problem, METHODS, 50), lambda: fresh_problem(workload)
        ),
        "four methods and ng": Job(with_ng, lambda: fresh_problem(workload)),
    }
    timings = interleave(jobs, settings)
    extra = timings["four methods and ng"] - timings["four methods"]
    share = Claim("extra time over that of four methods", extra / timings["four methods"], "×")
    gradients = Claim("extra time", extra / timings["gradient"], "GE")
    claims = [_with_reach(share, 1.0), gradients]
    if workload.name == "vit":
        claims = [_with_reach(gradients, 100.0), share]
    details = certificate(tables[-1])
    notes = [f"{name}: {value:.3g}" for name, value in details.items()]
    notes = notes or ["no certificate of ng's γ"]
    return Measured(claims, timings.seconds, details, [*notes, *timings.notes(settings.repeats)])


def precision(workload: Workload, settings: Settings) -> Measured:
    """Six dampings of four methods, Problem included, in float64 over float32."""
    jobs = {"gradient": gradient_job(workload)} | {
        str(dtype): Job(lambda _, dtype=dtype: grade(problem_of(workload, dtype=dtype), METHODS, 6))
        for dtype in (torch.float32, torch.float64)
    }
    timings = interleave(jobs, settings)
    ratio = timings["torch.float64"] / timings["torch.float32"]
    reach = 2.2 if settings.device == "cpu" else None
    claims = [Claim("time in float64 over float32", ratio, "×", "≤", reach)]
    cost = timings["torch.float64"] / timings["gradient"]
    notes = [f"{cost:.3g} GE in float64", *timings.notes(settings.repeats)]
    return Measured(claims, timings.seconds, {}, notes)


def _with_reach(entry: Claim, reach: float) -> Claim:
    return Claim(entry.quantity, entry.value, entry.unit, "≤", reach)


def certificate(table: pd.DataFrame) -> dict[str, float]:
    """The largest gap of the bounds on ng's γ, and the number of iterations."""
    rows = table[table["method"] == "ng"]
    details: dict[str, float] = {}
    if {"gamma_ng_lower", "gamma_ng_upper"} <= set(rows.columns):
        widest = (rows["gamma_ng_upper"] / rows["gamma_ng_lower"] - 1).max()
        details["widest relative gap of ng's bounds"] = float(widest)
    if "iterations" in rows.columns:
        details["iterations, most"] = float(rows["iterations"].max())
    return details


def growth(_: Workload, settings: Settings) -> Measured:
    """How the time of six dampings grows with P at fixed N, and with N at fixed P."""
    widths = [16, 32, 48] if settings.quick else [256, 512, 1024, 1448, 2048, 2896]
    samples = [8, 16, 32] if settings.quick else [64, 128, 256, 512, 1024]
    width, batch = (16, 8) if settings.quick else (512, 64)
    by_width = [_digits_mlp(value, batch, settings.device) for value in widths]
    by_samples = [_digits_mlp(width, value, settings.device) for value in samples]
    claims, seconds, details, notes = [], {}, {}, []
    for name, reach, sizes, workloads in (
        ("P", 1.1, [w.num_parameters for w in by_width], by_width),
        ("N", 2.1, samples, by_samples),
    ):
        jobs = {
            f"{name} = {size:,}": Job(lambda _, w=w: grade(problem_of(w), METHODS, 6))
            for size, w in zip(sizes, workloads, strict=True)
        }
        timings = interleave(jobs, settings)
        seconds |= timings.seconds
        notes += timings.notes(settings.repeats)
        slope = exponent(sizes, list(timings.seconds.values()))
        claims.append(Claim(f"exponent of time in {name}", slope, "", "≤", reach))
        details[name] = sizes
    half = len(widths) - len(widths) // 2, len(samples) - len(samples) // 2
    notes.append(
        f"six dampings of four methods, Problem included; P from widths {widths} at N = {batch}, "
        f"N at width {width}; fitted over the largest {half[0]} and {half[1]} sizes"
    )
    return Measured(claims, seconds, details, notes)


def _digits_mlp(width: int, samples: int, device: str) -> Workload:
    """Untrained: how time grows does not depend on the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = mlp([64, width, width, 10]).eval()
    inputs, targets = digits()
    return Workload("mlp", model, inputs[:samples], targets[:samples]).to(device)
