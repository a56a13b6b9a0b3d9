"""Copies of optimizers, with their whole state, that act on copies of their parameters.

``Optimizer.__getstate__`` has only three attributes, so ``copy.deepcopy`` loses those that a class
adds. Here the attributes themselves are copied, with a memo that maps every parameter to its copy,
so that every reference to a parameter becomes a reference to the copy.
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
"""The ending of the names of attributes that hold users' hooks."""

GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
"""The variables of torch that hold the hooks for the steps of every optimizer."""

_TORCH_MODULE = sys.modules[Optimizer.__module__]

_LEAVES = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float, torch.dtype)


@dataclass(frozen=True)
class Clones:
    """Copies that can be stepped.

    Attributes:
        optimizers: the copies, in the order of the originals.
        every: the copies and the copies of the optimizers that they wrap.
        parameters: the original and its copy, by the ``id`` of the original parameter.
        hooked: the class names of originals whose step hooks were left out.
    """

    optimizers: list[Optimizer]
    every: list[Optimizer]
    parameters: dict[int, tuple[nn.Parameter, nn.Parameter]]
    hooked: list[str]

    def groups(self) -> list[dict[str, Any]]:
        """Every parameter group once; a wrapper may share those of what it wraps."""
        groups = [group for optimizer in self.every for group in optimizer.param_groups]
        return list({id(group): group for group in groups}.values())

    @property
    def num_bytes(self) -> int:
        """The memory of the copies' tensors."""
        values = reachable([vars(optimizer) for optimizer in self.every])
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def again(self) -> Clones:
        """Copies of the copies, with the same originals."""
        further = clone_optimizers(self.optimizers, None)
        parameters = {
            key: (original, further.parameters[id(clone)][1])
            for key, (original, clone) in self.parameters.items()
        }
        return replace(further, parameters=parameters, hooked=self.hooked)

    def put_back(self) -> None:
        """Restore every copied parameter from its original; the state stays as it is."""
        with torch.no_grad():
            for original, clone in self.parameters.values():
                clone.copy_(original)


def clone_optimizers(optimizers: Sequence[Optimizer], dtype: torch.dtype | None) -> Clones:
    """Copy optimizers, which may share parameters and wrap others, with their state.

    Hooks, and methods that were patched into an instance (as learning-rate schedulers do), are
    left out, because they may act on the originals. The ``dtype`` is that of copied parameters, and
    of tensors in the state except for scalars of parameters that are not scalars themselves (a step
    count keeps its dtype); None keeps all dtypes.
    """
    originals = _with_wrapped(optimizers)
    every = list(originals)
    held = {id(p): p for o in every for group in o.param_groups for p in group["params"]}
    parameters = {
        key: (p, nn.Parameter(_copied(p, dtype, scalars=True), requires_grad=p.requires_grad))
        for key, p in held.items()
    }
    memo: dict[int, Any] = {key: clone for key, (_, clone) in parameters.items()}
    moments = _scalar_moments(every)
    for value in reachable(list(originals.values())):
        if type(value) in (Tensor, nn.Parameter) and id(value) not in memo:
            memo[id(value)] = _copied(value, dtype, scalars=id(value) in moments)
    memo |= {id(optimizer): object.__new__(type(optimizer)) for optimizer in every}
    for optimizer, attributes in originals.items():
        clone = memo[id(optimizer)]
        copied = copy.deepcopy(attributes, memo)
        if dtype is not None:  # some classes have the dtype of their state as an attribute
            kinds = {name for name, value in copied.items() if isinstance(value, torch.dtype)}
            copied |= {name: dtype for name in kinds if copied[name].is_floating_point}
        vars(clone).update(copied)
        if dtype is not None and isinstance(optimizer, Adafactor):
            _keep_floor(clone, optimizer)
    return Clones(
        [memo[id(optimizer)] for optimizer in optimizers],
        [memo[id(optimizer)] for optimizer in every],
        parameters,
        sorted({type(optimizer).__name__ for optimizer in every if _has_step_hooks(optimizer)}),
    )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper.

    The wrapper only forwards a step, but with a loss scale it patches the optimizer inside.
    """
    kind, inner = type(optimizer), vars(optimizer).get("optimizer")
    from_accelerate = kind.__module__.partition(".")[0] == "accelerate"
    return unwrapped(inner) if from_accelerate and isinstance(inner, Optimizer) else optimizer


@contextlib.contextmanager
def isolated_steps(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed and call no global hooks, and restore both afterwards."""
    on_gpu = device.type == "cuda"
    registered = {name: getattr(_TORCH_MODULE, name) for name in GLOBAL_HOOKS}
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed, which also seeds devices that are not restored.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            vars(_TORCH_MODULE).update({name: OrderedDict() for name in registered})
            yield
        finally:
            vars(_TORCH_MODULE).update(registered)


def _with_wrapped(optimizers: Sequence[Optimizer]) -> dict[Optimizer, dict[str, Any]]:
    """The optimizers and then those that they wrap, each with the attributes to copy."""
    originals: dict[Optimizer, dict[str, Any]] = {}
    waiting = deque(optimizers)
    while waiting:
        optimizer = waiting.popleft()
        if optimizer not in originals:
            originals[optimizer] = {  # no hooks, no patched methods
                name: OrderedDict() if name.endswith(HOOKS) and isinstance(value, dict) else value
                for name, value in vars(optimizer).items()
                if not (callable(value) and hasattr(type(optimizer), name))
            }
            wrapped = reachable(originals[optimizer])
            waiting += [value for value in wrapped if isinstance(value, Optimizer)]
    return originals


def _scalar_moments(optimizers: Sequence[Optimizer]) -> set[int]:
    """The ``id`` of everything except ``step`` in the states of scalar parameters."""
    return {
        id(value)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor) and parameter.ndim == 0 and isinstance(state, Mapping)
        for key, value in state.items()
        if key != "step"
    }


def _keep_floor(clone: Optimizer, original: Optimizer) -> None:
    """Give a copied Adafactor the floors of v̂ of its original, in one group for each parameter.

    The default is the machine epsilon of the parameter's dtype, which is not that of the copies.
    """
    groups = []
    for copied, group in zip(clone.param_groups, original.param_groups, strict=True):
        first, second = group["eps"]
        for parameter, source in zip(copied["params"], group["params"], strict=True):
            floor = torch.finfo(source.dtype).eps if first is None else first
            groups.append({**copied, "params": [parameter], "eps": (floor, second)})
    clone.param_groups[:] = groups


def _has_step_hooks(optimizer: Optimizer) -> bool:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    on_every = any(getattr(_TORCH_MODULE, name) for name in GLOBAL_HOOKS)
    return on_every or any(vars(optimizer).get(name) for name in names)


def reachable(root: Any) -> Iterator[Any]:
    """Every object that a value refers to, once each; tensors and optimizers are not entered."""
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


def _copied(tensor: Tensor, dtype: torch.dtype | None, *, scalars: bool) -> Tensor:
    """A copy of a tensor, detached from any graph."""
    plain = tensor.detach()
    cast = dtype is not None and plain.is_floating_point() and (scalars or plain.ndim > 0)
    return plain.to(dtype, copy=True) if cast else plain.clone()
