"""What tests of optimizers share: their problems, real steps to compare with, fingerprints."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ngeval
from ngeval.checkpoints import load_checkpoint
from ngeval.methods.optimizer.build import build_optimizers
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.methods.stage import OptimizerOptions, Stage
from ngeval.tasks import Task
from ngeval.training import Training
from tests import problems
from tests.problems import prepared

THIRD_PARTY = (
    "pytorch_optimizer.SOAP",
    "pytorch_optimizer.Shampoo",
    "pytorch_optimizer.ScalableShampoo",
    "pytorch_optimizer.FAdam",
)
Batch = tuple[Any, Tensor]


def case(dtype: str = "float64", model: str = "mlp", seed: int = 0) -> problems.Case:
    return problems.make(f"categorical-{model}-{dtype}", seed)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Batches of an uneven size for the MLP."""
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def mean_gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """By plain autograd, of the mean cross-entropy."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def train(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], over: Iterable[Batch]
) -> None:
    """Real training steps."""
    for batch in over:
        for parameter, gradient in zip(
            [p for p in model.parameters() if p.requires_grad],
            mean_gradients(model, batch),
            strict=True,
        ):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def build(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """As ngeval builds them, but that FAdam keeps its state in float64."""
    optimizers = build_optimizers(name, model)
    for optimizer in optimizers:
        for key, value in vars(optimizer).items():
            if isinstance(value, torch.dtype) and next(model.parameters()).dtype == torch.float64:
                setattr(optimizer, key, torch.float64)
    return optimizers


def trained(name: str, steps: int) -> tuple[problems.Case, list[torch.optim.Optimizer]]:
    """A float64 MLP after some real steps, with its optimizers."""
    one = case()
    optimizers = build(name, one.model)
    train(one.model, optimizers, batches(steps))
    return one, optimizers


def flat(model: nn.Module) -> Tensor:
    """θ, the trainable parameters in order."""
    parts = [p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]
    return torch.cat(parts).clone()


def step_of(optimizer: Any, problem: ngeval.Problem, seed: int = 0, **options: Any) -> Tensor:
    """The direction that ngeval grades."""
    return prepared(OptimizerStep(optimizer, **options), problem, seed).direction(0.0)


def fingerprint(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """Everything that must not change, as values that can be compared."""
    result: list[Any] = [torch.get_rng_state().tolist()]
    for name, parameter in model.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.clone()
        result.append((name, parameter.detach().clone(), parameter._version, gradient))
    for optimizer in optimizers:
        result.append(copy.deepcopy(optimizer.state_dict()))
        result.append([id(p) for group in optimizer.param_groups for p in group["params"]])
        result.append(sorted(vars(optimizer)))
    return result


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, whatever is nested in what."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and torch.equal(first, second)
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dict__") and not isinstance(first, type) and not callable(first):
        return type(first) is type(second) and same(vars(first), vars(second))
    return type(first) is type(second) and (first is second or first == second)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def load_batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 3):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, x[:, :3].argmax(1)


TASK = Task("argmax", net, load_batches, "categorical")


def run(folder: Path, name: str, epochs: int = 2, **options) -> Path:
    list(Training(TASK, folder, name, epochs=epochs, batch_size=8, **options).run())
    return folder


def graded_at(checkpoint, **options) -> tuple[nn.Module, ngeval.Problem, Stage]:
    """The model at a checkpoint of a run, a problem, and the stage that the method gets."""
    model = net()
    load_checkpoint(model, checkpoint)
    x, y = next(iter(load_batches(9, 1, 77)))
    problem = ngeval.Problem(model.eval(), x, y, "categorical")
    stage = Stage(
        checkpoint.name,
        checkpoint.optimizer,
        checkpoint.metadata.get("optimizer"),
        lambda count: load_batches(8, count, 5),
        OptimizerOptions(**options),
    )
    return model, problem, stage
