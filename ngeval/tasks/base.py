"""`Task`: a model with its data and its likelihood, as the command line needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ngeval.errors import InputError, TaskError, foreign_errors
from ngeval.likelihoods import Likelihood, Loss, get_likelihood
from ngeval.model.batches import Batch, Unpack, batches_of, pair_of
from ngeval.model.inputs import check_inputs, named_tensors
from ngeval.model.outputs import Output

LoadBatches = Callable[[int, int | None, int], Iterable[Any]] | Iterable[Any]
LoadIndices = Callable[[int, int | None, int], Iterable[Iterable[int]]]

MAX_SAMPLES = 10_000_000
"""The most samples of a run whose indices a manifest records."""


@dataclass(frozen=True)
class Task:
    """A model with data and a likelihood, under one name.

    Three things are needed: a function that builds the model, one that loads batches, and a
    likelihood. The rest is optional. The methods below call those functions and check what they
    return, so that an error names the task and the function that it comes from.

    Attributes:
        name: the name in result tables.
        build_model: builds the network, ``() -> nn.Module``; its weights are then loaded from a
            checkpoint.
        load_batches: ``(batch_size, num_batches, seed) -> iterable of (inputs, targets)``; equal
            arguments must give equal batches. ``num_batches=None`` is one pass over the training
            data, which ``ngeval train`` needs. Or a ``torch.utils.data.DataLoader``, or another
            iterable of batches that can be iterated over again: its batches are taken as they
            are, with torch's global seed set to ``seed``, and must be of ``batch_size`` samples.
            A batch is a pair, or a mapping with the targets under ``"labels"``.
        likelihood: a name, such as ``"categorical"``, a loss of torch, a dict of losses, or a
            `ngeval.Likelihood`; see `ngeval.Problem`.
        load_validation: ``() -> iterable of (inputs, targets)`` of held-out data, on which
            ``ngeval train`` reports the loss and stops early.
        description: one line about the task.
        output: which of the model's outputs is z; see `ngeval.Problem`.
        load_test: as ``load_validation``, for data on which no choice is based.
        unpack: a function of a batch that returns its inputs and targets.
        load_indices: as ``load_batches``, the indices of the samples in each batch; the manifest
            beside the results records them.

    Example:
        >>> import torch, ngeval
        >>> def load_batches(batch_size, num_batches, seed):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     for _ in range(num_batches or 10):
        ...         x = torch.randn(batch_size, 3, generator=generator)
        ...         yield x, (x[:, 0] > 0).long()
        >>> task = ngeval.Task("signs", lambda: torch.nn.Linear(3, 2), load_batches, "categorical")
        >>> len(list(task.batches(batch_size=8, num_batches=2, seed=0)))
        2
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_batches: LoadBatches
    likelihood: Loss
    load_validation: Callable[[], Iterable[Batch]] | None = None
    description: str = ""
    output: Output = None
    load_test: Callable[[], Iterable[Batch]] | None = None
    load_indices: LoadIndices | None = None
    unpack: Unpack | None = None

    def model(self) -> nn.Module:
        """Build the network.

        Raises:
            TaskError: ``build_model`` fails or returns something else.
        """
        with self._errors("build_model"):
            model: Any = self.build_model()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: build_model returned {type(model).__name__}, "
                "not a torch.nn.Module"
            )
        return model

    def resolved_likelihood(self) -> Likelihood:
        """The likelihood as an object.

        Raises:
            InputError: the likelihood's name is unknown.
        """
        return get_likelihood(self.likelihood)

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """The batches of training data.

        Args:
            batch_size: samples in a batch.
            num_batches: how many batches; None is one pass over the data.
            seed: for the choice and the order of samples.

        Raises:
            TaskError: ``load_batches`` fails, yields something else, or yields fewer batches.
            InputError: inputs of the wrong type, empty, or not finite.
        """
        count, samples = 0, 0
        for batch in self._loaded("load_batches", batch_size, num_batches, seed):
            yield batch
            count += 1
            samples += len(next(named_tensors(batch))[1])
            if count == num_batches:
                return
        if num_batches is not None or count == 0:
            raise TaskError(
                f"task {self.name!r}: load_batches gave {count} batches"
                + ("" if num_batches is None else f" of {num_batches} asked for")
                + f", {samples} samples in all; lower --num-batches or --batch-size ({batch_size})"
            )

    def indices(self, batch_size: int, num_batches: int, seed: int) -> list[list[int]] | None:
        """The indices of the samples in the batches of `batches` with the same arguments.

        Returns:
            One list for each batch; None if the task does not provide them, or if there are more
            than ten million.

        Raises:
            TaskError: ``load_indices`` fails or yields fewer batches.
        """
        if self.load_indices is None or batch_size * num_batches > MAX_SAMPLES:
            return None
        indices, room = list[list[int]](), MAX_SAMPLES
        with self._errors("load_indices"):
            batches = iter(self.load_indices(batch_size, num_batches, seed))
            for batch in itertools.islice(batches, num_batches):
                indices.append([int(index) for index in itertools.islice(batch, room + 1)])
                room -= len(indices[-1])
                if room < 0:
                    return None
        if len(indices) < num_batches:
            raise TaskError(
                f"task {self.name!r}: load_indices gave {len(indices)} batches of {num_batches} "
                "asked for"
            )
        return indices

    def validation(self) -> Iterator[Batch]:
        """The batches of held-out data, checked as in `batches`; none if the task has none."""
        if self.load_validation is not None:
            yield from self._loaded("load_validation")

    def test(self) -> Iterator[Batch]:
        """The batches of test data, checked as in `batches`; none if the task has none."""
        if self.load_test is not None:
            yield from self._loaded("load_test")

    def _loaded(self, source: str, *arguments: Any) -> Iterator[Batch]:
        """What one of the task's own functions yields, as soon as it is checked."""
        load = getattr(self, source)
        with self._errors(source):
            batches: Iterator[Any] = iter(
                load(*arguments) if callable(load) else batches_of(load, *arguments)
            )
        while True:
            with self._errors(source):
                batch = next(batches, None)
            if batch is None:
                return
            with self._errors(source):
                try:
                    inputs, targets = pair_of(batch, unpack=self.unpack)
                except InputError as error:
                    raise TaskError(f"task {self.name!r}: {source}: {error}") from error
            check_inputs(inputs)
            yield inputs, targets

    def _errors(self, source: str) -> AbstractContextManager[None]:
        """Turn any error of the task's own function into a `TaskError` that names it."""
        return foreign_errors(TaskError, f"task {self.name!r}: {source} failed")


def shuffled_batches(
    size: int, batch_size: int, num_batches: int | None, seed: int
) -> Iterator[Tensor]:
    """Indices of the samples in each batch, without replacement within a pass over the data.

    Without ``num_batches`` it is one pass over the ``size`` samples, whose last batch can be
    smaller.
    """
    if not 1 <= batch_size <= size:
        raise TaskError(f"batch size {batch_size} must be from 1 to {size}, the number of samples")
    generator = torch.Generator().manual_seed(seed)
    if num_batches is None:
        yield from torch.randperm(size, generator=generator).split(batch_size)
        return
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_batches):
        if len(order) < batch_size:
            order = torch.randperm(size, generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield chosen
