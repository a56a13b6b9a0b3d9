"""The same model function on a different batch, at the weights that the model has now."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

from ngeval.errors import ModelError
from ngeval.model.fsdp import reshard
from ngeval.model.function import ModelFunction, slots_of
from ngeval.model.inputs import Inputs, named_constants, named_tensors


def at_present(function: ModelFunction, inputs: Inputs) -> ModelFunction:
    """The same function on a different batch, at the weights that the model has now.

    Args:
        function: at earlier weights, on an earlier batch.
        inputs: of the same kind as those before; their shapes may differ.

    Raises:
        ModelError: a parameter or buffer is a different tensor, or its requires_grad was changed,
            or it has NaN.
        InputError: see `ModelFunction.of`.
    """
    if function.split:
        reshard(function.model)
    _check_same_parameters(function)
    present = ModelFunction.of(
        function.model, inputs, function.cast, function.output, function.shards, function.split
    )
    return replace(present, notes=set(function.notes))


def _check_same_parameters(function: ModelFunction) -> None:
    """Raise unless the parameters are the same tensors in the same places, and the same train."""
    named = dict(function.model.named_parameters())
    replaced = [n for n, p in function.originals.items() if named.get(n) is not p]
    replaced += [n for n in named if n not in function.originals]
    switched = [n for n, p in named.items() if p.requires_grad != (n in function.parameters)]
    if replaced:
        which = f"parameter {replaced[0]!r} is a different tensor"
    elif switched:
        which = f"parameter {switched[0]!r} has a different requires_grad"
    elif slots_of(function.model) != function.slots:
        which = "its parameters are tied differently"
    else:
        return
    raise ModelError(
        f"the model has changed since the first Problem was made: {which}; make a new Problem"
    )


def batch_key(function: ModelFunction) -> tuple[object, ...]:
    """Kind, shapes and dtypes of a single sample, and whether it is the only one.

    It identifies the batches that a plan holds for. With one sample every attribution of rows to
    samples is right, so a plan made there must not be used for more.
    """
    tensors = ((n, tuple(t.shape[1:]), t.dtype) for n, t in named_tensors(function.inputs))
    constants = ((n, repr(value)) for n, value in named_constants(function.inputs))
    alone = function.num_samples == 1
    return (type(function.inputs), alone, *sorted([*tensors, *constants], key=itemgetter(0)))
