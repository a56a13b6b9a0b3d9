"""The capture plan: which module's calls show the rows of which parameter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ngeval.jacobians.layer_rules import HookedModule
from ngeval.model.function import ModelFunction


@dataclass
class CapturePlan:
    """Where each parameter's rows are read off, as decided by the planner.

    Attributes:
        modules: the hooked modules.
        replicated: parameters that are passed to the model expanded to one copy per sample (their
            own first dimension is 1).
        looped: parameters whose rows come from a loop over samples of the whole model.
    """

    modules: list[HookedModule]
    replicated: list[str] = field(default_factory=list)
    looped: list[str] = field(default_factory=list)

    def uses(self) -> Counter[str]:
        """The number of places where each parameter is used."""
        uses = Counter(name for hooked in self.modules for name in set(hooked.parameters.values()))
        uses.update(self.replicated)
        return uses

    def streamed(self) -> set[str]:
        """The modules whose terms are complete as soon as the backward pass has reached them."""
        uses = self.uses()
        return {
            hooked.name
            for hooked in self.modules
            if hooked.rule is not None
            and len(hooked.calls) == 1
            and all(uses[name] == 1 for name in hooked.parameters.values())
        }

    def gradient_scalars(self, function: ModelFunction) -> int:
        """Scalars per sample at which a cotangent's gradients are taken."""
        outputs = sum(call.output_scalars for hooked in self.modules for call in hooked.calls)
        return outputs + sum(function.parameters[name].numel() for name in self.replicated)

    def captured_bytes(self, function: ModelFunction) -> int:
        """Bytes that a capture holds for one cotangent of one sample: gradients and whole rows.

        Gradients exist twice while a layer's are converted to float64. Only the rows of one module
        without a rule, or of all looped parameters, exist at a time, with their float64 copy.
        """
        size = function.dtype.itemsize
        whole_rows = [
            sum(function.parameters[name].numel() for name in names)
            for names in (
                self.looped,
                *(hooked.parameters.values() for hooked in self.modules if hooked.rule is None),
            )
        ]
        return 2 * size * self.gradient_scalars(function) + (size + 8) * max(whole_rows) + 1
