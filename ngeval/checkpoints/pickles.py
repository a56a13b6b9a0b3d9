"""What a pickle names, read from its opcodes: it is parsed, never run."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def asks_for_code(path: Path) -> bool:
    """Whether the pickle in a file names functions or classes."""
    calls = {"GLOBAL", "STACK_GLOBAL", "INST"}
    return any(opcode.name in calls for opcode, _, _ in _opcodes(path))


def names_any(path: Path, words: Iterable[str]) -> bool:
    """Whether the pickle in a file holds one of some texts, as a key of a dict would be."""
    wanted = set(words)
    return any(isinstance(text, str) and text in wanted for _, text, _ in _opcodes(path))


def _opcodes(path: Path) -> list[Any]:
    """The opcodes of the pickle that ``torch.save`` wrote; none if the file is something else."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                data = archive.read(names[0]) if names else b""
        else:
            data = path.read_bytes()
        return _readable_opcodes(data)
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return []


def _readable_opcodes(data: bytes) -> list[Any]:
    """The opcodes of all pickles that a file begins with; none if the bytes are something else.

    torch's old format is a few pickles in a row, and then raw numbers.
    """
    stream, found = io.BytesIO(data), []
    while stream.tell() < len(data):
        try:
            found += list(pickletools.genops(stream))
        except Exception:  # arbitrary bytes make the parser raise anything
            break
    return found
