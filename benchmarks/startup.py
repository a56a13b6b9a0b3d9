"""Processor seconds of commands that compute nothing: ``python -m benchmarks.startup``."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

CALLS = {
    "import torch": ["-c", "import torch"],
    "import ngeval": ["-c", "import ngeval"],
    "import torch, ngeval.evaluate": ["-c", "import ngeval; ngeval.evaluate"],
    "ngeval --version": ["-m", "ngeval", "--version"],
    "ngeval --help": ["-m", "ngeval", "--help"],
    "ngeval methods": ["-m", "ngeval", "methods"],
    "ngeval tasks": ["-m", "ngeval", "tasks"],
    "ngeval gamma --help": ["-m", "ngeval", "gamma", "--help"],
    "ngeval gamma --no-such-option": ["-m", "ngeval", "gamma", "--no-such-option"],
    "ngeval gamma --methods sgdd": ["-m", "ngeval", "gamma", "--methods", "sgdd"],
}


def processor_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process, which other processes change less than its wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="the least of these is printed")
    repeats = parser.parse_args().repeats
    for name, arguments in CALLS.items():
        processor_seconds(arguments)  # compiles modules and warms the disk cache
        seconds = min(processor_seconds(arguments) for _ in range(repeats))
        print(f"{name:32} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
