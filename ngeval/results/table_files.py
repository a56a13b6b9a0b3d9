"""Result files: tidy tables as ``.csv``, ``.parquet`` or ``.jsonl``, replaced atomically."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ngeval.errors import OutputError
from ngeval.utils.atomic import replace_file


def _write_jsonl(table: pd.DataFrame, path: Path) -> None:
    """One JSON object a line, every digit kept (pandas keeps 15 decimals); NaN and ∞ as null."""
    with path.open("w", encoding="utf-8") as file:
        for record in table.to_dict("records"):
            plain = {
                str(key): None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write through a file of Python: pyarrow opens no name that is not UTF-8."""
    with path.open("wb") as file:
        table.to_parquet(file, index=False)


def _read_parquet(path: Path) -> pd.DataFrame:
    with path.open("rb") as file:
        return pd.read_parquet(file)


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
}
_TEXT = {"layer": str}
"""Columns that are text even if they look like numbers: layers "0.1" and "0.10" differ."""

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, keep_default_na=True, dtype=_TEXT),
    ".parquet": _read_parquet,
    ".jsonl": lambda path: pd.read_json(
        path, orient="records", lines=True, precise_float=True, dtype=_TEXT
    ),
}
SUFFIXES = tuple(_WRITERS)
"""The extensions of result files."""


def write_results(table: pd.DataFrame, path: Path, scratch: Path | None = None) -> None:
    """Write a ``.csv``, ``.parquet`` or ``.jsonl`` file, in place of an earlier one.

    A reader sees the earlier table or the new one, never a part of it; see ``replace_file``.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    write = _WRITERS[path.suffix]
    replace_file(path, lambda place: write(table, place), scratch)


def check_output(path: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Check that a file can be written, and make its folder.

    Raises:
        OutputError: unknown extension, the file exists (without ``force``), a folder has its
            name, or its folder cannot be written.
    """
    if path.suffix not in suffixes:
        raise OutputError(
            f"output {path} has the extension {path.suffix!r}; use one of {', '.join(suffixes)}"
        )
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that the file system does not allow
        raise OutputError(f"output {path} cannot be written: {error.strerror}") from error
    if is_folder:
        raise OutputError(f"output {path} is a folder")
    if exists and not force:
        raise OutputError(f"output {path} exists; pass --force to replace it")
    if len(os.fsencode(path.name)) > 230:  # a temporary file beside it has a longer name
        raise OutputError(f"output {path} cannot be written: File name too long")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make a folder and check that a file can be written in it.

    Raises:
        OutputError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error}") from error


def read_results(path: Path) -> pd.DataFrame:
    """Read a result file back.

    Raises:
        OutputError: it does not exist, is a folder, has another extension or is not such a table.
    """
    if path.suffix not in _READERS:
        raise OutputError(f"{path}: results are {', '.join(_READERS)} files")
    if path.is_dir():
        raise OutputError(f"result file {path} is a folder; name a file in it")
    if not path.is_file():
        raise OutputError(f"result file {path} does not exist")
    try:
        table = _READERS[path.suffix](path)
    except Exception as error:  # arbitrary bytes make pandas and Arrow raise anything
        raise OutputError(f"{path} cannot be read as a result table: {error}") from error
    if table.empty:
        raise OutputError(f"{path} has no rows")
    return table
