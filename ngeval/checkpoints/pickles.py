"""The functions that a pickle names, read from its opcodes; the pickle is never run."""

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
"""The first bytes of a file that ``torch.load`` takes for a zip, whatever its end."""

HARMLESS = re.compile(r"torch\._utils\.\w+|torch\.\w+|collections\.OrderedDict")
"""The names in every state dict."""

BROKEN = (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile)
"""The errors of reading an arbitrary file as a zip."""

MAX_DEPTH = 1_000
"""Tuples nested in tuples; hashing some 100,000 of them overflows Python's stack."""

EXTENDING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""Opcodes that add to the value below on the stack."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A value on a pickle's stack: how deep it is nested, and its text if it is one."""

    depth: int = 0
    text: str | None = None


_MARK = _Item(-1)


def asks_for_code(path: Path) -> list[str]:
    """The functions and classes that the pickle in a file names, those of torch only if alone."""
    named = list(dict.fromkeys(name for _, name in _read(path) if name is not None))
    return [name for name in named if not HARMLESS.fullmatch(name)] or named


def names_any(path: Path, words: Iterable[str]) -> bool:
    """Whether the pickle in a file holds one of some texts, as the keys of a dict are."""
    keys = set(words)
    return any(item.text in keys for item, _ in _read(path))


def unreadable_because(path: Path) -> str:
    """Why a file must not be passed to ``torch.load``; empty if it can be.

    A small file can take all of the memory (compressed or overlapping members of a zip) or of
    Python's stack (a hundred thousand nested tuples as a key) before any error is raised.
    """
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(info.file_size for info in archive.infolist())
            if declared > path.stat().st_size:
                return f"its members declare {declared:,} bytes, more than the file has"
    except BROKEN as error:
        return f"its directory of members is broken (truncated?): {error}"
    if any(item.depth > MAX_DEPTH for item, _ in _read(path)):
        return f"it nests more than {MAX_DEPTH:,} values"
    return ""


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _pickles(path: Path) -> Iterator[Any]:
    """The bytes of the pickles in a file of ``torch.save``, as files."""
    if _is_zip(path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # All of them, because readers differ in which of several they load.
                if info.filename.endswith("data.pkl") and info.file_size <= size:
                    with archive.open(info) as member:
                        yield io.BytesIO(member.read())
    elif path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _opcodes(data: Any) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    """The opcodes of all pickles at the beginning of a file; none if it holds something else.

    torch's old format is a few pickles in a row, followed by raw numbers.
    """
    while True:
        try:
            yield from pickletools.genops(data)
        except Exception:  # the parser raises anything on arbitrary bytes and at the end
            return


def _read(path: Path) -> Iterator[tuple[_Item, str | None]]:
    """The value that each opcode leaves on the stack, and the function that it names."""
    try:
        for data in _pickles(path):
            yield from _simulated(data)
    except BROKEN:
        return


def _simulated(data: Any) -> Iterator[tuple[_Item, str | None]]:
    """Simulate an unpickler that keeps nesting depths in place of values."""
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
        except (IndexError, KeyError):  # an unpickler stops here, too
            return


def _called(name: str, argument: Any, taken: list[_Item]) -> str | None:
    """The function or class that an opcode names, or None."""
    if name == "STACK_GLOBAL":
        return ".".join(part.text or "?" for part in taken)
    return str(argument).replace(" ", ".") if name in ("GLOBAL", "INST") else None


def _depth(name: str, parts: list[int]) -> int:
    """The nesting depth of the value that an opcode builds from others."""
    if name in EXTENDING and parts:
        return max(parts[0], 1 + max(parts[1:], default=-1))
    return 1 + max(parts, default=-1)


def _taken(stack: list[_Item], opcode: pickletools.OpcodeInfo) -> list[_Item]:
    """The values that an opcode takes off the stack."""
    before = opcode.stack_before
    taken: list[_Item] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]
