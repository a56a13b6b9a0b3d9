"""Names and places in a training run, as people read them."""

from __future__ import annotations

MOST = 32
"""Letters of a name in a picture or table, unless told otherwise."""


def whole_or_short(value: float) -> str:
    """An epoch or a step: whole numbers in full, others in six digits.

    >>> [whole_or_short(value) for value in (12.0, 1234567, 0.25, 1e300)]
    ['12', '1234567', '0.25', '1e+300']
    """
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:g}"


def shortened(name: str, most: int = MOST) -> str:
    """A name's end, which tells paths, layers and methods apart better than its beginning.

    >>> shortened("encoder.layers.3.attention", 12)
    '…3.attention'
    """
    return name if len(name) <= most else "…" + name[1 - most :]
