"""Loading weights into a model, strictly, under the prefixes that training programs use."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ngeval.checkpoints.adapters import AdapterLoader
from ngeval.checkpoints.finding import Checkpoint
from ngeval.checkpoints.reading import read_state
from ngeval.errors import CheckpointError
from ngeval.utils.atomic import replace_file
from ngeval.utils.text import listed

T = TypeVar("T")

COMPILED = "_orig_mod."
"""The component that ``torch.compile`` inserts into names."""


class CheckpointLoader:
    """Loads checkpoints, one after the other, into one model.

    Args:
        model: the model as the task builds it; for adapters, their base.
        allow_pickle: unpickle with code; only for files that you trust.
    """

    def __init__(self, model: nn.Module, *, allow_pickle: bool = False) -> None:
        self.model = model
        self.allow_pickle = allow_pickle
        self._adapters: AdapterLoader | None = None
        self._loaded = False

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with a checkpoint's weights; the next call may change it.

        Raises:
            CheckpointError: see `load_checkpoint`; or an adapter does not fit the model; or
                adapters and whole models are mixed.
        """
        if checkpoint.error:
            raise CheckpointError(checkpoint.error)
        if checkpoint.is_adapter:
            if self._loaded:
                raise CheckpointError(
                    f"{checkpoint.path} is a PEFT adapter after checkpoints of the whole model, "
                    "which its base would be; grade them in separate runs"
                )
            self._adapters = self._adapters or AdapterLoader(self.model)
            return self._adapters.load(checkpoint.path, allow_pickle=self.allow_pickle)
        if self._adapters is not None:
            raise CheckpointError(
                f"{checkpoint.path} is not a PEFT adapter as those before it are; grade them in "
                "separate runs"
            )
        if not checkpoint.as_built:
            self._loaded = True
            load_checkpoint(self.model, checkpoint, allow_pickle=self.allow_pickle)
        return self.model


def load_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, *, allow_pickle: bool = False
) -> None:
    """Load weights into the model, strictly: every name and every shape must agree.

    A prefix that all names in the file share and the model's do not (``module.`` of data
    parallelism, ``model.`` of a Lightning module) is left out, as is ``_orig_mod.`` of
    ``torch.compile``. One name is enough for tied weights. A folder whose names differ from the
    model's is read by the model's own ``from_pretrained``, if it has one.

    Raises:
        CheckpointError: the file is unreadable, has NaN weights, or missing, unexpected or wrongly
            shaped keys, which are all listed. The model is unchanged then.
    """
    if checkpoint.is_adapter:
        raise CheckpointError(
            f"{checkpoint.path} is a PEFT adapter, not a whole model; `CheckpointLoader` puts it "
            "on its base"
        )
    try:
        _load_state(model, checkpoint, read_state(checkpoint.path, allow_pickle=allow_pickle))
    except MisfitError:
        state = _translated(model, checkpoint.path)
        if state is None:
            raise
        _load_state(model, checkpoint, state)


class MisfitError(CheckpointError):
    """The names, shapes or number types of a checkpoint are not the model's."""


def _translated(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """A folder's weights by the names of the installed transformers, which renames some on loading.

    The result is None if the weights do not fit then, either.
    """
    read = getattr(type(model), "from_pretrained", None)
    if read is None or not (folder / "config.json").is_file():
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded, report = read(folder, output_loading_info=True, local_files_only=True)
    except Exception:  # transformers can raise anything; the caller reports the names that differ
        return None
    if any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    state: dict[str, Tensor] = loaded.state_dict()
    return state


def _load_state(model: nn.Module, checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    expected = model.state_dict(keep_vars=True)
    state = renamed(state, list(expected))
    if problems := _misfits(expected, state):
        raise MisfitError(f"{checkpoint.path} does not fit the model; " + "; ".join(problems))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in state.items():
        # In the model's dtype, in which a large number can overflow. Buffers may hold −∞
        # (attention masks); a NaN is always a mistake.
        loaded = tensor.to(expected[key].dtype)
        bad = ~torch.isfinite(loaded) if key in parameters else torch.isnan(loaded)
        if bool(bad.any()):
            raise CheckpointError(f"{checkpoint.path}: {key!r} holds NaN or infinite values")
    model.load_state_dict(state, strict=False)


def _misfits(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """How the names, shapes and number types of a state dict differ from the model's."""
    names_of: dict[int, list[str]] = {}
    for key, tensor in expected.items():
        names_of.setdefault(id(tensor), []).append(key)
    missing = [
        key
        for key, tensor in expected.items()
        if not any(name in state for name in names_of[id(tensor)])
    ]
    shared = [(key, state[key], tensor) for key, tensor in expected.items() if key in state]
    differing = {
        "missing": missing,
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} {tuple(loaded.shape)} instead of {tuple(tensor.shape)}"
            for key, loaded, tensor in shared
            if loaded.shape != tensor.shape
        ],
        "wrong kind": [
            f"{key} {_kind(loaded)} instead of {_kind(tensor)}"
            for key, loaded, tensor in shared
            if _kind(loaded) != _kind(tensor)
        ],
    }
    problems = [f"{what}: {listed(names)}" for what, names in differing.items() if names]
    prefixes = Counter(
        key.removesuffix(name) for name in missing for key in state if key.endswith(f".{name}")
    )
    prefix = max(prefixes, key=lambda candidate: prefixes[candidate], default="")
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        problems.append(f"the file's names begin with {prefix!r}, but for {listed(others)}")
    return problems


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"


def renamed(state: dict[str, T], names: list[str]) -> dict[str, T]:
    """Rename the keys of a state dict to a model's names, as far as they differ by prefixes."""
    plain = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        return state
    prefix = _shared_prefix(list(plain), [key.replace(COMPILED, "") for key in names])
    plain = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    original = {key.replace(COMPILED, ""): key for key in names}
    return {original.get(key, key): tensor for key, tensor in plain.items()}


def _shared_prefix(names: list[str], expected: list[str]) -> str:
    """The leading components that all names share and the model's names do not have."""
    prefix = ""
    while names and not set(names) & set(expected):
        first = f"{names[0].split('.')[0]}."
        if not all(name.startswith(first) for name in names):
            return ""
        prefix += first
        names = [name.removeprefix(first) for name in names]
    return prefix


def save_checkpoint(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors checkpoint, and its metadata as JSON beside it; neither partially.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    state = {
        key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()
    }
    text = json.dumps(dict(metadata), indent=2) + "\n"
    replace_file(path, lambda file: safetensors.torch.save_file(state, file))
    replace_file(path.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))
