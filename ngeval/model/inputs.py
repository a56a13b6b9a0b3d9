"""The inputs of a batch: tensors with the samples in their first dimension, in any structure."""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ngeval.errors import InputError, foreign_errors
from ngeval.model.checks import is_finite

Inputs = Any
"""A tensor; a tuple or list (positional arguments); or a mapping (keyword arguments, or the one
argument of a model that takes the whole batch). They hold tensors, further lists and mappings, and
constants: None, booleans, numbers and text."""

CONSTANTS = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def named_tensors(inputs: Inputs, name: str = "inputs") -> Iterator[tuple[str, Tensor]]:
    """The tensors among the inputs, each with a name for messages."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    else:
        for part, value in _parts(inputs, name):
            yield from named_tensors(value, part)


def named_constants(inputs: Inputs, name: str = "inputs") -> Iterator[tuple[str, Any]]:
    """What else there is among the inputs: values that are the same for all samples."""
    if isinstance(inputs, Mapping | list | tuple):
        for part, value in _parts(inputs, name):
            yield from named_constants(value, part)
    elif not isinstance(inputs, Tensor):
        yield name, inputs


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Any]) -> Inputs:
    """Apply a function to every tensor of inputs or targets, keeping their structure."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        values = {key: map_tensors(value, function) for key, value in inputs.items()}
        if type(inputs) is dict or not isinstance(inputs, MutableMapping):
            return values
        other = copy.copy(inputs)  # of its own type, whose attributes the model may use
        other.update(values)
        return other
    if isinstance(inputs, list | tuple):
        parts = [map_tensors(value, function) for value in inputs]
        if hasattr(inputs, "_fields"):  # a named tuple
            return type(inputs)(*parts)
        return parts if isinstance(inputs, list) else tuple(parts)
    return inputs


def with_tensors(inputs: Inputs, tensors: Iterable[Tensor]) -> Inputs:
    """The inputs with other tensors in the places of theirs, in the order of `named_tensors`."""
    others = iter(tensors)
    return map_tensors(inputs, lambda _: next(others))


def cast_inputs(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Inputs with their floating-point tensors in a dtype; None leaves them as they are."""
    if dtype is None:
        return inputs
    return map_tensors(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)


def call_arguments(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of a model's call.

    A mapping is the keyword arguments where the model's ``forward`` takes its keys, and otherwise
    the one argument, if ``forward`` takes one.
    """
    if isinstance(inputs, Mapping):
        return ((inputs,), {}) if _takes_whole(model, inputs) else ((), dict(inputs))
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}


def _takes_whole(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError:
        try:
            signature.bind(inputs)
        except TypeError:
            return False
        return True
    return False


def check_inputs(inputs: Inputs) -> None:
    """Raise unless the tensors among the inputs are finite and of one length, batch first.

    Raises:
        InputError: no tensor, a wrong kind, unequal lengths, an empty batch, NaN or infinity.
    """
    lengths = dict[str, int]()
    for name, value in named_constants(inputs):
        _check_constant(name, value)
    for name, tensor in named_tensors(inputs):
        _check_tensor(name, tensor)
        lengths[name] = tensor.shape[0]
    if not lengths:
        name, value = next(_parts(inputs, "inputs"), ("inputs", inputs))
        what = "" if name == "inputs" else f": {name} is a {type(value).__name__}"
        raise InputError(
            "inputs must be a tensor, or a non-empty tuple, list or dict of tensors, not "
            f"{_kind(inputs)}{what}"
        )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InputError(
            f"the inputs' first dimensions (samples) differ: {listed}; for batches whose samples "
            "cannot be indexed, as those of graphs, give split="
        )
    count = next(iter(lengths.values()))
    if count == 0:
        raise InputError("the batch is empty; give at least one sample")
    _check_lists(inputs, "inputs", count)


def _kind(inputs: Any) -> str:
    empty = isinstance(inputs, Mapping | list | tuple) and not inputs
    return f"an empty {type(inputs).__name__}" if empty else type(inputs).__name__


def _check_constant(name: str, value: Any) -> None:
    if value is None or isinstance(value, CONSTANTS):
        return
    raise InputError(
        f"{name} is a {type(value).__name__}, not a tensor, a list or dict of tensors, or a "
        "constant; for batches that cannot be indexed by sample, as those of graphs, give split="
    )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise InputError(
            f"{name} is a nested tensor, which cannot be differentiated by sample; pad it "
            "(torch.nested.to_padded_tensor) and give a mask, or give split="
        )
    if tensor.layout != torch.strided:
        raise InputError(f"{name} is sparse ({tensor.layout}); give {name}.to_dense()")
    if tensor.ndim == 0:
        raise InputError(
            f"{name} has no batch dimension (it is a scalar); give a constant as a Python number"
        )
    if tensor.is_floating_point() and not is_finite(tensor):
        first = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
        raise InputError(f"{name} holds NaN or infinite values, first at index {first}")


def _check_lists(inputs: Inputs, name: str, count: int) -> None:
    """Raise where a list has one number or text for each sample: it would be taken for constant."""
    is_list = isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes)
    if is_list and len(inputs) == count > 1 and not any(named_tensors(inputs)):
        raise InputError(
            f"{name} is a {type(inputs).__name__} of {count} values, one for each sample; make it "
            "a tensor, or leave it out"
        )
    if isinstance(inputs, Mapping | list | tuple):
        for part, value in _parts(inputs, name):
            _check_lists(value, part, count)


def _parts(inputs: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(inputs, PackedSequence):
        raise InputError(
            f"{name} is a PackedSequence, whose first dimension mixes samples; give padded "
            "sequences and their lengths, and pack them in forward, or give split="
        )
    if isinstance(inputs, Mapping):
        yield from ((f"{name}[{key!r}]", value) for key, value in inputs.items())
    elif isinstance(inputs, list | tuple):
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(inputs))


@dataclass(frozen=True)
class Ragged:
    """A batch whose samples have unequal shapes: graphs, lists of unequal tensors, offsets.

    Attributes:
        inputs: the batch, in any form.
        split: ``split(inputs, n)`` gives the inputs of sample n alone, a batch of one.
        count: N.
        cast: the dtype of their floating-point tensors; None leaves them as they are.
    """

    inputs: Any
    split: Callable[[Any, int], Any]
    count: int
    cast: torch.dtype | None = None

    @classmethod
    def of(cls, inputs: Any, split: Callable[[Any, int], Any], targets: Any) -> Ragged:
        """A batch of as many samples as there are targets.

        Raises:
            InputError: ``split`` is not a function, or there are no targets.
        """
        first = next((tensor for _, tensor in named_tensors(targets)), None)
        if not callable(split) or first is None or first.ndim == 0 or len(first) == 0:
            raise InputError(
                "split= is a function of (inputs, n) that gives the inputs of sample n alone, for "
                "as many samples as there are targets"
            )
        return cls(inputs, split, len(first))

    def sample(self, n: int) -> Inputs:
        """The inputs of one sample.

        Raises:
            InputError: ``split`` fails.
        """
        with foreign_errors(InputError, f"split failed for sample {n}"):
            return self.converted(self.split(self.inputs, n))

    def converted(self, inputs: Inputs) -> Inputs:
        """Copies of inputs with their floating-point tensors in the dtype."""
        cast = self.cast

        def convert(tensor: Tensor) -> Tensor:
            floating = cast is not None and tensor.is_floating_point()
            return tensor.to(cast, copy=True) if floating else tensor.clone()

        # A graph of torch_geometric applies a function to its tensors.
        if not isinstance(inputs, Tensor | Mapping | list | tuple) and hasattr(inputs, "apply"):
            return copy.copy(inputs).apply(convert)
        return map_tensors(inputs, convert)
