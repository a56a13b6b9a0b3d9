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

from ngeval.tasks.base import Batch, Task
from ngeval.tasks.builtin import BUILTIN_TASKS
from ngeval.tasks.sampling import shuffled_batches

SPLIT_SEED = 0
HELD_OUT, TEST = 360, 180


@dataclass(frozen=True)
class Split:
    """Inputs and targets for training, validation and testing."""

    train_inputs: Tensor
    train_targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """Batches of training images; see `shuffled_batches`."""
        for chosen in self.indices(batch_size, num_batches, seed):
            yield self.train_inputs[chosen], self.train_targets[chosen]

    def indices(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Tensor]:
        """The indices of the training images in each batch."""
        return shuffled_batches(len(self.train_targets), batch_size, num_batches, seed)

    def validation(self) -> Iterator[Batch]:
        """The images for validation, in one batch."""
        yield self.validation_inputs, self.validation_targets

    def test(self) -> Iterator[Batch]:
        """The images for testing, in one batch."""
        yield self.test_inputs, self.test_targets

    def map(
        self, inputs: Callable[[Tensor], Tensor], targets: Callable[[Tensor], Tensor] | None = None
    ) -> Split:
        """The split with ``inputs(x)`` for the inputs x, and ``targets(x)`` for the targets."""
        parts = (
            (self.train_inputs, self.train_targets),
            (self.validation_inputs, self.validation_targets),
            (self.test_inputs, self.test_targets),
        )
        mapped = [(inputs(x), y if targets is None else targets(x)) for x, y in parts]
        return Split(*(tensor for pair in mapped for tensor in pair))


@cache
def _images() -> Split:
    """The classification split, with flat images ``(n, 64)``."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(
        pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    validation_x, test_x, validation_y, test_y = train_test_split(
        held_x, held_y, test_size=TEST, stratify=held_y, random_state=SPLIT_SEED
    )
    parts = ((train_x, train_y), (validation_x, validation_y), (test_x, test_y))
    tensors = [(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)) for x, y in parts]
    return Split(*(tensor for pair in tensors for tensor in pair))


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
    split = _images()
    return Task(
        "digits-mlp",
        lambda: _mlp(10),
        split.batches,
        "categorical",
        split.validation,
        BUILTIN_TASKS["digits-mlp"].description,
        load_test=split.test,
        load_indices=split.indices,
    )


def digits_cnn() -> Task:
    """A small convolutional network that classifies the digits."""
    images = _images().map(lambda x: _square(x).unsqueeze(1))
    return Task(
        "digits-cnn",
        _cnn,
        images.batches,
        "categorical",
        images.validation,
        BUILTIN_TASKS["digits-cnn"].description,
        load_test=images.test,
        load_indices=images.indices,
    )


def digits_regression() -> Task:
    """A 64-256-256-4 network that predicts the ink's centre, spread and slant.

    Targets are standardised with the training images' mean and deviation; σ² = 1, so the loss
    is half the squared error.
    """
    split = _images()
    train = shape_moments(_square(split.train_inputs))
    mean, deviation = train.mean(0), train.std(0)
    moments = split.map(lambda x: x, lambda x: (shape_moments(_square(x)) - mean) / deviation)
    return Task(
        "digits-regression",
        lambda: _mlp(4),
        moments.batches,
        "gaussian:1",
        moments.validation,
        BUILTIN_TASKS["digits-regression"].description,
        load_test=moments.test,
        load_indices=moments.indices,
    )
