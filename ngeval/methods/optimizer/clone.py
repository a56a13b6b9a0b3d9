"""Optimizers copied, with all that they hold, onto parameters of their own.

An optimizer's own ``__getstate__`` keeps three attributes, so ``copy.deepcopy`` of one loses what a
class has besides. Here the attributes are copied themselves, under a memo that maps every
parameter to its copy: whatever refers to a parameter refers to the copy afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

HOOKS = "_hooks"
"""How the names of the attributes end that hold what users want to be called at a step."""

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
        found = _reachable([vars(optimizer) for optimizer in self.every])
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
        dtype: for copied parameters and for tensors of the state that are not scalars (a step
            count stays as it is); None keeps everything as it is.
    """
    kept = {id(optimizer): _attributes(optimizer) for optimizer in optimizers}
    every = list(optimizers)
    tensors: list[Tensor] = []
    for found in _reachable(list(kept.values())):
        if isinstance(found, Tensor):
            tensors.append(found)
        elif isinstance(found, Optimizer) and id(found) not in kept:
            every.append(found)
    for inner in every[len(optimizers) :]:
        kept[id(inner)] = _attributes(inner)
        tensors += [t for t in _reachable(kept[id(inner)]) if isinstance(t, Tensor)]
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for optimizer in every:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) not in parameters:
                copied = nn.Parameter(_copied(parameter, dtype, scalars=True))
                copied.requires_grad_(parameter.requires_grad)
                parameters[id(parameter)] = parameter, copied
    memo: dict[int, Any] = {key: clone for key, (_, clone) in parameters.items()}
    for tensor in tensors:
        if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
            memo[id(tensor)] = _copied(tensor, dtype, scalars=False)
    memo |= {id(optimizer): object.__new__(type(optimizer)) for optimizer in every}
    for optimizer in every:
        attributes = copy.deepcopy(kept[id(optimizer)], memo)
        if dtype is not None:  # some classes keep the dtype of the state that they make
            floats = {n: v for n, v in attributes.items() if _is_float_dtype(v)}
            attributes |= dict.fromkeys(floats, dtype)
        vars(memo[id(optimizer)]).update(attributes)
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
    return any(vars(optimizer).get(name) for name in names)


def _reachable(root: Any) -> Iterator[Any]:
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
