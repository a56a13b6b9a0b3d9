"""The options that commands share, and how their text is read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ngeval.errors import InputError, nearest_name

MAX_SEED = 2**32 - 1

TaskOption = Annotated[
    str,
    typer.Option(
        "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
    ),
]
CheckpointOption = Annotated[
    list[str],
    typer.Option("--checkpoint", "-c", help="File, folder or glob; repeat or list several."),
]
MoreCheckpoints = Annotated[
    list[str] | None, typer.Argument(metavar="[CHECKPOINT]...", help="More checkpoints.")
]
MethodsOption = Annotated[
    str, typer.Option("--methods", "-m", help="Comma list; `ngeval methods` shows them.")
]
ScaleOption = Annotated[
    str,
    typer.Option(help="What λ multiplies: absolute (sum-reduced), mean (Nλ), relative (λ·λmax)."),
]
BatchSizeOption = Annotated[int, typer.Option(help="N, samples in a graded batch.")]
NumBatchesOption = Annotated[int, typer.Option(help="Graded batches for each checkpoint.")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="For batches, sampled labels and training.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Run the model in float32, float64 or bfloat16; default: as it is."),
]
EngineOption = Annotated[str, typer.Option(help="auto, layers, vmap or loop.")]
MemoryOption = Annotated[
    str | None, typer.Option(help="To work in, e.g. 8GiB; default: four fifths of what is free.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Result file: .csv, .parquet or .jsonl.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace output that exists.")]
MetricOption = Annotated[
    str | None,
    typer.Option(help="Grade by the task's first K batches, or all of an epoch; default: the own."),
]
NaturalOption = Annotated[
    bool, typer.Option(help="Also γ_min and bounds on the exact natural gradient's γ.")
]
GapOption = Annotated[
    float, typer.Option(help="Relative gap of those bounds where a Krylov run finds them.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
PickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Run code in checkpoints; only for files you trust."),
]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {
    f"{letter}{end}": 2**power
    for letter, power in zip("KMG", (10, 20, 30), strict=True)
    for end in ("", "IB")
}


def parse_dampings(text: str) -> list[float]:
    """Read ``"1e-8:1e4:50"`` (log-spaced low:high:count) or ``"0,1e-6,1"``.

    Raises:
        InputError: neither of the two, or a range that is empty or reaches 0.

    >>> parse_dampings("1e-2:1:3")
    [0.01, 0.1, 1.0]
    """
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",") if part.strip()]
        low, high, count = text.split(":")
        ends, number = (float(low), float(high)), int(count)
    except ValueError as error:
        raise InputError(
            f"damping {text!r}: write a comma list like 0,1e-6,1 or low:high:count like 1e-8:1e4:50"
        ) from error
    if not (0 < ends[0] <= ends[1] < math.inf) or number < 1:
        raise InputError(f"damping range {text!r} needs 0 < low ≤ high and count ≥ 1")
    # Rounded to 12 digits, so that 1e-06 is there as typed and can be asked for.
    return [float(f"{value:.12g}") for value in np.geomspace(*ends, number)]


def parse_bytes(text: str | None) -> int | None:
    """Read an amount of memory such as ``8GiB``, ``8G`` or ``500MB``; None stays None.

    Raises:
        InputError: no such amount.

    >>> parse_bytes("2GiB")
    2147483648
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"memory {text!r}: write an amount like 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_metric(text: str | None) -> int | str | None:
    """Read a number of batches, or ``all``; None stays None.

    Raises:
        InputError: neither.
    """
    if text is None or text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"metric batches {text!r}: write a number of batches, or all")
    return int(text)


def parse_dtype(text: str | None) -> torch.dtype | None:
    """Read a floating-point type by name; None stays None.

    Raises:
        InputError: no such type.
    """
    if text is None:
        return None
    if text not in DTYPES:
        raise InputError(f"unknown dtype {text!r}; {nearest_name(text, DTYPES)}")
    return DTYPES[text]
