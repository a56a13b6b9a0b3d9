"""Tasks by name: built in, ``path/to/file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os.path
import pkgutil
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ngeval.errors import TaskError, foreign_errors, nearest_name

if TYPE_CHECKING:
    from ngeval.tasks.base import Task


@dataclass(frozen=True)
class BuiltinTask:
    """A task that comes with ngeval; ``function`` is ``package.module:name`` of what makes it."""

    function: str
    description: str
    num_parameters: int


BUILTIN_TASKS = {
    "digits-mlp": BuiltinTask(
        "ngeval.tasks.digits:digits_mlp",
        "MLP 64-256-256-10 on scikit-learn's handwritten digits (softmax cross-entropy)",
        85_002,
    ),
    "digits-cnn": BuiltinTask(
        "ngeval.tasks.digits:digits_cnn",
        "three convolutions on the same digits, 15,338 parameters (softmax cross-entropy)",
        15_338,
    ),
    "digits-regression": BuiltinTask(
        "ngeval.tasks.digits:digits_regression",
        "the MLP predicts centre, spread and slant of the ink (Gaussian, σ² = 1)",
        83_460,
    ),
}
"""The tasks that come with ngeval, by name."""


def get_task(spec: str) -> Task:
    """Find a task by its name.

    Args:
        spec: a built-in name, ``path/to/file.py:name`` or ``package.module:name``, where the name
            is a `Task` or a function without arguments that returns one. A file is Python code
            and is run.

    Raises:
        TaskError: there is nothing of that name, its code fails, or it is not a task.
    """
    if spec in BUILTIN_TASKS:
        task: Task = pkgutil.resolve_name(BUILTIN_TASKS[spec].function)()
        return task
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise TaskError(
            f"unknown task {spec!r}; {nearest_name(spec, BUILTIN_TASKS)}; your own task is "
            "path/to/file.py:name or package.module:name"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise TaskError(f"{place} has no {name!r}; {nearest_name(name, public)}")
    return _as_task(spec, getattr(module, name))


def source_of(spec: str) -> Path | None:
    """The file, or the folder of the package, that defines a task; None for a built-in task."""
    if spec in BUILTIN_TASKS:
        return None
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).resolve()
    file = getattr(sys.modules.get(place.partition(".")[0]), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return path.parent if path.name == "__init__.py" else path


def _as_task(spec: str, value: Any) -> Task:
    """The task that a module's attribute is, or that it returns."""
    from ngeval.tasks.base import Task  # noqa: PLC0415  (imports torch)

    if not isinstance(value, Task) and callable(value):
        failure = f"{spec}: the function failed when called without arguments"
        with foreign_errors(TaskError, failure):
            value = value()
    if not isinstance(value, Task):
        raise TaskError(f"{spec} is a {type(value).__name__}, not an ngeval.Task")
    return value


def _load_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):
        raise TaskError(f"task file {path} does not exist")
    name = f"ngeval_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling in the file look it up there
    _make_importable(path.resolve().parent)  # as for a script: the file imports its neighbours
    # The code may change the working directory, to which the paths of the command are relative.
    with chdir("."), foreign_errors(TaskError, f"task file {path} failed on import"):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())  # as ``python -m`` does
    with chdir("."), foreign_errors(TaskError, f"task module {name!r} cannot be imported"):
        return importlib.import_module(name)


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
