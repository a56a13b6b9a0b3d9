"""Which dimension of a tensor inside a model holds the samples: measured, not guessed from sizes.

The model is run on two and on three samples. The dimension of a tensor that grows from 2k to 3k
is that of the samples, k entries for each (k > 1 where the model folds positions into the batch);
a tensor that does not grow is the same for all samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ngeval.model.autograd import autograd_enabled, leaves_of
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import map_tensors
from ngeval.model.operations import watched_linear

TRIAL_SIZES = (2, 3)

CallKey = int | tuple[str, str | None]

Leaf = tuple[torch.Size | None, bool]
"""The shape of a tensor, None of anything else, and whether it is the data of a packed sequence."""


@dataclass(frozen=True)
class Layout:
    """The samples of a tensor: dimension ``dim`` holds ``repeats`` entries for each.

    Those of a sample lie together, or, if ``interleaved``, one of every sample after the other.
    """

    dim: int
    repeats: int
    interleaved: bool = False

    def chunks(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """One chunk for each sample: shape ``(N, *leading dimensions, *chunk)``.

        The tensor has ``leading`` dimensions before those that the layout describes. A `RAGGED`
        one stays as it is.
        """
        if self == RAGGED:
            return tensor
        dim = self.dim + leading
        count = tensor.shape[dim] // self.repeats
        split, place = (count, self.repeats), dim
        if self.interleaved:
            split, place = (self.repeats, count), dim + 1
        chunks: Tensor = tensor.unflatten(dim, split).movedim(place, 0)
        return chunks


RAGGED = Layout(0, 0)
"""Of the data of a ``PackedSequence``: rows for every sample, in the order of their times."""


@dataclass(frozen=True)
class CallLayout:
    """The layouts of a call's tensors, None where a leaf is not a tensor or has no samples.

    Attributes:
        inputs: of the leaves of ``(args, kwargs)``.
        outputs: of the leaves of the returned value.
        shapes: of the output tensors in the smaller trial, None for other leaves.
        in_place: an output was modified after it was returned.
    """

    inputs: tuple[Layout | None, ...]
    outputs: tuple[Layout | None, ...]
    shapes: tuple[torch.Size | None, ...]
    in_place: bool

    def interleaved(self) -> CallLayout:
        """The same call if entries of different samples alternate, which shapes cannot show."""

        def of(layouts: tuple[Layout | None, ...]) -> tuple[Layout | None, ...]:
            return tuple(part and replace(part, interleaved=True) for part in layouts)

        return replace(self, inputs=of(self.inputs), outputs=of(self.outputs))

    @property
    def output_scalars(self) -> int:
        """Output scalars of one sample."""
        return sum(
            shape.numel() // (TRIAL_SIZES[0] if layout else 1)
            for shape, layout in zip(self.shapes, self.outputs, strict=True)
            if shape is not None
        )


@dataclass(frozen=True)
class _TrialCall:
    """The shapes of one call in one trial, and the versions of the output tensors."""

    inputs: list[Leaf]
    outputs: list[Leaf]
    versions: list[tuple[Tensor, int]]


def trial_batch(function: ModelFunction, size: int) -> Any:
    """The batch's first samples, repeated if there are fewer."""
    indices = torch.arange(size) % function.num_samples
    return map_tensors(function.inputs, lambda t: t[indices.to(t.device)])


@dataclass(frozen=True)
class Trial:
    """The result of running a model on two and on three samples.

    Attributes:
        calls: by ``id`` of the module, if they can be matched, in order of the first call; of
            ``F.linear`` with a parameter as its weight, by the names of weight and bias.
        outputs: of the smaller trial.
        sample_bytes: what autograd saves per additional sample.
    """

    calls: dict[CallKey, list[CallLayout]]
    outputs: Tensor
    sample_bytes: int


def call_layouts(
    function: ModelFunction, expanded: Collection[int] = (), copies: Sequence[str] = ()
) -> Trial:
    """Run the model on two and on three samples.

    The outputs of the ``expanded`` modules, by ``id``, and the parameters ``copies`` are expanded
    to one copy per sample.
    """
    (small, outputs, fewer), (large, _, more) = (
        _run_trial(function, size, expanded, copies) for size in TRIAL_SIZES
    )
    layouts: dict[CallKey, list[CallLayout]] = {}
    for key, calls in small.items():
        with contextlib.suppress(ValueError):  # the module's calls cannot be matched
            pairs = zip(calls, large.get(key, []), strict=True)
            layouts[key] = [_call_layout(a, b) for a, b in pairs]
    return Trial(layouts, outputs, max(0, more - fewer))


def expand_to_samples(tensor: Tensor, count: int) -> Tensor:
    """Expand a tensor that is the same for all samples: (1, …) or (…) to ``(count, …)``."""
    shape = tensor.shape
    return tensor.expand(count, *(shape[1:] if shape[:1] == (1,) else shape))


def _run_trial(
    function: ModelFunction, size: int, expanded: Collection[int], copies: Sequence[str]
) -> tuple[dict[CallKey, list[_TrialCall]], Tensor, int]:
    calls: dict[CallKey, list[_TrialCall]] = {}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if id(module) in expanded:
            output = expand_to_samples(output, size)
        record(id(module), (args, kwargs), output)
        return output if id(module) in expanded else None

    def record(key: CallKey, inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        versions = [(tensor, tensor._version) for tensor in tensors]
        call = _TrialCall(_leaves(inputs), _leaves(output), versions)
        calls.setdefault(key, []).append(call)

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        if id(weight) in names and (bias is None or id(bias) in names):
            key = names[id(weight)], None if bias is None else names[id(bias)]
            record(key, ((inputs,), {}), output)

    with contextlib.ExitStack() as contexts:
        for module in function.model.modules():
            contexts.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        contexts.enter_context(autograd_enabled())
        contexts.enter_context(saved_tensors_hooks(save, lambda tensor: tensor))
        leaves = leaves_of(function.parameters)
        names = {id(leaf): name for name, leaf in leaves.items()}
        contexts.enter_context(watched_linear(linear))
        placed = {name: expand_to_samples(leaves[name], size) for name in copies}
        outputs = function({**leaves, **placed}, trial_batch(function, size)).detach()
    return calls, outputs, sum(saved.values())


def _leaves(tree: Any) -> list[Leaf]:
    leaves: list[Leaf] = []
    for part in tree_leaves(tree, is_leaf=lambda node: isinstance(node, PackedSequence)):
        if isinstance(part, PackedSequence):  # its orders and sizes are of no sample
            leaves += [(part.data.shape, True), *[(None, False)] * (len(part) - 1)]
        else:
            leaves.append((part.shape if isinstance(part, Tensor) else None, False))
    return leaves


def _call_layout(small: _TrialCall, large: _TrialCall) -> CallLayout:
    inputs = [_layout(a, b) for a, b in zip(small.inputs, large.inputs, strict=True)]
    outputs = [_layout(a, b) for a, b in zip(small.outputs, large.outputs, strict=True)]
    modified = any(tensor._version != version for tensor, version in small.versions)
    return CallLayout(
        tuple(inputs), tuple(outputs), tuple(shape for shape, _ in small.outputs), modified
    )


def _layout(fewer: Leaf, more: Leaf) -> Layout | None:
    """The layout of a tensor of two shapes; a ValueError if they do not differ as batches do."""
    (small, packed), (large, _) = fewer, more
    if packed:
        return RAGGED
    if small is None or large is None or small == large:
        return None
    if len(small) != len(large):
        raise ValueError
    grown = [i for i, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    first, second = TRIAL_SIZES
    dim = grown[0]
    if len(grown) > 1 or small[dim] % first or small[dim] // first * second != large[dim]:
        raise ValueError
    return Layout(dim, small[dim] // first)
