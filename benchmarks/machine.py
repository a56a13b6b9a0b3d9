"""The machine and the settings of a run."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import ngeval
from benchmarks.timing import Settings, product_rates


def facts(settings: Settings) -> dict[str, Any]:
    """The machine, the versions, the date, the command line and measured gemm rates."""
    rates = product_rates(settings)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": usable_cores(),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ngeval": f"{ngeval.__version__} ({commit()})",
        "command": command_line(sys.argv[1:]),
        "repeats": settings.repeats,
        "float32 GF/s": round(rates["float32"], 1),
        "float64 GF/s": round(rates["float64"], 1),
    }
    if settings.device == "cuda":
        result |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return result


def processor() -> str:
    """The processor's name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The measured commit, with a + if the package has uncommitted changes."""
    root = Path(ngeval.__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ngeval")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"


def command_line(arguments: list[str]) -> str:
    """The command, with folders shortened to their names."""
    words = [Path(word).name if "/" in word else word for word in arguments]
    return " ".join(["python -m benchmarks", *words])
