"""Batches as training loops have them: pairs, or mappings with labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.model.inputs import Inputs, named_tensors

LABELS = ("labels", "label", "targets", "target", "y")
"""The names of targets in a batch that is a mapping; the other entries are the inputs."""

Batch = tuple[Inputs, Any]
"""The inputs of N samples, and their targets: a tensor, or a mapping for several heads."""

Unpack = Callable[[Any], Batch]
"""A function of a loader's batch that returns its inputs and targets."""


def pair_of(batch: Any, what: str = "a batch", unpack: Unpack | None = None) -> Batch:
    """The inputs and targets of a batch.

    Args:
        batch: a pair (inputs, targets), or a mapping with the targets under one of `LABELS`.
        what: names the batch in messages.
        unpack: turns the batch into a pair first.

    Raises:
        InputError: the batch is something else.
    """
    if unpack is not None:
        batch = unpack(batch)
    if isinstance(batch, Mapping):
        return _split_mapping(batch, what)
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise InputError(
            f"{what} is a {type(batch).__name__}{size}, not a pair (inputs, targets) or a mapping "
            "with labels; where several tensors are inputs, group them: ((a, b), targets) (unpack=)"
        )
    inputs, targets = batch
    if not isinstance(targets, Tensor | Mapping):
        raise InputError(
            f"targets are a {type(targets).__name__}, not a tensor or a dict of tensors, in {what}"
        )
    return inputs, targets


def _split_mapping(batch: Mapping[Any, Any], what: str) -> Batch:
    names = [name for name in LABELS if name in batch]
    if len(names) != 1:
        which = f"several entries of labels ({', '.join(names)})" if names else "no labels"
        raise InputError(
            f"{what} is a mapping with {which}; its entries are {', '.join(map(repr, batch))}, "
            f"and targets are one of {', '.join(LABELS)}: give a pair (inputs, targets)"
        )
    inputs = {key: value for key, value in batch.items() if key != names[0]}
    return inputs, batch[names[0]]


def seeded(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """The batches of a loader that shuffles by torch's global seed, the same for the same seed.

    torch's random state is the same afterwards, and between the batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        remaining = iter(batches)
        state = torch.get_rng_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            try:
                batch = next(remaining)
            except StopIteration:
                return
            state = torch.get_rng_state()
        yield batch


def batches_of(
    loader: Iterable[Any], batch_size: int, num_batches: int | None = None, seed: int = 0
) -> Iterator[Any]:
    """The batches of a loader, which must be of a given size.

    Args:
        loader: a ``DataLoader``, or another iterable that can be iterated over again.
        batch_size: samples in a batch; the last may be smaller.
        num_batches: how many; None is all of them.
        seed: of torch's random numbers.

    Raises:
        InputError: an iterator, or batches of a different size.
    """
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise InputError(
            "load_batches is a function, a DataLoader or a list of batches, not "
            f"{type(loader).__name__}; an iterator can be iterated over only once"
        )
    for number, batch in enumerate(itertools.islice(seeded(loader, seed), num_batches)):
        first = next((tensor for _, tensor in named_tensors(batch) if tensor.ndim), None)
        if number == 0 and first is not None and len(first) != batch_size:
            raise InputError(
                f"the loader's batches have {len(first)} samples, not {batch_size}; give "
                f"--batch-size {len(first)}, or load them in batches of {batch_size}"
            )
        yield batch
