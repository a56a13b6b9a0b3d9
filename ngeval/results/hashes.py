"""SHA-256 of everything that numbers depend on: files, checkpoints, batches, tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ngeval.checkpoints import Checkpoint
from ngeval.checkpoints.finding import SHARDED_FOLDER, SHARED_SUFFIXES, is_weights_name
from ngeval.model.inputs import Inputs, named_tensors

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""The files in a checkpoint's folder that describe its model."""

SETTLED_NS = 2_000_000_000
"""A file that was written to less than this before it was read may be written to again without a
change of its time: file systems keep it in steps of up to two seconds."""


def hash_files(paths: Iterable[Path], below: Path | None = None) -> str:
    """SHA-256 of the contents of files, and of their names below a folder if it is given.

    Raises:
        OSError: one cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        if below is not None:
            total.update(os.fsencode(path.relative_to(below).as_posix()) + b"\0")
        total.update(_digest(path))
    return total.hexdigest()


def _digest(path: Path) -> bytes:
    """SHA-256 of a file; one that has not changed since is not read again."""
    stat = path.stat()  # before it is read: a later change is noticed
    if time.time_ns() - stat.st_mtime_ns < SETTLED_NS:
        return _read_digest(path)
    return _settled_digest(path, stat.st_size, stat.st_ino, stat.st_mtime_ns)


@functools.cache
def _settled_digest(path: Path, *_: int) -> bytes:
    return _read_digest(path)


def _read_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights; if it cannot be read, the reason.

    That of a single file is the file's own.
    """
    if checkpoint.as_built:
        return "as the task builds it"
    try:
        files = weight_files(checkpoint.path)
        if files == [checkpoint.path]:
            return _digest(checkpoint.path).hex()
        return hash_files(files, checkpoint.path if checkpoint.path.is_dir() else files[0].parent)
    except OSError as error:  # its units will fail
        return f"cannot be read: {error}"


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those of its folder or index that describe weights."""
    if path.is_file() and path.suffix != ".json":
        return [path]
    folder = path if path.is_dir() else path.parent
    files = [*folder.iterdir(), *(folder / SHARDED_FOLDER).glob("*")]
    return sorted(file for file in files if file.is_file() and _describes_weights(file))


def _describes_weights(path: Path) -> bool:
    """Whether a file belongs to a checkpoint: results may lie in its folder, too."""
    if path.suffix == ".json":
        return path.name in CONFIGURATIONS or path.name.endswith(".index.json")
    if path.name == ".metadata" or path.suffix == ".distcp":
        return True
    return is_weights_name(path.name) and path.suffix not in SHARED_SUFFIXES


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of tensors by name."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(name.encode() + b"\0" + _bytes(tensor))
    return total.hexdigest()


def hash_batch(inputs: Inputs, targets: Any) -> str:
    """SHA-256 of a batch's tensors, by name."""
    total = hashlib.sha256()
    for name, tensor in [*named_tensors(inputs), *named_tensors(targets, "targets")]:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + _bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
