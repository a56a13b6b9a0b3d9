"""Names in pictures: plain text on one line.

matplotlib would read a dollar sign as the start of a formula, leave a name that begins with an
underscore out of the legend, and warn of each character that its fonts do not have.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager

from ngeval.utils.text import MAX_NAME, shortened

_GENERIC = ("serif", "sans-serif", "cursive", "fantasy", "monospace")
SIDE = 24
"""Characters of names beside a panel, which takes the rest of a column's width."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Replaces control characters, and characters that no available font has."""


def name_text(name: object, most: int = MAX_NAME) -> str:
    r"""A method's, layer's, task's or checkpoint's name as text that matplotlib draws as it is.

    White space becomes a space; a name that begins with an underscore gets a space in front; of a
    long one the end is kept.

    >>> print(name_text("$x_1$"), name_text("_mine"), name_text(""))
    \$x_1\$  _mine (no name)
    """
    flat = shortened(" ".join(str(name).split()), most)
    if not flat.isascii() or not flat.isprintable():
        known = _characters(tuple(_families()))
        flat = "".join(c if c.isprintable() and ord(c) in known else UNKNOWN for c in flat)
    flat = flat.replace("$", r"\$")
    return f" {flat}" if flat.startswith("_") else flat or "(no name)"


def _families() -> list[str]:
    """The names of the fonts that matplotlib is set to try."""
    settings: dict[Any, Any] = mpl.rcParams
    families: list[str] = []
    for family in mpl.rcParams["font.family"]:
        families += settings[f"font.{family}"] if family in _GENERIC else [family]
    return families


@lru_cache(maxsize=8)
def _characters(families: tuple[str, ...]) -> frozenset[int]:
    """The code points of the fonts that are installed."""
    present = {font.name for font in font_manager.fontManager.ttflist}.intersection(families)
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in present]
    return frozenset[int]().union(*(font.get_charmap() for font in fonts))
