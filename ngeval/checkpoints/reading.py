"""State dicts from files, in the layouts of common training programs, without running code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ngeval.checkpoints.finding import weights_file
from ngeval.checkpoints.pickles import asks_for_code, unreadable_because
from ngeval.errors import CheckpointError
from ngeval.utils.text import first_line, listed

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""The keys under which training programs keep the weights among other things."""


def read_state(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a state dict without running code.

    Args:
        path: a ``.safetensors`` file; a file of ``torch.save`` (a state dict, or one inside
            ``{"state_dict": …}`` or ``{"model": …}``, as Lightning writes it); the index of a
            sharded checkpoint; or a folder of ``save_pretrained``.
        allow_pickle: unpickle with code; only for files that you trust.

    Raises:
        CheckpointError: the file is unreadable or truncated, a shard is missing, it holds
            something other than tensors by name, or it asks for code to be run.
    """
    if path.is_dir():
        path = weights_file(path)
    if path.name.endswith(".index.json"):
        return _sharded(path, allow_pickle)
    return _single(path, allow_pickle)


def _single(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a broken file can raise anything
            raise _unreadable(path, error) from error
    content = load_file(path, "model.state_dict()", allow_pickle=allow_pickle)
    return _checked(path, _unwrapped(content))


def load_file(path: Path, instead: str, *, allow_pickle: bool) -> Any:
    """Read a file of ``torch.save`` to the CPU without running code; errors advise ``instead``."""
    reason = "" if allow_pickle else unreadable_because(path)
    if reason:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # a broken file, or an allowed pickle, can raise anything
        if not allow_pickle and (named := asks_for_code(path)):
            raise CheckpointError(
                f"{path} is a pickle that asks to run code on loading ({listed(named, 3)}), which "
                f"was refused; save {instead} instead, or pass --allow-pickle if you trust its "
                "source"
            ) from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a checkpoint (truncated, or of another format?): "
        f"{type(error).__name__}: {first_line(error)}"
    )


def _sharded(index: Path, allow_pickle: bool) -> dict[str, Tensor]:
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
    state: dict[str, Tensor] = {}
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


def _unwrapped(state: Any) -> Any:
    """The weights among the other things that a training program saved with them."""
    if not isinstance(state, Mapping) or not state:
        return state
    if all(isinstance(value, Tensor) for value in state.values()):
        return state
    for name in WRAPPERS:
        inner = state.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return inner
    return state


def _checked(path: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a state dict of tensors by name"
        )
    odd = [
        str(key)
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _is_plain(value)
    ]
    if odd or not state:
        what = f"entries that are not plain tensors by name: {listed(odd)}" if odd else "nothing"
        raise CheckpointError(
            f"{path} holds {what}; ngeval reads a state dict of tensors by name, also under one of "
            f"{', '.join(WRAPPERS)}"
        )
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has data and is not sparse, quantized or nested."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return strided and not tensor.is_quantized and not tensor.is_meta
