"""Folders of ``torch.distributed.checkpoint``: a ``.metadata`` and ``.distcp`` files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from ngeval.checkpoints.pickles import unreadable_because
from ngeval.errors import CheckpointError
from ngeval.utils.text import first_line

METADATA = ".metadata"

CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size",
        "device",
        *(str(d)[6:] for d in vars(torch).values() if isinstance(d, torch.dtype)),
    ),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}
"""The classes that a ``.metadata`` needs, by module; it is a pickle, and may name any others."""


class _Unpickler(pickle.Unpickler):
    """Makes objects of `CLASSES` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"asks to run code on loading ({module}.{name})")
        return super().find_class(module, name)


class _Reader(filesystem.FileSystemReader):
    """torch's reader, with a ``.metadata`` that is already read."""

    def __init__(self, folder: Path, content: metadata.Metadata) -> None:
        super().__init__(folder)
        self.content = content

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return self.content


def read_distributed(folder: Path) -> dict[str, Any]:
    """The tensors of a folder of ``torch.distributed.checkpoint``, nested as they were saved.

    Raises:
        CheckpointError: a file is missing or damaged, or the pickle in ``.metadata`` names other
            classes than torch writes there.
    """
    if reason := unreadable_because(folder / METADATA):
        raise CheckpointError(f"{folder / METADATA} cannot be read: {reason}")
    try:
        content = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
        _check(folder, content)
        tensors: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in content.state_dict_metadata.items()
            if isinstance(entry, metadata.TensorStorageMetadata)
        }
        load(tensors, storage_reader=_Reader(folder, content), no_dist=True)
        return _nested(tensors, content.planner_data or {})
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # a damaged file can raise anything
        failures = getattr(error, "failures", {})  # by rank, each with its traceback
        cause = next((failure for failure, _ in failures.values()), error)
        raise CheckpointError(
            f"{folder} cannot be read as a checkpoint of torch.distributed (truncated, or not "
            f"complete?): {type(cause).__name__}: {first_line(cause, 300)}"
        ) from error


def _check(folder: Path, content: Any) -> None:
    """Refuse a ``.metadata`` of another kind, or one that leads out of its folder or memory."""
    if not isinstance(content, metadata.Metadata):
        raise CheckpointError(f"{folder / METADATA} holds a {type(content).__name__}")
    stored: dict[Any, filesystem._StorageInfo] = content.storage_data or {}
    names = {str(info.relative_path) for info in stored.values()}
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder / METADATA} names files outside its folder: {outside[0]}")
    there = sum((folder / name).stat().st_size for name in names)
    needed = sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for entry in content.state_dict_metadata.values()
        if isinstance(entry, metadata.TensorStorageMetadata)
    )
    if needed > there:
        raise CheckpointError(
            f"{folder} is not complete: its tensors take {needed:,} bytes, its files have {there:,}"
        )


def _nested(tensors: dict[str, Tensor], places: dict[str, Any]) -> dict[str, Any]:
    """Tensors by flat names as nested dicts; ``places`` has the keys that lead to each."""
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *keys, last = places.get(name) or (name,)
        inner = result
        for key in keys:
            inner = inner.setdefault(str(key), {})
        inner[str(last)] = tensor
    return result
