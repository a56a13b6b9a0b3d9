"""What commands share."""

from __future__ import annotations

from rich.console import Console

from ngeval.utils.text import message


def say(out: Console, text: str) -> None:
    """Print as it is: a path may hold brackets, or escape sequences."""
    out.print(message(text), highlight=False, markup=False, soft_wrap=True)
