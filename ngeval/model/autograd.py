"""Recorded forward passes, and backward passes through them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ngeval.errors import ModelError, NgevalError
from ngeval.utils.memory import is_out_of_memory

Parameters = dict[str, Tensor]


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Turn whatever a user's model raises into a `ModelError` that names the model as the cause.

    Raises:
        ModelError: something other than an ngeval or out-of-memory error was raised inside.
    """
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the model failed on its inputs: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """Record gradients, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaves_of(parameters: Parameters) -> Parameters:
    """Leaves of a new graph, in the parameters' memory."""
    return {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}


def pull_back(
    outputs: Sequence[Tensor],
    leaves: Parameters,
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Parameters:
    """Σ Jᵀw by one backward pass from recorded outputs: dense gradients by parameter name."""
    gradients = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        [cotangent.to(z.dtype) for cotangent, z in zip(cotangents, outputs, strict=True)],
        materialize_grads=True,
        retain_graph=retain_graph,
    )
    dense = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
    return dict(zip(leaves, dense, strict=True))
