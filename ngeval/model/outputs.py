"""The outputs z in whatever a model returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError, ModelError
from ngeval.likelihoods import Heads, Likelihood, OutputDistribution, Weighted
from ngeval.likelihoods.heads import HeadsDistribution
from ngeval.likelihoods.weighted import TARGETS, WEIGHTS

Output = str | int | Callable[[Any], Tensor] | None
"""Which of a model's outputs is z: a name, an index, or a function of the returned value."""


def outputs_of(raw: Any, output: Output = None) -> Tensor:
    """The outputs z in the value that a model returned.

    Args:
        raw: the returned value.
        output: a key or attribute, an index, or a function of ``raw``; None: ``raw`` itself if it
            is a tensor, else its ``logits``, else the only tensor in it.

    Raises:
        ModelError: there is no such tensor.
    """
    outputs = _part(raw, output)
    if output is None and outputs is None:
        outputs = _only_tensor(raw)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returned {_described(raw)}; ngeval needs a tensor of outputs or an object "
            f"with a tensor in .logits{'' if output is None else f', or in output={output!r}'} "
            "(output= takes a name, an index, or a function of what the model returns)"
        )
    return outputs


def _part(raw: Any, output: Output) -> Any:
    """What ``output`` names in a returned value; None where there is no such part."""
    try:
        if callable(output):
            return output(raw)
        if isinstance(output, int):
            return raw[output]
        if output is None and isinstance(raw, Tensor):
            return raw
        name = output or "logits"
        return raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _only_tensor(raw: Any) -> Any:
    """The single tensor in a tuple, a mapping or a dataclass; None where there are several."""
    if dataclasses.is_dataclass(raw):
        raw = vars(raw)
    if not isinstance(raw, Mapping | tuple | list):
        return None
    values = raw.values() if isinstance(raw, Mapping) else raw
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _described(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} with {', '.join(repr(key) for key in list(raw)[:8])}"
    if isinstance(raw, tuple | list):
        return f"a {type(raw).__name__} of {len(raw)}"
    return f"a {type(raw).__name__}"


class Reading:
    """How the logits z are read off what a model returns, and how a loss is bound to them.

    What depends on shapes (which dimension holds the classes, outputs of shape ``(N,)``) is decided
    on the first batch, from its outputs and targets, and holds for all later ones.
    """

    def __init__(self, likelihood: Likelihood, output: Output, targets: Any) -> None:
        """Read the output that ``output`` chooses; ``targets`` are those of the first batch."""
        self.likelihood, self.output, self.targets = likelihood, output, targets
        self._settled = self._is_single = False
        self._arrange: Callable[[Tensor], Tensor] | None = None

    def __call__(self, raw: Any) -> Tensor:
        """The logits ``(N, *positions, C)`` in a returned value, differentiably."""
        reading = self.likelihood.reading
        if reading is None:
            outputs = outputs_of(raw, self.output)
        else:
            outputs = reading(raw if self.output is None else _part(raw, self.output))
        if not self._settled:
            self._arrange = self.likelihood.arrangement(outputs, self.targets)
            self._is_single, self._settled, self.targets = outputs.ndim == 1, True, None
        return outputs if self._arrange is None else self._arrange(outputs)

    def bind(self, logits: Tensor, targets: Any) -> OutputDistribution:
        """p(·|z) with the targets of a batch; see `Likelihood.bind`."""
        if self._is_single and isinstance(targets, Tensor) and targets.ndim == 1:
            targets = targets.unsqueeze(-1)  # as its outputs
        return self.likelihood.bind(logits, targets)


class _WeightedReading(Reading):
    """The logits of a likelihood whose samples have weights."""

    def __init__(self, likelihood: Weighted, output: Output, targets: Any) -> None:
        super().__init__(likelihood, output, targets)
        self.plain = reading_of(likelihood.plain, output, targets[TARGETS])
        self.scaled = likelihood.scaled

    def __call__(self, raw: Any) -> Tensor:
        return self.plain(raw)

    def bind(self, logits: Tensor, targets: Any) -> OutputDistribution:
        return self.scaled(self.plain.bind(logits, targets[TARGETS]), targets[WEIGHTS])


class _HeadsReading(Reading):
    """The logits of several heads, flattened and joined as ``(N, C)``."""

    def __init__(self, heads: Heads, output: Output, targets: Any) -> None:
        super().__init__(heads, output, targets)
        if output is not None:
            raise InputError("several losses are those of outputs by their names; leave out output")
        heads.check_targets(targets)
        self.parts = {n: reading_of(part, n, targets[n]) for n, part in heads.parts}
        self._shapes: dict[int, list[torch.Size]] = {}

    def __call__(self, raw: Any) -> Tensor:
        outputs = [part(raw) for part in self.parts.values()]
        shapes = [z.shape[1:] for z in outputs]
        total = sum(map(math.prod, shapes))
        if self._shapes.setdefault(total, shapes) != shapes:
            raise ModelError(
                f"the heads' outputs have shapes {shapes} and {self._shapes[total]} in two batches "
                "of one problem, which cannot be distinguished; pad them to one length"
            )
        return torch.cat([z.flatten(1) for z in outputs], 1)

    def bind(self, logits: Tensor, targets: Any) -> OutputDistribution:
        shapes = self._shapes[logits[0].numel()]
        flat = logits.split([math.prod(shape) for shape in shapes], 1)
        bound = {
            name: part.bind(z.reshape(len(z), *shape), targets[name])
            for (name, part), z, shape in zip(self.parts.items(), flat, shapes, strict=True)
        }
        return HeadsDistribution(bound)


def bound(
    output: Output, likelihood: Likelihood, logits: Tensor, targets: Any
) -> OutputDistribution:
    """p(·|z) with the targets of a batch, by the `Reading` that the logits were read with."""
    return (output if isinstance(output, Reading) else likelihood).bind(logits, targets)


def reading_of(likelihood: Likelihood, output: Output, targets: Any) -> Reading:
    """The `Reading` of a loss: its own, or that of the losses that it is made of.

    Args:
        likelihood: of the loss.
        output: which of the model's outputs is z; see `outputs_of`.
        targets: of the first batch.

    Raises:
        InputError: ``output`` is given for several heads, or the targets are not theirs.
    """
    if isinstance(likelihood, Weighted):
        return _WeightedReading(likelihood, output, targets)
    if isinstance(likelihood, Heads):
        return _HeadsReading(likelihood, output, targets)
    return Reading(likelihood, output, targets)
