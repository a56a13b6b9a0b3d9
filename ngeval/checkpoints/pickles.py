"""What a pickle names, read from its opcodes: it is parsed, never run."""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ZIP = b"PK\x03\x04"
"""How a file begins that ``torch.load`` takes for a zip, whatever stands at its end."""

HARMLESS = re.compile(r"torch\._utils\.\w+|torch\.\w+|collections\.OrderedDict")
"""What every state dict names."""

DEEPEST = 1_000
"""Tuples in tuples; Python's hash of some 100,000 ends the process without a word."""

FILLING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""Opcodes that put more into the value below."""


@dataclass(frozen=True, slots=True)
class _Item:
    """What is known of a value on a pickle's stack: how deep it is nested, and a text's text."""

    depth: int = 0
    text: str | None = None


_MARK = _Item(-1)


def asks_for_code(path: Path) -> list[str]:
    """The functions and classes that the pickle in a file names; those of torch where alone."""
    named = list(dict.fromkeys(name for _, name in _read(path) if name is not None))
    return [name for name in named if not HARMLESS.fullmatch(name)] or named


def names_any(path: Path, words: Iterable[str]) -> bool:
    """Whether the pickle in a file holds one of some texts, as a key of a dict would be."""
    wanted = set(words)
    try:
        for data in _pickles(path):
            for _, text, _ in _opcodes(data):
                if isinstance(text, str) and text in wanted:
                    return True
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        pass
    return False


def unreadable_because(path: Path) -> str:
    """Why a file must not be given to ``torch.load``, or nothing.

    A small file can ask for all of the memory (compressed or overlapping members of a zip), or for
    Python's stack (tuples nested by the hundred thousand, as a key), before any error is raised.
    """
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(info.file_size for info in archive.infolist())
            if declared > path.stat().st_size:
                return f"its members declare {declared:,} bytes, more than the file has"
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        return f"its directory of members is broken (truncated?): {error}"
    if any(item.depth > DEEPEST for item, _ in _read(path)):
        return f"it nests more than {DEEPEST:,} values"
    return ""


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _pickles(path: Path) -> Iterator[Any]:
    """The pickles' bytes in what ``torch.save`` wrote, as files."""
    if _is_zip(path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # Every one: which of several is loaded is up to the reader.
                if info.filename.endswith("data.pkl") and info.file_size <= size:
                    with archive.open(info) as member:
                        yield io.BytesIO(member.read())
    elif path.stat().st_size:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data


def _opcodes(data: Any) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    """The opcodes of all pickles that a file begins with; none if the bytes are something else.

    torch's old format is a few pickles in a row, and then raw numbers.
    """
    while True:
        try:
            yield from pickletools.genops(data)
        except Exception:  # arbitrary bytes make the parser raise anything, and so does the end
            return


def _read(path: Path) -> Iterator[tuple[_Item, str | None]]:
    """What each opcode leaves on the stack, and what it names that would be called."""
    try:
        for data in _pickles(path):
            yield from _simulated(data)
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return


def _simulated(data: Any) -> Iterator[tuple[_Item, str | None]]:
    """Go through pickles with a stack of nesting depths in place of values."""
    stack: list[_Item] = []
    memo: dict[Any, _Item] = {}
    for opcode, argument, _ in _opcodes(data):
        name = opcode.name
        try:
            if name == "STOP":
                stack, memo = [], {}
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[argument])
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "MARK":
                stack.append(_MARK)
            else:
                taken = _taken(stack, opcode)
                if opcode.stack_after:
                    text = argument if isinstance(argument, str) else None
                    stack.append(_Item(_depth(name, [part.depth for part in taken]), text))
                    yield stack[-1], _called(name, argument, taken)
        except (IndexError, KeyError):  # no unpickler goes on from here
            return


def _called(name: str, argument: Any, taken: list[_Item]) -> str | None:
    """The function or class that an opcode names, if it is one that does."""
    if name == "STACK_GLOBAL":
        return ".".join(part.text or "?" for part in taken)
    return str(argument).replace(" ", ".") if name in ("GLOBAL", "INST") else None


def _depth(name: str, parts: list[int]) -> int:
    """How deep the value is nested that an opcode makes of others."""
    if name in FILLING and parts:
        return max(parts[0], 1 + max(parts[1:], default=-1))
    return 1 + max(parts, default=-1)


def _taken(stack: list[_Item], opcode: pickletools.OpcodeInfo) -> list[_Item]:
    """What an opcode takes off the stack."""
    before = opcode.stack_before
    taken: list[_Item] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]
