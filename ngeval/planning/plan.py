"""What a run will cost, before it starts: its first unit is graded on more and more samples.

If all N samples of a batch are reached in the time that the probe may take, that unit's time is
the unit's time; otherwise what the smaller ones cost is extrapolated (`ngeval.planning.ladder`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn

from ngeval.checkpoints import CheckpointLoader
from ngeval.errors import CheckpointError, InputError, NgevalError
from ngeval.model.function import map_inputs
from ngeval.curvature.krylov import MAX_ITERATIONS
from ngeval.utils.memory import free_memory
from ngeval.methods import Method, get_methods
from ngeval.planning.climb import Told, climb
from ngeval.planning.footprint import device_count, disk_bytes, is_gpu, memory_in_use, model_bytes
from ngeval.planning.ladder import Cost, Rung, predict
from ngeval.planning.passes import Passes
from ngeval.planning.probing import Clock, FactorTimer, Job, Measured, Probe
from ngeval.grading.prepare import check_dampings, check_scale
from ngeval.runs.run import Grading, Run
from ngeval.runs.units import labelled, methods_at

MARGIN = 0.3
"""How far from the truth a plan may be: relative."""

PROBE_SECONDS = 60.0

LOGIT_BYTES = 5 * 8
"""Of matrices of logits by logits, for each entry: what a dense natural gradient works in."""

LITTLE = 0.7
"""Below this share of one core the probe's times say more of the neighbours than of the run."""

OWN_BATCH = Grading()
"""Grading by the batch that updates are made from."""

KINDS = ("gamma", "layers", "imbalance")


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        command: what is done with each unit.
        checkpoints: how many.
        batches: for each of them.
        batch_size: N.
        num_parameters: P.
        num_outputs: C, of a sample.
        methods: how many.
        dampings: how many.
        engine: of Jacobian rows.
        kernel: the form in which Θ is kept: ``"jacobian"``, ``"gram"``, ``"strip"`` or
            ``"matrix-free"``.
        solver: of the natural gradient: ``"dense"`` or ``"krylov"``.
        unit: what a unit costs.
        measured: N was reached: nothing is extrapolated.
        launch_seconds: until the process begins with the run: Python's start and imports.
        startup_seconds: building the model, and what a process does once.
        load_seconds: a checkpoint with its batches' data.
        model_bytes: of parameters and buffers.
        process_bytes: what the process holds with the model, before the first unit.
        memory: bytes that ngeval works in at most.
        disk: bytes of the result file by extension.
        rungs: what was measured.
        probe_seconds: what that took.
        device: where.
        threads: of this process; on a GPU, where they decide nothing, 1.
        cores: of this machine, or its devices where the run is on a GPU.
        notes: what the plan takes for granted.
    """

    command: str
    checkpoints: int
    batches: int
    batch_size: int
    num_parameters: int
    num_outputs: int
    methods: int
    dampings: int
    engine: str
    kernel: str
    solver: str
    unit: Cost
    measured: bool
    launch_seconds: float
    startup_seconds: float
    load_seconds: float
    model_bytes: int
    process_bytes: int
    memory: int
    disk: dict[str, int]
    rungs: tuple[Rung, ...]
    probe_seconds: float
    device: str
    threads: int
    cores: int
    notes: tuple[str, ...]

    @property
    def units(self) -> int:
        """Checkpoints × batches."""
        return self.checkpoints * self.batches

    @property
    def passes(self) -> Passes:
        """Through the model, of all units."""
        return Passes().plus(self.unit.passes, self.units)

    @property
    def gradient_equivalents(self) -> float:
        """A unit's time over that of a plain forward and backward pass of its batch."""
        return self.unit.seconds / self.unit.gradient_seconds

    @property
    def peak_bytes(self) -> float:
        """Of the process: what it holds with the model, and a unit's peak."""
        return self.process_bytes + self.unit.memory

    def seconds(self, ranks: int = 1) -> float:
        """On k ranks with a device of their own each.

        Units are handed out one by one, so that the last rank to be done has ⌈units/k⌉, and loads
        no more checkpoints than that.
        """
        units = math.ceil(self.units / ranks)
        loads = min(self.checkpoints, units)
        once = self.launch_seconds + self.startup_seconds
        return once + loads * self.load_seconds + units * self.unit.seconds

    def seconds_here(self, ranks: int) -> float:
        """On k ranks of this machine, if they wait for each other wherever they share a core."""
        share = max(1.0, ranks * self.threads / max(self.cores, self.threads))
        return self.seconds(ranks) * share


def plan(
    run: Run,
    methods: Sequence[str | Method],
    dampings: Sequence[float],
    damping_scale: str = "absolute",
    grading: Grading = OWN_BATCH,
    *,
    command: str = "gamma",
    groups: str | int = "layer",
    probe_seconds: float = PROBE_SECONDS,
    max_samples: int | None = None,
    launch_seconds: float = 0.0,
    on_step: Told | None = None,
    clock: Clock = time.perf_counter,
) -> Plan:
    """What a run will cost: passes, time, memory, disk.

    Args:
        run: which checkpoints on which batches.
        methods: as for `Run.gammas`.
        dampings: λ.
        damping_scale: what λ multiplies.
        grading: how updates are graded.
        command: ``"gamma"`` (``sweep`` and ``compare`` do the same), ``"layers"`` or
            ``"imbalance"``.
        groups: of ``"layers"``.
        probe_seconds: what may be measured for; the first and smallest unit is always run.
        max_samples: the most samples of a batch to try; None: all, if there is time.
        launch_seconds: what a process takes to start, besides what is measured here.
        on_step: told what is measured next.
        clock: seconds.

    A checkpoint that cannot be loaded is passed over, as the run would pass over it, and noted.

    Raises:
        CheckpointError: none can be loaded: why the first cannot.
        InputError: unknown command, method or scale, or a time that is not positive.
        NgevalError: what the run itself would raise at its first unit.
    """
    started = clock()
    resolved = get_methods(methods) if methods else []
    job = Job(command, resolved, check_dampings(dampings), damping_scale, grading, groups)
    _check(job, probe_seconds)
    for index in range(len(run.checkpoints)):
        methods_at(resolved, run.stage(index))  # what is missing is an error now
    tell = on_step or (lambda _: None)
    tell("loading")
    probe, startup, load, notes = _loaded(run, job, clock, started)
    held = memory_in_use(run.device)
    busy = time.perf_counter(), time.process_time()
    until = started + probe_seconds
    climbed = climb(probe, resolved, held, until, max_samples, tell)
    rungs, last = climbed.rungs, climbed.last
    share = (time.process_time() - busy[1]) / max(time.perf_counter() - busy[0], 1e-9)
    problem, size = last.problem, probe.num_samples
    form = probe.form(problem, resolved)
    tell("extrapolating")
    unit = predict(
        rungs,
        size,
        FactorTimer(run.device, clock),
        _most_iterations(probe, last),
        probe.memory + size * problem.rows.sample_bytes,
        square=LOGIT_BYTES * problem.num_outputs**2 if form.dense and form.solved else 0.0,
        gradient_seconds=climbed.gradient_seconds,
    )
    if command == "imbalance":
        unit = replace(unit, rows=size)
    unit, more = _averaged(probe, resolved, held, until, unit, last.rung, tell)
    notes += [*more, *_notes(last, unit, share)]
    return Plan(
        command,
        *(len(run.checkpoints), run.num_batches, size),
        *(problem.num_parameters, problem.num_outputs),
        *(len(resolved), len(job.dampings)),
        *(problem.engine, form.kernel, "dense" if form.dense else "krylov"),
        unit,
        rungs[-1].samples == size,
        launch_seconds,
        startup + climbed.once_seconds,
        load,
        model_bytes(probe.model),
        held,
        probe.memory,
        disk_bytes(labelled(last.table, run.columns((0, 0))), unit.rows, run.num_units),
        tuple(rungs),
        clock() - started,
        run.device,
        1 if is_gpu(run.device) else torch.get_num_threads(),
        device_count(run.device),
        tuple(notes),
    )


def _check(job: Job, probe_seconds: float) -> None:
    check_scale(job.damping_scale)
    if job.kind not in KINDS:
        raise InputError(f"unknown command {job.kind!r} to plan; one of {', '.join(KINDS)}")
    if not probe_seconds > 0:
        raise InputError(f"the probe needs a positive number of seconds, not {probe_seconds}")


def _loaded(
    run: Run, job: Job, clock: Clock, started: float
) -> tuple[Probe, float, float, list[str]]:
    """The first good checkpoint with the first batch; seconds to build, and to load one; notes."""
    base = run.task.model().to(run.device).eval()
    built = clock()
    loader = CheckpointLoader(base, allow_pickle=run.allow_pickle)
    stage, model, begun, notes = _first_good(run, loader, clock)
    run.on_model(run.checkpoints[stage], model)
    loaded = clock()
    batches = run.task.batches(run.batch_size, run.num_batches, run.seed)
    inputs, targets = next(batches)
    first = clock()
    more = len(list(islice(batches, 1)))
    second = clock()
    # The other batches are made as they are needed, for each checkpoint again.
    data = first - loaded + more * (second - first) * (run.num_batches - 1)
    probe = Probe(
        run,
        job,
        loader,
        model,
        map_inputs(inputs, lambda t: t.to(run.device)),
        targets.to(run.device),
        run.memory or free_memory(torch.device(run.device)),
        stage,
        clock,
    )
    return probe, built - started, loaded - begun + data, notes


def _first_good(
    run: Run, loader: CheckpointLoader, clock: Clock
) -> tuple[int, nn.Module, float, list[str]]:
    """The first checkpoint that can be loaded: its place, the model, since when; notes."""
    errors: list[CheckpointError] = []
    for stage, checkpoint in enumerate(run.checkpoints):
        begun = clock()
        try:
            model = loader.load(checkpoint).to(run.device).eval()
        except CheckpointError as error:
            errors.append(error)
            continue
        return stage, model, begun, [_unusable(error) for error in errors]
    raise errors[0]


def _unusable(error: Exception) -> str:
    return f"a checkpoint cannot be graded, and its rows will be failed ones: {error}"


def _averaged(
    probe: Probe,
    methods: Sequence[Method],
    held: int,
    until: float,
    unit: Cost,
    rung: Rung,
    tell: Told,
) -> tuple[Cost, list[str]]:
    """The mean over the probe's checkpoint and the last one, and what there is to note.

    Without the time for it, or where the last one is the probe's or none to grade, the probe's.
    """
    run, index = probe.run, len(probe.run.checkpoints) - 1
    if index == probe.stage or probe.clock() + 2 * rung.seconds > until:
        return unit, []
    tell("the last checkpoint")
    try:
        model = probe.loader.load(run.checkpoints[index]).to(run.device).eval()
        other = replace(probe, model=model, stage=index).rung(methods, rung.samples, held).rung
    except NgevalError as error:  # which the run goes on after
        return unit, [_unusable(error)]
    ratio = other.seconds / rung.seconds
    notes = []
    if not 1 / (1 + MARGIN) < ratio < 1 + MARGIN:
        notes.append(
            f"a unit of the last checkpoint takes {ratio:.2g} times as long as one of the first; "
            "the plan goes by their mean"
        )
    mean = (1 + ratio) / 2
    return replace(
        unit,
        seconds=mean * unit.seconds,
        factoring=mean * unit.factoring,
        krylov=mean * unit.krylov,
        memory=max(unit.memory, unit.memory + other.memory - rung.memory),
    ), notes


def _most_iterations(probe: Probe, last: Measured) -> int:
    """The Krylov iterations that the whole batch may take, if the run takes any."""
    if not last.rung.iterations:
        return 0
    problem = last.problem
    size = min(problem.num_parameters, problem.num_outputs * probe.num_samples)
    return int(min(MAX_ITERATIONS, size, max(2, probe.memory // (2 * 8 * size))))


def _notes(last: Measured, unit: Cost, share: float) -> list[str]:
    """What the plan takes for granted."""
    notes = []
    if share < LITTLE and last.problem.device.type == "cpu":
        notes.append(
            f"other programs took {1 - share:.0%} of the processor meanwhile; on an idle machine "
            f"the run is about {1 / max(share, 0.01):.2g} × faster"
        )
    if "status" in last.table:
        lost = last.table[last.table["status"] == "failed"]
        if len(lost):
            reasons = "; ".join(dict.fromkeys(lost["reason"]))
            notes.append(f"{len(lost)} of {len(last.table)} rows of the probe failed: {reasons}")
    if unit.iterations and unit.iterations != last.rung.iterations:
        notes.append(
            f"the natural gradient's Krylov run took {last.rung.iterations} iterations on "
            f"{last.rung.samples} samples, and is taken to need {unit.iterations} on all: by the "
            f"trend, and {MAX_ITERATIONS} at most"
        )
    return notes
