"""Per-sample gradient norms, and what updates do to the loss of single samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import pandas as pd
from torch import Tensor

from ngeval.analysis.norms import imbalance
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.row_space import unit_vectors
from ngeval.grading.prepare import Failure, Progress, attempt
from ngeval.jacobians import squared_norms
from ngeval.methods import Method
from ngeval.problem.gamma import loss_change
from ngeval.problem.problem import Problem


def gradient_norms(problem: Problem) -> pd.DataFrame:
    """Per-sample norms: one row for each sample of the batch.

    Returns:
        Columns ``sample``, ``gradient_norm`` (‖g_n‖), ``residual_norm`` (‖u_n‖), ``loss`` (ℓ_n,
        nats). In ``.attrs["imbalance"]``: the largest over the smallest ‖g_n‖ (∞ where one is
        zero).

    Example:
        >>> import torch, ngeval
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.ones(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> table = ngeval.gradient_norms(ngeval.Problem(model, inputs, targets, "gaussian"))
        >>> table["gradient_norm"].tolist(), table.attrs["imbalance"]
        ([1.0, 2.0], 2.0)
    """
    # At unit size, so that the squares of a learnt sample's gradient do not underflow.
    unit, sizes = unit_vectors(problem.residual.unsqueeze(1))
    norms = sizes * squared_norms(problem.rows, unit).sqrt()
    table = pd.DataFrame(
        {
            "sample": range(problem.num_samples),
            "gradient_norm": norms.cpu().numpy(),
            "residual_norm": (sizes * unit.flatten(1).norm(dim=1)).cpu().numpy(),
            "loss": problem.loss.cpu().numpy(),
        }
    )
    table.attrs["imbalance"] = imbalance(table["gradient_norm"])
    return table


def sample_table(
    problem: Problem,
    methods: Iterable[Method],
    damping: float,
    seed: int,
    on_step: Progress | None = None,
) -> pd.DataFrame:
    """`gradient_norms`, and the change of each sample's loss by each method's update.

    Args:
        problem: the model on its batch.
        methods: whose updates.
        damping: λ, absolute.
        seed: for sampled labels.
        on_step: called with the name of each method that is done.

    Returns:
        For each method a column ``loss_change_<method>``, NaN where the method fails; ``reason``
        names the methods that failed, and why.
    """
    table, kernel, failures = gradient_norms(problem), Kernel(problem), []

    def change(method: Method) -> Tensor:
        return loss_change(problem, method.prepare(problem, kernel, seed).direction(damping))

    for method in methods:
        result = attempt(problem.shards, partial(change, method))
        if isinstance(result, Failure):
            failures.append(f"{method.name}: {result.reason}")
        column = math.nan if isinstance(result, Failure) else result.cpu().numpy()
        table[f"loss_change_{method.name}"] = column
        if on_step is not None:
            on_step(method.name)
    return table.assign(reason="; ".join(failures))
