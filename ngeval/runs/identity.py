"""What the numbers of a run depend on, as text that can be kept and compared.

Two runs with the same identity make the same table: the same weights and data (by SHA-256), the
same options, the same code. ``--resume`` goes on only where it is the same, ``ngeval verify``
says where it is not, and the manifest beside the results tells it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ngeval
from ngeval.errors import OutputError
from ngeval.methods import Method, get_methods
from ngeval.results.hashes import hash_batch, hash_checkpoint, hash_files, hash_tensors, hash_text
from ngeval.results.manifest import plain, versions
from ngeval.runs.run import Run

MANY = 12
"""Differences that a message lists."""

DRAWN_BY = tuple(f"settings.{name}:" for name in ("seed", "batch_size", "num_batches"))

BATCHES = ("batches[", "metric_batches", "accumulated_batches")
"""What follows from those."""

PROCESSING = ("dtype", "engine", "seed", "batch_size", "num_batches")
"""Options of a run that its numbers depend on. How much memory there is, and how many processes
there are, changes no more than the order of sums."""


def identity(
    job: Run, options: Mapping[str, Any], on_checkpoint: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Everything that the numbers depend on.

    Args:
        job: the run.
        options: what is computed of each unit: methods, dampings, …
        on_checkpoint: called when another checkpoint has been read.

    Returns:
        ``options, settings, checkpoints`` (SHA-256 by name, in order; what cannot be read has its
        error there), ``metadata`` (what is told beside each), ``optimizer_states``, ``task``
        (name, likelihood, model, its own files), ``batches`` (SHA-256 of inputs and targets, and
        the samples' indices where the task tells them), ``metric_batches``, ``code``, and
        ``accumulated_batches`` where a method has such;
        plain values only.

    Raises:
        TaskError: the task's model or batches cannot be had.
    """
    settings = {name: getattr(job, name) for name in PROCESSING}
    settings["device"] = torch.device(job.device).type
    step = job.optimizer_options
    settings["optimizer"] = {"reduction": step.reduction, "weight_decay": step.weight_decay}
    checkpoints = {}
    for one in job.checkpoints:
        checkpoints[one.name] = hash_checkpoint(one)
        on_checkpoint()
    found: dict[str, Any] = {
        "options": dict(options),
        "settings": settings,
        "checkpoints": checkpoints,
        "metadata": {one.name: one.error or one.metadata for one in job.checkpoints},
        "optimizer_states": {str(p): hash_files([p]) for p in _optimizer_states(job, options)},
        "task": _task(job),
        "batches": _batches(job),
        "metric_batches": _metric_batches(job, options.get("metric_batches")),
        "code": code(),
    }
    if count := _accumulated(options):  # batches of another seed: seldom those that are graded
        found["accumulated_batches"] = [hash_batch(*batch) for batch in job.other_batches(count)]
    made: dict[str, Any] = plain(found)
    return made


def _optimizer_states(job: Run, options: Mapping[str, Any]) -> list[Path]:
    """The files that a method may read."""
    if not any(hasattr(method, "at") for method in _methods(options)):
        return []
    beside = [one.optimizer for one in job.checkpoints] if not job.optimizer_states else []
    return [*job.optimizer_states, *(path for path in beside if path is not None)]


def _methods(options: Mapping[str, Any]) -> list[Method]:
    """None where a table of samples is made without any."""
    return get_methods(options["methods"]) if options["methods"] else []


def _accumulated(options: Mapping[str, Any]) -> int:
    """The most batches that an optimizer's state is accumulated over."""
    counts = [getattr(method, "warmup_batches", None) or 0 for method in _methods(options)]
    return max(counts, default=0)


def code() -> dict[str, str]:
    """Versions of what computes, and the hash of ngeval's own files: a version may be edited."""
    folder = Path(ngeval.__file__).parent
    return versions() | {"ngeval_files": hash_files(sorted(folder.rglob("*.py")), folder)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a line each, by dotted name.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 0}})
    ['a.c: 2 then, 3 now', 'a.d: nothing then, 0 now']
    """
    before, after = dict(_flat(then)), dict(_flat(now))
    lines = []
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name, "nothing"), after.get(name, "nothing")
        if one != other:
            lines.append(f"{name}: {_short(one)} then, {_short(other)} now")
    return lines


def check_same(
    output: Path, then: Mapping[str, Any], now: Mapping[str, Any], loose: set[str]
) -> None:
    """Refuse to go on with a run of something else.

    Args:
        output: the result file.
        then: the identity of the run that is to be gone on with.
        now: that of this one.
        loose: checkpoints of which nothing is done yet, which may have been mended since.

    Raises:
        OutputError: they differ; it says where.
    """
    free = loose & then["checkpoints"].keys() & now["checkpoints"].keys()
    kept = [dict(one) for one in (then, now)]
    for one in kept:
        for part in ("checkpoints", "metadata"):
            told = one.get(part, {})
            one[part] = {name: "free" if name in free else told[name] for name in told}
    lines = _causes(differences(*kept))
    names = [list(one["checkpoints"]) for one in (then, now)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        lines.append("checkpoints: in another order, which is their number in the table")
    if lines:
        raise OutputError(
            f"{output} is of another run, which --resume cannot go on with:{listed(lines)}\n"
            "Restore what it was, give another output, or start anew with --force"
        )


def _causes(lines: list[str]) -> list[str]:
    """Without the batches, where what they are drawn by is another: that says it."""
    if not any(line.startswith(DRAWN_BY) for line in lines):
        return lines
    return [line for line in lines if not line.startswith(BATCHES)]


def is_identity(told: object) -> bool:
    """Whether something that was read has the parts that are looked into."""
    if not isinstance(told, dict) or not isinstance(told.get("checkpoints"), dict):
        return False
    return all(isinstance(told.get(name), dict) for name in ("options", "settings", "task", "code"))


def listed(lines: list[str]) -> str:
    """Differences below each other, as many as one reads."""
    shown = [f"\n  {line}" for line in lines[:MANY]]
    more = len(lines) - MANY
    return "".join(shown) + (f"\n  and {more} more" if more > 0 else "")


def _task(job: Run) -> dict[str, Any]:
    """The model as it is built, as far as checkpoints do not replace it, and the user's files."""
    task, model = job.task, job.task.model()
    base = any(one.is_adapter or one.as_built for one in job.checkpoints)
    return {
        "name": task.name,
        "likelihood": _without_addresses(task.resolved_likelihood()),
        "model": hash_text(_described(model)),
        "weights": hash_tensors(model.state_dict().items()) if base else "each checkpoint's",
        "files": _own_files(job.source),
    }


def _described(model: nn.Module) -> str:
    """Its modules with their options, its parameters, constants and configuration."""
    kept = model.state_dict().keys()
    constants = [(name, b) for name, b in model.named_buffers() if name not in kept]
    configure = getattr(getattr(model, "config", None), "to_dict", None)
    told = configure() if callable(configure) else {}
    parameters = {
        name: f"{tuple(p.shape)} {p.dtype} {'trainable' if p.requires_grad else 'frozen'}"
        for name, p in model.named_parameters()
    }
    plainly = json.dumps([plain(told), parameters, hash_tensors(constants)], sort_keys=True)
    return _without_addresses(model) + plainly


def _without_addresses(value: object) -> str:
    """Its ``repr``, without where in memory it is."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _own_files(source: Path | None) -> dict[str, str]:
    """Hashes of the task's package, or of its file and of what that imports from its folder."""
    if source is None:
        return {}
    folder = source if source.is_dir() else source.parent
    files = set(source.rglob("*.py")) if source.is_dir() else imported_files(source)
    return {path.relative_to(folder).as_posix(): hash_files([path]) for path in sorted(files)}


def imported_files(file: Path) -> set[Path]:
    """A Python file, and those in its folder that it imports, directly or by others.

    Read from the text, so that it is the same whatever the process has imported besides.
    """
    folder, found, left = file.parent, set[Path](), [file]
    while left:
        path = left.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            for name in _imported(ast.parse(path.read_bytes())):
                parts = name.split(".")
                for count in range(1, len(parts) + 1):
                    place = folder.joinpath(*parts[:count])
                    left += [place.with_suffix(".py"), place / "__init__.py"]
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names in a file's import statements; what is not a module is not a file either."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            front = f"{node.module}." if node.module else ""
            yield from (f"{front}{alias.name}" for alias in node.names)


def _batches(job: Run) -> list[dict[str, Any]]:
    indices = job.task.indices(job.batch_size, job.num_batches, job.seed)
    found: list[dict[str, Any]] = []
    for inputs, targets in job.task.batches(job.batch_size, job.num_batches, job.seed):
        told = {} if indices is None else {"samples": indices[len(found)]}
        found.append({"sha256": hash_batch(inputs, targets), **told})
    return found


def _metric_batches(job: Run, wanted: int | str | None) -> list[str]:
    """Of other batches that grade."""
    if wanted is None:
        return []
    count = None if isinstance(wanted, str) else wanted
    batches = job.task.batches(job.batch_size, count, job.seed)
    return [hash_batch(inputs, targets) for inputs, targets in batches]


def _flat(told: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(told, Mapping) and told:
        for key, value in told.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(told, list) and any(isinstance(value, Mapping) for value in told):
        for index, value in enumerate(told):
            yield from _flat(value, f"{name}[{index}]")
    else:
        yield name, json.dumps(told, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:24]}…{text[-12:]}"
