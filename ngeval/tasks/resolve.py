"""From what ``--task`` says to a `Task`: built in, ``file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from ngeval.errors import TaskError, nearest_name
from ngeval.tasks.base import Task
from ngeval.tasks.digits import digits_cnn, digits_mlp, digits_regression

BUILTIN_TASKS: dict[str, Callable[[], Task]] = {
    "digits-mlp": digits_mlp,
    "digits-cnn": digits_cnn,
    "digits-regression": digits_regression,
}
"""The tasks that ship with ngeval."""


def get_task(spec: str) -> Task:
    """Find a task.

    Args:
        spec: a built-in name, ``path/to/file.py:name`` or ``package.module:name``, where the name
            is a `Task` or a function without arguments that returns one. A file is Python code
            and is run.

    Raises:
        TaskError: nothing there, or it is not a task.
    """
    if spec in BUILTIN_TASKS:
        return BUILTIN_TASKS[spec]()
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise TaskError(
            f"unknown task {spec!r}; {nearest_name(spec, BUILTIN_TASKS)}; your own task is "
            "path/to/file.py:name or package.module:name"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise TaskError(f"{place} has no {name!r}; {nearest_name(name, public)}")
    found = getattr(module, name)
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except Exception as error:  # whatever a user's function raises, it is the task's
            raise TaskError(
                f"{spec}: the function failed when called without arguments: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, Task):
        raise TaskError(f"{spec} is a {type(found).__name__}, not an ngeval.Task")
    return found


def source_of(spec: str) -> Path | None:
    """The file, or the folder of the package, that a task was found in; None for ngeval's own."""
    if spec in BUILTIN_TASKS:
        return None
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).resolve()
    told = getattr(sys.modules.get(place.partition(".")[0]), "__file__", None)
    if told is None:
        return None
    file = Path(told).resolve()
    return file.parent if file.name == "__init__.py" else file


def _load_file(path: Path) -> ModuleType:
    try:
        there = path.is_file()
    except OSError as error:  # a name that the file system does not take
        raise TaskError(f"task file {str(path)[:80]} cannot be read: {error.strerror}") from error
    if not there:
        raise TaskError(f"task file {path} does not exist")
    name = f"ngeval_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling in the file look it up there
    _make_importable(path.resolve().parent)  # as for a script: the file imports its neighbours
    try:
        with _staying():
            spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises, it is the file's
        raise TaskError(
            f"task file {path} failed on import: {type(error).__name__}: {error}"
        ) from error
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())  # as ``python -m`` does
    try:
        with _staying():
            return importlib.import_module(name)
    except Exception as error:  # whatever a user's module raises, it is the module's
        raise TaskError(
            f"task module {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """In the folder that the command was started in, which its paths are relative to."""
    here = Path.cwd()
    try:
        yield
    finally:
        os.chdir(here)


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
