"""`Task`: what the command line needs to know of a user's model and data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ngeval.errors import NgevalError, TaskError
from ngeval.likelihoods import Likelihood, get_likelihood
from ngeval.model.checks import Inputs, check_inputs
from ngeval.model.function import Output

Batch = tuple[Inputs, Tensor]
LoadBatches = Callable[[int, int | None, int], Iterable[Batch]]
LoadIndices = Callable[[int, int | None, int], Iterable[Iterable[int]]]

MOST_SAMPLES = 10_000_000
"""In a run's batches: no manifest tells the indices of more."""


@dataclass(frozen=True)
class Task:
    """A named model with data and likelihood.

    Attributes:
        name: as it appears in result tables.
        build_model: makes the network, ``() -> nn.Module``; weights come from the checkpoint.
        load_batches: ``(batch_size, num_batches, seed) -> iterable of (inputs, targets)``, the
            same batches for the same arguments. ``ngeval train`` asks for one pass over the
            training data with ``num_batches=None``.
        likelihood: a name or a `ngeval.Likelihood`.
        load_validation: optional; ``() -> iterable of (inputs, targets)`` of held-out data, for
            the validation figures that ``ngeval train`` reports.
        description: one line for ``ngeval tasks``.
        output: which of the model's outputs is z, as in `ngeval.Problem`.
        load_test: optional; as ``load_validation``, other held-out data, which no choice is made
            by: for the figures of a tuned optimizer that are reported.
        load_indices: optional; which samples of the data are in the batches that ``load_batches``
            gives for the same arguments, in that order: for the manifest beside results.

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
    likelihood: str | Likelihood
    load_validation: Callable[[], Iterable[Batch]] | None = None
    description: str = ""
    output: Output = None
    load_test: Callable[[], Iterable[Batch]] | None = None
    load_indices: LoadIndices | None = None

    def model(self) -> nn.Module:
        """Build the network and check that it is one.

        Raises:
            TaskError: ``build_model`` failed or returned something else.
        """
        with self._errors("build_model"):
            model: Any = self.build_model()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: build_model returned {type(model).__name__}, "
                "not a torch.nn.Module"
            )
        return model

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """The task's batches, each checked to be (inputs, targets) of finite tensors.

        Raises:
            TaskError: ``load_batches`` failed, a batch is something else, or there are fewer
                than asked for.
            InputError: inputs of the wrong kind, empty, or not finite.
        """
        count = 0
        with self._errors("load_batches"):
            batches = iter(self.load_batches(batch_size, num_batches, seed))
        for batch in self._checked(batches, "load_batches"):
            yield batch
            count += 1
            if count == num_batches:
                return
        if num_batches is not None or count == 0:
            raise TaskError(
                f"task {self.name!r}: load_batches gave {count} batches"
                + ("" if num_batches is None else f" of {num_batches} asked for")
            )

    def indices(self, batch_size: int, num_batches: int, seed: int) -> list[list[int]] | None:
        """Which samples of the data the batches hold.

        None where the task does not tell, or where there are more than ten million: a manifest
        is no place for them.

        Raises:
            TaskError: ``load_indices`` failed, or tells of fewer batches than asked for.
        """
        if self.load_indices is None or batch_size * num_batches > MOST_SAMPLES:
            return None
        found, left = list[list[int]](), MOST_SAMPLES
        with self._errors("load_indices"):
            batches = iter(self.load_indices(batch_size, num_batches, seed))
            for batch in itertools.islice(batches, num_batches):
                found.append([int(index) for index in itertools.islice(batch, left + 1)])
                left -= len(found[-1])
                if left < 0:
                    return None
        if len(found) < num_batches:
            raise TaskError(
                f"task {self.name!r}: load_indices tells of {len(found)} batches of {num_batches}"
            )
        return found

    def validation(self) -> Iterator[Batch]:
        """The held-out batches, checked like the others; none if the task has none."""
        yield from self._held_out(self.load_validation, "load_validation")

    def test(self) -> Iterator[Batch]:
        """The batches for testing, checked like the others; none if the task has none."""
        yield from self._held_out(self.load_test, "load_test")

    def _held_out(self, load: Callable[[], Iterable[Batch]] | None, source: str) -> Iterator[Batch]:
        if load is None:
            return
        with self._errors(source):
            batches = iter(load())
        yield from self._checked(batches, source)

    def _checked(self, batches: Iterator[Any], source: str) -> Iterator[Batch]:
        while True:
            with self._errors(source):
                batch = next(batches, None)
            if batch is None:
                return
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TaskError(
                    f"task {self.name!r}: {source} must yield (inputs, targets) pairs, not "
                    f"{type(batch).__name__}"
                )
            inputs, targets = batch
            if not isinstance(targets, Tensor):
                raise TaskError(
                    f"task {self.name!r}: targets are a {type(targets).__name__}, not a tensor"
                )
            check_inputs(inputs)
            yield inputs, targets

    @contextlib.contextmanager
    def _errors(self, source: str) -> Iterator[None]:
        """Say that it was the task's own function that failed."""
        try:
            yield
        except NgevalError:
            raise
        except Exception as error:
            raise TaskError(
                f"task {self.name!r}: {source} failed: {type(error).__name__}: {error}"
            ) from error

    def resolved_likelihood(self) -> Likelihood:
        """The likelihood as an object."""
        return get_likelihood(self.likelihood)
