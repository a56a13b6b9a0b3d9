"""Checkpoints into a model: found at a path, chosen in a file, loaded by torch's strict rules."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ngeval.checkpoints.adapters import AdapterLoader, fill_adapter, find_peft
from ngeval.checkpoints.finding import Checkpoint, find_checkpoints
from ngeval.checkpoints.fitting import (
    MisfitError,
    Snapshot,
    choose_state,
    load_strictly,
    training_mode,
)
from ngeval.checkpoints.layouts import StateDict
from ngeval.checkpoints.reading import read_states
from ngeval.errors import CheckpointError
from ngeval.utils.atomic import replace_file


class CheckpointLoader:
    """Loads checkpoints, one after the other, into one model.

    Args:
        model: the model as the task builds it; for adapters, their base.
        allow_pickle: unpickle with code; only for files that you trust.
        key: the place of the state dict in each file; see `load_checkpoint`.
        strict: see `load_checkpoint`.

    Attributes:
        remarks: what to know of the last checkpoint that was loaded, a sentence each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        allow_pickle: bool = False,
        key: str | None = None,
        strict: bool = True,
    ) -> None:
        self.model = model
        self.allow_pickle, self.key, self.strict = allow_pickle, key, strict
        self.remarks: list[str] = []
        self._adapters: AdapterLoader | None = None
        self._loaded = False
        self._built: Snapshot | None = None

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with a checkpoint's weights; the next call may change it.

        Raises:
            CheckpointError: see `load_checkpoint`; or an adapter does not fit the model; or
                adapters and whole models are mixed.
        """
        self.remarks = []
        if checkpoint.error:
            raise CheckpointError(checkpoint.error)
        if checkpoint.as_built:
            return self.model
        if checkpoint.is_adapter and find_peft(self.model) is None:
            return self._adapted(checkpoint)
        if self._adapters is not None:
            raise CheckpointError(
                f"{checkpoint.path} is not a PEFT adapter as those before it are; grade them in "
                "separate runs"
            )
        self._loaded = True
        if not self.strict:
            self._restore()
        self.remarks = load_checkpoint(
            self.model,
            checkpoint,
            allow_pickle=self.allow_pickle,
            key=self.key,
            strict=self.strict,
        )
        return self.model

    def _restore(self) -> None:
        """Give the model the weights that the task builds: a checkpoint may not have all."""
        with training_mode(self.model):
            if self._built is None:
                self._built = Snapshot(self.model)
            self._built.restore()

    def _adapted(self, checkpoint: Checkpoint) -> nn.Module:
        """The base with a PEFT adapter."""
        if self._loaded:
            raise CheckpointError(
                f"{checkpoint.path} is a PEFT adapter after checkpoints of the whole model, "
                "which its base would be; grade them in separate runs"
            )
        self._adapters = self._adapters or AdapterLoader(self.model)
        model = self._adapters.load(checkpoint.path, allow_pickle=self.allow_pickle)
        self.remarks = self._adapters.remarks
        return model


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    key: str | None = None,
    strict: bool = True,
) -> list[str]:
    """Load weights into the model as ``load_state_dict(strict=True)`` does.

    The model is in training mode meanwhile, as it was when the weights were saved: layers that
    merge weights in eval mode (LoRA) merge the loaded ones afterwards. Load hooks and versions of
    modules translate old names. Before, names are matched: a prefix of the file's names
    (``module.`` of data parallelism, ``model.`` of a Lightning module) or of the model's (a wrapper
    around it) that the other side does not have, ``_orig_mod.`` of ``torch.compile``, and one name
    for tied weights. A folder whose names differ from the model's is read by the model's own
    ``from_pretrained``, if it has one.

    Args:
        model: the model.
        checkpoint: a file or folder, or a `Checkpoint` of `find_checkpoints`. A PEFT adapter's
            folder needs a model with such an adapter.
        allow_pickle: unpickle with code; only for files that you trust.
        key: the place of the state dict in the file, its keys joined with dots, or a prefix of its
            names; None: the state dict that fits the model.
        strict: whether the names of the file and of the model must agree; if not, what fits is
            loaded and the rest is returned.

    Returns:
        What to know of the result, a sentence each: which entries of the file were left out,
        and, without ``strict``, which of the model keep their values.

    Raises:
        CheckpointError: the file is unreadable, has NaN weights, several state dicts that fit,
            different values for tied weights, or missing, unexpected or wrongly shaped keys, which
            are all listed. The model is unchanged then.
    """
    checkpoint = _as_checkpoint(checkpoint)
    path = checkpoint.path
    if checkpoint.is_adapter:
        if find_peft(model) is None:
            raise CheckpointError(
                f"{path} is a PEFT adapter, not a whole model; `CheckpointLoader` puts it on its "
                "base"
            )
        with training_mode(model):
            return fill_adapter(model, path, allow_pickle=allow_pickle)
    states = read_states(path, allow_pickle=allow_pickle, key=key)
    if key in states:  # chosen by the caller, so there is nothing to remark
        states = {"": states[key]}
    try:
        return _load(model, path, states, strict)
    except MisfitError:
        translated = _translated(model, path) if strict else None
        if translated is None:
            raise
        return _load(model, path, {"": translated}, strict)


def _load(model: nn.Module, path: Path, states: Mapping[str, StateDict], strict: bool) -> list[str]:
    choice = choose_state(model, path, states)
    with training_mode(model):
        return load_strictly(model, path, choice, strict=strict)


def _as_checkpoint(checkpoint: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """The one checkpoint at a path."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    path = os.fspath(checkpoint)
    matches = find_checkpoints([path])
    if len(matches) > 1:
        first = matches[0].path.name
        raise CheckpointError(f"{path} has {len(matches)} checkpoints ({first}, …); give one")
    return matches[0]


def _translated(model: nn.Module, folder: Path) -> StateDict | None:
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
    state: StateDict = loaded.state_dict()
    return state


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
