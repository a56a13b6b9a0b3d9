"""The task of all faults: a model of 212 parameters, of which a unit takes a moment.

``FAULTS_BATCH=n`` makes batch n one that the model cannot take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ngeval


def build_model() -> nn.Module:
    """Eight inputs, four classes."""
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def load_batches(size: int, count: int | None, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal inputs, and the largest of the first four as label."""
    generator = torch.Generator().manual_seed(seed)
    wide = int(os.environ.get("FAULTS_BATCH", "-1"))
    for batch in range(count or 10):
        inputs = torch.randn(size, 8, generator=generator)
        targets = inputs[:, :4].argmax(1)
        yield (torch.cat([inputs, inputs[:, :1]], 1) if batch == wide else inputs), targets


def save_checkpoints(folder: Path, count: int) -> None:
    """As many models with weights of their own, ``epoch-00.pt`` and on."""
    folder.mkdir(parents=True)
    for epoch in range(count):
        torch.manual_seed(epoch)
        torch.save(build_model().state_dict(), folder / f"epoch-{epoch:02d}.pt")


task = ngeval.Task("faults", build_model, load_batches, "categorical")
