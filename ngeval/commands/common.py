"""What commands share."""

from __future__ import annotations

from rich.console import Console


def say(out: Console, text: str) -> None:
    """Print as it is: a path may hold brackets."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)
