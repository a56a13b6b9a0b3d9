"""Optimizers copied, with all that they hold, onto parameters of their own.

An optimizer's own ``__getstate__`` keeps three attributes, so ``copy.deepcopy`` of one loses what a
class has besides. Here the attributes are copied themselves, under a memo that maps every
parameter to its copy: whatever refers to a parameter refers to the copy afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

HOOKS = "_hooks"
"""How the names of the attributes end that hold what users want to be called at a step."""

GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
"""Where torch keeps the hooks that are called at the steps of every optimizer."""

_HOOKS_OF_ALL = sys.modules[Optimizer.__module__]

_LEAVES = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float, torch.dtype)


@dataclass(frozen=True)
class Clones:
    """Copies that can be stepped.

    Attributes:
        optimizers: copies of those that were given, in their order.
        every: with the optimizers that they wrap.
        parameters: by the ``id`` of the original parameter, the original and its copy.
        hooked: the class names of originals whose step hooks were left out.
    """

    optimizers: list[Optimizer]
    every: list[Optimizer]
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]]
    hooked: list[str]

    def groups(self) -> Iterator[dict[str, Any]]:
        """Every parameter group once; a wrapper may share those of what it wraps."""
        seen: set[int] = set()
        for optimizer in self.every:
            for group in optimizer.param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group

    @property
    def num_bytes(self) -> int:
        """What the copies' tensors take."""
        found = reachable([vars(optimizer) for optimizer in self.every])
        return sum(value.nbytes for value in found if isinstance(value, Tensor))

    def again(self) -> Clones:
        """Copies of the copies, which belong to the same originals."""
        further = clone_optimizers(self.optimizers, None)
        parameters = {
            key: (original, further.parameters[id(clone)][1])
            for key, (original, clone) in self.parameters.items()
        }
        return replace(further, parameters=parameters, hooked=self.hooked)

    def put_back(self) -> None:
        """Give every copied parameter its original's value again; the state stays."""
        with torch.no_grad():
            for original, clone in self.parameters.values():
                clone.copy_(original)


def clone_optimizers(optimizers: Sequence[Optimizer], dtype: torch.dtype | None) -> Clones:
    """Copy optimizers with their state; the originals are only read.

    Hooks, and methods that were patched into an instance (as learning-rate schedulers do), are
    left out: they may act on the originals.

    Args:
        optimizers: they may share parameters, and wrap others.
        dtype: for copied parameters and for tensors of the state that are not scalars, or are the
            state of a parameter that is one (a step count stays as it is); None keeps everything
            as it is.
    """
    kept = {id(optimizer): _attributes(optimizer) for optimizer in optimizers}
    every = list(optimizers)
    tensors: list[Tensor] = []
    for found in reachable(list(kept.values())):
        if isinstance(found, Tensor):
            tensors.append(found)
        elif isinstance(found, Optimizer) and id(found) not in kept:
            every.append(found)
    for inner in every[len(optimizers) :]:
        kept[id(inner)] = _attributes(inner)
        tensors += [t for t in reachable(kept[id(inner)]) if isinstance(t, Tensor)]
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for optimizer in every:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) not in parameters:
                copied = nn.Parameter(_copied(parameter, dtype, scalars=True))
                copied.requires_grad_(parameter.requires_grad)
                parameters[id(parameter)] = parameter, copied
    memo: dict[int, Any] = {key: clone for key, (_, clone) in parameters.items()}
    moments = _scalar_moments(every)
    for tensor in tensors:
        if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
            memo[id(tensor)] = _copied(tensor, dtype, scalars=id(tensor) in moments)
    memo |= {id(optimizer): object.__new__(type(optimizer)) for optimizer in every}
    for optimizer in every:
        attributes = copy.deepcopy(kept[id(optimizer)], memo)
        if dtype is not None:  # some classes keep the dtype of the state that they make
            floats = {n: v for n, v in attributes.items() if _is_float_dtype(v)}
            attributes |= dict.fromkeys(floats, dtype)
        vars(memo[id(optimizer)]).update(attributes)
        if dtype is not None and isinstance(optimizer, Adafactor):
            _keep_floor(memo[id(optimizer)], optimizer)
    return Clones(
        [memo[id(optimizer)] for optimizer in optimizers],
        [memo[id(optimizer)] for optimizer in every],
        parameters,
        sorted({type(optimizer).__name__ for optimizer in every if _has_step_hooks(optimizer)}),
    )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper.

    That one only passes a step on, but with a loss scale it patches what it wraps.
    """
    kind, inner = type(optimizer), vars(optimizer).get("optimizer")
    accelerates = kind.__module__.partition(".")[0] == "accelerate"
    return unwrapped(inner) if accelerates and isinstance(inner, Optimizer) else optimizer


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from a seed; the generators are afterwards as they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed, which reaches devices that are not put back.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """No hook that was registered for the steps of every optimizer is called."""
    kept = {name: getattr(_HOOKS_OF_ALL, name) for name in GLOBAL_HOOKS}
    try:
        for name in GLOBAL_HOOKS:
            setattr(_HOOKS_OF_ALL, name, OrderedDict())
        yield
    finally:
        for name, hooks in kept.items():
            setattr(_HOOKS_OF_ALL, name, hooks)


def _scalar_moments(optimizers: Sequence[Optimizer]) -> set[int]:
    """The ``id`` of what parameters without dimensions have in their state, but for its step."""
    return {
        id(value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor) and parameter.ndim == 0 and isinstance(state, Mapping)
        for key, value in state.items()
        if key != "step"
    }


def _keep_floor(clone: Optimizer, original: Optimizer) -> None:
    """Give a copied Adafactor the floor of v̂ that its original has.

    Without one it takes the machine epsilon of a parameter's dtype, which the copies have not.
    """
    groups = []
    for copied, group in zip(clone.param_groups, original.param_groups, strict=True):
        first, second = group["eps"]
        if first is not None or not group["params"]:
            groups.append(copied)
            continue
        for dtype in dict.fromkeys(parameter.dtype for parameter in group["params"]):
            pairs = zip(copied["params"], group["params"], strict=True)
            members = [ours for ours, theirs in pairs if theirs.dtype == dtype]
            floor = torch.finfo(dtype).eps, second
            groups.append({**copied, "params": members, "eps": floor})
    clone.param_groups[:] = groups


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What is copied of an optimizer."""
    kept: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if name.endswith(HOOKS) and isinstance(value, dict):
            kept[name] = OrderedDict()
        elif not (callable(value) and hasattr(type(optimizer), name)):
            kept[name] = value
    return kept


def _has_step_hooks(optimizer: Optimizer) -> bool:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    on_all = any(getattr(_HOOKS_OF_ALL, name) for name in GLOBAL_HOOKS)
    return on_all or any(vars(optimizer).get(name) for name in names)


def reachable(root: Any) -> Iterator[Any]:
    """Everything that can be got to from a value, each once; not into tensors or optimizers."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Tensor | Optimizer):
            continue
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting.append(vars(value))


def _is_float_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _copied(tensor: Tensor, dtype: torch.dtype | None, *, scalars: bool) -> Tensor:
    """A tensor with memory of its own, cut off from any graph."""
    plain = tensor.detach()
    cast = dtype is not None and plain.is_floating_point() and (scalars or plain.ndim > 0)
    return plain.to(dtype, copy=True) if cast else plain.clone()
