"""How a model's operations are run: plain attention, no checkpointing; and what they round to."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ngeval.model.fsdp import sharded_modules

CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
"""Classes of attributes whose entries are restored, too."""

HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""Attributes of every module that are not searched, for speed."""


def called(
    module: nn.Module,
    tensors: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    notes: set[str] | None = None,
    fused: bool = False,
) -> Any:
    """The value of a module with these tensors in place, run by plain operations.

    The module is as before afterwards, whatever its code assigns to it (hooks of weight norm write
    the weight, recurrent layers a list of weights, some models what they have seen).
    """
    # With tie_weights, torch would swap a module that is registered twice two times, and not
    # restore it; the tensors' names name every place once.
    with restored(module), plain_operations(notes, fused=fused):
        return torch.func.functional_call(module, tensors, args, kwargs, tie_weights=False)


@contextlib.contextmanager
def watched_linear(watch: Callable[[Tensor, Tensor, Tensor | None, Tensor], Any]) -> Iterator[None]:
    """Pass the input, weight, bias and output of every ``F.linear`` to a function.

    What it returns, unless that is None, takes the place of the output.
    """
    linear = nn.functional.linear

    def watched(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(inputs, weight, bias)
        other = watch(inputs, weight, bias, output)
        return output if other is None else other

    nn.functional.linear = watched  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = linear


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restore all attributes of a module and of its submodules, and what their containers hold.

    Not those of modules that ``fully_shard`` has split, which it changes around each pass itself.
    """
    split = {part for each in sharded_modules(module) for part in each.modules()}
    attributes = [(each, dict(vars(each))) for each in module.modules() if each not in split]
    containers = [
        (value, value.copy())
        for _, values in attributes
        for name, value in values.items()
        if type(value) in CONTAINERS and name not in HOOKS
    ]
    try:
        yield
    finally:
        for each, values in attributes:
            if not _same(vars(each), values):
                vars(each).clear()
                vars(each).update(values)
        for container, entries in containers:
            _refill(container, entries)


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is before[key] for key in now)


def _refill(container: Any, entries: Any) -> None:
    if isinstance(container, dict):
        if not _same(container, entries):
            container.clear()
            container.update(entries)
    elif len(container) != len(entries) or any(
        a is not b for a, b in zip(container, entries, strict=True)
    ):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(entries)


@contextlib.contextmanager
def plain_operations(notes: set[str] | None = None, *, fused: bool = False) -> Iterator[None]:
    """Attention by its definition unless ``fused``; no checkpointing, nothing compiled.

    The notes receive a line if there was checkpointing.

    Forward-mode AD has no rule for fused attention, and the fast path of
    ``nn.TransformerEncoder`` (taken where no gradient is recorded) is another function of padding.
    Checkpointing runs parts of the model again in the backward pass, which neither transforms of
    functions nor recorded calls allow; its values and derivatives are those of the plain call.
    What ``torch.compile`` made would be compiled again for every set of hooks and every transform.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attention = contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
        with attention, _without_checkpointing(notes), _without_compilation():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _without_checkpointing(notes: set[str] | None) -> Iterator[None]:
    def note() -> None:
        if notes is not None:
            notes.add("activation checkpointing was switched off")

    class PlainCall:
        @staticmethod
        def apply(function: Any, _preserve_rng_state: bool, *args: Any) -> Any:
            note()
            return function(*args)

    def no_recording(*_: Any, **__: Any) -> Iterator[None]:
        note()
        yield

    stand_ins = {
        "CheckpointFunction": PlainCall,
        "_checkpoint_without_reentrant_generator": no_recording,
    }
    kept = {name: getattr(checkpoint, name) for name in stand_ins if hasattr(checkpoint, name)}
    for name in kept:
        setattr(checkpoint, name, stand_ins[name])
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


class OperationWatch(TorchFunctionMode):
    """Records which operations a forward pass uses.

    Attributes:
        attention: whether it uses fused attention.
        epsilon: machine epsilon of the coarsest type to which it narrows anything (a float64 model
            whose softmax is in float32); 0 if it narrows nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = False
        self.epsilon = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.attention |= func is nn.functional.scaled_dot_product_attention
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            operands = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
            if any(tensor.element_size() > result.element_size() for tensor in operands):
                self.epsilon = max(self.epsilon, torch.finfo(result.dtype).eps)
        return result
