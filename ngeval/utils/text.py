"""Names and places in a training run, as people read them."""

from __future__ import annotations

import unicodedata

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of signs that a terminal acts on, or that no encoding has."""

MOST_LINES = 100
"""Of a message."""

MOST = 32
"""Letters of a name in a picture or table, unless told otherwise."""


def whole_or_short(value: float) -> str:
    """An epoch or a step: whole numbers in full, others in six digits.

    >>> [whole_or_short(value) for value in (12.0, 1234567, 0.25, 1e300)]
    ['12', '1234567', '0.25', '1e+300']
    """
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:g}"


def visible(text: str, most: int = 8_000) -> str:
    r"""A text for a terminal: what would move its cursor or colour it is spelt out instead.

    Names in files may hold escape sequences, line breaks, or a million letters.

    >>> print(visible("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    shown = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign) in HIDDEN else sign
        for sign in shown
    )


def encodable(text: str) -> str:
    r"""A text that every file can hold: bytes of a file's name that are not UTF-8 are spelt out.

    >>> print(encodable("Jürgen\udcff.pt"))
    Jürgen\udcff.pt
    """
    return text.encode(errors="backslashreplace").decode()


def message(text: str) -> str:
    r"""A message for a terminal: `visible`, but for its own line breaks.

    Its further lines are indented, so that a name with a line break begins no message of its own.

    >>> print(message("of another run:\n  seed: 0 then\x07"))
    of another run:
      seed: 0 then\x07
    """
    first, *others = (visible(line) for line in text.split("\n")[:MOST_LINES])
    return "\n".join([first, *(f"  {line.strip()}" for line in others)])


def shortened(name: str, most: int = MOST) -> str:
    """A name's end, which tells paths, layers and methods apart better than its beginning.

    >>> shortened("encoder.layers.3.attention", 12)
    '…3.attention'
    """
    return name if len(name) <= most else "…" + name[1 - most :]
