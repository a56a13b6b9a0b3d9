"""Small tasks to train: a net on numbers that are made on the spot, with held-out data."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ngeval.optim import iEF
from ngeval.tasks import Task

SAMPLES = 48


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def load_batches(batch_size, num_batches, seed):
    x, y = data(0, SAMPLES)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
    parts = order.split(batch_size)
    for index in range(len(parts) if num_batches is None else num_batches):
        chosen = parts[index % len(parts)]
        yield x[chosen], y[chosen]


CLASSES = Task(
    "argmax",
    net,
    load_batches,
    "categorical",
    lambda: [data(1, 30)],
    load_test=lambda: [data(2, 20), data(3, 10)],
)
"""Which of three numbers is the largest."""


def _numbers(batch):
    return batch[0], batch[0][:, :3].sin()


NUMBERS = dataclasses.replace(
    CLASSES,
    name="sine",
    load_batches=lambda *args: map(_numbers, load_batches(*args)),
    likelihood="gaussian:1",
    load_validation=lambda: [_numbers(data(1, 30))],
    load_test=lambda: [_numbers(data(2, 20))],
)
"""Three sines."""

ALONE = dataclasses.replace(CLASSES, name="alone", load_validation=None, load_test=None)
"""Nothing held out."""


def _wrong():
    x, _ = data(0, SAMPLES)
    return [(x, x[:, :3].argmin(1))]


MISLED = dataclasses.replace(CLASSES, name="misled", load_validation=_wrong)
"""The better it is trained, the worse its validation loss."""

DROPPED = dataclasses.replace(
    CLASSES,
    name="dropped",
    build_model=lambda: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
)
"""With modules that differ in train and eval mode."""


class Fifth(torch.optim.SGD):
    """An optimizer of somebody else's, which takes four steps and no more."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.left = 4

    def step(self, closure=None):
        if self.left == 0:
            raise KeyError("the fifth step")
        self.left -= 1
        return super().step(closure)


class Own(iEF):
    """A class made from one of the exact ones."""
