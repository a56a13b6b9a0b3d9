"""Checkpoints on disk: which files and folders are checkpoints, and their order in training."""

from __future__ import annotations

import difflib
import glob
import json
import os.path
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngeval.checkpoints.pickles import names_any
from ngeval.errors import CheckpointError
from ngeval.utils.text import encodable

SUFFIXES = (
    *(".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".th", ".pyth", ".t7"),
    *(".pt.tar", ".pth.tar", ".ckpt.tar"),
)
"""The ends of checkpoints' names."""

SHARED_SUFFIXES = (".pkl", ".pickle", ".tar")
"""Ends of names that other files have, too: those of ``torch.save`` are checkpoints."""

TORCH_BEGINS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
"""The first bytes of a file of ``torch.save``, and of one in the format before torch 1.6."""

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp.bin"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
)
"""The files that ``save_pretrained``, Trainer and accelerate write, in the order of preference."""

SHARDED_FOLDER = "pytorch_model_fsdp_0"
"""The folder with a sharded model in those of Trainer and accelerate."""

RUN_FILES = (
    *("config.json", "trainer_state.json", "training_args.bin", "random_states_0.pkl"),
    *("optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"),
)
"""Files beside those weights: together they are one checkpoint."""

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
"""The files that PEFT writes beside ``adapter_config.json``."""

MAX_NUMBER = 2.0**63
"""A larger number is not an epoch or a step; NaN compares as larger, too."""

NOT_WEIGHTS = re.compile(
    r"((.+[._-])?(optimizer|optim|optim_states|scheduler|lr_scheduler|scaler|grad_scaler)"
    r"|training_args|rng_state|random_states|sampler|dl_state_dict|custom_checkpoint)([._-](epoch|step)?[_=-]?\d+)*"
)
"""Files of a training run that have a checkpoint's suffix but hold no weights."""

OPTIMIZER = ("optimizer.pt", "optimizer.bin")
"""The optimizer's file in a checkpoint's folder, of transformers' Trainer and of accelerate."""

OPTIMIZER_KEYS = (
    *("optimizer_states", "optimizer_state_dict", "optimizer_state", "optimizer", "optim"),
)
"""The keys under which training programs keep the optimizer's state in a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: a file, or a folder of ``save_pretrained``, an adapter or shards.

    Attributes:
        path: the file or folder.
        metadata: the epoch, step, losses, … recorded beside it, if any.
        as_built: the model is graded as the task builds it, and nothing is loaded.
        error: why it cannot be graded, if that is known before it is loaded.
    """

    path: Path
    metadata: dict[str, Any]
    as_built: bool = False
    error: str = ""

    @property
    def name(self) -> str:
        """The name in result tables: the path as it matched."""
        return encodable(str(self.path))

    @property
    def epoch(self) -> float | None:
        """The training epoch, if the metadata or the file's name record it."""
        return self._number("epoch")

    @property
    def step(self) -> float | None:
        """The training step, if the metadata or the file's name record it."""
        return self._number("step")

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint is a PEFT adapter, which needs its base model."""
        return not self.as_built and is_adapter(self.path)

    @property
    def optimizer(self) -> Path | None:
        """The file with the optimizer's state, or None.

        ``epoch-003.optimizer.pt`` beside ``epoch-003.safetensors``, ``optimizer.pt`` in a
        checkpoint's folder, or the checkpoint itself.
        """
        return None if self.as_built else optimizer_file(self.path)

    def _number(self, name: str) -> float | None:
        value = self.metadata.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if abs(value) < MAX_NUMBER else None


def find_checkpoints(patterns: Iterable[str]) -> list[Checkpoint]:
    """Expand files, folders and globs into checkpoints.

    A folder is a checkpoint itself (``save_pretrained``, a PEFT adapter, ``.distcp`` shards of
    ``torch.distributed.checkpoint``), or a run of Trainer or accelerate with ``checkpoint-500/``
    and others inside, or holds checkpoint files or such folders. What a folder or a glob holds is
    in natural order (``epoch-2`` before ``epoch-10``); files of optimizers, samplers and the like
    are skipped. A checkpoint beside a broken JSON file carries an ``error``, so that the others can
    be graded.

    Raises:
        CheckpointError: a pattern matches no checkpoint.
    """
    paths: list[Path] = []
    for pattern in patterns:
        try:
            matches = _matches(pattern)
            below = [] if matches else _folders_below(pattern)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            raise CheckpointError(
                f"checkpoint {pattern[:80]!r} cannot be looked up: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from error
        if not matches:
            kinds = ", ".join(SUFFIXES)
            hint = f"; there are some in {', '.join(below[:4])}" if below else _near(Path(pattern))
            raise CheckpointError(
                f"no checkpoint at {pattern!r}: give a file, a folder that holds one ({kinds}, "
                f"save_pretrained's or a PEFT adapter's files), or a glob in quotes{hint}"
            )
        paths += sorted(_without_insides(matches), key=_natural_key)
    return [_checkpoint(path) for path in dict.fromkeys(paths)]


def _checkpoint(path: Path) -> Checkpoint:
    try:
        return Checkpoint(path, read_metadata(path))
    except CheckpointError as error:
        return Checkpoint(path, {}, error=str(error))


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path)
    matches = map(Path, glob.glob(os.path.expanduser(pattern), recursive=True))
    return [match for match in matches if _is_checkpoint(match) or match.suffix == ".npz"]


def _folders_below(pattern: str) -> list[str]:
    """Folders with checkpoints in a folder, or in the folders that a glob matches."""
    folders = [Path(pattern), *map(Path, glob.glob(pattern))]
    inside = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    candidates = {path for path in [*folders[1:], *inside] if path.is_dir()}
    return [str(path) for path in sorted(candidates, key=_natural_key) if _in_folder(path)]


def _near(path: Path) -> str:
    """The end of a message about a path that does not exist: the nearest name in its folder."""
    if path.exists() or not path.parent.is_dir():
        return ""
    names = [other.name for other in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return os.path.isfile(path / "adapter_config.json")


def weights_file(folder: Path) -> Path:
    """The file that a checkpoint folder's weights are read from, or the folder of its shards."""
    names = ADAPTER if is_adapter(folder) else WEIGHTS
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for shards in (folder, folder / SHARDED_FOLDER):
        if _is_distributed(shards):
            return shards
    raise CheckpointError(f"{folder} has none of the files {', '.join(names)}")


def is_weights_name(name: str) -> bool:
    """Whether a file's name is that of a checkpoint."""
    suffix = _suffix(name)
    return bool(suffix) and not NOT_WEIGHTS.fullmatch(name[: -len(suffix)])


def _suffix(name: str) -> str:
    """The end of a checkpoint's name, the longest of them; empty if it is not one's."""
    ends = (*SUFFIXES, *SHARED_SUFFIXES)
    return max((end for end in ends if name.lower().endswith(end)), key=len, default="")


def optimizer_file(path: Path) -> Path | None:
    """The file with a checkpoint's optimizer state, never that of a different checkpoint."""
    beside = path.with_name(f"{path.stem}.optimizer.pt")
    if not path.is_dir() and os.path.isfile(beside):
        return beside
    if path.is_dir() or path.name in WEIGHTS + ADAPTER:
        folder = path if path.is_dir() else path.parent
        return next((folder / name for name in OPTIMIZER if (folder / name).is_file()), None)
    pickled = bool(_suffix(path.name)) and path.suffix != ".safetensors"
    return path if pickled and path.is_file() and names_any(path, OPTIMIZER_KEYS) else None


def read_metadata(path: Path) -> dict[str, Any]:
    """The epoch, step, losses, … of a checkpoint, without opening it.

    They are read from a Trainer's ``trainer_state.json``, from the JSON of the same name beside a
    file, or from a name such as ``epoch=3-step=400.ckpt`` or ``checkpoint-500``.
    """
    metadata: dict[str, Any] = {}
    for word, number in re.findall(r"(epoch|step)=(\d+)", path.name):
        metadata[word] = int(number)
    if numbered := re.fullmatch(r"checkpoint-(\d+)", path.name):
        metadata["step"] = int(numbered[1])
    state = path / "trainer_state.json"
    if state.is_file():
        content = read_json(state)
        metadata |= {
            name: content[key]
            for name, key in (("epoch", "epoch"), ("step", "global_step"))
            if key in content
        }
    beside = path.with_suffix(".json")
    if path.is_file() and os.path.isfile(beside) and not path.name.endswith(".index.json"):
        metadata |= read_json(beside)
    return metadata


def _in_folder(folder: Path) -> list[Path]:
    inside = list(folder.iterdir())
    steps = [path for path in inside if re.fullmatch(r"checkpoint[-_]\d+", path.name)]
    steps = [path for path in steps if _has_weights(path)]
    if steps:  # weights beside them repeat those of the last step
        return steps
    if is_adapter(folder):  # PEFT puts adapters with other names into folders inside
        return [folder, *(path for path in inside if is_adapter(path))]
    if _is_folder_checkpoint(folder):
        return [folder]
    checkpoints = [path for path in inside if _is_checkpoint(path)]
    bare = [path for path in inside if _has_weights(path)]  # of accelerate's save_model
    arrays = [path for path in inside if path.suffix == ".npz" and path.is_file()]
    return checkpoints or bare or arrays


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return _is_folder_checkpoint(path)
    if not is_weights_name(path.name):
        return False
    return path.name.lower().endswith(SUFFIXES) or _is_of_torch(path)


def _is_of_torch(path: Path) -> bool:
    """Whether a file begins as ``torch.save`` writes it."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(TORCH_BEGINS)
    except OSError:
        return False


def _is_folder_checkpoint(path: Path) -> bool:
    if is_adapter(path) or _is_distributed(path):
        return True
    sharded = any((path / name).is_file() for name in WEIGHTS if name.endswith(".json"))
    beside = any((path / name).is_file() for name in RUN_FILES)
    return path.is_dir() and (sharded or (beside and _has_weights(path)))


def _has_weights(path: Path) -> bool:
    """Whether a folder has a file of weights under one of the usual names, or shards."""
    single = any((path / name).is_file() for name in (*WEIGHTS, *ADAPTER))
    return single or _is_distributed(path) or _is_distributed(path / SHARDED_FOLDER)


def _is_distributed(path: Path) -> bool:
    """Whether a folder holds a checkpoint of ``torch.distributed.checkpoint``."""
    return (path / ".metadata").is_file() and any(path.glob("*.distcp"))


def _without_insides(paths: list[Path]) -> list[Path]:
    """Leave out the files of folders that are checkpoints themselves."""
    folders = {path for path in paths if path.is_dir()}
    return [path for path in paths if path.parent not in folders or path.is_dir()]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty in place of anything else; a broken one is an error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
