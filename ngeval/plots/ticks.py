"""Ticks of logarithmic axes, and numbers as text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_text(value: float) -> str:
    """A number for a title: a power of ten where it is one, as text that can be searched."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    if value and float(mantissa) == 1 and abs(int(exponent)) > 2:
        return "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{value:g}"


def log_scale(axes: Axes, *names: Literal["x", "y"]) -> None:
    """Make axes logarithmic, with ticks of which at least two have a number."""
    for name in names:
        axis = axes.xaxis if name == "x" else axes.yaxis
        getattr(axes, f"set_{name}scale")("log")
        plain_ticks(axis)
    axes.autoscale_view()  # by the new ticks' own rule; limits that were set stay


def plain_ticks(axis: Axis) -> None:
    """Ticks for a logarithmic axis: as many numbers as there is room for, however far it goes.

    They are found anew at each drawing, from the limits that the axis then has.
    """
    axis.set_major_locator(_LogTicks())
    axis.set_major_formatter(_LogNumbers())
    axis.set_minor_locator(LogLocator(subs="auto"))
    axis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """The finest of several series of round numbers that the axis has room for."""

    SUBS = (
        (1.0,),
        (1.0, 3.0),
        (1.0, 2.0, 5.0),
        (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
        (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    )

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = sorted((max(vmin, sys.float_info.min), max(vmax, sys.float_info.min)))
        room = self._room()
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for subs in reversed(self.SUBS):
            powers = 10.0 ** np.arange(first, last + 1)
            found = _within(np.multiply.outer(powers, subs).ravel(), low, high)
            if 2 <= len(found) <= room:
                return found
        for stride in range(2, last - first + 1):
            start = -(-first // stride) * stride  # a multiple of it, so that 1 may be among them
            found = _within(10.0 ** np.arange(start, last + 1, stride), low, high)
            if 2 <= len(found) <= room:
                return found
        return MaxNLocator(room, min_n_ticks=2).tick_values(low, high)

    def nonsingular(self, v0: float, v1: float) -> tuple[float, float]:
        low, high = sorted((v0, v1))
        if low > 0 and high / low < 1 + 1e-9:  # values that differ by rounding, or not at all
            return low / 2, high * 2
        limits: tuple[float, float] = super().nonsingular(v0, v1)
        return limits

    def _room(self) -> int:
        """How many numbers fit; side by side they need more than one above the other."""
        axis: Any = self.axis
        space = axis.get_tick_space()
        return int(np.clip(space * 2 // 3 if axis.axis_name == "x" else space, 3, 7))


def _within(values: np.ndarray, low: float, high: float) -> list[float]:
    # An end that rounding has moved by a hair is still an end.
    return [float(v) for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]


class _LogNumbers(Formatter):
    """Plain numbers, or all powers of ten where one of them would have too many digits."""

    _shown: Sequence[float] = ()

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        self._shown = values
        return [self(value) for value in values]

    def __call__(self, x: float, pos: int | None = None) -> str:
        shown = [value for value in self._shown if value > 0] or [x]
        if min(shown) >= 1e-3 and max(shown) < 1e4:
            return f"{x:.6g}"
        mantissa, _, exponent = f"{x:.3e}".partition("e")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
        return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"
