"""Likely mistakes that a batch shows: probabilities for logits, parameters without effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import ModelError
from ngeval.likelihoods import Bernoulli, Categorical, Likelihood, Weighted
from ngeval.model.autograd import Parameters, autograd_enabled, leaves_of, model_errors
from ngeval.model.function import ModelFunction
from ngeval.model.outputs import Reading
from ngeval.utils.text import listed

VIEWS = (
    "Alias", "Clone", "Expand", "Permute", "Reshape", "Select", "Slice", "Squeeze", "ToCopy",
    "Transpose", "Unsqueeze", "UnsafeView", "View",
)  # fmt: skip
"""Names of autograd's nodes that change no value."""


MANY = 20
"""From this many outputs on, it is remarked if all lie in [0, 1]."""


def check_meaning(function: ModelFunction, likelihood: Likelihood, outputs: Tensor) -> None:
    """Raise if the outputs are something else than the logits that the loss takes them for.

    Raises:
        ModelError: a sigmoid's probabilities, or classes in dimension 1 as torch's losses have
            them.
    """
    plain = likelihood.plain if isinstance(likelihood, Weighted) else likelihood
    if function.split:
        return
    if isinstance(plain, Bernoulli) and not plain.probabilities:
        _check_logits(function, outputs)
    elif isinstance(plain, Categorical) and plain.class_dim == -1:
        _check_classes(function, outputs)


def _check_logits(function: ModelFunction, outputs: Tensor) -> None:
    if bool(((outputs < 0) | (outputs > 1)).any()):
        return
    advice = "for probabilities give nn.BCELoss() as the loss, or output=torch.logit"
    if _origin(function)[0].startswith("Sigmoid"):
        raise ModelError(
            "the model's outputs are probabilities, those of a sigmoid, but a binary "
            f"cross-entropy takes logits; {advice}"
        )
    if outputs.numel() >= MANY:
        function.notes.add(f"all outputs lie in [0, 1], as probabilities do; {advice}")


def _check_classes(function: ModelFunction, outputs: Tensor) -> None:
    """Which dimension of (N, K, K) outputs holds the classes, by the operation they are from."""
    chosen = isinstance(function.output, Reading) and function.output.output is not None
    if chosen or outputs.ndim < 3 or len(set(outputs.shape[1:])) > 1:
        return
    origin, is_swapped = _origin(function)
    is_convolution = origin.startswith("Convolution")
    if is_convolution != is_swapped and origin.startswith(("Convolution", "Addmm", "Mm")):
        raise ModelError(
            f"the model's outputs of shape {tuple(outputs.shape)} seem to have the classes in "
            "dimension 1, as torch's cross-entropy has them: give nn.CrossEntropyLoss() as the "
            "loss, or output=lambda z: z.movedim(1, -1); output=lambda z: z if they are last"
        )
    if not origin.startswith(("Convolution", "Addmm", "Mm")):
        function.notes.add(f"the classes of outputs {tuple(outputs.shape)} are taken to be last")


def _origin(function: ModelFunction) -> tuple[str, bool]:
    """The operation that the first sample's outputs are from, and whether its last dim is moved."""
    with autograd_enabled(), model_errors():
        first = function.on(slice(0, 1))
        node: Any = first(leaves_of(first.parameters)).grad_fn
    is_swapped = False
    while node is not None and node.name().startswith(VIEWS):
        is_swapped ^= _moves_last(node)
        node = node.next_functions[0][0]
    return ("" if node is None else node.name()), is_swapped


def _moves_last(node: Any) -> bool:
    """Whether a node of a view puts a different dimension last."""
    if node.name().startswith("Permute"):
        order = [_signed(d) for d in node._saved_dims]
        return order[-1] % len(order) != len(order) - 1
    if node.name().startswith("Transpose"):
        last = len(node._input_metadata[0].shape) - 1
        return not {-1, last}.isdisjoint(map(_signed, (node._saved_dim0, node._saved_dim1)))
    return False


def _signed(dim: int) -> int:
    """A dimension that autograd has stored as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def unused_parameters(function: ModelFunction, names: Sequence[str]) -> list[str]:
    """Those of some parameters on which no output of the first sample depends."""
    first = function.on(slice(0, 1))
    with autograd_enabled(), model_errors():
        leaves = leaves_of(first.parameters)
        outputs = first(leaves).sum()
        slopes = torch.autograd.grad(outputs, [leaves[n] for n in names], allow_unused=True)
    return [name for name, slope in zip(names, slopes, strict=True) if slope is None]


def unused_note(function: ModelFunction, gradient: Parameters) -> str | None:
    """A remark on parameters with a gradient of exactly 0; None where there are none."""
    zero = [name for name, part in gradient.items() if not bool(part.any())]
    if not zero or len(zero) == len(gradient) or function.split:
        return None
    unused = unused_parameters(function, zero)
    if unused:
        return f"no output depends on {listed(unused)}"
    return f"the gradient of {listed(zero)} is exactly 0"
