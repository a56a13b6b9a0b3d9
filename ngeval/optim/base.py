"""What the exact optimizers share: from an update d of a batch to moved weights.

With p the parameters of a group and d the method's update of the batch,

    m ← μ m + d · min(1, max_norm/‖d‖)        (‖d‖ over all parameters)
    p ← p (1 − η·wd) − η m

with η the learning rate, μ the momentum and wd the decoupled weight decay of the group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngeval.errors import EngineError, InputError, ModelError, NgevalError, NumericalError
from ngeval.fadam.state_checks import as_number, check_state
from ngeval.jacobians.capture import UnsupportedLayerError
from ngeval.model.checks import is_finite
from ngeval.problem.problem import Problem
from ngeval.utils.memory import is_out_of_memory

ProblemSource = Problem | Callable[[], Problem]
"""A problem on the batch, or a function that returns one."""

SHARED = ("damping", "max_norm", "mc_samples", "seed")
"""Settings of the whole update, which all groups must agree on."""

STEP, MOMENTUM = "step", "momentum_buffer"


class ExactOptimizer(Optimizer):
    """An optimizer whose update is that of a method of `ngeval.methods` on the step's batch.

    A step is all or nothing: where an error is raised, no weight and no state has changed.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        """Check the settings.

        Args:
            params: parameters or groups of them, as torch's optimizers take them.
            defaults: ``lr``, ``damping``, ``momentum``, ``weight_decay``, ``max_norm``, and those
                of the method.

        Raises:
            InputError: a setting is out of range, or the groups disagree on a shared one.
        """
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own ``lr``, ``momentum`` and ``weight_decay``.

        Raises:
            InputError: a setting is out of range, or differs where all groups share it.
        """
        _check_settings({**self.defaults, **param_group})
        for name in SHARED if self.param_groups else ():
            own = param_group.get(name, self.defaults.get(name))
            if own != self.param_groups[0].get(name):
                raise _disagreement(name, self.param_groups[0].get(name), own)
        super().add_param_group(param_group)

    @abstractmethod
    def direction(self, problem: Problem, damping: float) -> Tensor:
        """The update d of a problem, which a step goes against: shape ``(P,)``."""

    # torch's own signature has a closure that returns a loss.
    def step(  # type: ignore[override]
        self, problem: ProblemSource | None = None, closure: Callable[[], Problem] | None = None
    ) -> Tensor:
        """Move the weights.

        Args:
            problem: the `Problem` of the batch at the present weights, or a function that returns
                one. A model in train mode is refused: see ``docs/training.md``.
            closure: such a function, under the name that torch has for it.

        Returns:
            The batch's mean loss (1/N) Σ_n ℓ_n before the step, in nats: float64, 0-d.

        Raises:
            InputError: no problem was given, or two; its trainable parameters are not the
                optimizer's; a group's setting is out of range, or the groups disagree on what they
                share.
            ModelError: the problem is of earlier weights.
            EngineError: no engine treats the model on this batch.
            NumericalError: the update is not finite, or not defined on this batch, or not known
                closely enough.
        """
        for group in self.param_groups:
            _check_settings(group)
        if problem is not None and closure is not None:
            raise InputError(f"{type(self).__name__}.step takes a problem or a closure, not both")
        given = problem if closure is None else closure
        with torch.enable_grad():
            found = given() if callable(given) else given
        if not isinstance(found, Problem):
            raise InputError(
                f"{type(self).__name__}.step needs the ngeval.Problem of the batch, or a function "
                f"that returns one, not {type(found).__name__}: "
                "optimizer.step(first_problem.with_batch(inputs, targets))"
            )
        names = self._names_of(found)
        updates = self._clipped(found, self._direction(found, self.shared("damping")))
        self._apply({parameter: updates[name] for name, parameter in names.items()})
        return found.loss.mean()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of the same class and of parameters of the same shapes.

        Raises:
            InputError: it is of another optimizer or of another model, or a setting in it is out
                of range; nothing has changed.
        """
        foreign = {*SHARED} - self.defaults.keys()
        check_state(self, state_dict, (MOMENTUM,), foreign)
        for group in state_dict["param_groups"]:
            _check_settings(group)
        super().load_state_dict(dict(state_dict))

    def _direction(self, problem: Problem, damping: float) -> Tensor:
        """The update; where a plan of another batch fails on this one, by a plan of its own."""
        try:
            return self.direction(problem, damping)
        except Exception as error:
            expected = isinstance(error, ModelError | UnsupportedLayerError)
            if is_out_of_memory(error) or (isinstance(error, NgevalError) and not expected):
                raise
            if not problem.choose_engine_again():
                raise
        try:
            return self.direction(problem, damping)
        except NgevalError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise EngineError(
                f"the per-sample gradients of this batch cannot be made ({error}), also with a "
                "plan of its own; try engine='loop' in the first Problem, and report it"
            ) from error

    def shared(self, name: str) -> Any:
        """A setting that all groups have in common; a scheduler may have changed it.

        Raises:
            InputError: the groups disagree, or the value is out of range.
        """
        values = [group[name] for group in self.param_groups]
        for value in values[1:]:
            if value != values[0]:
                raise _disagreement(name, values[0], value)
        _check_settings({name: values[0]})
        return values[0]

    @property
    def steps(self) -> int:
        """How many steps were made, as the state has it."""
        return max((int(entry.get(STEP, 0)) for entry in self.state.values()), default=0)

    def _names_of(self, problem: Problem) -> dict[str, Tensor]:
        """The problem's trainable parameters by name, which must be those of the optimizer.

        A frozen parameter in a group is left alone, as torch's optimizers do.
        """
        originals = problem.function.originals
        wanted = {name: originals[name] for name in problem.function.parameters}
        held = {id(p) for group in self.param_groups for p in group["params"]}
        missing = [name for name, p in wanted.items() if id(p) not in held]
        known = {id(p): name for name, p in wanted.items()}
        extra = [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in known
        ]
        if missing or extra:
            described = [f"one of shape {tuple(p.shape)}" for p in extra]
            raise InputError(
                "the optimizer's parameters are not the trainable ones of the problem's model: "
                f"missing {_listed(missing)}; too many {_listed(described)}; make the optimizer "
                "of this model's parameters()"
            )
        return wanted

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
                        f"the update of {name!r} is NaN or infinite; raise the damping (now "
                        f"{self.shared('damping'):g}), or try dtype=torch.float64"
                    )
        return parts

    @torch.no_grad()
    def _apply(self, updates: dict[Tensor, Tensor]) -> None:
        """Move the weights and the state; nothing can fail any more."""
        step = self.steps + 1
        for group in self.param_groups:
            moved = [p for p in group["params"] if p in updates]
            if not moved:
                continue
            rate, decay = float(group["lr"]), float(group["weight_decay"])
            steps = self._momenta(moved, [updates[p] for p in moved], float(group["momentum"]))
            for parameter in moved:
                self.state[parameter][STEP] = step
            if decay:
                torch._foreach_mul_(moved, 1 - rate * decay)
            torch._foreach_add_(moved, steps, alpha=-rate)

    def _momenta(
        self, parameters: list[Tensor], updates: list[Tensor], momentum: float
    ) -> list[Tensor]:
        """The m of each parameter, which the state keeps where there is momentum."""
        if not momentum:
            return updates
        buffers = []
        for parameter, update in zip(parameters, updates, strict=True):
            state = self.state[parameter]
            if MOMENTUM in state:
                # The model may have been brought to another dtype or device.
                state[MOMENTUM] = state[MOMENTUM].to(update).mul_(momentum).add_(update)
            else:
                state[MOMENTUM] = update.clone(memory_format=torch.preserve_format)
            buffers.append(state[MOMENTUM])
        return buffers


def _check_settings(settings: dict[str, Any]) -> None:
    """Each that is there is in its range."""
    ranges: dict[str, tuple[Callable[[float], bool], str]] = {
        "lr": (lambda x: x >= 0, "≥ 0"),
        "damping": (lambda x: x >= 0, "≥ 0"),
        "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "weight_decay": (lambda x: x >= 0, "≥ 0"),
        "max_norm": (lambda x: x > 0, "> 0, or None"),
        "mc_samples": (lambda x: x >= 1 and x == int(x), "a whole number ≥ 1"),
        "seed": (lambda x: x == int(x), "a whole number"),
    }
    for name, (allowed, words) in ranges.items():
        value: Any = settings.get(name)
        if name not in settings or (name == "max_norm" and value is None):
            continue
        number = as_number(value)
        if not (math.isfinite(number) and allowed(number)):
            raise InputError(f"{name} must be {words}, not {value!r}")


def _disagreement(name: str, one: Any, other: Any) -> InputError:
    return InputError(
        f"{name} is one setting of the whole update, but two parameter groups have {one!r} and "
        f"{other!r}; give all groups the same"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "none"
