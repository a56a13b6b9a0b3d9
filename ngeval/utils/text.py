"""Texts that are printed or written: names, numbers, messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that a terminal acts on, or that no encoding has."""

MAX_LINES = 100
"""Lines of a message."""

MAX_NAME = 32
"""Characters of a name in a figure or a table."""

MAX_LISTED = 200
"""Characters of a name in a message: a file can hold names of a million characters."""


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def whole_or_short(value: float) -> str:
    """An epoch or a step: whole numbers in full, others with six digits.

    >>> [whole_or_short(value) for value in (12.0, 1234567, 0.25, 1e300)]
    ['12', '1234567', '0.25', '1e+300']
    """
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:g}"


def visible(text: str, most: int = 8_000) -> str:
    r"""A text for a terminal, without characters that would move its cursor or change its colours.

    Names in files can hold escape sequences, line breaks, or a million characters.

    >>> print(visible("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    shown = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in HIDDEN
        else character
        for character in shown
    )


def encodable(text: str) -> str:
    r"""A text that every file can hold: bytes of a file's name that are not UTF-8 are escaped.

    >>> print(encodable("Jürgen\udcff.pt"))
    Jürgen\udcff.pt
    """
    return text.encode(errors="backslashreplace").decode()


def message(text: str) -> str:
    r"""A message for a terminal: as `visible`, but with its own line breaks.

    Further lines are indented, so that a name with a line break cannot begin a message.

    >>> print(message("of another run:\n  seed: 0 then\x07"))
    of another run:
      seed: 0 then\x07
    """
    first, *others = (visible(line) for line in text.split("\n")[:MAX_LINES])
    return "\n".join([first, *(f"  {line.strip()}" for line in others)])


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def shortened(name: str, most: int = MAX_NAME) -> str:
    """The end of a name, in which paths, layers and methods differ more than at the beginning.

    >>> shortened("encoder.layers.3.attention", 12)
    '…3.attention'
    """
    return name if len(name) <= most else "…" + name[1 - most :]


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many there are in all.

    >>> listed(["a", "b", "c"], 2)
    'a, b, … (3 in all)'
    """
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(shortened(name, MAX_LISTED) for name in names[:most]) + more


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun, in the plural unless it is one.

    >>> counted(1, "checkpoint"), counted(2, "checkpoint")
    ('1 checkpoint', '2 checkpoints')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def describe_bytes(count: float) -> str:
    """An amount of memory as text.

    >>> describe_bytes(3 * 2**29)
    '1.5 GiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"


def power_of_ten(exponent: int) -> str:
    """A power of ten as text, without markup.

    >>> power_of_ten(-8)
    '10⁻⁸'
    """
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
