"""Parsing of what command-line options say: dampings, bytes, dtypes."""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from ngeval.errors import InputError, nearest_name

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as ``8GiB``, ``500MB`` or ``1000000``.

    Raises:
        InputError: no such amount.

    >>> parse_bytes("2GiB")
    2147483648
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"memory {text!r}: write an amount like 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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
