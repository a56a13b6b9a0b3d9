"""The outputs z in whatever a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ngeval.errors import ModelError

Output = str | int | Callable[[Any], Tensor] | None
"""Which of a model's outputs is z: a name, an index, or a function of the returned value."""


def outputs_of(raw: Any, output: Output = None) -> Tensor:
    """The outputs z in the value that a model returned.

    Args:
        raw: the returned value.
        output: a key or attribute, an index, or a function of ``raw``; None: ``raw`` itself if it
            is a tensor, else its ``logits``.

    Raises:
        ModelError: there is no such tensor.
    """
    try:
        if callable(output):
            outputs: Any = output(raw)
        elif isinstance(output, int):
            outputs = raw[output]
        elif output is None and isinstance(raw, Tensor):
            outputs = raw
        else:
            name = output or "logits"
            outputs = raw[name] if isinstance(raw, Mapping) else getattr(raw, name)
    except (KeyError, IndexError, TypeError, AttributeError):
        outputs = None
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returned {_described(raw)}; ngeval needs a tensor of outputs or an object "
            f"with a tensor in .logits{'' if output is None else f', or in output={output!r}'} "
            "(output= takes a name, an index, or a function of what the model returns)"
        )
    return outputs


def _described(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} with {', '.join(repr(key) for key in list(raw)[:8])}"
    if isinstance(raw, tuple | list):
        return f"a {type(raw).__name__} of {len(raw)}"
    return f"a {type(raw).__name__}"
