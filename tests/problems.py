"""A small zoo of problems: likelihood × model × dtype, each with its dense reference.

Seven samples (a prime, so that no block size divides the batch), three outputs for each position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ngeval
from tests import reference

NUM_SAMPLES = 7
NUM_CLASSES = 3
NUM_POSITIONS = 3
VARIANCE = 0.5
PADDING = -100

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
METHODS = ("sgd", "ef", "ief", "sf", "sf:2", "ng", "diag", "diag-ef", "diag-ef:0.5")


@dataclass(frozen=True)
class Case:
    """A model with its batch, as ngeval and as the reference see it."""

    name: str
    model: nn.Module
    inputs: reference.Inputs
    targets: Tensor
    family: reference.Family

    @property
    def likelihood(self) -> str:
        if self.family.name == "gaussian":
            return f"gaussian:{self.family.variance}"
        return self.family.name

    @property
    def tolerance(self) -> float:
        """What products of the Jacobian are compared to, relative to their norm."""
        single = next(self.model.parameters()).dtype == torch.float32
        return 2e-5 if single else 1e-11

    def problem(self, **options: object) -> ngeval.Problem:
        return ngeval.Problem(self.model, self.inputs, self.targets, self.likelihood, **options)

    def reference(self) -> reference.Dense:
        return reference.build(self.model, self.inputs, self.targets, self.family)


class Sequence(nn.Module):
    """Outputs (N, T, C) whose positions see the earlier positions of their own sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)).cumsum(1))


class Tied(nn.Module):
    """One weight used twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        self.second = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, NUM_CLASSES))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, NUM_CLASSES), (4,)),
    "mlp": (mlp, (4,)),
    "conv": (conv, (1, 3, 3)),
    "sequence": (Sequence, (NUM_POSITIONS, 3)),
    "frozen": (frozen, (4,)),
    "tied": (Tied, (NUM_CLASSES,)),
}

DTYPES = {"float64": torch.float64, "float32": torch.float32}

NAMES = [f"{li}-{mo}-{dt}" for li in LIKELIHOODS for mo in MODELS for dt in DTYPES]
EXACT_NAMES = [name for name in NAMES if name.endswith("float64")]


def make_targets(family: reference.Family, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Random labels of the right shape; a sequence gets padding, uneven between samples."""
    if family.name == "gaussian":
        return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    if family.name == "bernoulli":
        coins = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype)
        return (coins < 0.5).to(outputs.dtype)
    labels = torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator)
    if labels.ndim > 1:
        for n in range(labels.shape[0]):
            labels[n, labels.shape[1] - n % labels.shape[1] :] = family.ignore_index
    return labels


def make(name: str, seed: int = 0, num_samples: int = NUM_SAMPLES) -> Case:
    """A fresh case: its model may be modified."""
    likelihood, model_name, dtype_name = name.split("-")
    build, shape = MODELS[model_name]
    dtype = DTYPES[dtype_name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn((num_samples, *shape), generator=generator, dtype=torch.float64).to(dtype)
    family = reference.Family(likelihood, VARIANCE if likelihood == "gaussian" else 1.0, PADDING)
    with torch.no_grad():
        outputs = model(inputs)
    return Case(name, model, inputs, make_targets(family, outputs, generator), family)


@functools.cache
def case(name: str) -> Case:
    """A shared case: read only."""
    return make(name)


@functools.cache
def problem_of(name: str) -> ngeval.Problem:
    """The shared case as ngeval's problem."""
    return case(name).problem()


@functools.cache
def reference_of(name: str) -> reference.Dense:
    """The shared case as explicit matrices."""
    return case(name).reference()


def labels_of(problem: ngeval.Problem, method: str, seed: int = 0) -> Tensor | None:
    """The labels that ``sf:k`` draws with this seed; None for other methods."""
    family, _, draws = method.partition(":")
    if family != "sf":
        return None
    generator = torch.Generator().manual_seed(seed)
    return problem.distribution.sample(int(draws or 1), generator)


def prepared(
    method: str | Optimizer | ngeval.Method, problem: ngeval.Problem, seed: int = 0
) -> Any:
    """A method's state on a problem, with a kernel of its own."""
    return ngeval.get_method(method).prepare(problem, ngeval.Kernel(problem), seed)


def relative_gap(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    gap = (actual.double().flatten() - expected.double().flatten()).norm()
    return float(gap / expected.double().norm())
