"""A saved state into fresh optimizers: matched by name or order, checked against a trial step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngeval.checkpoints import read_optimizer, renamed
from ngeval.errors import CheckpointError
from ngeval.methods.optimizer.clone import clone_optimizers, seeded, without_global_hooks
from ngeval.methods.optimizer.parameter_orders import fitting_order
from ngeval.methods.optimizer.state_checks import MisfitError, check_entry, check_hyperparameters
from ngeval.utils.text import listed

EXECUTION = ("foreach", "fused", "capturable", "differentiable")
"""How a step is computed, not what it is: these stay as they are here."""

ADDED_LATER = (*EXECUTION, "maximize", "decoupled_weight_decay")
"""What torch's optimizers did not always have in their groups."""

OF_CLASSES = {
    *("alpha", "amsgrad", "beta2_decay", "betas", "centered", "d", "dampening", "etas"),
    *("initial_accumulator_value", "lambd", "lr_decay", "momentum", "momentum_decay", "nesterov"),
    *("ns_coefficients", "ns_steps", "rho", "step_sizes", "t0"),
}
"""Hyperparameters by which torch's classes differ."""


@dataclass(frozen=True)
class _Saved:
    """One optimizer's state in a file, by parameter name.

    Attributes:
        groups: names and hyperparameters of each group that holds something trainable.
        states: the state of each parameter that has one.
    """

    groups: list[tuple[list[str], dict[str, Any]]]
    states: dict[str, dict[str, Any]]


def load_optimizer_state(
    optimizers: Sequence[Optimizer],
    model: nn.Module,
    path: Path,
    allow_pickle: bool = False,
    name: str | None = None,
) -> tuple[str, ...]:
    """Put a saved state into freshly built optimizers.

    Parameters are matched by the names in the file's groups (``param_names``) where it has them,
    else by position: in the optimizers' own groups, in the model's order (one group), or with
    those that decay first (two groups, as transformers' Trainer has them); every shape is checked.
    The file's groups and hyperparameters take the place of the optimizers' own, but for those that
    only say how a step is computed (`EXECUTION`).

    Args:
        optimizers: built on the model's trainable parameters, as many as the file has.
        model: whose parameters they hold; it is only read.
        path: see `ngeval.checkpoints.read_optimizer`.
        allow_pickle: unpickle with code; only for files that you trust.
        name: which optimizer it is, for messages, and for files that say of which they are.

    Returns:
        Notes for a reader of the results.

    Raises:
        CheckpointError: unreadable; of another optimizer; parameters, or entries of their state,
            are missing, unexpected, have other shapes or are not finite; or the shapes leave open
            which parameters are in which group. The optimizers are then fresh no more.
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
            f"{path} holds the states of {len(saved.states)} optimizers; {label} is made of "
            f"{len(optimizers)}"
        )
    fresh = 0
    for optimizer, state in zip(optimizers, saved.states, strict=True):
        try:
            known = _by_name(optimizer, model, state)
            _check_groups(optimizer, known, label)
            for _, hyper in known.groups:
                check_hyperparameters(hyper, optimizer.defaults)
            _regroup(optimizer, model, known)
            if not known.states and saved.name is not None:
                fresh += 1  # our own file, from before the first step
            else:
                _check_states(optimizer, model, known, label)
        except MisfitError as error:
            raise CheckpointError(f"{path} does not fit {label}: {error}") from error
        _fill(optimizer, model, known)
    if fresh and fresh == len(optimizers):
        return ("the optimizer had not stepped at this checkpoint: this is its first step",)
    return ()


def _by_name(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> _Saved:
    """Names for the parameters of a state dict."""
    groups = [dict(group) for group in state["param_groups"]]
    held = _held(optimizer, model)
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        told = dict(zip(keys, keys, strict=True))
    elif all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        names = [name for group in groups for name in group["param_names"] or ()]
        told = dict(zip(keys, names, strict=True))
    else:
        order = fitting_order(optimizer, model, groups, state["state"])
        name_of = dict(zip(keys, order, strict=True))
        return _assembled(model, held, groups, name_of, state["state"])
    ours = renamed({told[key]: key for key in keys}, held)
    name_of = {key: name for name, key in ours.items()}
    return _assembled(model, held, groups, name_of, state["state"])


def _assembled(
    model: nn.Module,
    held: list[str],
    groups: list[dict[str, Any]],
    name_of: Mapping[Any, str],
    states: Mapping[Any, Any],
) -> _Saved:
    """The groups and states of the parameters that are held; frozen ones are left out.

    Raises:
        MisfitError: parameters are missing, or are not the model's.
    """
    frozen = {name for name, _ in model.named_parameters()} - set(held)
    unexpected = [name for name in name_of.values() if name not in held and name not in frozen]
    missing = [name for name in held if name not in name_of.values()]
    problems = {"missing": missing, "unexpected": unexpected}
    told = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if told:
        raise MisfitError("parameters " + "; ".join(told))
    kept = []
    for group in groups:
        names = [name_of[key] for key in group["params"] if name_of[key] in held]
        hyper = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if names:
            kept.append((names, hyper))
    by_name = {
        name: _present(states[key])
        for key, name in name_of.items()
        if name in held and _present(states.get(key, {}))
    }
    return _Saved(kept, by_name)


def _present(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state without the None of an SGD that has no momentum."""
    return {key: value for key, value in state.items() if value is not None}


def _check_groups(optimizer: Optimizer, saved: _Saved, label: str) -> None:
    """The file's hyperparameters are of the optimizer's class.

    Raises:
        MisfitError: it is of another.
    """
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
        other = sorted((set(hyper) & OF_CLASSES) - set(optimizer.defaults)) if of_torch else []
        if other:
            raise MisfitError(f"its groups have {listed(other)}; is the file {label}'s?")
        decoupled = "decoupled_weight_decay"  # what makes an Adam an AdamW
        if hyper.get(decoupled, None) not in (None, optimizer.defaults.get(decoupled)):
            raise MisfitError(
                f"it has {decoupled}={hyper[decoupled]}, as "
                f"{'AdamW' if hyper[decoupled] else 'Adam'} has and {label} has not"
            )


def _regroup(optimizer: Optimizer, model: nn.Module, saved: _Saved) -> None:
    """Give a fresh optimizer the file's groups."""
    parameters = dict(model.named_parameters())
    own = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = []
    for names, hyper in saved.groups:
        base = own[id(parameters[names[0]])]
        chosen = {key: value for key, value in hyper.items() if key not in EXECUTION}
        members = {"params": [parameters[name] for name in names], "param_names": list(names)}
        groups.append({**base, **chosen, **members})
    optimizer.param_groups[:] = groups


def _check_states(optimizer: Optimizer, model: nn.Module, saved: _Saved, label: str) -> None:
    """Every parameter has the state that a step would give it.

    Raises:
        MisfitError: entries are missing, unexpected, have other shapes, or cannot be stepped with.
    """
    missing: dict[str, list[str]] = {}
    unexpected: dict[str, list[str]] = {}
    wrong: list[str] = []
    after = _after_a_step(optimizer, model)
    for name, expected in after.items():
        found = saved.states.get(name, {})
        for key in expected.keys() - found.keys():
            missing.setdefault(str(key), []).append(name)
        for key in found.keys() - expected.keys():
            unexpected.setdefault(str(key), []).append(name)
        wrong += [
            f"{key} of {name} {_shapes(found[key])} instead of {_shapes(expected[key])}"
            for key in expected.keys() & found.keys()
            if _shapes(expected[key]) != _shapes(found[key])
        ]
    if not type(optimizer).__module__.startswith("torch.optim"):
        unexpected = {}  # others make some of their state later than in the first step
    told = [
        f"{key} {what} for {listed(names)}"
        for what, entries in (("missing", missing), ("unexpected", unexpected))
        for key, names in sorted(entries.items())
    ]
    if wrong:
        told.append(f"wrong shape: {listed(wrong)}")
    if told:
        never = "" if saved.states else " (no parameter has any: had it never stepped?)"
        raise MisfitError("; ".join(told) + f"; is the file {label}'s?{never}")
    for name, entries in saved.states.items():
        for key, found in entries.items():
            check_entry(key, name, after.get(name, {}).get(key), found)


def _after_a_step(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The state that each parameter has after one step of a fresh copy."""
    clones = clone_optimizers([optimizer], None)
    for group in clones.groups():  # without what a class counts in its groups as it goes
        for key in set(group) - {*optimizer.defaults, "params", "param_names"}:
            del group[key]
    for _, clone in clones.parameters.values():
        clone.grad = torch.full_like(clone, 1e-3)
    device = next(iter(clones.parameters.values()))[0].device
    try:
        with seeded(device, 0), without_global_hooks():
            clones.optimizers[0].step()
    except Exception as error:  # a step may be anybody's code
        raise MisfitError(f"a first step failed: {type(error).__name__}: {error}") from error
    names = {id(p): name for name, p in model.named_parameters()}
    state = clones.optimizers[0].state
    return {
        names[key]: _present(state.get(clone, {})) for key, (_, clone) in clones.parameters.items()
    }


def _fill(optimizer: Optimizer, model: nn.Module, saved: _Saved) -> None:
    """Load what was checked, as the optimizer's own class does on resuming."""
    content = optimizer.state_dict()
    parameters = dict(model.named_parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    number_of = dict(zip(held, numbers, strict=True))
    content["state"] = {
        number_of[id(parameters[name])]: state for name, state in saved.states.items()
    }
    optimizer.load_state_dict(content)


def _held(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the parameters that an optimizer holds, in the model's order."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held]


def _shapes(value: Any) -> Any:
    """The shapes of the tensors in an entry; scalars count as numbers."""
    if isinstance(value, Tensor):
        return tuple(value.shape) if value.ndim else ()
    if isinstance(value, list | tuple):
        return [_shapes(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _shapes(part) for key, part in value.items()}
    return ()
