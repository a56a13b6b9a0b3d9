"""How a model's operations are run: plain attention, no checkpointing; and what they round to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint


@contextlib.contextmanager
def plain_operations(notes: set[str] | None = None, *, fused: bool = False) -> Iterator[None]:
    """Attention by its definition unless ``fused``, and no activation checkpointing.

    The notes receive a line if there was checkpointing.

    Forward-mode AD has no rule for fused attention, and the fast path of
    ``nn.TransformerEncoder`` (taken where no gradient is recorded) is another function of padding.
    Checkpointing runs parts of the model again in the backward pass, which neither transforms of
    functions nor recorded calls allow; its values and derivatives are those of the plain call.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attention = contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
        with attention, _without_checkpointing(notes):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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
