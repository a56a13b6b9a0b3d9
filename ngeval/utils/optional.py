"""Packages that only some functions need."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from ngeval.errors import DependencyError


def optional_module(name: str) -> Any:
    """Import ``transformers``, ``peft`` or ``datasets``; a `DependencyError` if that fails."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"{name} is needed for this and cannot be imported ({error}); "
            'pip install "ngeval[hf]" (or ".[hf]" in a clone) installs it'
        ) from error
    if name == "transformers":
        # ngeval reports errors and progress itself.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        module.utils.logging.disable_progress_bar()
    if name == "datasets":
        module.disable_progress_bars()
    return module
