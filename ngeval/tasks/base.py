"""`Task`: what the command line needs to know of a user's model and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ngeval.errors import TaskError
from ngeval.functional import Inputs
from ngeval.likelihoods import Likelihood, get_likelihood

Batch = tuple[Inputs, Tensor]
LoadBatches = Callable[[int, int | None, int], Iterable[Batch]]


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

    def model(self) -> nn.Module:
        """Build the network and check that it is one.

        Raises:
            TaskError: ``build_model`` returned something else.
        """
        model: Any = self.build_model()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: build_model returned {type(model).__name__}, "
                "not a torch.nn.Module"
            )
        return model

    def batches(self, batch_size: int, num_batches: int | None, seed: int) -> Iterator[Batch]:
        """The task's batches, each checked to be an (inputs, targets) pair.

        Raises:
            TaskError: a batch is something else, or there are fewer than asked for.
        """
        count = 0
        for batch in self.load_batches(batch_size, num_batches, seed):
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TaskError(
                    f"task {self.name!r}: load_batches must yield (inputs, targets) pairs, not "
                    f"{type(batch).__name__}"
                )
            if not isinstance(batch[1], Tensor):
                raise TaskError(
                    f"task {self.name!r}: targets are a {type(batch[1]).__name__}, not a tensor"
                )
            yield batch[0], batch[1]
            count += 1
            if count == num_batches:
                return
        if num_batches is not None or count == 0:
            raise TaskError(
                f"task {self.name!r}: load_batches gave {count} batches of {num_batches} asked for"
            )

    def resolved_likelihood(self) -> Likelihood:
        """The likelihood as an object."""
        return get_likelihood(self.likelihood)
