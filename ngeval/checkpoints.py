"""Checkpoint files: finding them in order, reading them without running code, loading strictly."""

from __future__ import annotations

import glob
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ngeval.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, and what the JSON beside it says.

    Attributes:
        path: the file.
        metadata: the JSON's content (task, epoch, losses, …); empty where there is none.
    """

    path: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The name in result tables: the path as it was found."""
        return str(self.path)

    @property
    def epoch(self) -> float | None:
        """The training epoch, where the metadata tell it."""
        epoch = self.metadata.get("epoch")
        return float(epoch) if isinstance(epoch, int | float) else None


def find_checkpoints(patterns: Iterable[str]) -> list[Checkpoint]:
    """Expand files, folders and globs into checkpoints.

    A folder's and a glob's files come in natural order (``epoch-2`` before ``epoch-10``).

    Raises:
        CheckpointError: a pattern matches nothing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES]
        else:
            found = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
            found = [p for p in found if p.suffix in SUFFIXES]
        if not found:
            kinds = ", ".join(SUFFIXES)
            raise CheckpointError(
                f"no checkpoint at {pattern!r}: give a file, a folder that holds one ({kinds}), "
                "or a glob in quotes"
            )
        paths += sorted(found, key=_natural_key)
    return [Checkpoint(path, _read_metadata(path)) for path in dict.fromkeys(paths)]


def read_state(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a state dict without running code.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote.
        allow_pickle: unpickle with code; only for files that you trust.

    Raises:
        CheckpointError: unreadable, truncated, holds something other than tensors by name, or
            asks for code to be run.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # a broken file, or an allowed pickle, may raise anything
        if not allow_pickle and _asks_for_code(path):
            raise CheckpointError(
                f"{path} is a pickle that asks to run code on loading, which was refused; save "
                "model.state_dict() instead, or pass --allow-pickle if you trust its source"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint (truncated, or of another format?): "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    return _checked_state(path, state)


def load_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, *, allow_pickle: bool = False
) -> None:
    """Load weights into the model, strictly: every name and every shape must agree.

    Raises:
        CheckpointError: unreadable, NaN weights, or missing, unexpected or wrongly shaped keys,
            all listed. The model is unchanged then.
    """
    state = read_state(checkpoint.path, allow_pickle=allow_pickle)
    own = model.state_dict()
    problems = [
        f"missing: {_listed([key for key in own if key not in state])}",
        f"unexpected: {_listed([key for key in state if key not in own])}",
        "wrong shape: "
        + _listed(
            [
                f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ]
        ),
    ]
    problems = [line for line in problems if not line.endswith(": ")]
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit the model; " + "; ".join(problems))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in state.items():
        # Buffers may hold −∞ (attention masks); a NaN is never meant.
        bad = ~torch.isfinite(tensor) if key in parameters else torch.isnan(tensor)
        if bool(bad.any()):
            raise CheckpointError(f"{checkpoint.path}: {key!r} holds NaN or infinite values")
    model.load_state_dict(state)


def save_checkpoint(model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors checkpoint, and its metadata as JSON beside it."""
    state = {
        key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(dict(metadata), indent=2) + "\n")


def _asks_for_code(path: Path) -> bool:
    """Whether the pickle in a file names functions or classes; it is parsed, never run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                data = archive.read(names[0]) if names else b""
        else:
            data = path.read_bytes()
        calls = {"GLOBAL", "STACK_GLOBAL", "INST"}
        return any(opcode.name in calls for opcode, _, _ in _readable_opcodes(data))
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return False


def _readable_opcodes(data: bytes) -> list[Any]:
    """The opcodes of a pickle that ends as a pickle does; none if the bytes are something else."""
    try:
        return list(pickletools.genops(data))
    except Exception:  # arbitrary bytes make the parser raise anything
        return []


def _checked_state(path: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a state dict of tensors by name"
        )
    odd = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        what = f"entries that are no tensors: {_listed(odd)}" if odd else "nothing"
        raise CheckpointError(f"{path} holds {what}; ngeval reads a state dict of tensors by name")
    return dict(state)


def _read_metadata(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        content = json.loads(beside.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{beside} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _listed(names: list[str], most: int = 8) -> str:
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
