"""From small problems to a large one: what a unit of N samples will cost, by units of fewer.

Time is the sum of factorisations of matrices whose sizes go with N, which are timed by themselves
at their size; of Krylov iterations, of a number that is unknown until the run is made: their trend
is followed to the limit; and of the rest, passes through the model and inner products of rows. A
cost that is not known by itself grows by the power of N that it grew by last, and at least as a
plain gradient does, which is measured at N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ngeval.planning.passes import Passes

NO_PASSES = Passes()

ITERATION = Passes(forward=1, backward=1, tangent=1)
"""A Krylov iteration: J d, and Jᵀw with the run that it goes back through."""


@dataclass(frozen=True)
class Factorisation:
    """A matrix that was factored.

    Attributes:
        kind: ``"gram"``, symmetric n × n; or ``"rows"``, n × P.
        shape: of the matrix.
        seconds: what it took.
    """

    kind: str
    shape: tuple[int, int]
    seconds: float

    @property
    def operations(self) -> float:
        """Up to a factor."""
        rows, columns = self.shape
        return rows * columns * min(rows, columns)


TimeOf = Callable[[str, tuple[int, int]], float]
"""The seconds that a factorisation of a kind and shape takes."""


@dataclass(frozen=True)
class Rung:
    """A unit of n samples, as measured.

    Attributes:
        samples: n.
        seconds: for all of it.
        factorisations: in order, part of that time.
        krylov_seconds: likewise.
        iterations: of the Krylov run; 0 where there is none.
        gradient_seconds: a plain forward and backward pass of the n samples.
        memory: bytes above what the process held before, at the peak.
        passes: through the model.
        rows: of the result table.
        repeats: how often it was run; times are those of the median run.
    """

    samples: int
    seconds: float
    factorisations: tuple[Factorisation, ...] = ()
    krylov_seconds: float = 0.0
    iterations: int = 0
    gradient_seconds: float = 0.0
    memory: float = 0.0
    passes: Passes = NO_PASSES
    rows: int = 0
    repeats: int = 1

    @property
    def rest(self) -> float:
        """Seconds that are neither factorisations nor Krylov iterations."""
        named = sum(one.seconds for one in self.factorisations) + self.krylov_seconds
        return max(self.seconds - named, 0.0)


@dataclass(frozen=True)
class Cost:
    """What a unit of N samples costs, measured or extrapolated.

    Attributes:
        seconds: in all.
        factoring: seconds of it for factorisations.
        krylov: and for Krylov iterations.
        iterations: how many of these.
        gradient_seconds: a plain forward and backward pass of the batch.
        memory: bytes at the peak, besides what is there before.
        passes: through the model.
        rows: of the result table.
    """

    seconds: float
    factoring: float
    krylov: float
    iterations: int
    gradient_seconds: float
    memory: float
    passes: Passes
    rows: int


def rung_sizes(num_samples: int, most: int | None = None) -> list[int]:
    """N/16, N/8, N/4, N/2 and N, from two samples on, up to ``most``.

    A single sample is another kind of problem (nothing tells samples from features), so that it
    is a rung only where it is the whole batch, or all that is allowed.

    >>> rung_sizes(160), rung_sizes(8), rung_sizes(160, 40)
    ([10, 20, 40, 80, 160], [2, 4, 8], [10, 20, 40])
    """
    limit = num_samples if most is None else max(1, min(most, num_samples))
    sizes = {max(2, math.ceil(num_samples / 2**power)) for power in range(5)}
    return sorted(size for size in sizes if size <= limit) or [limit]


def extrapolate(
    sizes: Sequence[int], values: Sequence[float], target: int, least: float = 0.0
) -> float:
    """A cost at N from that of fewer samples: a power of N, that of the last two, 2 at most.

    What goes with N beside what does not depend on it, or beside what goes with N², is met within
    30 % from a quarter of N on, and a noisy measurement changes the power a little, where it would
    change the terms of a polynomial much.

    Args:
        sizes: n, growing.
        values: what each costs.
        target: N.
        least: a factor that it grows by in any case, from the last size to N.

    A single value grows by ``least``; where that is not given, as N.

    >>> extrapolate([10, 20], [1.0, 2.0], 160), extrapolate([10, 20], [3.0, 3.0], 160, 1.5)
    (16.0, 4.5)
    """
    last, growth = values[-1], target / sizes[-1]
    if len(sizes) == 1 or min(values[-2:]) <= 0:
        return last * (least or growth)
    power = math.log(last / values[-2]) / math.log(sizes[-1] / sizes[-2])
    return last * max(math.pow(growth, min(max(power, 0.0), 2.0)), least)


def memory_at(rungs: Sequence[Rung], target: int, square: float) -> float:
    """Bytes at the peak for N samples.

    Matrices of logits by logits, ``square`` · n², are known; the rest follows the line through the
    last two rungs. Smaller ones say less: their blocks have not grown to their size. A single one
    is taken to grow as √N, the middle between what does not grow and what grows as N.
    """
    rests = [max(rung.memory - square * rung.samples**2, 0.0) for rung in rungs]
    last, size = rests[-1], rungs[-1].samples
    if len(rungs) == 1:
        rest = last * math.sqrt(target / size)
    else:
        slope = max(last - rests[-2], 0.0) / (size - rungs[-2].samples)
        rest = last + slope * (target - size)
    return rest + square * target**2


def iterations_at(rungs: Sequence[Rung], target: int, limit: int) -> int:
    """Krylov iterations by the trend of the last two rungs that had any, a power of N."""
    known = [(rung.samples, rung.iterations) for rung in rungs if rung.iterations]
    if not known:
        return 0
    size, count = known[-1]
    power = 0.0
    if len(known) > 1:
        before, fewer = known[-2]
        power = min(max(math.log(count / fewer) / math.log(size / before), 0.0), 1.0)
    return min(limit, math.ceil(count * math.pow(target / size, power)))


def shapes_at(rungs: Sequence[Rung], target: int) -> list[tuple[str, tuple[int, int]]]:
    """The matrices that the unit of N samples will factor.

    A side that has grown from one rung to the next goes with n. With one rung, a side that is a
    multiple of n does.
    """
    last = rungs[-1]
    before: Sequence[Factorisation] = rungs[-2].factorisations if len(rungs) > 1 else ()
    same = len(before) == len(last.factorisations)
    found = []
    for index, one in enumerate(last.factorisations):
        sides = [
            round(side * target / last.samples)
            if (side != before[index].shape[axis] if same else side % last.samples == 0)
            else side
            for axis, side in enumerate(one.shape)
        ]
        found.append((one.kind, (sides[0], sides[1])))
    return found


def predict(
    rungs: Sequence[Rung],
    target: int,
    time_of: TimeOf,
    limit: int,
    memory: float,
    *,
    square: float = 0.0,
    gradient_seconds: float | None = None,
) -> Cost:
    """What the unit of ``target`` samples costs.

    Args:
        rungs: of growing size; where the last one is the unit itself, it is taken as it is.
        target: N.
        time_of: times factorisations.
        limit: the most Krylov iterations that there can be.
        memory: the most bytes that ngeval works in, besides one pass of the batch.
        square: see `memory_at`.
        gradient_seconds: of a plain forward and backward pass of N samples; None: not measured.
    """
    last = rungs[-1]
    if last.samples == target:
        factoring = sum(one.seconds for one in last.factorisations)
        return Cost(
            *(last.seconds, factoring, last.krylov_seconds, last.iterations),
            *(last.gradient_seconds, last.memory, last.passes, last.rows),
        )
    sizes = [rung.samples for rung in rungs]
    least, gradient = 0.0, gradient_seconds
    if gradient is None:
        gradient = extrapolate(sizes, [rung.gradient_seconds for rung in rungs], target)
    elif last.gradient_seconds > 0:
        least = max(1.0, gradient / last.gradient_seconds)
    rest = extrapolate(sizes, [rung.rest for rung in rungs], target, least)
    factoring = sum(time_of(kind, shape) for kind, shape in shapes_at(rungs, target))
    iterations = iterations_at(rungs, target, limit)
    krylov = 0.0
    if iterations:
        each = [r.krylov_seconds / r.iterations for r in rungs if r.iterations]
        ran = [r.samples for r in rungs if r.iterations]
        krylov = iterations * extrapolate(ran, each, target, least)
    peak = memory_at(rungs, target, square)
    return Cost(
        rest + factoring + krylov,
        factoring,
        krylov,
        iterations,
        gradient,
        min(peak, max(memory, last.memory)),
        last.passes.plus(ITERATION, iterations - last.iterations),
        last.rows,
    )
