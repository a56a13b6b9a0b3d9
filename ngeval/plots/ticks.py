"""Ticks of logarithmic axes, and numbers as text.

matplotlib labels the minor ticks of a logarithmic axis up to a given length, all or none of them:
in a panel of 1.5 inches an axis of two decades has one number, or numbers that overlap. These ticks
are chosen by the room that an axis has, and there are always two. Powers are written with
superscript characters, not as formulas, so that an SVG or PDF can be searched for them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from ngeval.utils.text import power_of_ten


def number_text(value: float) -> str:
    """A number for a title, as a power of ten if it is a large or small one.

    >>> number_text(1e-8), number_text(0.5), number_text(100.0)
    ('10⁻⁸', '0.5', '100')
    """
    power = _power_text(value)
    return power if power.startswith("10") and not 1e-3 < value < 1e3 else f"{value:g}"


def _power_text(value: float) -> str:
    """A number as a multiple of a power of ten."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    power = power_of_ten(int(exponent))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def log_scale(axes: Axes, *names: Literal["x", "y"]) -> None:
    """Make axes logarithmic, with at least two numbers on each."""
    for name in names:
        axis = axes.xaxis if name == "x" else axes.yaxis
        with warnings.catch_warnings():  # limits of values near 1e-100, made before the scale
            warnings.filterwarnings("ignore", "Attempting to set identical", UserWarning)
            getattr(axes, f"set_{name}scale")("log")
        plain_ticks(axis)
    axes.autoscale_view()  # by the new ticks' own rule; limits that were set stay


def plain_ticks(axis: Axis) -> None:
    """Give a logarithmic axis as many numbers as there is room for, whatever its limits are."""
    axis.set_major_locator(_LogTicks())
    axis.set_major_formatter(_LogNumbers())
    axis.set_minor_locator(LogLocator(subs="auto"))
    axis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """The finest of several series of round numbers that the axis has room for."""

    SUBS = (
        (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
        (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
        (1.0, 2.0, 5.0),
        (1.0, 3.0),
    )

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = sorted((max(vmin, sys.float_info.min), max(vmax, sys.float_info.min)))
        room = self._room()
        powers = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        series = [np.multiply.outer(10.0**powers, subs).ravel() for subs in self.SUBS]
        # Multiples of the stride, so that 1 may be among the ticks.
        series += [10.0 ** powers[powers % stride == 0] for stride in range(1, len(powers))]
        for values in series:
            # An end that rounding has moved is still an end.
            ticks = values[(low * (1 - 1e-9) <= values) & (values <= high * (1 + 1e-9))]
            if 2 <= len(ticks) <= room:
                return [float(tick) for tick in ticks]
        return MaxNLocator(room, min_n_ticks=2).tick_values(low, high)

    def nonsingular(self, v0: float, v1: float) -> tuple[float, float]:
        low, high = sorted((v0, v1))
        if low > 0 and high / low < 1 + 1e-9:  # values that differ by rounding, or not at all
            return low / 2, high * 2
        limits: tuple[float, float] = super().nonsingular(v0, v1)
        return limits

    def _room(self) -> int:
        """How many numbers fit; side by side they need more room than above each other."""
        axis: Any = self.axis
        space = axis.get_tick_space()
        return int(np.clip(space * 2 // 3 if axis.axis_name == "x" else space, 3, 7))


class _LogNumbers(Formatter):
    """Plain numbers, or all powers of ten if one of them would have too many digits."""

    _shown: Sequence[float] = ()

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        self._shown = values
        return [self(value) for value in values]

    def __call__(self, x: float, pos: int | None = None) -> str:
        shown = [value for value in self._shown if value > 0] or [x]
        return f"{x:.6g}" if min(shown) >= 1e-3 and max(shown) < 1e4 else _power_text(x)
