"""Least squares with two parameters and two samples, where the updates of methods can be drawn.

The losses are ℓ_n = ½r_n² with residuals r_n = x_n·θ − y_n, the Gaussian's with σ² = 1 up to its
constant; L = Σ_n ℓ_n is 0 at one θ*. Here iEF at λ = 0 is the natural gradient: both are
X⁻¹r = θ − θ*, and a step multiplies every residual by 1 − η. EF at λ = 0 is X⁻¹(1/r): it maps r_n
to r_n − η/r_n, so that a sample that is nearly fitted moves it furthest; in units of √η this is
Boole's map x − 1/x, whose paths never converge. Source of the example: Wu et al.
(arXiv 2406.06420), the figure on a linear least squares problem of two parameters and two data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ngeval.curvature.kernel import Kernel
from ngeval.dampings import check_dampings
from ngeval.errors import InputError
from ngeval.methods import Method, get_method
from ngeval.problem.problem import Problem

Point = tuple[float, float]

OFFSETS = ((-2.0, 0.8), (-0.15, -2.2), (1.2, -1.2))
"""Default starts of paths, as seen from the minimum."""

PARALLEL = 1e-6
"""Inputs count as parallel below this sine of the angle between them."""

LARGEST, LENGTHS, UNLIKE = 1e6, (1e-4, 1e4), 1e4
"""Bounds on targets, the minimum, and starts as seen from it; on the length of an input; and on the
ratio of the two lengths. Within these bounds results have six correct digits."""

NEAR = 1e-12
"""A start with residuals below this, relative to the targets and 1, is the minimum."""

FAR = 1e6
"""A path diverges when its distance to the minimum has grown by this factor."""


@dataclass(frozen=True)
class LeastSquares:
    """Two samples x_n with targets y_n; the model is x·θ with θ = (θ₁, θ₂).

    Attributes:
        inputs: the rows x_n.
        targets: y_n.

    Raises:
        InputError: wrong shapes, numbers that are not finite, too large or too small, inputs that
            are parallel or of too different lengths, or a minimum that is too far away.

    Example:
        >>> toy = LeastSquares(inputs=((1, 0), (0, 2)), targets=(3, 2))
        >>> toy.minimum.tolist(), toy.residuals((4, 1)).tolist()
        ([3.0, 1.0], [1.0, 0.0])
    """

    inputs: tuple[Point, Point] = ((2.0, 0.0), (0.4, 0.6))
    targets: Point = (2.0, 1.0)

    def __post_init__(self) -> None:
        """Check the data, and convert arrays to tuples of floats."""
        inputs = _numbers("inputs", self.inputs, (2, 2), "two samples of two numbers")
        targets = _numbers("targets", self.targets, (2,), "one number for each of two samples")
        _check_size("targets", targets)
        lengths = np.hypot(*inputs.T)
        least, most = LENGTHS
        if lengths.all() and not (least <= lengths.min() and lengths.max() <= most):
            raise InputError(
                f"the inputs have lengths {lengths[0]:.3g} and {lengths[1]:.3g}; give samples of "
                f"lengths from {least:g} to {most:g} (in other units the picture is the same)"
            )
        if lengths.max() > UNLIKE * lengths.min() > 0:
            raise InputError(
                f"one input is {lengths.max() / lengths.min():.3g} times as long as the other; "
                f"{UNLIKE:g} times is the most of which a picture shows both"
            )
        if abs(np.linalg.det(inputs)) <= PARALLEL * lengths.prod():
            first, second = (f"({x:g}, {y:g})" for x, y in inputs)
            raise InputError(
                f"the inputs {first} and {second} are parallel, so that no single θ fits best; "
                "give two that are not multiples of each other"
            )
        _check_size("the minimum", np.linalg.solve(inputs, targets))
        object.__setattr__(self, "inputs", tuple(map(tuple, inputs.tolist())))
        object.__setattr__(self, "targets", tuple(targets.tolist()))

    @property
    def minimum(self) -> NDArray[np.float64]:
        """θ* = X⁻¹y, where every sample's loss is 0: shape ``(2,)``."""
        return np.asarray(np.linalg.solve(np.array(self.inputs), np.array(self.targets)))

    @property
    def optima(self) -> NDArray[np.float64]:
        """Unit vectors along the lines {θ : x_n·θ = y_n}, where sample n is fitted.

        Both lines go through the minimum. Shape ``(2, 2)``, a row for each sample.
        """
        across = np.array([(-second, first) for first, second in self.inputs])
        return np.asarray(across / np.linalg.norm(across, axis=1, keepdims=True))

    @property
    def starts(self) -> tuple[Point, ...]:
        """Three points around the minimum."""
        first, second = self.minimum.tolist()
        return tuple((first + x, second + y) for x, y in OFFSETS)

    def residuals(self, theta: ArrayLike) -> NDArray[np.float64]:
        """r_n = x_n·θ − y_n at points of shape ``(…, 2)``: the same shape."""
        fitted = np.asarray(theta, dtype=float) @ np.array(self.inputs).T
        return np.asarray(fitted - np.array(self.targets))

    def loss(self, theta: ArrayLike) -> NDArray[np.float64]:
        """L = ½ Σ_n r_n² in nats, at points of shape ``(…, 2)``: shape ``(…)``."""
        return np.asarray(0.5 * np.square(self.residuals(theta)).sum(-1))

    def updates(
        self, method: str | Method, thetas: ArrayLike, damping: float = 0.0, seed: int = 0
    ) -> NDArray[np.float64]:
        """The updates d of a method at many θ, from ngeval's own method on a `Problem` at each.

        A step is −η d. One update takes about two milliseconds.

        Args:
            method: any of ngeval's, by name or as an object.
            thetas: points, shape ``(M, 2)``.
            damping: λ, absolute. At λ = 0 the pseudo-inverse of ``ef`` and ``ief`` ignores a sample
                whose residual is exactly 0, so both are discontinuous there.
            seed: for methods that draw labels; point m draws with ``seed + m``.

        Returns:
            d, shape ``(M, 2)``.

        Raises:
            InputError: the method is unknown, or needs more than a model and a batch.
        """
        return np.asarray(self.all_updates([method], thetas, damping, seed)[0])

    def all_updates(
        self,
        methods: Sequence[str | Method],
        thetas: ArrayLike,
        damping: float = 0.0,
        seed: int = 0,
    ) -> NDArray[np.float64]:
        """The `updates` of several methods with one `Problem` for each point.

        Results that methods share are computed once, which halves the time of four methods. The
        shape is ``(methods, M, 2)``.
        """
        points = _numbers("points", thetas, (None, 2), "two numbers for each point")
        objects = [get_method(name) if isinstance(name, str) else name for name in methods]
        model = _LinearModel(self)
        updates = [
            [model.update(method, point, damping, seed + m) for method in objects]
            for m, point in enumerate(points)
        ]
        return np.array(updates).reshape(-1, len(objects), 2).swapaxes(0, 1)

    def rate(self, method: str, starts: Sequence[Point] | None = None) -> float:
        """A learning rate that shows a method's path.

        For SGD half of the largest stable rate, 1/λ_max(XᵀX). For EF, which lowers every ℓ_n by η
        in a step, a hundredth of the mean ℓ_n at the starts (at the default starts, if all others
        are the minimum). For other methods 0.1.
        """
        if method == "sgd":
            return float(1 / np.linalg.norm(np.array(self.inputs), 2) ** 2)
        if method == "ef":
            points = [point for point in _starts(self, starts) if not self.is_minimum(point)]
            return float(self.loss(points or self.starts).mean() / 200)
        return 0.1

    def is_minimum(self, theta: ArrayLike) -> bool:
        """Whether a point is θ* up to rounding, where every update is 0."""
        size = 1 + np.abs(np.array(self.targets)).max()
        return bool(np.abs(self.residuals(theta)).max() <= NEAR * size)


DEFAULT_METHODS = ("sgd", "ng", "ief", "ef")


def trajectories(
    toy: LeastSquares,
    rates: Mapping[str, float] | None = None,
    starts: Sequence[Point] | None = None,
    *,
    steps: int = 60,
    damping: float = 0.0,
    seed: int = 0,
) -> Iterator[pd.DataFrame]:
    """The paths of gradient descent θ ← θ − η d(λ), a table for each method and start.

    Args:
        toy: the problem.
        rates: the methods with their learning rates η; default: those of `DEFAULT_METHODS`, with
            `LeastSquares.rate`.
        starts: points; default: ``toy.starts``.
        steps: of each path.
        damping: λ, absolute.
        seed: for methods that draw labels.

    Returns:
        Columns ``method, learning_rate, damping, start`` (its number), ``step, theta_1, theta_2,
        loss`` (L, in nats) and ``cosine_ng``, the cosine between the method's update and the
        natural gradient at λ = 0, which is θ − θ* here (NaN where one of them is 0).

    Raises:
        InputError: an unknown method, a learning rate that is not positive, no steps or starts,
            starts too far away, or a path that diverges. A path from the minimum stays there.
    """
    points = _starts(toy, starts)
    check_dampings([damping])
    if len(points) == 0 or steps < 1:
        raise InputError(f"paths need a start and a step: {len(points)} starts, {steps} steps")
    if rates is None:
        rates = {name: toy.rate(name, points.tolist()) for name in DEFAULT_METHODS}
    for method, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise InputError(f"the learning rate of {method} must be positive, not {rate!r}")
        for start, point in enumerate(points):
            rows = _path(toy, get_method(method), rate, point, steps, damping, seed)
            path = pd.DataFrame(rows, columns=["step", "theta_1", "theta_2", "cosine_ng"])
            yield path.assign(
                method=method,
                learning_rate=rate,
                damping=damping,
                start=start,
                loss=toy.loss(path[["theta_1", "theta_2"]].to_numpy()),
            )


def _path(
    toy: LeastSquares,
    method: Method,
    rate: float,
    theta: NDArray[np.float64],
    steps: int,
    damping: float,
    seed: int,
) -> list[tuple[int, float, float, float]]:
    if toy.is_minimum(theta):
        return [(step, float(theta[0]), float(theta[1]), math.nan) for step in range(steps + 1)]
    model = _LinearModel(toy)
    bound = FAR * (np.linalg.norm(theta - toy.minimum) + np.linalg.norm(toy.minimum) + 1)
    rows = []
    for step in range(steps + 1):
        if not np.linalg.norm(theta) <= bound:
            raise InputError(
                f"the path of {method.name} with learning rate {rate:g} diverges in {step} steps; "
                "choose a smaller one"
            )
        update = model.update(method, theta, damping, seed + step)
        cosine = _cosine(update, theta - toy.minimum)
        rows.append((step, float(theta[0]), float(theta[1]), cosine))
        theta = theta - rate * update
    return rows


class _LinearModel:
    """A linear model whose weights are set to one θ after the other, with its problem there."""

    def __init__(self, toy: LeastSquares) -> None:
        self.model = nn.Linear(2, 1, bias=False, dtype=torch.float64).eval()
        self.inputs = torch.tensor(toy.inputs, dtype=torch.float64)
        self.targets = torch.tensor(toy.targets, dtype=torch.float64).unsqueeze(1)
        self.problem = Problem(self.model, self.inputs, self.targets, "gaussian:1", probes=False)
        self.kernel = Kernel(self.problem)

    def update(
        self, method: Method, theta: NDArray[np.float64], damping: float, seed: int = 0
    ) -> NDArray[np.float64]:
        weight = torch.as_tensor(theta, dtype=torch.float64).unsqueeze(0)
        if not torch.equal(self.model.weight, weight):  # otherwise the problem is the one at θ
            with torch.no_grad():
                self.model.weight.copy_(weight)
            self.problem = self.problem.with_batch(self.inputs, self.targets)
            self.kernel = Kernel(self.problem)
        direction = method.prepare(self.problem, self.kernel, seed).direction(damping)
        return np.asarray(direction.detach().to(torch.float64).numpy())


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size > 0 else math.nan


def _starts(toy: LeastSquares, starts: Sequence[Point] | None) -> NDArray[np.float64]:
    points = _numbers(
        "starts", toy.starts if starts is None else starts, (None, 2), "two numbers for each start"
    )
    _check_size("starts, as seen from the minimum,", points - toy.minimum)
    return points


def _check_size(name: str, values: ArrayLike) -> None:
    array = np.asarray(values)
    if np.abs(array).max(initial=0) > LARGEST:
        raise InputError(f"{name} must be of size {LARGEST:g} at most, not {array.tolist()}")


def _numbers(
    name: str, values: ArrayLike, shape: tuple[int | None, ...], what: str
) -> NDArray[np.float64]:
    """An array of finite numbers of this shape, where None is any length.

    Raises:
        InputError: the values are not.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be {what}: {error}") from error
    fits = array.ndim == len(shape) and all(
        expected in (None, size) for expected, size in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(f"{name} must be {what}, not an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite numbers, not {array.tolist()}")
    return array
