"""The base class of the exact optimizers, which turns the update of a batch into a step.

With p the parameters of a group and d the method's update on the batch,

    m ← μ m + d · min(1, max_norm/‖d‖)        (‖d‖ over all parameters)
    p ← p (1 − η·wd) − η m

with η the learning rate, μ the momentum and wd the decoupled weight decay of the group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngeval.errors import EngineError, InputError, ModelError, NgevalError, NumericalError
from ngeval.fadam.state_checks import Range, check_state, number_in
from ngeval.jacobians.capture import UnsupportedLayerError
from ngeval.model.checks import is_finite
from ngeval.problem.problem import Problem
from ngeval.utils.memory import is_out_of_memory
from ngeval.utils.text import listed

ProblemSource = Problem | Callable[[], Problem]
"""A problem on the batch, or a function that returns one."""

SHARED = ("damping", "max_norm", "mc_samples", "seed")
"""Settings of the whole update, which all groups must agree on."""

RANGES = {
    "lr": Range(lambda x: 0 <= x < math.inf, "≥ 0"),
    "damping": Range(lambda x: 0 <= x < math.inf, "≥ 0"),
    "momentum": Range(lambda x: 0 <= x < 1, "in [0, 1)"),
    "weight_decay": Range(lambda x: 0 <= x < math.inf, "≥ 0"),
    "max_norm": Range(lambda x: 0 < x < math.inf, "> 0, or None"),
    "mc_samples": Range(lambda x: 1 <= x < math.inf and x == int(x), "a whole number ≥ 1"),
    "seed": Range(lambda x: math.isfinite(x) and x == int(x), "a whole number"),
}

STEP, MOMENTUM = "step", "momentum_buffer"


class ExactOptimizer(Optimizer):
    """An optimizer whose update is that of a method of `ngeval.methods` on the step's batch.

    If a step raises an error, no weight and no state has changed.

    Args:
        params: all trainable parameters of one model, or groups of them, each of which can have
            its ``lr``, ``momentum`` and ``weight_decay``.
        lr: the learning rate η; its unit depends on the method.
        damping: λ ≥ 0, absolute and for sum-reduced curvature, the same for all groups; None takes
            the ``default_damping`` of the class.
        momentum: μ in [0, 1).
        weight_decay: decoupled: a step multiplies the weights by 1 − η·weight_decay.
        max_norm: the update over all parameters is scaled down to this length; None never does.
        others: settings of the method, the same for all groups.

    Raises:
        InputError: a setting is out of range, or the groups disagree on a shared one.
    """

    default_damping: ClassVar[float]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        damping: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping": self.default_damping if damping is None else damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
            **(others or {}),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_groups([*self.param_groups, {**self.defaults, **param_group}])
        super().add_param_group(param_group)

    @abstractmethod
    def direction(self, problem: Problem, damping: float) -> Tensor:
        """The update d on a problem, shape ``(P,)``; the step is −η d."""

    # torch's own signature has a closure that returns a loss.
    def step(  # type: ignore[override]
        self, problem: ProblemSource | None = None, closure: Callable[[], Problem] | None = None
    ) -> Tensor:
        """Move the weights.

        Args:
            problem: the `Problem` of the batch at the present weights, or a function that returns
                it. A model in train mode is an error: see ``docs/training.md``.
            closure: such a function, under torch's name for it.

        Returns:
            The batch's mean loss (1/N) Σ_n ℓ_n before the step, in nats: float64, 0-d.

        Raises:
            InputError: there is no problem, or two; its trainable parameters are not the
                optimizer's; a group's setting is out of range, or the groups disagree on a shared
                one.
            ModelError: the weights have changed since the problem was made.
            EngineError: no engine can treat the model on this batch.
            NumericalError: the update is not finite, not defined on this batch, or not accurate
                enough.
        """
        _check_groups(self.param_groups)
        if problem is not None and closure is not None:
            raise InputError(f"{type(self).__name__}.step takes a problem or a closure, not both")
        source = problem if closure is None else closure
        with torch.enable_grad():
            batch = source() if callable(source) else source
        if not isinstance(batch, Problem):
            raise InputError(
                f"{type(self).__name__}.step needs the ngeval.Problem of the batch, or a function "
                f"that returns one, not {type(batch).__name__}: "
                "optimizer.step(first_problem.with_batch(inputs, targets))"
            )
        names = self._names_of(batch)
        updates = self._clipped(batch, self._direction(batch, self.shared("damping")))
        self._apply({parameter: updates[name] for name, parameter in names.items()})
        return batch.loss.mean()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of the same class and of parameters of the same shapes.

        Raises:
            InputError: the state is of another optimizer or of another model, a setting in it is
                out of range, or its groups disagree on a shared one; nothing has changed.
        """
        foreign = {*SHARED} - self.defaults.keys()
        check_state(self, state_dict, (MOMENTUM,), foreign)
        _check_groups(state_dict["param_groups"])
        super().load_state_dict(dict(state_dict))

    def _direction(self, problem: Problem, damping: float) -> Tensor:
        """The update; if a plan made for an earlier batch fails, with a new plan for this batch."""
        try:
            return self.direction(problem, damping)
        except Exception as error:  # the model's code can raise anything
            expected = isinstance(error, ModelError | UnsupportedLayerError)
            if is_out_of_memory(error) or (isinstance(error, NgevalError) and not expected):
                raise
            if not problem.choose_engine_again():
                raise
        try:
            return self.direction(problem, damping)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, NgevalError):
                raise
            raise EngineError(
                f"the per-sample gradients of this batch cannot be computed ({error}), even with a "
                "new plan for it; try engine='loop' in the first Problem, and report it"
            ) from error

    def shared(self, name: str) -> Any:
        """The value of a setting in all groups, which a scheduler may have changed."""
        return self.param_groups[0][name]

    @property
    def steps(self) -> int:
        """The number of steps that the state has recorded."""
        return max((int(entry.get(STEP, 0)) for entry in self.state.values()), default=0)

    def _names_of(self, problem: Problem) -> dict[str, Tensor]:
        """The problem's trainable parameters by name, which must be those of the optimizer.

        A frozen parameter in a group is ignored, as in torch's optimizers.
        """
        originals = problem.function.originals
        trainable = {name: originals[name] for name in problem.function.parameters}
        held = [p for group in self.param_groups for p in group["params"]]
        known, held_ids = set(map(id, trainable.values())), set(map(id, held))
        missing = [name for name, p in trainable.items() if id(p) not in held_ids]
        extra = [p for p in held if p.requires_grad and id(p) not in known]
        if missing or extra:
            described = [f"one of shape {tuple(p.shape)}" for p in extra]
            raise InputError(
                "the optimizer's parameters are not the trainable ones of the problem's model: "
                f"missing {listed(missing) or 'none'}; unexpected {listed(described) or 'none'}; "
                "build the optimizer on this model's parameters()"
            )
        return trainable

    def _clipped(self, problem: Problem, update: Tensor) -> dict[str, Tensor]:
        """The update by parameter, in the parameters' dtypes, no longer than ``max_norm``."""
        max_norm = self.shared("max_norm")
        if max_norm is not None:
            length = float(torch.linalg.vector_norm(update, dtype=torch.float64))
            if length > max_norm:
                update = update * (max_norm / length)
        originals = problem.function.originals
        split = problem.function.unflatten(update)
        parts = {name: part.to(originals[name].dtype) for name, part in split.items()}
        narrowed = any(part.dtype != update.dtype for part in parts.values())
        if narrowed or not is_finite(update):
            for name, part in parts.items():
                if not is_finite(part):
                    raise NumericalError(
                        f"the update of {name!r} is NaN or infinite; raise the damping from "
                        f"{self.shared('damping'):g}, or try dtype=torch.float64"
                    )
        return parts

    @torch.no_grad()
    def _apply(self, updates: dict[Tensor, Tensor]) -> None:
        """Update the weights and the state; called when no error can be raised any more."""
        step = self.steps + 1
        for group in self.param_groups:
            moved = [p for p in group["params"] if p in updates]
            if not moved:
                continue
            rate, decay = float(group["lr"]), float(group["weight_decay"])
            steps = [self._momentum(p, updates[p], float(group["momentum"])) for p in moved]
            for parameter in moved:
                self.state[parameter][STEP] = step
            if decay:
                torch._foreach_mul_(moved, 1 - rate * decay)
            torch._foreach_add_(moved, steps, alpha=-rate)

    def _momentum(self, parameter: Tensor, update: Tensor, momentum: float) -> Tensor:
        """The m of a parameter, which is stored in the state if there is momentum."""
        if not momentum:
            return update
        state = self.state[parameter]
        if MOMENTUM in state:
            # The model may have been moved to another dtype or device.
            state[MOMENTUM] = state[MOMENTUM].to(update).mul_(momentum).add_(update)
        else:
            state[MOMENTUM] = update.clone(memory_format=torch.preserve_format)
        buffer: Tensor = state[MOMENTUM]
        return buffer


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check the range of every setting, and that the groups agree on the shared ones."""
    for group in groups:
        for name, numbers in RANGES.items():
            if name in group and not (name == "max_norm" and group[name] is None):
                number_in(group[name], name, numbers)
        for name in SHARED:
            first, value = groups[0].get(name), group.get(name)
            if value != first:
                raise InputError(
                    f"{name} is a setting of the whole update, but two parameter groups have "
                    f"{first!r} and {value!r}; give all groups the same"
                )
