"""Loading a saved state into new optimizers: matched by name or order, checked by a trial step."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.checkpoints import read_optimizer, renamed
from ngeval.errors import CheckpointError, foreign_errors
from ngeval.fadam.state_checks import as_number
from ngeval.methods.optimizer.clone import clone_optimizers, isolated_steps, reachable
from ngeval.methods.optimizer.parameter_orders import MisfitError, fitting_order
from ngeval.utils.text import listed

EXECUTION = ("foreach", "fused", "capturable", "differentiable")
"""Options that do not change the value of a step; those of the new optimizer are kept."""

ADDED_LATER = (*EXECUTION, "maximize", "decoupled_weight_decay")
"""Options that files of earlier versions of torch do not have in their groups."""

OF_CLASSES = {
    name
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    for name in inspect.signature(kind).parameters
} - {*ADDED_LATER, "params", "lr", "eps", "weight_decay"}
"""Hyperparameters that distinguish torch's classes."""


class _Saved(NamedTuple):
    """One optimizer's state in a file, without frozen parameters."""

    groups: list[tuple[list[str], dict[str, Any]]]
    """The names of the parameters and the hyperparameters of each group."""

    states: dict[str, dict[str, Any]]
    """The state of each parameter that has one, by its name."""


def load_optimizer_state(
    optimizers: Sequence[Optimizer],
    model: nn.Module,
    path: Path,
    allow_pickle: bool = False,
    name: str | None = None,
) -> tuple[str, ...]:
    """Load a saved state into newly built optimizers; returns notes for the results.

    Parameters are matched by the names in the file's groups (``param_names``) if it has them, else
    by position: in the groups of the optimizers, in the model's order (one group), or with the
    parameters that decay first (two groups, as in transformers' Trainer). Every shape is checked.
    The file's groups and hyperparameters replace those of the optimizers, except for `EXECUTION`.
    The ``name`` is the optimizer's, for messages, and to compare with that in the file.

    Raises:
        CheckpointError: the file is unreadable or of another optimizer; parameters, or entries of
            their state, are missing, unexpected, of another shape or not finite; or the shapes do
            not determine which parameters are in which group. The optimizers may have changed.
    """
    saved = read_optimizer(path, allow_pickle=allow_pickle)
    label = name or "+".join(type(optimizer).__name__ for optimizer in optimizers)
    if None not in (name, saved.name) and saved.name != name:
        raise CheckpointError(
            f"{path} holds the state of {saved.name}, not of {name}; grade {saved.name}, or "
            f"{name}:20 (state accumulated over 20 batches at the checkpoint's weights)"
        )
    if len(saved.states) != len(optimizers):
        raise CheckpointError(
            f"{path} holds the states of {len(saved.states)} optimizers; {label} consists of "
            f"{len(optimizers)}"
        )
    unstepped = 0
    for optimizer, state in zip(optimizers, saved.states, strict=True):
        try:
            known = _by_name(optimizer, model, state)
            _check_groups(optimizer, known, label)
            for _, hyper in known.groups:
                _check_hyperparameters(hyper, optimizer.defaults)
            _regroup(optimizer, model, known)
            if not known.states and saved.name is not None:
                unstepped += 1  # a file that ngeval wrote before the first step
            else:
                _check_states(optimizer, model, known, label)
        except MisfitError as error:
            raise CheckpointError(f"{path} does not fit {label}: {error}") from error
        _fill(optimizer, known.states)
    if unstepped and unstepped == len(optimizers):
        return ("the optimizer had not stepped at this checkpoint: this is its first step",)
    return ()


def _by_name(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> _Saved:
    """A state dict by parameter name."""
    groups, states = state["param_groups"], state["state"]
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    held = [name for name, p in parameters.items() if id(p) in in_optimizer]
    name_of = _names_by_key(groups, held)
    if name_of is None:
        keys = [key for group in groups for key in group["params"]]
        name_of = dict(zip(keys, fitting_order(optimizer, model, groups, states), strict=True))
    faults = {
        "missing": [name for name in held if name not in name_of.values()],
        "unexpected": [name for name in name_of.values() if name not in parameters],
    }
    if any(faults.values()):
        lists = [f"{what}: {listed(names)}" for what, names in faults.items() if names]
        raise MisfitError("parameters " + "; ".join(lists))
    trainable = []
    for group in groups:
        names = [name_of[key] for key in group["params"] if name_of[key] in held]
        hyper = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if names:
            trainable.append((names, hyper))
    present = {name: _present(states.get(key, {})) for key, name in name_of.items() if name in held}
    return _Saved(trainable, {name: entries for name, entries in present.items() if entries})


def _names_by_key(groups: Sequence[Mapping[str, Any]], held: list[str]) -> dict[Any, str] | None:
    """The parameters' names by their keys in a file; None if it does not record the names."""
    recorded: dict[str, Any] = {}
    for group in groups:
        by_name = all(isinstance(key, str) for key in group["params"])
        names = group["params"] if by_name else group.get("param_names") or ()
        if len(names) != len(group["params"]):
            return None
        recorded |= dict(zip(names, group["params"], strict=True))
    return {key: name for name, key in renamed(recorded, held).items()}


def _present(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state without entries that are None, as those of an SGD without momentum."""
    return {key: value for key, value in state.items() if value is not None}


def _check_groups(optimizer: Optimizer, saved: _Saved, label: str) -> None:
    """Check that the file's hyperparameters are those of the optimizer's class."""
    of_torch = type(optimizer).__module__.startswith("torch.optim")
    for _, hyper in saved.groups:
        needed = [
            key
            for key, value in optimizer.defaults.items()
            if (key not in ADDED_LATER if of_torch else isinstance(value, float | tuple))
        ]
        lacking = [key for key in needed if key not in hyper]
        if lacking:
            raise MisfitError(f"its groups have no {listed(lacking)}; is the file {label}'s?")
        others = OF_CLASSES - optimizer.defaults.keys()
        if of_torch and (other := sorted(hyper.keys() & others)):
            raise MisfitError(f"its groups have {listed(other)}; is the file {label}'s?")
        decoupled = "decoupled_weight_decay"  # the difference of Adam and AdamW in torch
        if hyper.get(decoupled, None) not in (None, optimizer.defaults.get(decoupled)):
            raise MisfitError(
                f"it has {decoupled}={hyper[decoupled]}, as "
                f"{'AdamW' if hyper[decoupled] else 'Adam'} has, but {label} has not"
            )


def _regroup(optimizer: Optimizer, model: nn.Module, saved: _Saved) -> None:
    """Give a new optimizer the file's groups."""
    parameters = dict(model.named_parameters())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = []
    for names, hyper in saved.groups:
        base = group_of[id(parameters[names[0]])]
        chosen = {key: value for key, value in hyper.items() if key not in EXECUTION}
        members = {"params": [parameters[name] for name in names], "param_names": list(names)}
        groups.append({**base, **chosen, **members})
    optimizer.param_groups[:] = groups


def _check_states(optimizer: Optimizer, model: nn.Module, saved: _Saved, label: str) -> None:
    """Check that every parameter has the entries that a step would create."""
    differing = defaultdict[tuple[str, str], list[str]](list)
    wrong: list[str] = []
    after = _after_a_step(optimizer, model)
    # Other packages create some of the state after the first step.
    complete = type(optimizer).__module__.startswith("torch.optim")
    for name, expected in after.items():
        entries = saved.states.get(name, {})
        for key in expected.keys() - entries.keys():
            differing["missing", str(key)].append(name)
        for key in entries.keys() - expected.keys() if complete else ():
            differing["unexpected", str(key)].append(name)
        wrong += [
            f"{key} of {name} {_shapes(entries[key])} instead of {_shapes(expected[key])}"
            for key in expected.keys() & entries.keys()
            if _shapes(expected[key]) != _shapes(entries[key])
        ]
    faults = [f"{key} {what} for {listed(at)}" for (what, key), at in sorted(differing.items())]
    if wrong:
        faults.append(f"wrong shape: {listed(wrong)}")
    if faults:
        never = "" if saved.states else " (no parameter has any: had it never stepped?)"
        raise MisfitError("; ".join(faults) + f"; is the file {label}'s?{never}")
    for name, entries in saved.states.items():
        for key, value in entries.items():
            _check_entry(key, name, after.get(name, {}).get(key), value)


def _after_a_step(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The state of each parameter after one step of a copy."""
    clones = clone_optimizers([optimizer], None)
    for group in clones.groups():  # some classes count their steps in their groups
        for key in set(group) - {*optimizer.defaults, "params", "param_names"}:
            del group[key]
    for _, clone in clones.parameters.values():
        clone.grad = torch.full_like(clone, 1e-3)
    device = next(iter(clones.parameters.values()))[0].device
    with foreign_errors(MisfitError, "a first step failed"), isolated_steps(device, 0):
        clones.optimizers[0].step()
    names = {id(p): name for name, p in model.named_parameters()}
    state = clones.optimizers[0].state
    return {
        names[key]: _present(state.get(clone, {})) for key, (_, clone) in clones.parameters.items()
    }


def _fill(optimizer: Optimizer, states: Mapping[str, dict[str, Any]]) -> None:
    """Load the checked state with the optimizer's ``load_state_dict``, as on resuming."""
    content = optimizer.state_dict()
    content["state"] = {
        number: states[name]
        for group in content["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if name in states
    }
    optimizer.load_state_dict(content)


def _shapes(value: Any) -> Any:
    """The shapes of the tensors in an entry; scalars are treated like numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return [_shapes(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _shapes(part) for key, part in value.items()}
    return ()


def _check_hyperparameters(hyper: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check those hyperparameters of a file's group that are numbers in the class's defaults."""
    for key in (k for k, default in defaults.items() if isinstance(default, float) and k in hyper):
        number = as_number(hyper[key])
        if math.isnan(number) or (key == "lr" and math.isinf(number)):
            raise MisfitError(
                f"{key} in its groups is {hyper[key]!r}, not a number to step with; set it in the "
                "file's param_groups and save the file again"
            )
    if (count := hyper.get("step")) is not None:
        _check_count("step in its groups", count)


def _check_entry(key: str, name: str, expected: Any, value: Any) -> None:
    """Check that an entry of a state has the type that a step creates, and is finite."""
    where = f"{key} of {name}"
    if key == "step":
        _check_count(where, value)
        return
    numeric = isinstance(expected, Tensor | int | float) and not isinstance(expected, bool)
    if numeric and not isinstance(value, Tensor | int | float):
        raise MisfitError(f"{where} is a {type(value).__name__}, not a tensor or number")
    if isinstance(expected, Tensor) and isinstance(value, Tensor):
        real = expected.is_floating_point()
        if (real and not value.is_floating_point()) or expected.is_complex() != value.is_complex():
            raise MisfitError(f"{where} is of {value.dtype}, where {expected.dtype} is needed")
    for part in [value] if isinstance(value, float) else reachable(value):
        numbers = part if isinstance(part, Tensor | float) else 0.0
        if not bool(torch.isfinite(torch.as_tensor(numbers)).all()):
            raise MisfitError(f"{where} is NaN or infinite: the run had diverged, or overflowed")


def _check_count(where: str, value: Any) -> None:
    """Check that a value is a finite number ≥ 0."""
    number = as_number(value)
    if not 0 <= number < math.inf:
        shown = value if math.isnan(number) else number
        raise MisfitError(f"{where} is {shown!r}, which is not a number of steps")
