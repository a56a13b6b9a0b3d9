"""``OptimizerStep``: the step that an optimizer would take now, as a method."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ngeval.curvature.kernel import Kernel
from ngeval.errors import InputError, NgevalError, NumericalError
from ngeval.methods.base import UndampedState
from ngeval.methods.optimizer.clone import Clones, clone_optimizers, isolated_steps, unwrapped
from ngeval.methods.optimizer.gradients import Batches, Gradients, batch_gradient, batch_gradients
from ngeval.methods.stage import check_reduction
from ngeval.problem.problem import Problem
from ngeval.utils.memory import is_out_of_memory
from ngeval.utils.text import listed

CACHED_SHARE = 16
"""Warm copies are cached if they take at most 1/16 of the memory budget."""

FALLBACK_RATE = 1e-3
"""The learning rate if every one is 0 and none is known from an earlier step."""


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """The step that an optimizer would take now, d = θ − θ′, with its present state.

    Copies of the optimizer and of its parameters take the step, on the gradient of the problem's
    batch. The parameters, their ``.grad``, the optimizer's state and groups and torch's random
    generators do not change. The copies are float64, so that d is accurate even if a step is a
    millionth of θ; an optimizer that cannot step in float64 steps in the parameters' dtype, and a
    note records it. The step does not depend on the damping λ.

    Attributes:
        optimizer: built on the problem's model; or several, each with a part of its parameters.
        reduction: of the training loss, which the state depends on: ``"mean"`` over samples,
            ``"token-mean"`` over unmasked positions, or ``"sum"``.
        weight_decay: whether the step includes the optimizer's weight decay, which is not part of
            the gradient of the loss.
        warmup: batches ``(inputs, targets)``, or a function that returns them. Before the graded
            step the copies take a step on each of them, and θ is restored after each, so that
            momentum and second moments are those accumulated at this θ.
        name: in tables; the default is the classes' names, as ``"adam"``, with the number of
            warm-up batches, as ``"adam:20"``, or ``"adam:warm"`` if that is unknown.

    Raises:
        InputError: the optimizer is not one, or needs a closure; the batches can be iterated over
            only once; there is no such reduction.

    Example:
        >>> import torch, ngeval
        >>> model = torch.nn.Linear(3, 2)
        >>> problem = ngeval.Problem(model, torch.eye(3), torch.tensor([0, 1, 1]), "categorical")
        >>> adam = torch.optim.Adam(model.parameters())
        >>> state = OptimizerStep(adam).prepare(problem, ngeval.Kernel(problem))
        >>> state.direction(0.0).abs().max() < 1.001e-3
        tensor(True)
    """

    optimizer: Optimizer | Sequence[Optimizer]
    reduction: str = "mean"
    weight_decay: bool = True
    warmup: Batches | Callable[[], Batches] | None = None
    name: str = ""
    # Warm copies by θ and dtype; None for optimizers whose state may change between two steps.
    warm: dict[Any, tuple[Clones, list[str]]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        for optimizer in self.optimizers:
            _check_closure(optimizer)
        if isinstance(self.warmup, Iterator):
            raise InputError(
                "warmup is an iterator, which can be iterated over only once; give a list, a "
                "DataLoader, or a function that returns an iterable of batches"
            )
        if not self.name:
            name = "+".join(type(optimizer).__name__.lower() for optimizer in self.optimizers)
            if self.warmup is not None:  # a DataLoader of a stream has __len__ but no length
                count = operator.length_hint(self.warmup, -1)
                name += ":warm" if count < 0 else f":{count}"
            object.__setattr__(self, "name", name)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, without wrappers that only forward a step."""
        return as_optimizers(self.optimizer)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> UndampedState:
        """Take the step on copies, in float64; the seed is for an optimizer that draws numbers.

        Raises:
            InputError: the optimizer holds none of the model's parameters, or cannot step on a
                gradient alone.
            NumericalError: the step is NaN or infinite.
        """
        names = _names_of(problem, self.optimizers)
        missing = [name for name in problem.function.parameters if name not in names.values()]
        with torch.inference_mode(False):
            steps, notes = self._steps(problem, names, seed)
        for name, part in steps.items():
            if not bool(torch.isfinite(part).all()):
                raise NumericalError(
                    f"{self.name}: the step of {name!r} is NaN or infinite (is its state?)"
                )
        if missing:
            notes.append(f"no optimizer holds {listed(missing)}: their update is 0")
        for name in missing:
            parameter = problem.function.parameters[name]
            steps[name] = torch.zeros_like(parameter, dtype=torch.float64)
        step = torch.cat([steps[name].reshape(-1) for name in problem.function.parameters])
        left = sum(steps[name].numel() for name in missing)
        coverage = 100.0 * (1.0 - left / problem.num_parameters)
        if not bool(step.any()):
            notes.append("the step is 0 (some optimizers only set up their state in the first)")
        return UndampedState(problem, step, coverage, tuple(notes))

    def _steps(
        self, problem: Problem, names: dict[int, str], seed: int
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The steps by parameter name, in float64 if the optimizer can; and notes."""
        failures: list[Exception] = []
        for dtype in (torch.float64, None):
            try:
                steps, notes = self._steps_in(dtype, problem, names, seed)
            except NgevalError:
                raise
            except Exception as error:  # the step of a third-party class can raise anything
                if is_out_of_memory(error):
                    raise
                failures.append(error)
                continue
            if failures:
                why = _in_a_line(failures[0])
                notes.append(f"stepped in the parameters' dtype, where d is rounded ({why})")
            return steps, notes
        last = failures[-1]
        message = f"{self.name}: step() failed with {_in_a_line(last)}{_hint(last)}"
        raise InputError(message) from last

    def _steps_in(
        self, dtype: torch.dtype | None, problem: Problem, names: dict[int, str], seed: int
    ) -> tuple[dict[str, Tensor], list[str]]:
        clones, notes = self._warm_copies(dtype, problem, names)
        with isolated_steps(problem.device, seed):
            gradients = batch_gradient(problem, self.reduction)
            _step(clones, gradients, names)
        idle = [name for name in names.values() if name not in gradients]
        if idle:
            notes.append(f"the loss does not depend on {listed(idle)}: no gradient, no step")
        steps = {
            names[key]: original.detach() - clone.detach().to(torch.float64)
            for key, (original, clone) in clones.parameters.items()
            if key in names
        }
        return steps, notes

    def _warm_copies(
        self, dtype: torch.dtype | None, problem: Problem, names: dict[int, str]
    ) -> tuple[Clones, list[str]]:
        """Copies that are ready for the graded step, and notes; the batch is not used."""
        if self.warmup is None or self.warm is None:
            return self._warmed_up(dtype, problem, names)
        key = (dtype, problem.dtype, *problem.function.versions.items())
        if key not in self.warm:
            clones, notes = self._warmed_up(dtype, problem, names)
            if clones.num_bytes > problem.rows.memory // CACHED_SHARE:
                return clones, notes
            self.warm.clear()
            self.warm[key] = clones, notes
        clones, notes = self.warm[key]
        return clones.again(), [*notes]

    def _warmed_up(
        self, dtype: torch.dtype | None, problem: Problem, names: dict[int, str]
    ) -> tuple[Clones, list[str]]:
        clones = clone_optimizers(self.optimizers, dtype)
        notes = [f"step hooks of {name} are left out" for name in clones.hooked]
        notes += _ensure_rate(clones)
        if not self.weight_decay:
            for group in clones.groups():
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0
        if self.warmup is not None:
            with isolated_steps(problem.device, 0):  # the same for every graded batch
                for gradients in batch_gradients(problem, self.warmup, self.reduction):
                    _step(clones, gradients, names)
                    clones.put_back()
        return clones, notes


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """One or several optimizers as a list, without wrappers that only forward a step."""
    several: list[Any] = [*optimizer] if isinstance(optimizer, list | tuple) else [optimizer]
    if not several or not all(isinstance(each, Optimizer) for each in several):
        raise InputError(
            "optimizer must be a torch.optim.Optimizer or a list of them, not "
            f"{type(optimizer).__name__}; for another update rule, write its step as a subclass of "
            "torch.optim.Optimizer, or grade the direction with problem.gamma({name: step})"
        )
    return [unwrapped(each) for each in several]


def _names_of(problem: Problem, optimizers: Sequence[Optimizer]) -> dict[int, str]:
    """The names of the trainable parameters that the optimizers hold, by ``id``."""
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    graded = problem.function.parameters
    names = {id(p): n for n, p in problem.function.model.named_parameters() if n in graded}
    if not names.keys() & held:
        raise InputError(
            "the optimizer holds none of the problem's trainable parameters; build it on "
            "model.parameters() of the same model as the problem (a copy, or a model that was "
            "moved or wrapped later, has different ones)"
        )
    return {key: name for key, name in names.items() if key in held}


def _check_closure(optimizer: Optimizer) -> None:
    """Check that an optimizer's step does not evaluate the loss."""
    parameters = inspect.signature(type(optimizer).step).parameters
    if "problem" in parameters:  # a class of ngeval.optim, which cannot be imported here
        name = type(optimizer).__name__
        raise InputError(
            f"ngeval.optim.{name} steps on a Problem, not on a gradient: grade the method "
            f"{name.lower()!r} itself, which is its update before momentum and clipping"
        )
    closure = parameters.get("closure")
    needed = closure is not None and closure.default is inspect.Parameter.empty
    if isinstance(optimizer, LBFGS) or needed:
        raise InputError(
            f"{type(optimizer).__name__} evaluates the loss within its step (a closure), so its "
            "step does not follow from one gradient and cannot be graded; grade a direction with "
            "problem.gamma instead"
        )


def _ensure_rate(clones: Clones) -> list[str]:
    """If every learning rate is 0 (the end of a schedule), take the initial ones, with a note."""
    groups = [group for group in clones.groups() if group.get("lr") is not None]
    if not groups or any(float(group["lr"]) for group in groups):
        return []
    for group in groups:
        group["lr"] = float(group.get("initial_lr", 0.0)) or FALLBACK_RATE
    rates = ", ".join(sorted({f"{group['lr']:g}" for group in groups}))
    return [f"every learning rate is 0 here (a schedule's end or start); stepped with {rates}"]


def _step(clones: Clones, gradients: Gradients, names: dict[int, str]) -> None:
    """One step of the copies on a gradient; parameters that it does not have do not move."""
    for key, (_, clone) in clones.parameters.items():
        gradient = gradients.get(names[key]) if key in names else None
        clone.grad = None if gradient is None else gradient.to(clone.dtype)
    for optimizer in clones.optimizers:
        optimizer.step()


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _hint(error: BaseException) -> str:
    """The reason why a step cannot be taken, if its error shows it."""
    text = str(error).lower()
    if "closure" in text:
        return "; a step that evaluates the loss itself (a closure) cannot be graded"
    if "does not require grad" in text:
        return (
            "; it differentiates the gradient a second time, as AdaHessian does, but the gradient "
            "of a graded step has no second derivatives: such a step cannot be graded"
        )
    return ""
