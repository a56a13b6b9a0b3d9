"""Manifests: the command, versions and machine behind a result file, and what its run depends on.

A manifest lies beside its result file, as ``gamma.csv.manifest.json`` beside ``gamma.csv``: one
JSON object, for people, ``ngeval report``, ``ngeval verify`` and ``--resume``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ngeval.errors import OutputError
from ngeval.utils.atomic import replace_file
from ngeval.utils.text import encodable

FORMAT = 1
"""Raised when a key changes its meaning; new keys may come at any time."""

SUFFIX = ".manifest.json"

PACKAGES = ("torch", "numpy", "scipy", "pandas", "scikit-learn")
"""Numbers may depend on the versions of these packages."""

WHERE_IMPORTED = ("transformers", "peft", "datasets", "pytorch_optimizer")
"""Likewise, if the run has imported them."""


Index = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A part of a manifest; it keeps keys that it does not know, of other versions."""

    model_config = ConfigDict(extra="allow", strict=True)

    def plain(self) -> dict[str, Any]:
        """The record as it was read."""
        return self.model_dump(mode="json", exclude_unset=True)


class BatchRecord(Record):
    """A graded batch: the SHA-256 of its tensors."""

    sha256: str


class Identity(Record):
    """Everything that the numbers of a run depend on; see `ngeval.runs.identity`."""

    options: dict[str, Any]
    settings: dict[str, Any]
    checkpoints: dict[str, str]
    task: dict[str, Any]
    batches: list[BatchRecord]
    code: dict[str, Any]


class RunManifest(Record):
    """The manifest of a run that can be resumed and verified.

    Attributes:
        options: those of the command, which was typed in ``directory``.
        identity: what the numbers depend on.
        machine: where they were computed.
        complete: set at the end of the run, as the following are: whether no unit has failed.
        failed_units: the keys of units that are to be computed again.
        rows: how many the table has.
    """

    options: dict[str, Any]
    identity: Identity
    machine: dict[str, Any] = {}
    directory: str = ""
    id: str = ""
    complete: bool = False
    failed_units: list[tuple[Index, Index]] = []
    rows: int | None = None
    resumed: list[Any] = []

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return "complete" in self.model_fields_set


def manifest(
    options: Mapping[str, Any],
    *,
    command: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run that begins now.

    The ``command`` is as typed, by default that of this process; the ``facts`` are what the options
    resulted in (the task's name, the checkpoints, …).

    Returns:
        ``format, created`` (UTC, ISO 8601), ``command``, ``directory`` (where it was typed, which
        its relative paths start from), ``options`` that are set, ``run`` (the facts), ``versions``
        (of ngeval, Python and packages) and ``machine``; plain values, which JSON can hold.
    """
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": encodable(command_line(sys.argv if command is None else command)),
        "directory": _directory(),
        "options": {k: v for k, v in plain(options).items() if v not in (None, [])},
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


def versions() -> dict[str, str]:
    """Versions of ngeval, Python, and the packages that a result may depend on."""
    names = [*PACKAGES, *(name for name in WHERE_IMPORTED if name in sys.modules)]
    own = {"ngeval": version("ngeval"), "python": platform.python_version()}
    return own | {name: version(name) for name in names}


def machine() -> dict[str, Any]:
    """Platform, processor, GPUs, threads; memory in bytes."""
    import torch  # noqa: PLC0415  (manifests are read without torch)

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
    """The path of the manifest of a result file.

    >>> manifest_path(Path("runs/gamma.csv")).name
    'gamma.csv.manifest.json'
    """
    return results.with_name(results.name + SUFFIX)


def write_manifest(results: Path, manifest: Mapping[str, Any], scratch: Path | None = None) -> Path:
    """Write the manifest of a result file, in place of an earlier one; see `replace_file`."""
    path = manifest_path(results)
    text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
    replace_file(path, lambda place: place.write_text(text, encoding="utf-8"), scratch)
    return path


def read_manifest(results: Path) -> dict[str, Any] | None:
    """The JSON object beside a result file, whatever it holds; None if there is none."""
    path = manifest_path(results)
    if not path.is_file():
        return None
    try:
        # Unlike pydantic's, Python's parser reads every text that it has written.
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # editors may add a BOM
        problem: object = "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        value, problem = None, error
    if not isinstance(value, dict):
        raise OutputError(
            f"{path} cannot be read as a manifest: {problem}; delete it if it is of no use"
        )
    return value


def read_run_manifest(results: Path) -> RunManifest | None:
    """The manifest of a run's result file, checked; None if there is none."""
    value = read_manifest(results)
    try:
        return None if value is None else RunManifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise malformed(manifest_path(results), first_problem(error)) from error


def malformed(path: Path, problem: str) -> OutputError:
    """The error of a manifest that describes no run."""
    return OutputError(f"{path} is not a manifest that a run can be repeated from: {problem}")


def first_problem(error: ValidationError) -> str:
    """The first problem of values that do not fit, in one line: where, the value, why."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"it has no {place!r}"
    if not place:
        return problem["msg"]
    return f"{place} is {repr(problem['input'])[:60]}: {problem['msg']}"


def _directory() -> str:
    """The working directory; empty if it was deleted meanwhile."""
    try:
        return encodable(str(Path.cwd()))
    except OSError:
        return ""


def _processor() -> str:
    """The processor's name: from Linux if possible, else from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """Values that JSON can hold; others (paths, types, ∞) become text."""
    if isinstance(value, Mapping):
        return {encodable(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return encodable(str(value))
