"""Names of users in pictures: plain text of which nothing is lost, of no more than a line."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager

from ngeval.utils.text import MAX_NAME, shortened

_GENERIC = ("serif", "sans-serif", "cursive", "fantasy", "monospace")
SIDE = 24
"""Letters of names beside a panel, which has what they leave of a column's width."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for what cannot be drawn: control characters, and what no font at hand has."""


def name_text(name: object, most: int = MAX_NAME) -> str:
    r"""A method's, layer's, task's or checkpoint's name as matplotlib draws it letter by letter.

    A dollar sign begins no formula; white space is a space; a name that begins with an underscore,
    which would have no place in a legend, gets a space in front; of a long one the end is kept.

    >>> print(name_text("$x_1$"), name_text("_mine"), name_text(""))
    \$x_1\$  _mine (no name)
    """
    flat = shortened(" ".join(str(name).split()), most)
    if not flat.isascii() or not flat.isprintable():
        known = _letters(tuple(_families()))
        flat = "".join(letter if _is_drawn(letter, known) else UNKNOWN for letter in flat)
    flat = flat.replace("$", r"\$")
    return f" {flat}" if flat.startswith("_") else flat or "(no name)"


def _is_drawn(letter: str, known: frozenset[int]) -> bool:
    return unicodedata.category(letter)[0] != "C" and ord(letter) in known


def _families() -> list[str]:
    """The fonts that matplotlib is set to try, by name."""
    settings: dict[Any, Any] = mpl.rcParams
    families: list[str] = []
    for family in mpl.rcParams["font.family"]:
        families += settings[f"font.{family}"] if family in _GENERIC else [family]
    return families


@lru_cache(maxsize=8)
def _letters(families: tuple[str, ...]) -> frozenset[int]:
    """The code points of those fonts that there are."""
    known: set[int] = set()
    present = {font.name for font in font_manager.fontManager.ttflist}
    for family in families:
        if family in present:
            known |= set(font_manager.get_font(font_manager.findfont(family)).get_charmap())
    return frozenset(known)
