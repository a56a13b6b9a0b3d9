"""A measured value and its target."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        quantity: what was measured.
        value: the measurement.
        unit: ``"×"``, ``"GE"``, ``"GiB"``, ``"%"`` or nothing.
        bound: ``"≥"`` or ``"≤"``.
        reach: the target, or None.
    """

    quantity: str
    value: float
    unit: str = ""
    bound: str = "≤"
    reach: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; NaN does not meet it."""
        if self.reach is None:
            return None
        compare = {"≥": operator.ge, "≤": operator.le}[self.bound]
        return bool(compare(self.value, self.reach))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass
class Measured:
    """The result of a figure: claims, median seconds, further numbers, and notes."""

    claims: list[Claim]
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "claims": [entry.as_dict() for entry in self.claims]}
