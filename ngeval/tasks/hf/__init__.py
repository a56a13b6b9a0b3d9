"""Tasks made of Hugging Face models, PEFT adapters and data sets."""

from ngeval.tasks.hf.task import hub_task

__all__ = ["hub_task"]
