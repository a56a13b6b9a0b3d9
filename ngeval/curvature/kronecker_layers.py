"""The layers that have Kronecker factors: affine maps and tables, by their trainable parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

from ngeval.jacobians.capture_plan import CapturePlan


@dataclass(frozen=True)
class Layer:
    """An affine layer by its trainable parameters.

    Attributes:
        name: the module's path.
        weight: the weight's parameter name, None if it is frozen.
        bias: the bias's, None if it is frozen or absent.
        transposed: the layer holds Wᵀ.
        lookup: it is a table, with a one-hot vector for each position as its inputs.
        sizes: groups, outputs and inputs without the bias.
    """

    name: str
    weight: str | None
    bias: str | None
    transposed: bool = False
    lookup: bool = False
    sizes: tuple[int, int, int] = (1, 1, 1)

    @property
    def width(self) -> int:
        """The length of ā."""
        return (self.sizes[2] if self.weight else 0) + (1 if self.bias else 0)

    @property
    def parameters(self) -> list[str]:
        """The trainable ones, the weight first."""
        return [name for name in (self.weight, self.bias) if name]


def kronecker_layers(plan: CapturePlan) -> list[Layer]:
    """The layers whose rows are sums of outer products: affine ones, and tables.

    A tied weight is one layer, shared over all its uses as over positions, if these are of a kind;
    the biases beside it are layers of their own.
    """
    places = _places(plan)
    uses = Counter(name for layer in places for name in layer.parameters)
    pairs = Counter((layer.weight, layer.bias) for layer in places)
    unlike = {name for name, count in plan.uses().items() if count != uses[name]}
    kinds: dict[str, set[object]] = {}
    for layer in places:
        kind = (layer.transposed, layer.lookup, layer.sizes)
        for name in layer.parameters:
            kinds.setdefault(name, set()).add(kind if name == layer.weight else None)
    unlike |= {name for name, found in kinds.items() if len(found) > 1}
    layers: dict[tuple[str | None, str | None], Layer] = {}
    for layer in places:
        if all(uses[name] == pairs[layer.weight, layer.bias] for name in layer.parameters):
            parts = [layer]
        else:
            parts = [replace(layer, bias=None), replace(layer, weight=None)]
        for part in parts:
            if part.parameters and not unlike & set(part.parameters):
                layers.setdefault((part.weight, part.bias), part)
    return list(layers.values())


def _places(plan: CapturePlan) -> list[Layer]:
    """Every use of a weight by an affine map or a look-up."""
    places = []
    for owner in plan.modules:
        rule, module = owner.rule, cast(Any, owner.module)
        if rule is None or rule.affine is None or owner.replicate:
            continue
        for weight, bias in rule.affine(module):
            names = owner.parameters.get(weight), owner.parameters.get(bias)
            if not any(names):
                continue
            sizes = _sizes(module, weight, bias, transposed=rule.transposed)
            places.append(Layer(owner.name, *names, rule.transposed, rule.lookup, sizes))
    return places


def _sizes(module: Any, weight: str, bias: str, *, transposed: bool) -> tuple[int, int, int]:
    if not weight:  # a bias that is a layer of its own
        return 1, module.get_parameter(bias).numel(), 0
    shape = module.get_parameter(weight).shape
    if transposed:
        return 1, shape[1:].numel(), shape[0]
    groups = getattr(module, "groups", 1)
    return groups, shape[0] // groups, shape[1:].numel()
