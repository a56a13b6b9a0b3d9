"""figures/make.py as a module, and what the committed pictures consist of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

FIGURES = Path(__file__).parent.parent / "figures"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"figures_{name}", FIGURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make = _load("make")
KEPT = json.loads(make.STRUCTURE.read_text(encoding="utf-8"))
