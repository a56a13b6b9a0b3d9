"""Tasks on real images that need no download: scikit-learn's 1,797 handwritten digits, 8 × 8.

The split is fixed and stratified by digit: 1,437 images for training, 180 for validation, 180 for
testing. Pixels are scaled to [0, 1] by their known maximum, 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ngeval.tasks.base import Task, shuffled_batches
from ngeval.tasks.resolve import BUILTIN_TASKS

SPLIT_SEED = 0
HELD_OUT, TEST = 360, 180

Samples = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class Split:
    """The samples for training, validation and testing."""

    train: Samples
    validation: Samples
    test: Samples

    def map(self, change: Callable[[Tensor, Tensor], Samples]) -> Split:
        """The split with ``change(inputs, targets)`` in place of each part."""
        return Split(change(*self.train), change(*self.validation), change(*self.test))

    def task(self, name: str, build_model: Callable[[], nn.Module], likelihood: str) -> Task:
        """The built-in task of a name, whose batches hold samples for training."""
        inputs, targets = self.train

        def indices(batch_size: int, num_batches: int | None, seed: int) -> Iterator[Tensor]:
            return shuffled_batches(len(targets), batch_size, num_batches, seed)

        def batches(batch_size: int, num_batches: int | None, seed: int) -> Iterator[Samples]:
            for chosen in indices(batch_size, num_batches, seed):
                yield inputs[chosen], targets[chosen]

        return Task(
            name,
            build_model,
            batches,
            likelihood,
            description=BUILTIN_TASKS[name].description,
            load_validation=lambda: [self.validation],
            load_test=lambda: [self.test],
            load_indices=indices,
        )


@cache
def _images() -> Split:
    """The images, flat ``(n, 64)``, and their digits."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(
        pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    validation_x, test_x, validation_y, test_y = train_test_split(
        held_x, held_y, test_size=TEST, stratify=held_y, random_state=SPLIT_SEED
    )
    split = Split((train_x, train_y), (validation_x, validation_y), (test_x, test_y))
    return split.map(lambda x, y: (torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)))


def _square(images: Tensor) -> Tensor:
    return images.reshape(-1, 8, 8)


def shape_moments(images: Tensor) -> Tensor:
    """Four properties of the ink of images ``(n, 8, 8)``, from its moments: shape ``(n, 4)``.

    With pixel values as weights: centre of mass (column, row), log of the spread (root mean
    squared distance from the centre), and slant (correlation between column and row).
    """
    grid = torch.arange(8, dtype=images.dtype)
    ink = images.sum((1, 2))
    column = (images.sum(1) @ grid) / ink
    row = (images.sum(2) @ grid) / ink
    dx = grid.reshape(1, 1, 8) - column.reshape(-1, 1, 1)
    dy = grid.reshape(1, 8, 1) - row.reshape(-1, 1, 1)
    xx, yy, xy = ((images * moment).sum((1, 2)) / ink for moment in (dx**2, dy**2, dx * dy))
    return torch.stack([column, row, 0.5 * (xx + yy).log(), xy / (xx * yy).sqrt()], 1)


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits_mlp() -> Task:
    """A 64-256-256-10 network that classifies the digits."""
    return _images().task("digits-mlp", lambda: _mlp(10), "categorical")


def digits_cnn() -> Task:
    """A small convolutional network that classifies the digits."""
    images = _images().map(lambda x, y: (_square(x).unsqueeze(1), y))
    return images.task("digits-cnn", _cnn, "categorical")


def digits_regression() -> Task:
    """A 64-256-256-4 network that predicts the ink's centre, spread and slant.

    Targets are standardised with the training images' mean and deviation; σ² = 1, so the loss
    is half the squared error.
    """
    images = _images()
    moments = shape_moments(_square(images.train[0]))
    mean, deviation = moments.mean(0), moments.std(0)
    split = images.map(lambda x, _: (x, (shape_moments(_square(x)) - mean) / deviation))
    return split.task("digits-regression", lambda: _mlp(4), "gaussian:1")
