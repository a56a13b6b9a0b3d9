"""Single products: γ of one update, the Gram matrix of gradients, the dense logit kernel.

None of them is remembered, so one `Problem` serves all repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ngeval
from benchmarks.claims import Claim, Measured
from benchmarks.models import Workload
from benchmarks.pipeline import Pipeline, problem_of
from benchmarks.timing import (
    Job,
    Settings,
    Timings,
    gradient_job,
    interleave,
    product_job,
)
from ngeval.jacobians import gram_matrix
from ngeval.problem.fisher import unit_cotangents


def gradient_gram(problem: ngeval.Problem) -> Tensor:
    """K_nm = g_n·g_m."""
    return gram_matrix(problem.rows, problem.residual.unsqueeze(1))


def random_direction(workload: Workload) -> Tensor:
    """A seeded vector of length P."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(workload.num_parameters, generator=generator).to(workload.device)


def indicator(workload: Workload, settings: Settings) -> Measured:
    """γ of one given update."""
    direction = random_direction(workload)
    problem = problem_of(workload)
    jobs = {
        "gradient": gradient_job(workload),
        "gamma": Job(lambda _: problem.gamma(direction)),
    }
    timings = interleave(jobs, settings)
    ratio = timings["gamma"] / timings["gradient"]
    return Measured(
        [Claim("γ of a given update", ratio, "GE", "≤", 1.5)],
        timings.seconds,
        {"parameters": workload.num_parameters},
        _size_notes(workload, timings, settings),
    )


def gram(workload: Workload, settings: Settings) -> Measured:
    """The Gram matrix of per-sample gradients; on mlp also against ``vmap(grad)``."""
    problem = problem_of(workload)
    jobs = {
        "gradient": gradient_job(workload),
        "gram": Job(lambda _: gradient_gram(problem)),
    }
    if workload.name == "mlp":
        pipeline = Pipeline(workload, workload.targets)
        jobs["vmap"] = Job(lambda _: _product(pipeline.sample_gradients(workload.targets)))
    timings = interleave(jobs, settings)
    claims = [Claim("K", timings["gram"] / timings["gradient"], "GE", "≤", 1.6)]
    if "vmap" in jobs:
        faster = timings["vmap"] / timings["gram"]
        claims.append(Claim("K, speed-up over vmap(grad) of the model", faster, "×", "≥", 100.0))
    notes = _size_notes(workload, timings, settings)
    return Measured(claims, timings.seconds, {"parameters": workload.num_parameters}, notes)


def _size_notes(workload: Workload, timings: Timings, settings: Settings) -> list[str]:
    size = f"{workload.num_parameters:,} trainable parameters, N = {len(workload.targets)}"
    return [size, *timings.notes(settings.repeats)]


def _product(rows: Tensor) -> Tensor:
    return rows @ rows.T


def theta(workload: Workload, settings: Settings) -> Measured:
    """The flop rate of the dense logit kernel, as a share of that of a float64 product."""
    size = 256 if settings.quick else 2048
    problem = problem_of(workload)
    jobs = {
        "float64 product": product_job(size, settings.device, torch.float64),
        "theta": Job(lambda _: gram_matrix(problem.rows, unit_cotangents(problem))),
    }
    timings = interleave(jobs, settings)
    rate = 2 * size**3 / timings["float64 product"]
    triangle, full = (kernel_operations(workload, half=half) for half in (True, False))
    share = 100 * triangle / timings["theta"] / rate
    return Measured(
        [
            Claim("Θ's share of the gemm rate, one triangle counted", share, "%", "≥", 50.0),
            Claim("the same, full square counted", share * full / triangle, "%", "≥"),
        ],
        timings.seconds,
        {"operations, triangle": triangle, "operations, full": full, "gemm GF/s": rate / 1e9},
        [
            "least operations: a·a′ and b·b′ for every layer, their product, and the cotangents "
            f"pulled back through the layers: {triangle / 1e9:.3g} GF with one triangle, "
            f"{full / 1e9:.3g} GF with the full square; float64 gemm {rate / 1e9:.3g} GF/s",
            *timings.notes(settings.repeats),
        ],
    )


def kernel_operations(workload: Workload, *, half: bool) -> float:
    """Additions and multiplications of Θ = Σ_layers (a·a′ + 1)(b·b′), symmetry used or not."""
    layers = [module for module in workload.model.modules() if isinstance(module, nn.Linear)]
    samples, classes = len(workload.targets), layers[-1].out_features
    rows = samples * classes
    part = 0.5 if half else 1.0
    inner_inputs = part * 2 * samples**2 * sum(layer.in_features for layer in layers)
    inner_outputs = part * 2 * rows**2 * sum(layer.out_features for layer in layers)
    combined = part * 2 * rows**2 * len(layers)
    pulled = 2 * rows * sum(layer.weight.numel() for layer in layers[1:])
    return inner_inputs + inner_outputs + combined + pulled
