"""The options of a run as plain values, and how their text is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngeval.errors import InputError, check_choice

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**32 - 1
MAX_BYTES = 2**60

SHARDS = ("auto", "units", "samples")


@dataclass(frozen=True)
class HubOptions:
    """What makes up a Hugging Face task; see `ngeval.tasks.hf.hub_task`."""

    hf_model: str | None = None
    adapter: list[str] | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    data_dir: Path | None = None
    objective: str | None = None
    columns: str | None = None
    label_column: str | None = None
    template: str | None = None
    label_words: str | None = None
    max_length: int = 256
    max_target_tokens: int = 16
    padding_side: str = "right"
    samples: str = "sequence"
    processor: str | None = None
    attention: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class RunOptions(HubOptions):
    """Which checkpoints of which task are graded, on what, and how.

    The help of ``ngeval gamma`` describes each; `ngeval.runs.run.Run` is what they describe.
    """

    task: str | None = None
    checkpoint: list[str] | None = None
    more: list[str] | None = None
    batch_size: int = 160
    num_batches: int = 5
    seed: int = 0
    device: str = "cpu"
    shard: str = "auto"
    dtype: str | None = "auto"
    engine: str = "auto"
    memory: str | None = None
    allow_pickle: bool = False
    checkpoint_key: str | None = None
    strict: bool = True
    optimizer_state: list[Path] | None = None
    reduction: str = "mean"
    weight_decay: bool = True

    def recorded(self) -> dict[str, Any]:
        """The options for a manifest; those of Hugging Face only where they name the model."""
        left_out = [field.name for field in fields(HubOptions) if self.hf_model is None]
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True)
class GradingOptions:
    """How updates are graded; see `ngeval.evaluate`."""

    damping_scale: str = "absolute"
    metric_batches: str | None = None
    natural: bool = True
    gap: float = 1e-4  # `ngeval.curvature.krylov.GAP`, which this module reads without torch


@dataclass(frozen=True)
class OutputOptions:
    """Where results go, and how a run begins; without ``output`` the rows are only returned."""

    output: Path | None = None
    force: bool = False
    resume: bool = False
    stop_after: int | None = None
    quiet: bool = False


DTYPES = ("auto", "model", "float64", "float32", "bfloat16")

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {
    f"{letter}{end}": 2**power
    for letter, power in zip("KMG", (10, 20, 30), strict=True)
    for end in ("", "IB")
}


def parse_bytes(text: str | None) -> int | None:
    """Read an amount of memory such as ``8GiB``, ``8G`` or ``500MB``; None stays None.

    >>> parse_bytes("2GiB")
    2147483648
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"memory {text!r}: write an amount like 8GiB or 500MB")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if not count < MAX_BYTES:
        raise InputError(f"memory {text[:40]!r} is more than there is anywhere")
    return int(count)


def parse_metric(text: str | None) -> int | str | None:
    """Read a number of batches, or ``all``; None stays None."""
    if text is None or text == "all":
        return text
    return _count(text, f"metric batches {text!r}: write a number of batches, or all")


def parse_groups(text: str) -> str | int:
    """Read ``layer``, ``parameter``, or a number of components of parameters' names."""
    if text in ("layer", "parameter"):
        return text
    advice = "how many components of a parameter's name make a group, like 2"
    return _count(text, f"groups {text!r}: write layer, parameter, or {advice}")


def _count(text: str, problem: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(problem)
    return int(text)


def parse_dtype(text: str | None) -> torch.dtype | str:
    """The type that models are graded in, by name; None, of earlier manifests, is the model's."""
    if text is None:
        return "model"
    check_choice("dtype", text, DTYPES)
    if text in ("auto", "model"):
        return text
    import torch  # noqa: PLC0415  (takes seconds, and the options are read without it)

    dtype: torch.dtype = getattr(torch, text)
    return dtype
