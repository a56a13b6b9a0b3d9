"""State dicts from files, in the layouts of common training programs, without running code."""

from __future__ import annotations

import contextlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ngeval.checkpoints.finding import weights_file
from ngeval.checkpoints.layouts import (
    PREFERRED,
    StateDict,
    odd_entries,
    preferred,
    state_dicts,
    under_key,
)
from ngeval.checkpoints.pickles import BROKEN, Inert, asks_for_code, stand_ins, unreadable_because
from ngeval.errors import CheckpointError
from ngeval.utils.memory import free_memory
from ngeval.utils.text import describe_bytes, first_line, listed

LFS = b"version https://git-lfs"
"""The first bytes of a file that Git LFS has not fetched."""

ENTRIES = "entries that are not plain tensors by name"


def read_state(
    path: Path, *, allow_pickle: bool = False, key: str | None = None
) -> dict[str, Tensor]:
    """Read a state dict without running code.

    Args:
        path: a ``.safetensors`` or ``.npz`` file; a file of ``torch.save`` (a state dict, or one
            among other things, as Lightning or timm write it); the index of a sharded checkpoint;
            a folder of ``save_pretrained`` or of ``torch.distributed.checkpoint``.
        allow_pickle: unpickle with code; only for files that you trust.
        key: the place of the state dict in the file, its keys joined with dots; None: the one
            that there is, or the one under the first of the usual keys (``state_dict``, …).

    Raises:
        CheckpointError: the file is unreadable or truncated, a shard is missing, it holds
            something other than tensors by name, or several state dicts, or it asks for code to be
            run.
    """
    states = read_states(path, allow_pickle=allow_pickle, key=key)
    chosen = preferred(list(states))
    if len(chosen) > 1:
        raise CheckpointError(ambiguous(path, chosen))
    state = states[chosen[0]]
    if odd := [name for name, entry in state.items() if not isinstance(entry, Tensor)]:
        raise CheckpointError(f"{path} holds {ENTRIES}: {listed(odd)}")
    return state


def read_states(
    path: Path, *, allow_pickle: bool = False, key: str | None = None
) -> dict[str, StateDict]:
    """The state dicts in a checkpoint by their keys, at least one; see `read_state`."""
    content = _content(path, allow_pickle)
    states = state_dicts(content) if key is None else under_key(path, content, key)
    if not states:
        raise CheckpointError(_no_state(path, content))
    return states


def ambiguous(path: Path, keys: list[str]) -> str:
    """The message about a file with several state dicts."""
    return (
        f"{path} holds several state dicts, under {listed(keys)}; choose one with --checkpoint-key "
        "(key=)"
    )


def _content(path: Path, allow_pickle: bool) -> Any:
    """What a file or folder holds."""
    if path.is_dir():
        path = weights_file(path)
    if path.is_dir():
        # It takes a second to import.
        from ngeval.checkpoints.distributed import read_distributed  # noqa: PLC0415

        return read_distributed(path)
    if path.name.endswith(".index.json"):
        return _sharded(path, allow_pickle)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a broken file can raise anything
            raise _unreadable(path, error) from error
    if path.suffix == ".npz":
        return _arrays(path)
    return load_file(path, "model.state_dict()", allow_pickle=allow_pickle)


def _single(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    """The one state dict of a shard."""
    return read_state(path, allow_pickle=allow_pickle)


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of ``numpy.savez``, by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(info.file_size for info in archive.infolist())
        if needed <= free_memory(torch.device("cpu")):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a broken file can raise anything
        raise _unreadable(path, error) from error
    raise CheckpointError(f"{path} takes {describe_bytes(needed)} of memory, more than is free")


def load_file(path: Path, instead: str, *, allow_pickle: bool) -> Any:
    """Read a file of ``torch.save`` to the CPU without running code; errors advise ``instead``.

    Objects of classes that are not torch's (arguments, numbers of numpy, configurations) are
    `Inert` then.
    """
    if not allow_pickle and is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript archive (torch.jit.save), which is code to run; save "
            f"{instead} of the model instead, or pass --allow-pickle if you trust its source"
        )
    reason = "" if allow_pickle else unreadable_because(path)
    if reason:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}")
    try:
        return _loaded(path, allow_pickle)
    except Exception as error:  # a broken file, or an allowed pickle, can raise anything
        if not allow_pickle and (named := asks_for_code(path)):
            raise CheckpointError(_refused(path, named, instead)) from error
        raise _unreadable(path, error) from error


def _loaded(path: Path, allow_pickle: bool) -> Any:
    """The content of a file of ``torch.save``; again with stand-ins for what torch refuses."""

    def load() -> Any:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols and TorchScript
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)

    try:
        return load()
    except Exception:  # torch raises errors of many types for what it refuses
        if allow_pickle or not (inert := stand_ins(path)):
            raise
    with torch.serialization.safe_globals(inert):
        return load()


def is_torchscript(path: Path) -> bool:
    """Whether a file is of ``torch.jit.save``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except BROKEN:
        return False
    return any(name.endswith("/constants.pkl") for name in names)


def _refused(path: Path, named: list[str], instead: str) -> str:
    return (
        f"{path} is a pickle that asks to run code on loading ({listed(named, 3)}), which was "
        f"refused; save {instead} instead, or pass --allow-pickle if you trust its source"
    )


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return CheckpointError(
                f"{path} is a pointer of Git LFS, not the file itself; fetch that with `git lfs "
                "pull`"
            )
    return CheckpointError(
        f"{path} cannot be read as a checkpoint (truncated, or of another format?): "
        f"{type(error).__name__}: {first_line(error)}"
    )


def _no_state(path: Path, content: Any) -> str:
    """Why a file has no state dict."""
    parts = [content]
    if isinstance(content, Mapping):
        parts += [content.get(key) for key in PREFERRED]
    if any(isinstance(part, Inert) for part in parts):  # a whole model
        return _refused(path, asks_for_code(path), "model.state_dict()")
    if not isinstance(content, Mapping):
        return f"{path} holds a {type(content).__name__}, not a state dict of tensors by name"
    odd = odd_entries(content) or list(map(str, content))
    what = f"{ENTRIES}: {listed(odd)}" if odd else "nothing"
    return (
        f"{path} holds {what}; ngeval reads a state dict of tensors by name, also under one of "
        f"{', '.join(PREFERRED[:7])}, …"
    )


def _sharded(index: Path, allow_pickle: bool) -> dict[str, Any]:
    """The weights of all shards that an index names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        shards = [index.parent / file for file in files]
        outside = [file for file in files if not _is_beside(index, file)]
        missing = [shard.name for shard in shards if not (outside or shard.is_file())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} cannot be read as the index of a sharded checkpoint: {repr(error)[:200]}"
        ) from error
    if outside:
        raise CheckpointError(
            f"{index} names shards outside its folder, which was refused: {listed(outside)}; put "
            "the files themselves beside it"
        )
    if missing:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, of which {listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it"
        )
    state: dict[str, Any] = {}
    for file, shard in zip(files, shards, strict=True):
        part = _single(shard, allow_pickle)
        state |= {
            name: part[name] for name, place in places.items() if place == file and name in part
        }
    lost = [name for name in places if name not in state]
    if lost:
        raise CheckpointError(f"the shards of {index} lack {listed(lost)}, which it names")
    return state


def _is_beside(index: Path, file: str) -> bool:
    """Whether a shard is a file of its index's folder, links followed.

    In the hub's cache both are links, into one folder.
    """
    folders = {index.parent.resolve(), index.resolve().parent}
    return Path(file).name == file and (index.parent / file).resolve().parent in folders
