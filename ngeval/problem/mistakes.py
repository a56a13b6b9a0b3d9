"""Likely mistakes that a batch shows: probabilities for logits, parameters without effect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngeval.errors import ModelError
from ngeval.likelihoods import Bernoulli, Likelihood, Weighted
from ngeval.model.function import (
    ModelFunction,
    Parameters,
    autograd_enabled,
    leaves_of,
    model_errors,
)
from ngeval.utils.text import listed

VIEWS = (
    "Alias", "Clone", "Expand", "Permute", "Reshape", "Select", "Slice", "Squeeze", "ToCopy",
    "Transpose", "Unsqueeze", "UnsafeView", "View",
)  # fmt: skip
"""Names of autograd's nodes that change no value."""

MANY = 20
"""From this many outputs on, it is remarked if all lie in [0, 1]."""


def check_logits(function: ModelFunction, likelihood: Likelihood, outputs: Tensor) -> None:
    """Raise if a binary cross-entropy is given a sigmoid's probabilities for logits.

    Raises:
        ModelError: the outputs are those of a sigmoid.
    """
    plain = likelihood.plain if isinstance(likelihood, Weighted) else likelihood
    if not isinstance(plain, Bernoulli) or plain.probabilities:
        return
    if bool(((outputs < 0) | (outputs > 1)).any()) or function.split:
        return
    with autograd_enabled(), model_errors():
        first = function.on(slice(0, 1))
        node = first(leaves_of(first.parameters)).grad_fn
    while node is not None and node.name().startswith(VIEWS):
        node = node.next_functions[0][0]
    advice = "for probabilities give nn.BCELoss() as the loss, or output=torch.logit"
    if node is not None and node.name().startswith("Sigmoid"):
        raise ModelError(
            "the model's outputs are probabilities, those of a sigmoid, but a binary "
            f"cross-entropy takes logits; {advice}"
        )
    if outputs.numel() >= MANY:
        function.notes.add(f"all outputs lie in [0, 1], as probabilities do; {advice}")


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
