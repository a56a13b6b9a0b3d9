"""A state dict into a model: names matched, then loaded by torch's strict rules, or not at all."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ngeval.checkpoints.layouts import EXTRA, PREFERRED, StateDict, preferred
from ngeval.checkpoints.names import Prefixes, Shapes, fitting_prefixes, plain, with_names
from ngeval.checkpoints.reading import ambiguous
from ngeval.errors import CheckpointError, foreign_errors
from ngeval.utils.text import listed

AVERAGED = "n_averaged"
"""The buffer that ``torch.optim.swa_utils.AveragedModel`` has beside the model."""


class MisfitError(CheckpointError):
    """The names, shapes or number types of a checkpoint are not the model's."""


@dataclass(frozen=True)
class Choice:
    """A state dict of a file under the model's names.

    Attributes:
        state: what is to be loaded.
        prefixes: how the file's names differ from the model's.
        beside: the file's names that do not begin with the prefix.
        remarks: what was chosen among several.
    """

    state: StateDict
    prefixes: Prefixes
    beside: list[str]
    remarks: list[str]


def choose_state(model: nn.Module, path: Path, states: Mapping[str, StateDict]) -> Choice:
    """The state dict of a file that fits a model best, and the prefixes by which it does.

    Raises:
        CheckpointError: several fit equally well, and none has one of the usual keys.
    """
    expected = _shapes(model.state_dict(keep_vars=True))
    fits = {key: _fit(state, expected) for key, state in states.items()}
    most = max(len(covered) for _, covered in fits.values())
    if most < len(expected) and len(states) > 1:  # one for each part of the model?
        whole = _joined(states)
        candidates, covered = _fit(whole, expected)
        if len(covered) == len(expected) and len(candidates) == 1:
            return _choice(whole, candidates[0], expected, [])
    best = [key for key, (_, covered) in fits.items() if len(covered) == most]
    chosen = preferred(best)
    if len(chosen) > 1:
        raise CheckpointError(ambiguous(path, chosen))
    (key,) = chosen
    remarks = _remarks(key, [other for other in best if other != key])
    candidates = fits[key][0]
    if len(candidates) > 1:
        removed = [prefixes.removed.removesuffix(".") for prefixes in candidates]
        places = [".".join(filter(None, (key, prefix))) for prefix in removed]
        raise CheckpointError(ambiguous(path, places))
    return _choice(states[key], candidates[0], expected, remarks)


def _remarks(key: str, others: list[str]) -> list[str]:
    """What to know of a choice of weights: where others would fit, or the key is an unusual one."""
    if others:
        return [f"the weights are those under {key}; {listed(others)} would fit, too"]
    usual = {*key.split(".")} & {"", *PREFERRED[: PREFERRED.index("state_dict_ema")]}
    return [] if usual else [f"the weights are those under {key}"]


def _joined(states: Mapping[str, StateDict]) -> StateDict:
    """State dicts as one, in which their keys are the first part of the names."""
    items = [(key, name, v) for key, state in states.items() for name, v in state.items()]
    return OrderedDict((f"{key}.{name}", value) for key, name, value in items)


def _fit(state: StateDict, expected: Shapes) -> tuple[list[Prefixes], set[str]]:
    """The prefixes of a state dict, and the model's names that it has by the first of them."""
    short = {plain(name): shape for name, shape in _shapes(state).items()}
    targets = {plain(name): shape for name, shape in expected.items()}
    candidates = fitting_prefixes(short, targets)
    renamed = {candidates[0].renamed(name): shape for name, shape in short.items()}
    same = {n for n, shape in targets.items() if n in renamed and shape in (None, renamed[n])}
    return candidates, same


def _choice(state: StateDict, prefixes: Prefixes, expected: Shapes, remarks: list[str]) -> Choice:
    names = {name: plain(name) for name in state}
    if len(set(names.values())) < len(names):  # with and without a wrapper's component
        names = {name: name for name in state}
    short: StateDict = OrderedDict((names[name], value) for name, value in state.items())
    short._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    original = {plain(name): name for name in expected}
    beside = [name for name in state if prefixes.renamed(names[name]) is None]
    return Choice(with_names(short, prefixes, original), prefixes, beside, remarks)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of tensors; None for other values, and for parameters that have none yet."""
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) and not is_lazy(value) else None
        for name, value in state.items()
    }


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """A model in training mode; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module in list(model.modules()):  # outer modules first, whose mode inner ones take
            if module.training != modes.get(module, module.training):
                module.train(modes[module])


class Snapshot:
    """The values of a model's parameters and buffers at one moment."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
        self.copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model these values again."""
        for tensor, copy in self.copies:
            tensor.copy_(copy)


def load_strictly(
    model: nn.Module, path: Path, choice: Choice, *, strict: bool = True
) -> list[str]:
    """Load a state dict by torch's strict rules, or leave the model as it is.

    Returns:
        Remarks on what was left out.

    Raises:
        MisfitError: names, shapes or number types differ; all are listed.
        CheckpointError: weights that are NaN, or tied ones with different values.
    """
    expected = model.state_dict(keep_vars=True)
    state, dropped = _completed(model, path, expected, choice.state)
    problems = _misfits(expected, state, choice)
    misfit = MisfitError(f"{path} does not fit the model; " + "; ".join(problems.values()))
    if {"single number", "wrong kind"} & problems.keys():
        raise misfit
    if not strict and not state.keys() & expected.keys():
        raise misfit
    _check_values(path, model, expected, state)
    differing = _loaded(model, path, state, strict=strict, trial=bool(problems))
    if differing is None:
        raise misfit
    missing, unexpected = differing
    remarks = list(choice.remarks)
    if left_out := [*choice.beside, *dropped, *unexpected]:
        remarks.append(f"left out of the checkpoint: {listed(left_out)}")
    if missing:
        remarks.append(f"not in the checkpoint, as the task builds them: {listed(missing)}")
    return remarks


def _loaded(
    model: nn.Module, path: Path, state: StateDict, *, strict: bool, trial: bool
) -> tuple[list[str], list[str]] | None:
    """Load a state dict by torch's rules.

    A ``trial`` keeps a copy of the weights, because torch copies what fits before it refuses the
    rest.

    Returns:
        The missing and the unexpected names that torch accepts without ``strict``; None if it
        refuses, and the model is unchanged.
    """
    before = Snapshot(model) if trial else None
    try:
        with foreign_errors(CheckpointError, f"{path} cannot be loaded into the model"):
            missing, unexpected = model.load_state_dict(state, strict=strict)
    except CheckpointError:  # load hooks are anybody's code
        if before is None:
            raise
        before.restore()
        return None
    return missing, unexpected


def _completed(
    model: nn.Module, path: Path, expected: Mapping[str, Any], state: StateDict
) -> tuple[StateDict, list[str]]:
    """A state dict with every name of tied weights, without what the model computes itself.

    Returns:
        The state dict, and the names that were dropped.
    """
    result: StateDict = OrderedDict(state)
    result._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    for names in _tied(expected):
        present = [name for name in names if name in state]
        for one, other in itertools.pairwise(present):
            if not _equal(state[one], state[other]):
                raise MisfitError(
                    f"{path} has different values for {one!r} and {other!r}, which the model ties "
                    "into one parameter; build a model that does not tie them (for a folder of "
                    "save_pretrained: give it as --hf-model), or take one out of the file"
                )
        result |= {name: state[present[0]] for name in names if present and name not in state}
    buffers = {plain(name): buffer for name, buffer in model.named_buffers()}
    dropped = []
    for name in [name for name in result if name not in expected]:
        computed = _equal(result[name], buffers.get(plain(name)))
        if computed or name.endswith(EXTRA) or name == AVERAGED:
            del result[name]
            dropped += [] if computed else [name]
    return result, dropped


def _tied(expected: Mapping[str, Any]) -> list[list[str]]:
    """The names of each tensor that has several."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            names_of.setdefault(id(tensor), []).append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are equal, in the coarser of their types."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
        return False
    coarse = min((one, other), key=lambda tensor: tensor.element_size())
    left, right = (t.detach().cpu().to(coarse.dtype) for t in (one, other))
    return torch.equal(left, right)


def _misfits(expected: Mapping[str, Any], state: StateDict, choice: Choice) -> dict[str, str]:
    """How the names, shapes and number types of a state dict differ from the model's."""
    pairs = [
        (name, state[name], tensor)
        for name, tensor in expected.items()
        if isinstance(tensor, Tensor) and isinstance(state.get(name), Tensor)
    ]
    shaped = [(n, loaded, tensor) for n, loaded, tensor in pairs if not is_lazy(tensor)]
    differing = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "wrong shape": [
            f"{name} {tuple(loaded.shape)} instead of {tuple(tensor.shape)}"
            for name, loaded, tensor in shaped
            if loaded.shape != tensor.shape
        ],
        # torch would take the first number.
        "single number": [
            f"{name} {tuple(loaded.shape)} instead of ()"
            for name, loaded, tensor in shaped
            if loaded.numel() != 1 and not tensor.ndim
        ],
        "wrong kind": [
            f"{name} {_kind(loaded)} instead of {_kind(tensor)}"
            for name, loaded, tensor in pairs
            if _kind(loaded) != _kind(tensor)
        ],
    }
    problems = {what: f"{what}: {listed(names)}" for what, names in differing.items() if names}
    if choice.beside and problems:
        front = choice.prefixes.removed
        problems["beside"] = (
            f"the file's names begin with {front!r}, but for {listed(choice.beside)}"
        )
    return problems


def _check_values(
    path: Path, model: nn.Module, expected: Mapping[str, Any], state: StateDict
) -> None:
    """Refuse weights that are not finite in the model's type, in which large ones can overflow.

    Buffers may hold −∞ (attention masks); a NaN is always a mistake.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        target = expected.get(name)
        loaded = tensor.to(target.dtype) if isinstance(target, Tensor) else tensor
        bad = ~torch.isfinite(loaded) if name in parameters else torch.isnan(loaded)
        if bool(bad.any()):
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinite values")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"
