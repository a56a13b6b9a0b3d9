"""Weights into a model, strictly, under whatever prefix a training program gave their names."""

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
from ngeval.checkpoints.reading import listed, read_state
from ngeval.errors import CheckpointError
from ngeval.utils.atomic import replace_file

T = TypeVar("T")

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into names."""


class CheckpointLoader:
    """Checkpoints, one after the other, into one model: whole ones, or adapters on a base."""

    def __init__(self, model: nn.Module, *, allow_pickle: bool = False) -> None:
        """Keep the model that is loaded into.

        Args:
            model: as the task builds it; for adapters, the base.
            allow_pickle: unpickle with code; only for files that you trust.
        """
        self.model = model
        self.allow_pickle = allow_pickle
        self._adapters: AdapterLoader | None = None
        self._loaded = False

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with a checkpoint's weights; the next call may change it.

        Raises:
            CheckpointError: see `load_checkpoint`; an adapter does not fit its base model; or
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
                f"{checkpoint.path} is no PEFT adapter as those before it; grade them in separate "
                "runs"
            )
        if not checkpoint.as_built:
            self._loaded = True
            load_checkpoint(self.model, checkpoint, allow_pickle=self.allow_pickle)
        return self.model


def load_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, *, allow_pickle: bool = False
) -> None:
    """Load weights into the model, strictly: every name and every shape must agree.

    A prefix that all names share and the model's do not (``module.`` of data parallelism,
    ``model.`` of a Lightning module) is left out, as is ``_orig_mod.`` of ``torch.compile``. Of
    tied weights one name is enough. A folder of transformers is read by the model's own
    ``from_pretrained`` where its names differ from the model's.

    Raises:
        CheckpointError: unreadable, NaN weights, or missing, unexpected or wrongly shaped keys,
            all listed. The model is unchanged then.
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
    """Names, shapes or kinds of a checkpoint are not the model's."""


def _translated(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """A folder's weights by the names of today's transformers, which renames some on loading.

    None where that does not make them fit.
    """
    read = getattr(type(model), "from_pretrained", None)
    if read is None or not (folder / "config.json").is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, report = read(folder, output_loading_info=True, local_files_only=True)
    except Exception:  # whatever transformers raises; the plain misfit says enough
        return None
    if any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    state: dict[str, Tensor] = found.state_dict()
    return state


def _load_state(model: nn.Module, checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    state = renamed(state, list(own))
    names_of: dict[int, list[str]] = {}
    for key, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(key)
    missing = [
        key
        for key, tensor in own.items()
        if not any(name in state for name in names_of[id(tensor)])
    ]
    problems = [
        f"missing: {listed(missing)}",
        f"unexpected: {listed([key for key in state if key not in own])}",
        "wrong shape: "
        + listed(
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ]
        ),
    ]
    other_kind = [
        f"{key} {_kind(state[key])} instead of {_kind(own[key])}"
        for key in own
        if key in state and _kind(state[key]) != _kind(own[key])
    ]
    problems.append(f"wrong kind: {listed(other_kind)}")
    problems = [line for line in problems if not line.endswith(": ")]
    prefixes = Counter(
        key.removesuffix(name) for name in missing for key in state if key.endswith(f".{name}")
    )
    prefix = max(prefixes, key=lambda found: prefixes[found], default="")
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        problems.append(f"the file's names begin with {prefix!r}, but for {listed(others)}")
    if problems:
        raise MisfitError(f"{checkpoint.path} does not fit the model; " + "; ".join(problems))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in state.items():
        # As the model will hold it: a large number may overflow there. Buffers may hold −∞
        # (attention masks); a NaN is never meant.
        held = tensor.to(own[key].dtype)
        bad = ~torch.isfinite(held) if key in parameters else torch.isnan(held)
        if bool(bad.any()):
            raise CheckpointError(f"{checkpoint.path}: {key!r} holds NaN or infinite values")
    model.load_state_dict(state, strict=False)


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"


def renamed(state: dict[str, T], own: list[str]) -> dict[str, T]:
    """What is kept by name with the model's names, as far as prefixes tell them apart."""
    plain = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        return state
    prefix = _shared_prefix(list(plain), [key.replace(COMPILED, "") for key in own])
    plain = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    named = {key.replace(COMPILED, ""): key for key in own}
    return {named.get(key, key): tensor for key, tensor in plain.items()}


def _shared_prefix(names: list[str], own: list[str]) -> str:
    """The leading components that all names share, and of which the model knows nothing."""
    prefix = ""
    while names and not set(names) & set(own):
        first = f"{names[0].split('.')[0]}."
        if not all(name.startswith(first) for name in names):
            return ""
        prefix += first
        names = [name.removeprefix(first) for name in names]
    return prefix


def save_checkpoint(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors checkpoint, and its metadata as JSON beside it, each as a whole.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    state = {
        key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()
    }
    told = json.dumps(dict(metadata), indent=2) + "\n"
    replace_file(path, lambda place: safetensors.torch.save_file(state, place))
    replace_file(path.with_suffix(".json"), lambda place: place.write_text(told, encoding="utf-8"))
