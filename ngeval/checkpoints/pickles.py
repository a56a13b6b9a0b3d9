"""The functions and classes that a pickle names, read from its opcodes; the pickle is never run."""

from __future__ import annotations

import _compat_pickle
import io
import mmap
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ZIP = b"PK\x03\x04"
"""The first bytes of a file that ``torch.load`` takes for a zip, whatever its end."""

HARMLESS = re.compile(r"torch\._utils\.\w+|torch\.\w+|collections\.OrderedDict")
"""The names in every state dict."""

VALUES = re.compile(
    r"numpy(\._?core)?\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|random\.[\w.]+)|"
    r"collections\.(defaultdict|deque|Counter)|pathlib[\w.]*\.\w+|argparse\.Namespace|uuid\.UUID|"
    r"datetime\.\w+|decimal\.Decimal|fractions\.Fraction|functools\.partial|_io\.(BytesIO|StringIO)|"
    r"copyreg\._reconstructor|_operator\.getitem|typing\.\w+|types\.SimpleNamespace|_codecs\.encode|torch\.(nn\.parameter|storage|serialization)\._?[A-Za-z]\w*|"
    r"builtins\.(set|frozenset|list|dict|tuple|bytes|bytearray|complex|slice|range|int|float|str|bool|type)"
)
"""Functions that pickles of harmless values call; no file makes ngeval call one of them."""

BROKEN = (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile)
"""The errors of reading an arbitrary file as a zip."""

MAX_DEPTH = 1_000
"""Tuples nested in tuples; hashing some 100,000 of them overflows Python's stack."""

EXTENDING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""Opcodes that add to the value below on the stack."""

CALLING = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"})
"""Opcodes that make an object by the function or class below its arguments."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A value on a pickle's stack: how deep it is nested, and its text if it is one.

    ``name`` is that of a function or class, ``made_by`` that of the one whose result it is.
    """

    depth: int = 0
    text: str | None = None
    name: str | None = None
    made_by: str | None = None


@dataclass(frozen=True, slots=True)
class _Use:
    """What an opcode does with a function or class, or with an object that one has made."""

    what: Literal["names", "calls", "sets items of", "appends to"]
    name: str


_MARK = _Item(-1)


class Inert:
    """Stands for an object of a class that is not torch's: whatever it is given, it ignores."""

    def __new__(cls, *_: object) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


class _InertDict(Inert):
    """Stands for a class of dicts."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _InertList(Inert):
    """Stands for a class of lists."""

    def __new__(cls, *_: object) -> Any:
        return []


def asks_for_code(path: Path) -> list[str]:
    """The functions and classes that the pickle in a file names, those of torch only if alone.

    If there are such that it calls and that no harmless value needs, these alone.
    """
    named = _names(path, "names")
    foreign = [name for name in named if not HARMLESS.fullmatch(name)]
    return _calls(path) or foreign or named


def stand_ins(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Inert classes by the names in a file that ``torch.load`` does not know.

    With them as safe globals it reads what lies beside the weights (a ``Namespace`` of arguments,
    numpy scalars, configurations) without importing or calling anything. The list is empty if the
    pickle calls a function that harmless values do not need.
    """
    if _calls(path):
        return []
    dicts, lists = _names(path, "sets items of"), _names(path, "appends to")
    return [
        (_InertDict if name in dicts else _InertList if name in lists else Inert, name)
        for name in _names(path, "names")
        if not HARMLESS.fullmatch(name)
    ]


def _calls(path: Path) -> list[str]:
    """The functions that a pickle calls and that harmless values do not need."""
    called = _names(path, "calls")
    return [name for name in called if not (HARMLESS.fullmatch(name) or VALUES.fullmatch(name))]


def _names(path: Path, what: str) -> list[str]:
    """The names in the uses of one kind, each once."""
    return list(dict.fromkeys(use.name for _, use in _read(path) if use and use.what == what))


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


def _read(path: Path) -> Iterator[tuple[_Item, _Use | None]]:
    """The value that each opcode leaves on the stack, and how it uses a function or class."""
    try:
        for data in _pickles(path):
            yield from _simulated(data)
    except BROKEN:
        return


def _simulated(data: Any) -> Iterator[tuple[_Item, _Use | None]]:
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
                    stack.append(_result(name, argument, taken))
                    yield stack[-1], _use(name, stack[-1], taken)
        except (IndexError, KeyError):  # an unpickler stops here, too
            return


def _result(opcode: str, argument: Any, taken: list[_Item]) -> _Item:
    """The value that an opcode builds from others."""
    depth = _depth(opcode, [part.depth for part in taken])
    if opcode in ("GLOBAL", "STACK_GLOBAL"):
        module, name = [part.text or "?" for part in taken] or str(argument).split(" ", 1)
        return _Item(depth, name=_present_name(module, name))
    if opcode in EXTENDING and taken:
        return replace(taken[0], depth=depth)
    if opcode == "INST":
        return _Item(depth, made_by=str(argument).replace(" ", "."))
    if opcode in CALLING and taken:
        return _Item(depth, made_by=taken[0].name)
    return _Item(depth, argument if isinstance(argument, str) else None)


def _present_name(module: str, name: str) -> str:
    """The name of a function or class, which protocol 2 writes as Python 2 had it."""
    renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    return ".".join(_compat_pickle.NAME_MAPPING.get((module, name), renamed))


def _use(opcode: str, result: _Item, taken: list[_Item]) -> _Use | None:
    """How an opcode uses a function or class, or an object that one has made."""
    if result.name:
        return _Use("names", result.name)
    if result.made_by is None:
        return None
    if opcode in ("REDUCE", "OBJ", "INST"):
        return _Use("calls", result.made_by)
    if opcode in ("SETITEM", "SETITEMS"):
        return _Use("sets items of", result.made_by)
    return _Use("appends to", result.made_by) if opcode in ("APPEND", "APPENDS") else None


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
