"""Image tasks of the study *optimization*: colour images for an MLP, and a small ViT with LoRA.

Both are made of scikit-learn's digits, so that nothing is downloaded. CIFAR-10 replaces the colour
images where its files are available.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ngeval.errors import TaskError
from ngeval.model.batches import Batch
from ngeval.model.inputs import Inputs, map_tensors
from ngeval.tasks.base import Task, shuffled_batches
from ngeval.tasks.hf.cifar import read_cifar
from ngeval.utils.optional import optional_module

CIFAR_SIZES = (4000, 1000, 2000)
"""Numbers of training, validation and test images of CIFAR-10."""

DIGITS_SIZES = (1197, 300, 300)
RESERVED = range(5)
"""The digits that the ViT is pre-trained on; it is tuned on the other digits."""

VIT = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of one part of the data."""

    inputs: Inputs
    targets: Tensor

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """As `ngeval.Task.load_batches`."""
        for index in shuffled_batches(len(self.targets), batch_size, num_batches, seed):
            yield self._take(index)

    def whole(self) -> list[Batch]:
        """All samples in one batch."""
        return [(self.inputs, self.targets)]

    def _take(self, index: Tensor) -> Batch:
        return map_tensors(self.inputs, lambda tensor: tensor[index]), self.targets[index]


def three_parts(inputs: Tensor, targets: Tensor, sizes: Sequence[int], seed: int) -> list[Samples]:
    """Training, validation and test parts of these sizes, stratified by class."""
    labels = targets.numpy()
    left = np.arange(len(labels))
    parts = []
    for size in sizes[::-1]:
        if size < len(left):
            left, part = train_test_split(
                left, test_size=size, stratify=labels[left], random_state=seed
            )
        else:
            part = left
        index = torch.from_numpy(part)
        parts.append(Samples(inputs[index], targets[index]))
    return parts[::-1]


def make_task(
    name: str, build: Callable[[], nn.Module], parts: Sequence[Samples], description: str
) -> Task:
    """A classification task with training, validation and test parts."""
    train, validation, test = parts
    return Task(
        name,
        build,
        train.batches,
        "categorical",
        validation.whole,
        description,
        load_test=test.whole,
    )


def image_task(data_dir: Path | None = None) -> Task:
    """An MLP 3072-64-64-10 on colour images of 32 × 32.

    Args:
        data_dir: folder with the files of CIFAR-10; None: digits on textures, `coloured_digits`.

    Raises:
        TaskError: the folder holds no such files.
    """
    if data_dir is None:
        return _mlp_task("coloured-digits-mlp", _coloured(), "digits on coloured textures")
    train, test = (read_cifar("cifar10", data_dir, split) for split in ("train", "test"))
    if train is None or test is None:
        raise TaskError(f"{data_dir} holds no files of CIFAR-10 (cifar-10-batches-py or -bin)")
    num_train, num_validation, num_test = CIFAR_SIZES
    parts = [
        Samples(_standardised(images.pixels[span]), torch.from_numpy(images.labels[span]))
        for images, span in (
            (train, slice(num_train)),
            (train, slice(num_train, num_train + num_validation)),
            (test, slice(num_test)),
        )
    ]
    return _mlp_task("cifar10-mlp", parts, f"{num_train:,} images of CIFAR-10")


def _mlp_task(name: str, parts: Sequence[Samples], data: str) -> Task:
    def build() -> nn.Module:
        layers = (nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(*layers)

    return make_task(name, build, parts, f"MLP 3072-64-64-10 on {data}")


def _standardised(pixels: np.ndarray) -> Tensor:
    """Bytes ``(n, 32, 32, 3)`` as rows of numbers around 0."""
    return (torch.from_numpy(pixels).flatten(1).float() / 255 - 0.5) / 0.25


@cache
def _coloured() -> list[Samples]:
    images, labels = load_digits(return_X_y=True)
    pixels = coloured_digits(torch.tensor(images / 16, dtype=torch.float32), seed=0)
    return three_parts(_standardised(pixels), torch.tensor(labels), DIGITS_SIZES, seed=0)


def coloured_digits(images: Tensor, seed: int) -> np.ndarray:
    """Digits as images of CIFAR-10's shape: shifted, in a bright colour on a darker texture.

    Args:
        images: pixels in [0, 1], shape ``(n, 64)``.
        seed: of colours, places and textures.

    Returns:
        Bytes ``(n, 32, 32, 3)``.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    small = images.reshape(-1, 1, 8, 8)
    ink = interpolate(small, size=(26, 26), mode="bilinear", align_corners=False)
    mask = torch.zeros(count, 1, 32, 32)
    corners = torch.randint(7, (count, 2), generator=generator).tolist()
    for index, (down, right) in enumerate(corners):
        mask[index, :, down : down + 26, right : right + 26] = ink[index]
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    texture = interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    colour = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.08 * torch.randn(count, 3, 32, 32, generator=generator)
    pixels = (mask * colour + (1 - mask) * 0.55 * texture + noise).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def vit_lora_task(steps: int, sizes: Sequence[int] = (300, 200, 390)) -> Task:
    """LoRA on a small ViT, which is pre-trained on rotated digits 0 to 4, for the digits 5 to 9.

    Args:
        steps: of the pre-training.
        sizes: of the training, validation and test parts.

    Raises:
        DependencyError: transformers or peft are not installed.
    """
    peft = optional_module("peft")
    inputs, targets = _square_digits()
    others = targets >= len(RESERVED)
    parts = three_parts(inputs[others], targets[others] - len(RESERVED), sizes, seed=0)

    def build() -> nn.Module:
        model = copy.deepcopy(_pretrained_vit(steps))
        model.classifier = nn.Linear(model.config.hidden_size, 10 - len(RESERVED))
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
        )
        return adapted(model, config)

    return make_task("vit-lora", build, parts, "LoRA on a small ViT, digits 5 to 9")


def adapted(model: nn.Module, config: Any) -> nn.Module:
    """A model with a PEFT adapter, without the deprecation warnings that PEFT causes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted_model: nn.Module = optional_module("peft").get_peft_model(model, config)
    return adapted_model


def _square_digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return pixels, torch.tensor(labels)


@cache
def _pretrained_vit(steps: int) -> Any:
    """A ViT that classifies the reserved digits and their rotation."""
    transformers = optional_module("transformers")
    inputs, targets = _square_digits()
    reserved = targets < len(RESERVED)
    rotated = [(inputs[reserved].rot90(k, (2, 3)), 4 * targets[reserved] + k) for k in range(4)]
    samples = Samples(torch.cat([x for x, _ in rotated]), torch.cat([y for _, y in rotated]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ViTConfig(**VIT, num_labels=4 * len(RESERVED))
        model = transformers.ViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for images, labels in samples.batches(64, steps, 0):
            optimizer.zero_grad()
            cross_entropy(model(images).logits, labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
