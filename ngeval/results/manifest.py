"""What a result file cannot tell of itself: the command, versions and machine that made it.

A manifest lies beside the file that it is about, as ``gamma.csv.manifest.json`` beside
``gamma.csv``: one JSON object, for people and for ``ngeval report``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ngeval.errors import OutputError
from ngeval.utils.atomic import replace_file
from ngeval.utils.text import encodable

FORMAT = 1
"""Raised when a key changes its meaning; new keys may come at any time."""

SUFFIX = ".manifest.json"

PACKAGES = ("torch", "numpy", "scipy", "pandas", "scikit-learn")
"""Packages whose versions numbers may depend on."""

WHERE_IMPORTED = ("transformers", "peft", "datasets", "pytorch_optimizer")
"""Likewise, where the run has imported them."""


def manifest(
    options: Mapping[str, Any],
    *,
    command: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is told of a run, now.

    Args:
        options: those of the command, by name; see `as_options`.
        command: program and arguments as typed; None takes this process's.
        facts: what became of the options (task's name, checkpoints that were found, …).

    Returns:
        ``format, created`` (UTC, ISO 8601), ``command``, ``directory`` (where it was typed, which
        relative paths in it start from), ``options``, ``run`` (the facts),
        ``versions`` (of ngeval, Python and packages) and ``machine``; plain values only, so that
        it can be written as JSON.
    """
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": encodable(command_line(sys.argv if command is None else command)),
        "directory": _directory(),
        "options": plain(options),
        "run": plain(facts or {}),
        "versions": versions(),
        "machine": machine(),
    }


def command_line(arguments: Sequence[str]) -> str:
    """A command as it can be typed again, the program without its folder.

    >>> command_line(["/usr/bin/ngeval", "gamma", "--task", "my task.py:task"])
    "ngeval gamma --task 'my task.py:task'"
    """
    program, *rest = arguments
    path = Path(program)
    words = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return shlex.join([*words, *rest])


def as_options(*groups: Any, **more: Any) -> dict[str, Any]:
    """Options by name, of dataclasses of them; those that are not set are left out."""
    merged: dict[str, Any] = {}
    for group in groups:
        merged |= asdict(group) if is_dataclass(group) and not isinstance(group, type) else group
    merged |= more
    return {name: value for name, value in merged.items() if value not in (None, [], ())}


def versions() -> dict[str, str]:
    """Of ngeval, Python, and the packages that a result may depend on."""
    names = [*PACKAGES, *(name for name in WHERE_IMPORTED if name in sys.modules)]
    found = {"ngeval": version("ngeval"), "python": platform.python_version()}
    return found | {name: version(name) for name in names}


def machine() -> dict[str, Any]:
    """Platform, processor, GPUs, threads; memory in bytes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def manifest_path(results: Path) -> Path:
    """Where the manifest of a result file lies.

    >>> manifest_path(Path("runs/gamma.csv")).name
    'gamma.csv.manifest.json'
    """
    return results.with_name(results.name + SUFFIX)


def write_manifest(results: Path, told: Mapping[str, Any], scratch: Path | None = None) -> Path:
    """Write the manifest of a result file in one step, in place of an earlier one.

    Args:
        results: the result file.
        told: the manifest.
        scratch: a folder for what is not yet whole; see `replace_file`.

    Raises:
        OutputError: it cannot be written.
    """
    path = manifest_path(results)
    text = json.dumps(told, ensure_ascii=False, indent=2) + "\n"
    replace_file(path, lambda place: place.write_text(text, encoding="utf-8"), scratch)
    return path


def read_manifest(results: Path) -> dict[str, Any] | None:
    """The manifest of a result file, None where it has none.

    Raises:
        OutputError: there is one that cannot be read.
    """
    path = manifest_path(results)
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may have put a BOM
    except RecursionError as error:
        raise OutputError(
            f"{path} cannot be read as a manifest: it is nested too deep; delete it"
        ) from error
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read as a manifest: {error}; delete it, if it is of no use"
        ) from error
    if not isinstance(told, dict):
        raise OutputError(f"{path} is not a manifest: it holds no JSON object; delete it")
    return told


def _directory() -> str:
    """The folder that the process is in; nothing where it was deleted meanwhile."""
    try:
        return encodable(str(Path.cwd()))
    except OSError:
        return ""


def _processor() -> str:
    """The processor's name: as Linux tells it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """Values as JSON has them; what it has not (paths, types, ∞) as text."""
    if isinstance(value, Mapping):
        return {encodable(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return encodable(str(value))
