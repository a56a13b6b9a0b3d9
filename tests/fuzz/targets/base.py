"""`Target`: one kind of input."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

HOSTILE_NAMES = (
    *("../escape", "/etc/passwd", "a\x00b", "a\nngeval: done", "\x1b[31mred\x1b[0m", "[bold]x"),
    *("[link=http://x]y[/link]", "<script>alert(1)</script>", "%s%n{0}{x}", "x" * 5000, "\ud800"),
    *("\u202egnp.exe", "", ".", "..", "~", "*", "**", "[", "a:b:c", "-1", "NaN", "1e400", "٣"),
)
"""Texts that have been trouble somewhere."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: of it.
        share: of all inputs that are tried.
        attempt: gives an input (bytes, and a folder to work in) to ngeval.
        seeds: valid inputs, which the engines start from.
        structured: Hypothesis's inputs: of the right form, with something odd in it.
        words: what the coverage-guided engine may put in.
    """

    name: str
    share: float
    attempt: Callable[[bytes, Path], None]
    seeds: Callable[[], Sequence[bytes]]
    structured: Callable[[], st.SearchStrategy[bytes]]
    words: Sequence[str | bytes] = ()


def emptied(folder: Path) -> None:
    """Remove what the last input left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def names() -> st.SearchStrategy[str]:
    """Names, also such as nobody would give."""
    return st.sampled_from(HOSTILE_NAMES) | st.text(max_size=12)


def json_values(keys: Sequence[str]) -> st.SearchStrategy[Any]:
    """What JSON may hold, under keys that mean something or nothing."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.integers(),
        st.sampled_from([2**63, -(2**70), 10**18]),
        st.floats(),
        names(),
        st.sampled_from(keys),
    )
    key = st.sampled_from(keys) | names()
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=5),
        max_leaves=12,
    )


def as_json(value: Any) -> bytes:
    """JSON with whatever Python's writer lets through: NaN, ∞, half of a surrogate pair."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with a few of them changed, cut off, doubled or left out."""
    data = bytearray(draw(contents))
    chance = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        if not data:
            break
        place = chance.choice((chance.randrange(len(data)), chance.randrange(min(len(data), 96))))
        match chance.randrange(6):
            case 0:
                data[place] = chance.randrange(256)
            case 1:
                data[place] ^= 1 << chance.randrange(8)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + chance.randrange(1, 9)]
            case 4:
                data[place:place] = data[place : place + chance.randrange(1, 40)]
            case _:
                data[place : place + 8] = chance.choice(
                    (b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little"), b"\x85" * 64)
                )
    return bytes(data)


def remembered(make: Callable[[], Sequence[bytes]]) -> Callable[[], Sequence[bytes]]:
    """Made once in a process."""
    return cache(make)
