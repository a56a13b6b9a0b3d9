"""KFAC: its factors, their decomposition, solves for many dampings."""

from __future__ import annotations

import itertools

import torch

import ngeval
from benchmarks.claims import Claim, Measured
from benchmarks.models import Workload
from benchmarks.pipeline import problem_of
from benchmarks.sweeps import dampings
from benchmarks.timing import Job, Settings, gradient_job, interleave
from ngeval.curvature.kronecker_block import KroneckerBlock
from ngeval.methods.kfac import Kronecker
from ngeval.methods.label_sources import DATA, SAMPLED, Labels

DAMPINGS = 50


def kfac(workload: Workload, settings: Settings) -> Measured:
    """In gradient equivalents, for factors by the data's labels and by one sampled label."""
    problem = problem_of(workload)
    methods = {
        "factors, data's labels": Kronecker("kfac-ef", Labels(DATA), rest="zero"),
        "factors, a sampled label": Kronecker("kfac-sf", Labels(SAMPLED), rest="zero"),
    }
    settings.on_step("decomposing")
    state = methods["factors, data's labels"].prepare(problem, ngeval.Kernel(problem))
    jobs = {"gradient": gradient_job(workload)}
    for name, method in methods.items():
        jobs[name] = Job(lambda _, method=method: method.factors(problem))
    jobs["eigendecompositions"] = Job(
        lambda factors: [
            KroneckerBlock.of(each, problem.num_samples, problem.function.row_epsilon)
            for each in factors
        ],
        lambda: methods["factors, data's labels"].factors(problem),
    )
    order = itertools.cycle(dampings(DAMPINGS))
    jobs["a solve"] = Job(lambda _: _solve_all(state.blocks, next(order)))
    timings = interleave(jobs, settings)
    gradient, solves = timings["gradient"], DAMPINGS * timings["a solve"]
    data, sampled = (timings[name] / gradient for name in methods)
    return Measured(
        [
            Claim("factors, data's labels", data, "GE", "≤", 2.0),
            Claim("factors, a sampled label", sampled, "GE", "≤", 2.0),
            Claim(f"solves for {DAMPINGS} dampings", solves / gradient, "GE", "≤", 3.0),
            Claim("eigendecompositions", timings["eigendecompositions"] / gradient, "GE"),
        ],
        timings.seconds,
        {"coverage in %": state.coverage, "layers": len(state.blocks)},
        [
            f"{len(state.blocks)} layers with {state.coverage:.1f} % of the parameters; all is "
            f"float64; a solve is one update in parameter space, and its median is multiplied: "
            f"every damping costs the same; "
            f"eigendecompositions take {timings['eigendecompositions']:.3g} s",
            *timings.notes(settings.repeats),
        ],
    )


def _solve_all(blocks: list[KroneckerBlock], damping: float) -> None:
    for block in blocks:
        block.solve(damping, "exact")


def optimizer_step(workload: Workload, settings: Settings) -> Measured:
    """Grading the step that an AdamW with a state would take now."""
    problem = problem_of(workload)
    parameters = [p for p in workload.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(100.0),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    method = ngeval.OptimizerStep(optimizer)

    def grade(_: object) -> None:
        problem.use_rows(problem.rows)  # the gradient is computed again
        problem.gamma(method.prepare(problem, ngeval.Kernel(problem)).direction(0.0))

    timings = interleave({"gradient": gradient_job(workload), "step": Job(grade)}, settings)
    ratio = timings["step"] / timings["gradient"]
    return Measured(
        [Claim("γ of an AdamW step, gradient included", ratio, "GE", "≤", 3.0)],
        timings.seconds,
        {"parameters": workload.num_parameters},
        timings.notes(settings.repeats),
    )
