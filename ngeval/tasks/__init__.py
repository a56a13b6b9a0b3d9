"""Tasks: a model, its data and its likelihood under one name.

The built-in tasks are listed, and the name of a task is looked up, without importing torch.
"""

from typing import TYPE_CHECKING

from ngeval.tasks.resolve import BUILTIN_TASKS, get_task, source_of
from ngeval.utils.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ngeval.model.batches import Batch
    from ngeval.tasks.base import Task

__getattr__, __dir__ = _lazy_names(
    __name__, {"ngeval.model.batches": ["Batch"], "ngeval.tasks.base": ["Task"]}
)

__all__ = ["BUILTIN_TASKS", "Batch", "Task", "get_task", "source_of"]
