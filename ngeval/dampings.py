"""Dampings λ: read from text, checked, and what they multiply."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ngeval.errors import InputError, check_choice

DAMPING_SCALES = ("absolute", "mean", "relative")
"""What λ multiplies; see `ngeval.evaluate`."""

MAX_COUNT = 10_000
"""Values in a range; more are taken for a typing error."""


def parse_dampings(text: str) -> list[float]:
    """Read ``"1e-8:1e4:50"`` (log-spaced low:high:count) or ``"0,1e-6,1"``.

    Raises:
        InputError: neither of the two, or a range that is empty or reaches 0.

    >>> parse_dampings("1e-2:1:3")
    [0.01, 0.1, 1.0]
    """
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",") if part.strip()]
        low, high, count = text.split(":")
        ends, number = (float(low), float(high)), int(count)
    except ValueError as error:
        raise InputError(
            f"damping {text!r}: write a comma list like 0,1e-6,1 or low:high:count like 1e-8:1e4:50"
        ) from error
    if not (0 < ends[0] <= ends[1] < math.inf) or not 1 <= number <= MAX_COUNT:
        raise InputError(
            f"damping range {text!r} needs 0 < low ≤ high and a count from 1 to {MAX_COUNT}"
        )
    import numpy as np  # noqa: PLC0415  (a third of the time in which a command starts)

    # Rounded to 12 digits, so that 1e-06 is in the range exactly as a user types it.
    return [float(f"{value:.12g}") for value in np.geomspace(*ends, number)]


def check_scale(scale: str) -> None:
    """Refuse a damping scale that is not one of `DAMPING_SCALES`."""
    check_choice("damping scale", scale, DAMPING_SCALES)


def check_dampings(dampings: Iterable[float]) -> list[float]:
    """Turn dampings into a list of distinct floats.

    Raises:
        InputError: there is none, or one is negative, NaN, infinite or not a number.
    """
    if isinstance(dampings, int | float):
        dampings = [dampings]
    if isinstance(dampings, str):
        raise InputError(f"dampings is the text {dampings!r}; give a list of numbers")
    try:
        values = [float(damping) for damping in dampings]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"dampings must be numbers: {error}") from error
    if not values:
        raise InputError("no damping given; λ = 0 asks for the pseudo-inverse")
    for value in values:
        if not math.isfinite(value) or value < 0:
            raise InputError(f"damping {value} is not allowed; λ must be finite and ≥ 0")
    return list(dict.fromkeys(values))
