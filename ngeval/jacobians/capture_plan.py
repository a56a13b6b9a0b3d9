"""The plan of which modules' calls are recorded, the record of a call, and what a rule is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ngeval.jacobians.layouts import CallLayout
from ngeval.jacobians.terms import Term
from ngeval.model.function import ModelFunction


@dataclass
class HookedModule:
    """A module whose calls are recorded, and the parameters whose rows are read off them.

    Attributes:
        parameters: canonical names of trainable parameters by path inside the module.
        calls: the layouts of its calls.
        rule: None for a module that is differentiated as a function.
        replicate: its outputs are the same for all samples, and are expanded to one copy for each.
        of_function: a weight whose uses by ``F.linear`` are recorded; the module stands for them.
        vmap_fails: ``vmap`` turned out not to work for its function; set when that happens.
        vmap_over_calls_fails: the same of ``vmap`` over several calls of it.
    """

    name: str
    module: nn.Module
    parameters: dict[str, str]
    calls: list[CallLayout]
    rule: LayerRule | None
    replicate: bool = False
    of_function: str | None = None
    vmap_fails: bool = False
    vmap_over_calls_fails: bool = False

    @property
    def gradient_scalars(self) -> int:
        """Scalars per sample at which a cotangent's gradients are taken."""
        inner = self.rule.inner_scalars if self.rule else None
        return sum(
            call.output_scalars + (inner(self.module, call) if inner else 0) for call in self.calls
        )


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
            and hooked.rule.inner_scalars is None
            and len(hooked.calls) == 1
            and all(uses[name] == 1 for name in hooked.parameters.values())
        }

    def gradient_scalars(self, function: ModelFunction) -> int:
        """Scalars per sample at which a cotangent's gradients are taken."""
        outputs = sum(hooked.gradient_scalars for hooked in self.modules)
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


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: the leaves of its arguments, its outputs, and the gradients there.

    Attributes:
        spec: the pytree structure of ``(args, kwargs)``.
        leaves: of the arguments, tensors detached.
        outputs: the output tensors that depend on parameters, by leaf number.
        gradients: of vᵀz at those, in chunks by sample: ``(N, Q, *chunk)``.
    """

    hooked: HookedModule
    layout: CallLayout
    spec: Any
    leaves: list[Any]
    outputs: dict[int, Tensor]
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def add_gradient(self, index: int, gradient: Tensor) -> None:
        """Store the gradients at an output, shape ``(Q, *output.shape)``."""
        layout = self.layout.outputs[index]
        if layout is not None:
            self.gradients[index] = layout.chunks(gradient, 1)

    def input_chunks(self, index: int, num_samples: int) -> Tensor:
        """An input leaf, one chunk for each sample."""
        leaf: Tensor = self.leaves[index]
        layout = self.layout.inputs[index]
        return layout.chunks(leaf) if layout else leaf.expand(num_samples, *leaf.shape)


@dataclass(frozen=True)
class LayerRule:
    """How one class of layer is treated.

    Attributes:
        applies: whether the rule is right for a call of a module.
        terms: of the calls of a module.
        affine: the affine maps of a module, each a weight and a bias by their paths in it; all
            terms are `AffineTerm`. None where the layer is of another kind.
        transposed: the weights have inputs first.
        lookup: the layer is a table, an affine map of one-hot vectors; its terms are
            `EmbeddingTerm`.
        inner_scalars: scalars per sample, inside the module, at which gradients are taken, too;
            None where a call's gradients are those at its one output.
    """

    applies: Callable[[Any, CallLayout], bool]
    terms: Callable[[ModelFunction, list[RecordedCall]], list[Term]]
    affine: Callable[[Any], list[tuple[str, str]]] | None = None
    transposed: bool = False
    lookup: bool = False
    inner_scalars: Callable[[Any, CallLayout], int] | None = None


def for_each(
    term: Callable[[ModelFunction, RecordedCall], list[Term]],
) -> Callable[[ModelFunction, list[RecordedCall]], list[Term]]:
    """The terms of several calls, from those of one."""

    def terms(function: ModelFunction, calls: list[RecordedCall]) -> list[Term]:
        return [each for call in calls for each in term(function, call)]

    return terms
