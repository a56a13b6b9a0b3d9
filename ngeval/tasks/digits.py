"""Tasks on real images that need no download: scikit-learn's 1,797 handwritten digits, 8 × 8.

The split is fixed: 1,437 training and 360 held-out images, stratified by digit. Pixels are
scaled to [0, 1] by their known maximum, 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ngeval.tasks.base import Batch, Task
from ngeval.tasks.sampling import shuffled_batches

SPLIT_SEED = 0
HELD_OUT = 360


@dataclass(frozen=True)
class Split:
    """Inputs and targets, training and held out."""

    train_inputs: Tensor
    train_targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """Batches without replacement within a pass over the shuffled training images.

        ``num_batches=None`` is one whole pass, its last batch possibly smaller.
        """
        for chosen in shuffled_batches(len(self.train_targets), batch_size, num_batches, seed):
            yield self.train_inputs[chosen], self.train_targets[chosen]

    def validation(self) -> Iterator[Batch]:
        """The held-out images in one batch."""
        yield self.held_inputs, self.held_targets


@cache
def _images() -> tuple[Split, Tensor, Tensor]:
    """The classification split, and both parts' images as ``(n, 8, 8)``."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(
        pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    train_x, held_x = (torch.tensor(part / 16, dtype=torch.float32) for part in (train_x, held_x))
    split = Split(train_x, torch.tensor(train_y), held_x, torch.tensor(held_y))
    return split, train_x.reshape(-1, 8, 8), held_x.reshape(-1, 8, 8)


def shape_moments(images: Tensor) -> Tensor:
    """Four continuous properties of an image's ink, from its moments: shape ``(n, 4)``.

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
    split, _, _ = _images()
    return Task(
        "digits-mlp",
        lambda: _mlp(10),
        split.batches,
        "categorical",
        split.validation,
        "MLP 64-256-256-10 on scikit-learn's handwritten digits (softmax cross-entropy)",
    )


def digits_cnn() -> Task:
    """A small convolutional network that classifies the digits."""
    split, train_images, held_images = _images()
    images = Split(
        train_images.unsqueeze(1), split.train_targets, held_images.unsqueeze(1), split.held_targets
    )
    return Task(
        "digits-cnn",
        _cnn,
        images.batches,
        "categorical",
        images.validation,
        "three convolutions on the same digits, 15,338 parameters (softmax cross-entropy)",
    )


def digits_regression() -> Task:
    """A 64-256-256-4 network that predicts the ink's centre, spread and slant.

    Targets are standardised with the training images' mean and deviation; σ² = 1, so the loss
    is half the squared error.
    """
    split, train_images, held_images = _images()
    train, held = shape_moments(train_images), shape_moments(held_images)
    mean, deviation = train.mean(0), train.std(0)
    moments = Split(
        split.train_inputs, (train - mean) / deviation, split.held_inputs, (held - mean) / deviation
    )
    return Task(
        "digits-regression",
        lambda: _mlp(4),
        moments.batches,
        "gaussian:1",
        moments.validation,
        "the MLP predicts centre, spread and slant of the ink (Gaussian, σ² = 1)",
    )
