"""In which orders training programs give a model's parameters to an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.methods.optimizer.state_checks import MisfitError
from ngeval.utils.text import listed

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
"""Names of parameters that transformers' Trainer spares from weight decay."""

FULL = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta")
"""Entries of a state that have the parameter's shape in every optimizer that has them."""

BY_HAND = (
    "build the optimizer in Python with the groups of the run, call its load_state_dict, and give "
    "it to ngeval.OptimizerStep; or save the state of an optimizer made from "
    "model.named_parameters(), which torch writes the names of"
)

States = Mapping[Any, Mapping[str, Any]]


def fitting_order(
    optimizer: Optimizer, model: nn.Module, groups: Sequence[Mapping[str, Any]], states: States
) -> list[str]:
    """The names of the parameters in a file's groups, one after the other, that has no names.

    The optimizer's own groups go first, where they are several and as large as the file's. Other
    orders are guesses: the shapes must fit one of them only, and must tell groups apart whose
    hyperparameters differ.

    Args:
        optimizer: as it is built here.
        model: whose parameters it holds.
        groups: the file's.
        states: the file's, by the keys in its groups' ``params``.

    Raises:
        MisfitError: no order fits, or the shapes leave open which.
    """
    sizes = [len(group["params"]) for group in groups]
    keys = [key for group in groups for key in group["params"]]
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    own = [
        [names[id(p)] for p in group["params"] if id(p) in names]
        for group in optimizer.param_groups
    ]
    held = {name for group in own for name in group}
    declared = [len(group) for group in own] == sizes and len(sizes) > 1
    orders = [[n for group in own for n in group]] if declared else []
    fitting: list[list[str]] = []
    problem = ""
    for order in [*orders, *_guesses(model, held, sizes)]:
        wrong = [
            f"{name} {tuple(parameters[name].shape)} has {entry} of shape {shape}"
            for key, name in zip(keys, order, strict=True)
            for entry, shape in _full_shapes(states.get(key, {}))
            if shape != tuple(parameters[name].shape)
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
    """Refuse a guess that decides about the step and that no tensor confirms.

    Raises:
        MisfitError: it is one.
    """
    hyper = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        for group in groups
        if group["params"]
    ]
    differ = any(other != hyper[0] for other in hyper[1:])
    with_tensors = [
        all(_has_tensor(states.get(key, {})) for key in group["params"])
        for group in groups
        if group["params"]
    ]
    several = len(fitting) > 1 and (differ or any(map(_has_tensor, states.values())))
    if several or (differ and not any(with_tensors)):
        raise MisfitError(
            f"its {len(groups)} groups have no names of parameters (param_names), and no shape in "
            f"its state tells which parameters are in which group; {BY_HAND}"
        )


def _guesses(model: nn.Module, held: set[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Orders of parameter names for groups of some sizes, likely ones first."""
    names = [name for name, _ in model.named_parameters()]
    trainable = [name for name in names if name in held]
    if len(sizes) == 2:
        for first in (_decayed(model), _matrices(model)):
            decayed = [name for name in trainable if name in first]
            if len(decayed) == sizes[0] and len(trainable) == sum(sizes):
                yield decayed + [name for name in trainable if name not in first]
    if len(sizes) == 1:
        for order in (trainable, names):
            if len(order) == sizes[0]:
                yield order


def _decayed(model: nn.Module) -> set[str]:
    """Parameters with weight decay in transformers' Trainer: no biases, nothing of a norm."""
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if n not in spared and not UNDECAYED.search(n.lower())}


def _matrices(model: nn.Module) -> set[str]:
    """Parameters with weight decay where a program goes by their dimensions."""
    return {name for name, p in model.named_parameters() if p.ndim >= 2}


def _full_shapes(state: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The entries that have the parameter's shape, and that shape."""
    for key in FULL:
        if isinstance(value := state.get(key), Tensor) and value.ndim:
            yield key, tuple(value.shape)


def _has_tensor(state: Any) -> bool:
    """Whether a parameter's state has a shape to go by."""
    values = state.values() if isinstance(state, Mapping) else ()
    return any(isinstance(value, Tensor) and value.ndim for value in values)


def _plain(value: Any) -> Any:
    """A hyperparameter as what can be compared."""
    return value.tolist() if isinstance(value, Tensor) else value
