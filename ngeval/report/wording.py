"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ngeval.utils.text import power_of_ten

ROUNDING = 1e-4
"""Relative difference from 1 below which a number counts as 1: what five digits show."""

PAPER_NAMES = {"sgd": "SGD", "ef": "EF", "ief": "iEF", "sf": "SF", "ng": "exact NG"}


def number(value: float, digits: int = 3) -> str:
    """A number with three significant digits, as a power of ten where that is shorter.

    >>> [number(value) for value in (0.4912, 61.53, 12345, 5.1e7, 2e-6)]
    ['0.491', '61.5', '12,300', '5.1 × 10⁷', '2 × 10⁻⁶']
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits}g}")
    size = abs(rounded)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        power = power_of_ten(int(exponent))
        factor = f"{float(mantissa):g}".replace("-", "−")
        return power if factor == "1" else f"{factor} × {power}"
    shown = f"{rounded:,.0f}" if size >= 1000 else f"{rounded:.{digits}g}"
    return shown.replace("-", "−")


def damping_text(value: float) -> str:
    """λ as one types it.

    >>> [damping_text(value) for value in (1e-6, 0.001, 1.7575106e-8, 10000.0)]
    ['1e-6', '0.001', '1.76e-8', '1e4']
    """
    shown = f"{value:.3g}" if value < 1e4 else f"{value:.2e}"
    mantissa, _, exponent = shown.partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if exponent else shown


def interval_text(low: float, high: float) -> str:
    """``[low, high]``, or nothing if there is no interval."""
    if math.isnan(low) or math.isnan(high):
        return ""
    digits = _digits(low, high)
    return f"[{number(low, digits)}, {number(high, digits)}]"


def value_text(value: float, low: float, high: float) -> str:
    """A value with as many digits as its interval has."""
    return number(value, _digits(low, high))


def with_interval(value: float, low: float, high: float) -> str:
    """A value followed by its interval."""
    return f"{value_text(value, low, high)} {interval_text(low, high)}".rstrip()


def _digits(low: float, high: float) -> int:
    """As many as distinguish the ends of a narrow interval from each other and from 1."""
    spread = abs(high / low - 1) if low else math.inf
    digits = 5 if ROUNDING < spread < 0.002 else 4 if 0.002 <= spread < 0.02 else 3
    # An end shown as 1 would contradict a verdict that it lies beyond 1.
    ends = [end for end in (low, high) if below_one(end) or above_one(end)]
    while digits < 6 and any(float(f"{end:.{digits}g}") == 1 for end in ends):
        digits += 1
    return digits


def below_one(end: Any) -> Any:
    """Whether an end of an interval lies below 1 by more than rounding, and is shown so."""
    return end < 1 - ROUNDING


def above_one(end: Any) -> Any:
    """Whether an end of an interval lies above 1 by more than rounding, and is shown so."""
    return end > 1 + ROUNDING


def method_text(method: str) -> str:
    """A method as papers write it; names that they do not use stay as they are.

    >>> [method_text(name) for name in ("ief", "sf:4", "kfac-ef")]
    ['iEF', 'SF:4', 'kfac-ef']
    """
    family, colon, parameter = method.partition(":")
    return PAPER_NAMES.get(family, family) + colon + parameter


def listed(parts: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def first_of(names: Sequence[str], most: int) -> list[str]:
    """The first names of a list, and how many more there are.

    >>> first_of(["a", "b", "c"], 1)
    ['a', '2 more']
    """
    rest = len(names) - most
    return [*names[:most], *([f"{rest} more"] if rest > 0 else [])]


def batches_text(counts: pd.Series[int]) -> str:
    """A number of batches, or a range of numbers."""
    least, most = counts.min(), counts.max()
    amount = f"{least}" if least == most else f"{least} to {most}"
    return f"{amount} {'batch' if most == 1 else 'batches'}"


def plain(value: Any) -> str:
    """A value of a table as text; whole numbers in full."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
