"""Tasks: a model, its data and its likelihood under one name."""

from ngeval.tasks.base import Batch, Task
from ngeval.tasks.resolve import BUILTIN_TASKS, get_task, source_of

__all__ = ["BUILTIN_TASKS", "Batch", "Task", "get_task", "source_of"]
