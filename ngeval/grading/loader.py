"""`evaluate_loader`: the batches of a data loader, graded one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim import Optimizer

from ngeval.dampings import check_dampings
from ngeval.errors import InputError
from ngeval.grading.evaluate import DEFAULT_METHODS, evaluate
from ngeval.grading.prepare import add_note
from ngeval.likelihoods import Loss, get_likelihood
from ngeval.methods import Method, get_methods
from ngeval.model.batches import Unpack, pair_of, seeded
from ngeval.model.checks import check_model
from ngeval.model.function import unwrapped
from ngeval.model.inputs import map_tensors
from ngeval.model.outputs import Output
from ngeval.model.precision import AUTO
from ngeval.problem.problem import Problem


def evaluate_loader(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    methods: Iterable[str | Method | Optimizer] = DEFAULT_METHODS,
    dampings: Iterable[float] = (1e-6, 1e-3, 1.0),
    *,
    num_batches: int | None = 5,
    seed: int = 0,
    unpack: Unpack | None = None,
    output: Output = None,
    split: Callable[[Any, int], Any] | None = None,
    dtype: torch.dtype | str = AUTO,
    engine: str = "auto",
    memory: int | None = None,
    damping_scale: str = "absolute",
    natural: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Grade updates by γ on the first batches of a data loader.

    Each batch is a `Problem` of its own: updates are made from it and graded on it. Batches are
    moved to the model's device.

    Args:
        model: in eval mode.
        loader: a ``torch.utils.data.DataLoader``, or any iterable of batches: pairs
            (inputs, targets), or mappings with the targets under ``"labels"``.
        loss: a loss of torch such as ``nn.CrossEntropyLoss()``, the name of a likelihood, …; see
            `Problem`.
        methods: see `evaluate`.
        dampings: λ ≥ 0; see `evaluate`.
        num_batches: how many batches are graded; None: all of them. Where the loader has fewer,
            those are graded, and ``note`` says so.
        seed: torch's seed while the loader shuffles; batch b draws its labels with ``seed`` + b.
        unpack: a function of a batch that returns (inputs, targets), or (inputs, targets,
            weights) with a weight for each sample, for other batches.
        output: which of the model's outputs is z; see `Problem`.
        split: for batches that cannot be indexed by sample; see `Problem`.
        dtype: what the model is graded in; see `Problem`.
        engine: of the Jacobian's rows; see `Problem`.
        memory: bytes to work in.
        damping_scale: what λ multiplies; see `evaluate`.
        natural: also γ_min and bounds on γ_NG; see `evaluate`.
        progress: show a progress bar, if the standard error is a terminal.

    Returns:
        The rows of `evaluate` for each batch, with the column ``batch``, from 0, in front.

    Raises:
        InputError: the loader has no batch, or one that is not a pair; unknown loss or method.
        ModelError, EngineError: see `Problem`.

    Example:
        >>> import torch, ngeval
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> model, loss = torch.nn.Linear(4, 3).eval(), torch.nn.CrossEntropyLoss()
        >>> table = ngeval.evaluate_loader(model, loader, loss, ["ef"], [1e-3], num_batches=2)
        >>> table[["batch", "method"]].values.tolist()
        [[0, 'ef'], [1, 'ef']]
    """
    check_model(unwrapped(model))
    likelihood, lambdas = get_likelihood(loss), check_dampings(dampings)
    resolved = get_methods(methods)
    batches = _first_batches(loader, num_batches, seed, unpack)
    device = next(model.parameters()).device
    steps = len(resolved) + natural
    tables = []
    with _bar(len(batches) * steps, shown=progress) as advance:
        for number, batch in enumerate(batches):
            inputs, *labels = batch
            targets, weights = (map_tensors(part, lambda t: t.to(device)) for part in labels)
            problem = Problem(
                model,
                inputs if split else map_tensors(inputs, lambda t: t.to(device)),
                targets,
                likelihood,
                weights=weights,
                output=output,
                split=split,
                dtype=dtype,
                engine=engine,
                memory=memory,
            )
            table = evaluate(
                problem,
                resolved,
                lambdas,
                damping_scale=damping_scale,
                seed=seed + number,
                natural=natural,
                on_step=advance,
            )
            table.insert(0, "batch", number)
            tables.append(table)
    result = pd.concat(tables, ignore_index=True)
    if num_batches is not None and len(batches) < num_batches:
        note = f"the loader had {len(batches)} batches of {num_batches} asked for (num_batches)"
        result = add_note(result, note)
    return result


def _first_batches(
    loader: Iterable[Any], num_batches: int | None, seed: int, unpack: Unpack | None
) -> list[Any]:
    """The batches as inputs, targets and weights, all of them before any is graded."""
    if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
        raise InputError(f"num_batches must be a positive whole number or None, not {num_batches}")
    if not isinstance(loader, Iterable) or isinstance(loader, torch.Tensor):
        raise InputError(
            "the loader must be a DataLoader or another iterable of batches, not "
            f"{type(loader).__name__}"
        )
    batches = []
    for number, batch in enumerate(itertools.islice(seeded(loader, seed), num_batches)):
        unpacked, weights = batch if unpack is None else unpack(batch), None
        if unpack is not None and isinstance(unpacked, tuple) and len(unpacked) == 3:
            *unpacked, weights = unpacked
        batches.append((*pair_of(unpacked, f"batch {number} of the loader"), weights))
    if not batches:
        raise InputError(
            "the loader has no batch; an iterator that was used before is empty, and so is a "
            "DataLoader with drop_last=True and fewer samples than its batch_size"
        )
    return batches


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on the standard error; gives what is called after each step."""
    from rich.console import Console  # noqa: PLC0415 # slow to import
    from rich.progress import Progress  # noqa: PLC0415

    console = Console(stderr=True)
    hidden = not shown or not (console.is_terminal or console.is_jupyter)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("grading", total=total)
        yield lambda _: bar.advance(task)
