"""The orders in which training programs pass a model's parameters to an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.utils.text import listed

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
"""Names of parameters that transformers' Trainer excludes from weight decay."""

FULL = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta")
"""Entries of a state that always have the shape of their parameter."""

BY_HAND = (
    "build the optimizer in Python with the groups of the run, call its load_state_dict, and give "
    "it to ngeval.OptimizerStep; or save the state of an optimizer that was built on "
    "model.named_parameters(), whose names torch saves"
)

States = Mapping[Any, Mapping[str, Any]]


class MisfitError(Exception):
    """The reason why a state does not fit; the caller adds the name of the file."""


def fitting_order(
    optimizer: Optimizer, model: nn.Module, groups: Sequence[Mapping[str, Any]], states: States
) -> list[str]:
    """The names of the parameters in a file's groups, in their order, if the file has no names.

    If the optimizer has several groups of the same sizes as the file's, their order is tried
    first. Other orders are guesses: the shapes must fit only one of them, and must distinguish
    groups with different hyperparameters. The states are by the keys in the groups' ``params``.
    """
    sizes = [len(group["params"]) for group in groups]
    keys = [key for group in groups for key in group["params"]]
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    grouped = [
        [names[id(p)] for p in group["params"] if id(p) in names]
        for group in optimizer.param_groups
    ]
    held = {name for group in grouped for name in group}
    declared = [len(group) for group in grouped] == sizes and len(sizes) > 1
    orders = [[name for group in grouped for name in group]] if declared else []
    fitting: list[list[str]] = []
    problem = ""
    for order in [*orders, *_guesses(model, held, sizes)]:
        wrong = [
            f"{name} {tuple(parameters[name].shape)} has {entry} of shape {tuple(value.shape)}"
            for key, name in zip(keys, order, strict=True)
            for entry, value in states.get(key, {}).items()
            if entry in FULL and isinstance(value, Tensor) and value.ndim
            if value.shape != parameters[name].shape
        ]
        if not wrong and order in orders:
            return order
        if not wrong and order not in fitting:
            fitting.append(order)
        problem = problem or listed(wrong)
    if fitting:
        _check_certain(fitting, groups, states)
        return fitting[0]
    if problem:
        raise MisfitError(f"wrong shape: {problem}")
    raise MisfitError(
        f"it has groups of {listed([str(size) for size in sizes])} parameters without names "
        f"(param_names), and the optimizer holds {len(held)}; {BY_HAND}"
    )


def _check_certain(
    fitting: Sequence[list[str]], groups: Sequence[Mapping[str, Any]], states: States
) -> None:
    """Check that a guess which affects the step is confirmed by the shape of some tensor."""
    filled = [group for group in groups if group["params"]]
    hyper = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        for group in filled
    ]
    differ = any(other != hyper[0] for other in hyper[1:])
    with_shape = {key for key, state in states.items() if _has_tensor(state)}
    several = len(fitting) > 1 and (differ or with_shape)
    if several or (differ and not any(with_shape.issuperset(g["params"]) for g in filled)):
        raise MisfitError(
            f"its {len(groups)} groups have no names of parameters (param_names), and no shape in "
            f"its state determines which parameters are in which group; {BY_HAND}"
        )


def _guesses(model: nn.Module, held: set[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Orders of parameter names for groups of given sizes, likely ones first."""
    names = [name for name, _ in model.named_parameters()]
    trainable = [name for name in names if name in held]
    if len(sizes) == 2:
        # Programs that do not decide by names decide by the number of dimensions.
        matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
        for first in (_decayed(model), matrices):
            decayed = [name for name in trainable if name in first]
            if len(decayed) == sizes[0] and len(trainable) == sum(sizes):
                yield decayed + [name for name in trainable if name not in first]
    if len(sizes) == 1:
        for order in (trainable, names):
            if len(order) == sizes[0]:
                yield order


def _decayed(model: nn.Module) -> set[str]:
    """Parameters with weight decay in transformers' Trainer: no biases, no norms."""
    excluded = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if n not in excluded and not UNDECAYED.search(n.lower())}


def _has_tensor(state: Any) -> bool:
    """Whether a parameter's state has a tensor with a shape."""
    values = state.values() if isinstance(state, Mapping) else ()
    return any(isinstance(value, Tensor) and value.ndim for value in values)


def _plain(value: Any) -> Any:
    """A hyperparameter in a form that can be compared."""
    return value.tolist() if isinstance(value, Tensor) else value
