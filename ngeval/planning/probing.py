"""One unit of a run on the first n samples of its batch, graded as all N would be, and measured.

How Θ is kept and how the natural gradient is solved depends on a problem's sizes. A small one
that stands for a large one is made to go the large one's way.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ngeval.checkpoints import CheckpointLoader
from ngeval.model.checks import Inputs
from ngeval.grading.evaluate import evaluate
from ngeval.problem.fisher import factor_columns, has_few_parameters
from ngeval.model.function import map_inputs
from ngeval.model.parameter_groups import Groups
from ngeval.curvature.logit_kernel import (
    COMMON_RANK,
    DENSE_SIZE,
    EXPLICIT_ENTRIES,
    STRIP_OUTPUTS,
    GramKernel,
    MatrixFreeKernel,
    StripKernel,
)
from ngeval.curvature.krylov import MAX_ITERATIONS, KrylovRun
from ngeval.grading.layer_table import layer_table
from ngeval.methods import Method
from ngeval.methods.ng import NaturalGradient
from ngeval.problem.metric_batch import Metric
from ngeval.curvature.natural_gradient import KrylovSolver
from ngeval.planning.footprint import watch_memory
from ngeval.planning.ladder import Factorisation, Rung
from ngeval.planning.passes import count_passes
from ngeval.problem.problem import Problem
from ngeval.runs.run import Grading, Run
from ngeval.curvature.spectrum import Spectrum
from ngeval.runs.units import methods_at, sample_table

SHORT_SECONDS = 1.0
MOST_REPEATS = 5
"""A rung is repeated until it has taken `SHORT_SECONDS`, or this often: short ones vary more."""

FACTORED_SIZE = 1600
"""Larger matrices are timed at this size, and their time taken to grow with the operations."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """What is done with every unit.

    Attributes:
        kind: ``"gamma"`` (also of ``sweep`` and ``compare``), ``"layers"`` or ``"imbalance"``.
        methods: by name, or objects.
        dampings: λ; of imbalance the first one counts.
        damping_scale: see `ngeval.evaluate`.
        grading: how updates are graded.
        groups: of ``"layers"``.
    """

    kind: str
    methods: Sequence[str | Method]
    dampings: Sequence[float]
    damping_scale: str = "absolute"
    grading: Grading = field(default_factory=Grading)
    groups: Groups = "layer"

    def table(
        self, problem: Problem, methods: Sequence[Method], metric: Metric | None, seed: int
    ) -> pd.DataFrame:
        """The rows of one unit, as the run makes them."""
        if self.kind == "imbalance":
            return sample_table(problem, methods, self.dampings[0], seed)
        options: dict[str, Any] = {
            "damping_scale": self.damping_scale,
            "seed": seed,
            "metric": metric,
            "natural": self.grading.natural,
        }
        if self.kind == "layers":
            return layer_table(problem, methods, self.dampings, groups=self.groups, **options)
        return evaluate(problem, methods, self.dampings, gap=self.grading.gap, **options)


@dataclass(frozen=True)
class Form:
    """How a problem of N samples is treated.

    Attributes:
        kernel: ``"jacobian"``, ``"gram"``, ``"strip"`` or ``"matrix-free"``.
        dense: the natural gradient is exact, by a factorisation; else by a Krylov run.
        solved: it is computed.
    """

    kernel: str
    dense: bool
    solved: bool = True


def form_of(problem: Problem, num_samples: int, memory: int, *, exact: bool, pushes: int) -> Form:
    """What `ngeval.kernel.logit_kernel` would choose for a problem of more samples.

    Args:
        problem: of fewer samples.
        num_samples: N.
        memory: bytes to work in.
        exact: the exact natural gradient is wanted.
        pushes: how many updates are pushed.
    """
    outputs = problem.num_outputs
    size = num_samples * outputs
    entries = size * problem.num_parameters
    dense = size <= DENSE_SIZE and 5 * 8 * size**2 <= memory
    in_reach = size <= DENSE_SIZE or has_few_parameters(problem)
    if in_reach and entries <= EXPLICIT_ENTRIES and 4 * 8 * entries <= memory:
        return Form("jacobian", dense)
    if exact and dense:
        return Form("gram", dense)
    needed = min(pushes, COMMON_RANK, 2 * num_samples)
    fits = 8 * size * (4 * num_samples + 100) < memory
    strip = outputs <= min(STRIP_OUTPUTS, 2 * needed) and fits
    return Form("strip" if strip else "matrix-free", dense)


def take_form(problem: Problem, form: Form, gap: float) -> None:
    """Make a problem go the way of a larger one, by remembering what that would choose."""
    if form.kernel == "gram":
        problem.remember("dense_kernel", lambda: GramKernel(problem))
    elif form.kernel == "strip":
        problem.remember("dense_kernel", lambda: StripKernel(problem))
    elif form.kernel == "matrix-free":
        problem.remember("dense_kernel", lambda: MatrixFreeKernel(problem))
    if not form.solved:
        return
    if not form.dense:
        problem.remember("dense_solver", lambda: KrylovSolver(problem, gap, MAX_ITERATIONS))
    elif form.kernel in ("strip", "matrix-free"):
        right = problem.distribution.whitened_residual().flatten
        problem.remember("fisher_spectrum", partial(_full_spectrum, problem, right))


def _full_spectrum(problem: Problem, right: Callable[[], Tensor]) -> Spectrum:
    """As `ngeval.kernel.fisher_spectrum` has it, by a Θ that is made for it alone."""
    return GramKernel(problem).spectrum(factor_columns(problem), right(), 1e-4)


@dataclass(frozen=True)
class Probe:
    """A model at a checkpoint with a batch, to grade parts of.

    Attributes:
        run: that is planned.
        job: what is done with every unit.
        loader: of other checkpoints, into the same model.
        model: with the checkpoint's weights.
        inputs: of the batch, on the device.
        targets: likewise.
        memory: bytes to work in.
        stage: the checkpoint's place in the list.
        clock: seconds.
    """

    run: Run
    job: Job
    loader: CheckpointLoader
    model: nn.Module
    inputs: Inputs
    targets: Tensor
    memory: int
    stage: int = 0
    clock: Clock = time.perf_counter

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.targets)

    def problem(self, samples: int) -> Problem:
        """The first n samples."""
        part = slice(0, samples)
        return Problem(
            self.model,
            map_inputs(self.inputs, itemgetter(part)),
            self.targets[part],
            self.run.task.resolved_likelihood(),
            output=self.run.task.output,
            dtype=self.run.dtype,
            engine=self.run.engine,
            memory=self.memory,
        )

    def form(self, problem: Problem, methods: Sequence[Method]) -> Form:
        """How the whole batch is treated."""
        asked = any(isinstance(method, NaturalGradient) for method in methods)
        exact = (self.job.grading.natural or asked) and self.job.grading.metric_batches is None
        pushes = len(methods) * len(self.job.dampings)
        size, memory = self.num_samples, problem.rows.memory
        form = form_of(problem, size, memory, exact=exact, pushes=pushes)
        return replace(form, solved=exact or asked)

    def rung(
        self,
        methods: Sequence[Method],
        samples: int,
        baseline: int,
        repeats: int = MOST_REPEATS,
    ) -> Measured:
        """Grade n samples, again while that is short, and take the median run.

        Args:
            methods: that were asked for.
            samples: n.
            baseline: bytes that the process held before any unit.
            repeats: at most.
        """
        runs: list[Measured] = []
        gc.collect()  # what earlier rungs have left
        started = self.clock()
        while not runs or (len(runs) < repeats and self.clock() - started < SHORT_SECONDS):
            runs.append(self._once(methods, samples, baseline))
        middle = sorted(runs, key=lambda one: one.rung.seconds)[(len(runs) - 1) // 2]
        peak = max(one.rung.memory for one in runs)
        gradient = self.gradient_seconds(middle.problem)
        rung = replace(middle.rung, memory=peak, gradient_seconds=gradient, repeats=len(runs))
        return replace(middle, rung=rung)

    def _once(self, methods: Sequence[Method], samples: int, baseline: int) -> Measured:
        part = replace(self.run, batch_size=samples)
        wanted = self.job.grading.metric_batches
        count = None if isinstance(wanted, str) else wanted
        with (
            watch_memory(self.run.device) as peak,
            count_passes() as counter,
            timed_parts(self.clock) as parts,
        ):
            start = self.clock()
            problem = self.problem(samples)
            if self.job.kind == "gamma":
                take_form(problem, self.form(problem, methods), self.job.grading.gap)
            metric = None
            if wanted is not None:
                batches = partial(part.task.batches, samples, count, part.seed)
                metric = Metric(problem, batches)
            bound = methods_at(methods, part.stage(self.stage))
            table = self.job.table(problem, bound, metric, part.seed)
            wait_for(self.run.device)
            seconds = self.clock() - start
        krylov = problem.recall("krylov_run")
        rung = Rung(
            samples,
            seconds,
            tuple(parts.factorisations),
            parts.krylov,
            0 if krylov is None else krylov.iterations,
            memory=max(peak.bytes - baseline, 0),
            passes=counter.per_batch(samples),
            rows=len(table),
        )
        problem.forget()
        return Measured(rung, problem, table)

    def gradient_seconds(self, problem: Problem) -> float:
        """A plain forward and backward pass, the median of three."""
        found = []
        for _ in range(3):
            start = self.clock()
            problem.vjp(problem.residual)
            wait_for(self.run.device)
            found.append(self.clock() - start)
        return sorted(found)[1]


@dataclass(frozen=True)
class Measured:
    """A rung with the problem, without what was computed, and the table of its median run."""

    rung: Rung
    problem: Problem
    table: pd.DataFrame


class Parts:
    """Seconds of parts of a unit; see `timed_parts`."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.factorisations: list[Factorisation] = []
        self.krylov = 0.0


@contextlib.contextmanager
def timed_parts(clock: Clock) -> Iterator[Parts]:
    """Time factorisations and Krylov runs of this process while inside."""
    parts = Parts()
    kept = {name: Spectrum.__dict__[name] for name in ("of_gram", "of_rows")}
    run = KrylovRun.run

    def timed_run(*args: Any, **options: Any) -> None:
        start = clock()
        try:
            run(*args, **options)
        finally:
            parts.krylov += clock() - start

    def timed(kind: str) -> Any:
        inner = kept[f"of_{kind}"].__func__

        def factor(cls: type[Spectrum], matrix: Tensor, *args: Any, **options: Any) -> Spectrum:
            start = clock()
            found: Spectrum = inner(cls, matrix, *args, **options)
            shape = (matrix.shape[0], matrix.shape[1])
            parts.factorisations.append(Factorisation(kind, shape, clock() - start))
            return found

        return classmethod(factor)

    try:
        KrylovRun.run = timed_run  # type: ignore[method-assign]
        for kind in ("gram", "rows"):
            setattr(Spectrum, f"of_{kind}", timed(kind))
        yield parts
    finally:
        KrylovRun.run = run  # type: ignore[method-assign]
        for name, method in kept.items():
            setattr(Spectrum, name, method)


class FactorTimer:
    """How long factorisations take here, by random matrices of their kind."""

    def __init__(self, device: str, clock: Clock) -> None:
        """Nothing is timed yet."""
        self.device, self.clock = device, clock
        self._known: dict[tuple[str, tuple[int, int]], float] = {}

    def __call__(self, kind: str, shape: tuple[int, int]) -> float:
        """Seconds; of one too large to try, those of a smaller one by the operations of both."""
        share = min(1.0, FACTORED_SIZE / max(1, shape[0]))
        tried = (max(1, round(shape[0] * share)), max(1, round(shape[1] * share)))
        if (kind, tried) not in self._known:
            self._known[kind, tried] = self._time(kind, tried)
        ratio = Factorisation(kind, shape, 0.0).operations
        return self._known[kind, tried] * ratio / Factorisation(kind, tried, 0.0).operations

    def _time(self, kind: str, shape: tuple[int, int]) -> float:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device)
        right = torch.ones(shape[0], dtype=torch.float64, device=self.device)
        epsilon = torch.finfo(torch.float32).eps
        wait_for(self.device)
        if kind == "rows":
            start = self.clock()
            Spectrum.of_rows(rows, epsilon)
        else:
            gram = rows @ rows.T
            start = self.clock()
            Spectrum.of_gram(gram, epsilon, right)
        wait_for(self.device)
        return self.clock() - start


def wait_for(device: str) -> None:
    """Until the device has done what it was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
