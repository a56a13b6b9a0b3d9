"""Everything that the numbers of a run depend on, as plain values that can be kept and compared.

Two runs with the same identity compute the same table: the same weights and data (by SHA-256), the
same options, the same code. ``--resume`` continues only a run with the same identity, ``ngeval
verify`` reports where it differs, and the manifest beside the results records it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ngeval
from ngeval.errors import OutputError
from ngeval.results.hashes import hash_batch, hash_checkpoint, hash_files, hash_tensors
from ngeval.results.manifest import plain, versions
from ngeval.runs.run import Run
from ngeval.runs.tables import Work

MAX_LINES = 12
"""Differences that a message lists."""

DRAWN_BY = tuple(f"settings.{name}:" for name in ("seed", "batch_size", "num_batches"))
"""The settings that the batches are drawn by."""

BATCHES = ("batches[", "metric_batches", "accumulated_batches")
"""What differs as a consequence of those."""

PROCESSING = ("dtype", "engine", "seed", "batch_size", "num_batches")
"""The fields of a run that its numbers depend on. The memory and the number of processes change
only the order of sums."""


def identity(run: Run, work: Work) -> dict[str, Any]:
    """Everything that the numbers depend on.

    Returns:
        Plain values: ``options, settings, checkpoints`` (SHA-256 by name, in order; the error of
        one that cannot be read), ``metadata`` (recorded beside each checkpoint),
        ``optimizer_states``, ``task`` (name, likelihood, model, files), ``batches`` (SHA-256 of
        inputs and targets, and the samples' indices where the task has them), ``metric_batches``,
        ``code``, and ``accumulated_batches`` where a method has such.
    """
    settings = {name: getattr(run, name) for name in PROCESSING}
    settings["device"] = torch.device(run.device).type
    step, count = run.optimizer_options, work.options.get("metric_batches")
    loading = {"checkpoint_key": run.checkpoint_key, "strict": run.strict}
    settings |= {name: value for name, value in loading.items() if value not in (None, True)}
    settings["optimizer"] = {"reduction": step.reduction, "weight_decay": step.weight_decay}
    metric = () if count is None else run.metric_batches(count)
    parts: dict[str, Any] = {
        "options": {"kind": work.kind, **work.options},
        "settings": settings,
        "checkpoints": {c.name: hash_checkpoint(c) for c in run.checkpoints},
        "metadata": {c.name: c.error or c.metadata for c in run.checkpoints},
        "optimizer_states": {str(p): hash_files([p]) for p in _optimizer_states(run, work)},
        "task": _task(run),
        "batches": _batches(run),
        "metric_batches": [hash_batch(*batch) for batch in metric],
        "code": code(),
    }
    counts = [getattr(method, "warmup_batches", None) or 0 for method in work.resolved]
    if most := max(counts, default=0):  # batches that optimizers accumulate their state over
        parts["accumulated_batches"] = [hash_batch(*batch) for batch in run.other_batches(most)]
    return dict(plain(parts))


def _optimizer_states(run: Run, work: Work) -> list[Path]:
    """The files that a method may read."""
    if not any(hasattr(method, "at") for method in work.resolved):
        return []
    if run.optimizer_states:
        return list(run.optimizer_states)
    return [c.optimizer for c in run.checkpoints if c.optimizer is not None]


def code() -> dict[str, str]:
    """Versions of packages, and the hash of ngeval's files: an installed version may be edited."""
    folder = Path(ngeval.__file__).parent
    return versions() | {"ngeval_files": hash_files(sorted(folder.rglob("*.py")), folder)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts that differ, a line each, by dotted name.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 0}})
    ['a.c: 2 then, 3 now', 'a.d: nothing then, 0 now']
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    lines = []
    for name in dict.fromkeys([*before, *after]):
        left, right = before.get(name, "nothing"), after.get(name, "nothing")
        if left != right:
            lines.append(f"{name}: {_short(left)} then, {_short(right)} now")
    return lines


def check_same(
    output: Path, then: Mapping[str, Any], now: Mapping[str, Any], untouched: set[str]
) -> None:
    """Refuse to continue a run with one of a different identity, and list where it differs.

    Checkpoints that are ``untouched``, of which no unit is done, may have been replaced since.
    """
    free = untouched & then["checkpoints"].keys() & now["checkpoints"].keys()
    lines = differences(_without(then, free), _without(now, free))
    if any(line.startswith(DRAWN_BY) for line in lines):  # which the batches follow from
        lines = [line for line in lines if not line.startswith(BATCHES)]
    names = [list(part["checkpoints"]) for part in (then, now)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        lines.append("checkpoints: in a different order, which is their number in the table")
    if lines:
        raise OutputError(
            f"{output} belongs to a different run, which --resume cannot continue:{listed(lines)}\n"
            "Restore what it was, give another output, or start again with --force"
        )


def _without(parts: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """An identity without the contents of some checkpoints."""
    result = dict(parts)
    for part in ("checkpoints", "metadata"):
        values = result.get(part, {})
        result[part] = {name: "free" if name in free else values[name] for name in values}
    return result


def listed(lines: Sequence[str], count: int | None = None) -> str:
    """The first lines below each other, and how many others there are; ``count``: of all."""
    shown = [f"\n  {line}" for line in lines[:MAX_LINES]]
    more = (len(lines) if count is None else count) - len(shown)
    return "".join(shown) + (f"\n  and {more} more" if more else "")


def _task(run: Run) -> dict[str, Any]:
    """The model as it is built, where checkpoints do not replace it, and the user's files."""
    task, model = run.task, run.task.model()
    base = not run.strict or any(c.is_adapter or c.as_built for c in run.checkpoints)
    return {
        "name": task.name,
        "likelihood": _without_addresses(task.resolved_likelihood()),
        "model": hashlib.sha256(_described(model).encode()).hexdigest(),
        "weights": hash_tensors(model.state_dict().items()) if base else "each checkpoint's",
        "files": _local_files(run.source),
    }


def _described(model: nn.Module) -> str:
    """A model's modules with their options, its parameters, constants and configuration."""
    saved = model.state_dict().keys()
    constants = [(name, b) for name, b in model.named_buffers() if name not in saved]
    configure = getattr(getattr(model, "config", None), "to_dict", None)
    configuration = configure() if callable(configure) else {}
    parameters = {
        name: f"{tuple(p.shape)} {p.dtype} {'trainable' if p.requires_grad else 'frozen'}"
        for name, p in model.named_parameters()
    }
    values = json.dumps([plain(configuration), parameters, hash_tensors(constants)], sort_keys=True)
    return _without_addresses(model) + values


def _without_addresses(value: object) -> str:
    """The ``repr`` of a value without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _local_files(source: Path | None) -> dict[str, str]:
    """Hashes of the task's package, or of its file and those that it imports from its folder."""
    if source is None:
        return {}
    folder = source if source.is_dir() else source.parent
    files = set(source.rglob("*.py")) if source.is_dir() else imported_files(source)
    return {path.relative_to(folder).as_posix(): hash_files([path]) for path in sorted(files)}


def imported_files(file: Path) -> set[Path]:
    """A Python file, and those in its folder that it imports, directly or through others.

    They are read from the text, so that they do not depend on what the process has imported.
    """
    folder, paths, left = file.parent, set[Path](), [file]
    while left:
        path = left.pop()
        if path in paths or not path.is_file():
            continue
        paths.add(path)
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            for name in _imported(ast.parse(path.read_bytes())):
                parts = name.split(".")
                for count in range(1, len(parts) + 1):
                    place = folder.joinpath(*parts[:count])
                    left += [place.with_suffix(".py"), place / "__init__.py"]
    return paths


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names in import statements; a name that is not a module is not a file either."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            front = f"{node.module}." if node.module else ""
            yield from (f"{front}{alias.name}" for alias in node.names)


def _batches(run: Run) -> list[dict[str, Any]]:
    indices = run.task.indices(run.batch_size, run.num_batches, run.seed)
    batches = run.task.batches(run.batch_size, run.num_batches, run.seed)
    return [
        {"sha256": hash_batch(*batch)} | ({} if indices is None else {"samples": indices[number]})
        for number, batch in enumerate(batches)
    ]


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of nested values as JSON, by dotted name."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for index, part in enumerate(value):
            yield from _flat(part, f"{name}[{index}]")
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:24]}…{text[-12:]}"
