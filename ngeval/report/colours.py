"""The pictures' colours and markers for plotly, also readable on a dark page."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from ngeval.plots.style import styles_of

DARK = "#15181c"
"""The dark page."""

CONTRAST = 4.5
"""Least contrast of a line on the dark page: what WCAG 2 demands of text."""

INK = ("#000000", "#f0f0f0")
GREY = ("#595959", "#a6a6a6")

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "D": "diamond",
    "d": "diamond-tall",
    "P": "cross",
    "X": "x",
    "*": "star",
    "p": "pentagon",
    "h": "hexagon",
    "H": "hexagon2",
    "8": "octagon",
}
"""plotly's names of matplotlib's markers."""

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


@dataclass(frozen=True)
class Look:
    """How a series looks.

    Attributes:
        colours: on a light and on a dark page.
        dash: of the line.
        symbol: of the points.
    """

    colours: tuple[str, str]
    dash: str = "solid"
    symbol: str = "circle"


def looks_of(table: pd.DataFrame) -> dict[str, Look]:
    """The looks of a table's methods, the same as in the pictures."""
    return {
        name: Look(
            pair(to_hex(colour)),
            DASHES.get(str(dash), "solid"),
            SYMBOLS.get(marker, "circle"),
        )
        for name, (colour, marker, dash) in styles_of(table).items()
    }


def dark(colour: str) -> str:
    """A colour mixed with as much white as makes it readable on the dark page.

    >>> dark("#000000"), dark("#ffffff")
    ('#828282', '#ffffff')
    """
    red, green, blue = to_rgb(colour)
    for step in range(101):
        share = step / 100
        mixed = (red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share)
        if contrast(mixed, to_rgb(DARK)) >= CONTRAST:
            return str(to_hex(mixed))
    return "#ffffff"


def contrast(first: tuple[float, float, float], second: tuple[float, float, float]) -> float:
    """Contrast of two colours, 1 to 21: (L₁ + 0.05)/(L₂ + 0.05) with luminances L (WCAG 2)."""
    bright, dim = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def pair(colour: str) -> tuple[str, str]:
    """A colour on a light and on a dark page; black becomes white, as the text does."""
    return INK if colour == INK[0] else (colour, dark(colour))


NATURAL = pair("#CC79A7")
BAND = pair("#0072B2")
BUYS = pair("#009E73")
SPENDS = pair("#D55E00")
