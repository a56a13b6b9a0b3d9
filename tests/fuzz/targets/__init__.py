"""What is fuzzed: bytes in, and whatever of ngeval reads such bytes."""

from __future__ import annotations

from tests.fuzz.targets import checkpoints, commands, results, texts
from tests.fuzz.targets.base import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (checkpoints.TARGET, results.TARGET, texts.TARGET, commands.TARGET)
}

__all__ = ["TARGETS", "Target"]
