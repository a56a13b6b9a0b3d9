"""What a run takes up, and of what: bytes of a process at its peak, of files; cores and GPUs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn

from ngeval.results.table_files import ResultFile

WATCH_SECONDS = 0.005
"""How often a process's memory is looked at."""

FORMATS = (".csv", ".parquet", ".jsonl")

WRITTEN_UNITS = (1, 4)
"""Result files of so many units are written, to see how they grow."""

GIVEN = ("damping", "damping_absolute")
"""Numbers that are the same in every unit."""


class Peak:
    """The most bytes in use; see `watch_memory`."""

    def __init__(self, number: int) -> None:
        """Now."""
        self.bytes = number


def is_gpu(device: str) -> bool:
    """Whether a device is one of CUDA's."""
    return torch.device(device).type == "cuda"


def device_count(device: str) -> int:
    """GPUs, or cores that this process may use."""
    if is_gpu(device):
        return torch.cuda.device_count()
    usable = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(usable(0)) if usable else os.cpu_count() or 1


def model_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_in_use(device: str) -> int:
    """Bytes that this process holds on a device; on the CPU, its resident set."""
    if is_gpu(device):
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def watch_memory(device: str) -> Iterator[Peak]:
    """The peak of this process's memory while inside.

    Of a CUDA device as torch's allocator counts it; of the CPU, the largest resident set that a
    thread has seen: what lives shorter than `WATCH_SECONDS` may be missed.
    """
    peak = Peak(memory_in_use(device))
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            peak.bytes = max(peak.bytes, memory_in_use(device))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.bytes = max(peak.bytes, memory_in_use(device))


def disk_bytes(table: pd.DataFrame, rows: int, units: int) -> dict[str, int]:
    """Bytes of a result file of many units, by extension.

    Files of one unit and of several are written in a temporary folder: what there is once (a
    header, a dictionary of names) is told from what every unit adds. Numbers that differ between
    units are made to differ.

    Args:
        table: of a unit, or of a part of one.
        rows: of a whole unit.
        units: how many.
    """
    share = rows / len(table)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in FORMATS:
            few, many = (
                _written(Path(folder) / f"{count}{suffix}", table, count) for count in WRITTEN_UNITS
            )
            each = max(0.0, (many - few) / (WRITTEN_UNITS[1] - WRITTEN_UNITS[0]))
            found[suffix] = round(max(0.0, few - each) + each * share * units)
    return found


def _written(path: Path, table: pd.DataFrame, units: int) -> int:
    with ResultFile(path) as file:
        file.append(pd.concat([_another(table, index) for index in range(units)]))
    return path.stat().st_size


def _another(table: pd.DataFrame, index: int) -> pd.DataFrame:
    """A table like that of another unit: every measured number has other digits."""
    noise = np.random.default_rng(index)
    changed = {
        str(name): table[name] * (1 + 1e-3 * noise.random())
        for name in table.select_dtypes("float")
        if name not in GIVEN
    }
    return table.assign(batch=index, **changed)
