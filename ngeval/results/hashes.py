"""SHA-256 of what numbers depend on: files, checkpoints, batches, tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ngeval.checkpoints import Checkpoint
from ngeval.checkpoints.finding import NOT_WEIGHTS, SUFFIXES
from ngeval.model.checks import Inputs, named_tensors

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""What a checkpoint's folder tells of its model."""


def hash_files(paths: Iterable[Path], below: Path | None = None) -> str:
    """SHA-256 of files' contents, with their names below a folder if one is given.

    Raises:
        OSError: one cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        digest = _digest(path)
        if below is not None:
            total.update(os.fsencode(path.relative_to(below).as_posix()) + b"\0")
        total.update(digest)
    return total.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights, of a single file its own; else why it cannot be read."""
    if checkpoint.as_built:
        return "as the task builds it"
    try:
        files = weight_files(checkpoint.path)
        if files == [checkpoint.path]:
            return _digest(checkpoint.path).hex()
        return hash_files(files, checkpoint.path if checkpoint.path.is_dir() else files[0].parent)
    except OSError as error:  # it will be a failed unit
        return f"cannot be read: {error}"


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those of its folder or index that tell of weights."""
    if path.is_file() and path.suffix != ".json":
        return [path]
    folder = path if path.is_dir() else path.parent
    return sorted(one for one in folder.iterdir() if one.is_file() and _tells_weights(one))


def _tells_weights(path: Path) -> bool:
    """Results may lie there, too."""
    if path.suffix == ".json":
        return path.name in CONFIGURATIONS or path.name.endswith(".index.json")
    return path.suffix in SUFFIXES and not NOT_WEIGHTS.fullmatch(path.stem)


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of tensors by name."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(name.encode() + b"\0" + _bytes(tensor))
    return total.hexdigest()


def hash_text(text: str) -> str:
    """SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_batch(inputs: Inputs, targets: torch.Tensor) -> str:
    """SHA-256 of a batch's tensors, by name."""
    total = hashlib.sha256()
    for name, tensor in [*named_tensors(inputs), ("targets", targets)]:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + _bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
