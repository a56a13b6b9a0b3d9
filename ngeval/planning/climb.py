"""A unit on more and more samples of its batch, as far as there is time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ngeval.methods import Method
from ngeval.planning.ladder import Rung, extrapolate, rung_sizes
from ngeval.planning.probing import Measured, Probe

SLACK = 1.2
"""A rung is begun where there is time for so many times of what it should take."""

GRADIENTS = 10
"""Plain gradients that measuring one takes about, with building the problem."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Climbed:
    """What was measured.

    Attributes:
        rungs: of growing size.
        last: the last of them, with its problem and table.
        once_seconds: what the very first unit took longer than another of its size.
        gradient_seconds: of a plain forward and backward pass of the whole batch; None where
            there was no time for it, or no need.
    """

    rungs: tuple[Rung, ...]
    last: Measured
    once_seconds: float
    gradient_seconds: float | None


def climb(
    probe: Probe,
    methods: Sequence[Method],
    held: int,
    until: float,
    most: int | None,
    tell: Told,
) -> Climbed:
    """Grade the first samples of a batch, then twice as many, and so on.

    Args:
        probe: what is graded.
        methods: that were asked for.
        held: bytes that the process held before.
        until: when to end, by the probe's clock; the first rung is measured in any case.
        most: samples to try at most; None: the whole batch.
        tell: told what comes next.
    """
    sizes = rung_sizes(probe.num_samples, most)
    tell(f"{sizes[0]} of {probe.num_samples} samples")
    # What a process does once (imports, kernels that are chosen) is in the first run alone.
    last = probe.rung(methods, sizes[0], held, repeats=1)
    first = last.rung.seconds
    if probe.clock() + 3 * first < until:  # else what is done once is a small part of it
        last = probe.rung(methods, sizes[0], held)
    rungs = [last.rung]
    gradient = _gradient_of_all(probe, last.rung, until, tell)
    for size in sizes[1:]:
        if probe.clock() + _expected(rungs, size, probe.num_samples, gradient) > until:
            break
        tell(f"{size} of {probe.num_samples} samples")
        del last  # one problem at a time
        last = probe.rung(methods, size, held)
        rungs.append(last.rung)
    once = max(0.0, first - rungs[0].seconds)
    if rungs[-1].samples < probe.num_samples:
        tell("the same again")
        rungs = [_lesser(probe, methods, rung, until) for rung in reversed(rungs)][::-1]
    return Climbed(tuple(rungs), last, once, gradient)


def _gradient_of_all(probe: Probe, rung: Rung, until: float, tell: Told) -> float | None:
    """A plain forward and backward pass of the whole batch, if there is time for it."""
    size = probe.num_samples
    expected = GRADIENTS * rung.gradient_seconds * size / rung.samples
    if rung.samples == size or probe.clock() + expected > until:
        return None
    tell(f"a gradient of {size} samples")
    return probe.gradient_seconds(probe.problem(size))


def _expected(rungs: Sequence[Rung], size: int, target: int, gradient: float | None) -> float:
    """What the next rung will take, roughly, and rather more."""
    if len(rungs) > 1:
        samples = [rung.samples for rung in rungs]
        return SLACK * extrapolate(samples, [rung.seconds for rung in rungs], size)
    (rung,) = rungs
    power = 2.0
    if gradient and rung.gradient_seconds > 0:  # by how gradients grow; a coarse clock says 0
        power = math.log(gradient / rung.gradient_seconds) / math.log(target / rung.samples)
    return SLACK * rung.seconds * math.pow(size / rung.samples, min(max(power, 0.5), 2.0))


def _lesser(probe: Probe, methods: Sequence[Method], rung: Rung, until: float) -> Rung:
    """A rung that was run once, or again if that is faster and there is time.

    What others take of a processor goes in one direction only, and a few percent in small units
    are much in the large one.
    """
    if rung.repeats > 1 or probe.clock() + SLACK * rung.seconds > until:
        return rung
    again = probe.rung(methods, rung.samples, 0, repeats=1).rung
    kept = min(rung, again, key=lambda one: one.seconds)
    return replace(kept, memory=rung.memory, repeats=2)
