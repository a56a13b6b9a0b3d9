"""The state dicts in the content of a checkpoint, wherever a training program keeps them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ngeval.errors import CheckpointError
from ngeval.utils.text import listed

StateDict = OrderedDict[str, Any]
"""Tensors by name, with the ``_metadata`` of ``state_dict()`` if the file has it; the value of a
module's ``_extra_state`` can be anything."""

PREFERRED = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("network_weights", "params", "weights", "state_dict_ema", "model_ema", "params_ema", "ema"),
)
"""The keys under which training programs keep the weights among other things, best first: of the
trained weights and their moving average, the trained ones."""

NOT_WEIGHTS = re.compile(
    r"optim(?!al|um)|sched|scaler|sampler|criterion|loss|metric|callback|rng|random|hyper|history|"
    r"state_dict_keys|param_groups|args|config",
    re.IGNORECASE,
)
"""Keys of what training programs keep beside the weights, which may hold tensors, too."""

EXTRA = "_extra_state"
"""The end of the names under which ``get_extra_state`` of modules is saved."""

SCALARS = (int, float, str, type(None))
"""Values that a program has put among the tensors themselves, as an epoch."""

MAX_DEPTH = 5
"""Mappings and lists within each other that are searched."""


def state_dicts(content: Any) -> dict[str, StateDict]:
    """The state dicts in the content of a file, by their keys joined with dots.

    The key is empty if the content itself is one. A module (of a pickle that was allowed to run)
    gives its ``state_dict()``.
    """
    return {".".join(keys): state for keys, state in _walk(content, (), set())}


def _walk(
    value: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if id(value) in seen or len(keys) > MAX_DEPTH or not isinstance(value, Mapping | list | tuple):
        return
    seen.add(id(value))
    if (state := _as_state(value)) is not None:
        yield keys, state
        return
    if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
        return  # an optimizer's
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        if not NOT_WEIGHTS.search(str(key)):
            yield from _walk(inner, (*keys, str(key)), seen)


def _as_state(value: Any) -> StateDict | None:
    """A mapping as a state dict, if all of it is plain tensors by name."""
    if not isinstance(value, Mapping) or odd_entries(value):
        return None
    state = OrderedDict((key, _as_tensor(entry)) for key, entry in value.items())
    if not any(isinstance(entry, Tensor) for entry in state.values()):
        return None
    if metadata := getattr(value, "_metadata", None):
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _as_tensor(entry: Any) -> Any:
    return torch.from_numpy(entry.copy()) if isinstance(entry, np.ndarray) else entry


def odd_entries(content: Mapping[Any, Any]) -> list[str]:
    """The entries of a mapping that no state dict has."""
    return [
        str(key)
        for key, entry in content.items()
        if not isinstance(key, str)
        or not (_is_plain(entry) or key.endswith(EXTRA) or isinstance(entry, SCALARS))
    ]


def _is_plain(entry: Any) -> bool:
    """Whether an entry is a tensor that has data and is not sparse, quantized or nested."""
    if isinstance(entry, np.ndarray):
        return entry.dtype.kind in "biufc"
    if not isinstance(entry, Tensor):
        return False
    strided = entry.layout == torch.strided and not entry.is_nested
    return strided and not entry.is_quantized and not entry.is_meta


def under_key(path: Path, content: Any, key: str) -> dict[str, StateDict]:
    """The state dicts under a key of the content, whose parts are joined with dots.

    Below a state dict the key is a prefix of names: ``state_dict.student``.

    Raises:
        CheckpointError: there is no such key.
    """
    inner, rest = content, key
    while rest:
        if isinstance(inner, nn.Module):
            inner = inner.state_dict()
        items = dict(enumerate(inner)) if isinstance(inner, list | tuple) else inner
        if not isinstance(items, Mapping):
            break
        names = [name for name in map(str, items) if rest == name or rest.startswith(f"{name}.")]
        if not names:
            break
        name = max(names, key=len)
        inner = next(value for other, value in items.items() if str(other) == name)
        rest = rest[len(name) + 1 :]
    if rest and isinstance(inner, Mapping):
        prefix = f"{rest}."
        below = {str(k)[len(prefix) :]: v for k, v in inner.items() if str(k).startswith(prefix)}
        inner, rest = (below, "") if below else (inner, rest)
    states = {} if rest else state_dicts(inner)
    if not states:
        raise CheckpointError(
            f"{path} has no state dict of tensors by name under the key {key!r}; {offered(content)}"
        )
    return {f"{key}.{name}" if name else key: state for name, state in states.items()}


def offered(content: Any) -> str:
    """The end of a message: the keys that a file has state dicts under."""
    states = {key or "(no key)": state for key, state in state_dicts(content).items()}
    if not states:
        keys = list(map(str, content)) if isinstance(content, Mapping) else []
        return f"its keys: {listed(keys)}" if keys else "it has none at all"
    sizes = [f"{key} ({len(state)} entries)" for key, state in states.items()]
    return f"it has some under {listed(sizes)}"


def preferred(keys: list[str]) -> list[str]:
    """The keys whose last parts stand first in `PREFERRED`: one, or all if none of them is there.

    >>> preferred(["model", "model_ema"]), preferred(["student", "teacher"])
    (['model'], ['student', 'teacher'])
    """

    def rank(key: str) -> list[int]:
        parts = key.split(".")
        return [PREFERRED.index(part) if part in PREFERRED else len(PREFERRED) for part in parts]

    ranks = {key: rank(key) for key in keys}
    least = min(ranks.values(), default=[])
    best = [key for key in keys if ranks[key] == least]
    return best if len(best) == 1 and min(least) < len(PREFERRED) else keys
