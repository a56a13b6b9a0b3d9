"""Which module's calls show the rows of which parameter, as decided by the planner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ngeval.jacobians.layer_rules import HookedModule
from ngeval.model.function import ModelFunction


@dataclass
class CapturePlan:
    """Which parameter's rows are read off where.

    Attributes:
        owners: the watched modules.
        replicated: parameters that are handed to the model expanded to one copy for each sample
            (their own first dimension is 1).
        looped: parameters whose rows come from a loop over samples of the whole model.
    """

    owners: list[HookedModule]
    replicated: list[str] = field(default_factory=list)
    looped: list[str] = field(default_factory=list)

    def uses(self) -> Counter[str]:
        """In how many places each parameter is seen."""
        uses = Counter(name for owner in self.owners for name in set(owner.parameters.values()))
        uses.update(self.replicated)
        return uses

    def streamed(self) -> set[str]:
        """The owners whose terms are complete as soon as the backward pass has come by them."""
        uses = self.uses()
        return {
            owner.name
            for owner in self.owners
            if owner.rule is not None
            and len(owner.calls) == 1
            and all(uses[name] == 1 for name in owner.parameters.values())
        }

    def watched_scalars(self, function: ModelFunction) -> int:
        """Scalars of a sample at which a cotangent's gradients are taken."""
        outputs = sum(call.output_scalars for owner in self.owners for call in owner.calls)
        return outputs + sum(function.parameters[name].numel() for name in self.replicated)

    def captured_bytes(self, function: ModelFunction) -> int:
        """Bytes that a capture keeps for one cotangent of one sample: gradients, and whole rows.

        Gradients exist twice for a moment, when a layer's are brought to float64. Only the rows
        of one unit, or of all looped parameters, exist at one time, with their float64 copy.
        """
        size = function.dtype.itemsize
        wholes = [
            sum(function.parameters[name].numel() for name in names)
            for names in (
                self.looped,
                *(owner.parameters.values() for owner in self.owners if owner.rule is None),
            )
        ]
        return 2 * size * self.watched_scalars(function) + (size + 8) * max(wholes) + 1
