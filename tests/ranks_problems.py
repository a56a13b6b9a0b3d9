"""Problems whose samples are spread over ranks: what each is asked, alone or in a group.

As a script, one rank: ``python ranks_problems.py RANK SIZE STORE OUTPUT``. The ranks meet in a
file, answer all questions as a group of everyone and as a group of the first two, and each writes
its answers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import problems
import torch
import torch.distributed as dist
import zoo_attention
from torch import Tensor, nn

import ngeval
from ngeval import kernel
from ngeval.jacobians import CapturedRows

DAMPINGS = (0.0, 1e-4, 1e-2, 1.0)
METHODS = (
    *("sgd", "ef", "ief", "sf:2", "ng", "diag", "diag-ef", "diag-sf:2", "diag-ief"),
    *("kfac", "ekfac", "kfac-ief", "kfac-sf:2", "kfac:reduce", "block-ng", "adamw:0"),
)
FEW = ("sgd", "ef", "ief", "sf:2", "ng", "diag", "block-ng")
SMALL = ("sgd", "ef", "ief", "ng", "diag")
TIGHT = {"memory": 20_000}

Answers = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model with a batch, and how it is treated.

    Attributes:
        model: a name in `MODELS`.
        samples: N.
        methods: to grade.
        options: of `ngeval.Problem`.
        forced: values of constants of `ngeval.kernel`, which choose the kernel.
        kernel: the kernel's class that comes of it.
    """

    model: str
    samples: int = 7
    methods: tuple[str, ...] = FEW
    options: dict[str, Any] = field(default_factory=dict)
    forced: dict[str, int] = field(default_factory=dict)
    kernel: str = "JacobianKernel"


class Words(nn.Module):
    """An embedding that is also the output layer, a class token, and a layer without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.start = nn.Parameter(torch.randn(1, 3))
        self.head = nn.Linear(3, 6)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids).sum(1) + self.start))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], str]] = {
    "mlp": (problems.mlp, lambda n: torch.randn(n, 4), "categorical"),
    "conv": (problems.conv, lambda n: torch.randn(n, 1, 3, 3), "gaussian:0.5"),
    "tied": (problems.Tied, lambda n: torch.randn(n, 3), "categorical"),
    "sequence": (problems.Sequence, lambda n: torch.randn(n, 3, 3), "categorical"),
    "words": (Words, lambda n: torch.randint(6, (n, 4)), "categorical"),
    "gpt": (zoo_attention.Gpt, lambda n: torch.randint(5, (n, 3)), "categorical"),
}

GRAM = {"EXPLICIT_ENTRIES": 0}
STRIP = {"EXPLICIT_ENTRIES": 0, "DENSE_SIZE": 0}
FREE = {**STRIP, "STRIP_OUTPUTS": 0}

CASES = {
    "mlp": Case("mlp", methods=METHODS),
    "mlp, fewer samples than ranks": Case("mlp", 1, METHODS),
    "mlp, two samples": Case("mlp", 2),
    "mlp, a row at a time": Case(
        "mlp", methods=SMALL, options=TIGHT, forced=GRAM, kernel="GramKernel"
    ),
    "mlp, gram": Case("mlp", 10, forced=GRAM, kernel="GramKernel"),
    "mlp, strip": Case("mlp", forced=STRIP, kernel="StripKernel"),
    "mlp, free": Case("mlp", forced=FREE, kernel="MatrixFreeKernel"),
    "mlp, vmap": Case("mlp", options={"engine": "vmap"}, forced=GRAM, kernel="GramKernel"),
    "conv, loop": Case("conv", options={"engine": "loop"}),
    "conv, gram": Case("conv", methods=METHODS, forced=GRAM, kernel="GramKernel"),
    "tied, gram": Case("tied", forced=GRAM, kernel="GramKernel"),
    "sequence, strip": Case("sequence", methods=METHODS, forced=STRIP, kernel="StripKernel"),
    "words, gram": Case("words", forced=GRAM, kernel="GramKernel"),
    "words, free": Case("words", forced=FREE, kernel="MatrixFreeKernel"),
    "gpt, gram": Case("gpt", forced=GRAM, kernel="GramKernel"),
}


def problem_of(case: Case, group: Any = None, seed: int = 0) -> ngeval.Problem:
    """The same on every rank."""
    build, draw, likelihood = MODELS[case.model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = build().double().eval(), draw(case.samples)
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        with torch.no_grad():
            outputs = model(inputs)
        if likelihood == "categorical":
            targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
        else:
            targets = torch.randn_like(outputs)
    return ngeval.Problem(model, inputs, targets, likelihood, group=group, **case.options)


@contextlib.contextmanager
def forced(case: Case) -> Iterator[None]:
    """With the constants that choose the case's kernel."""
    with contextlib.ExitStack() as stack:
        for name, value in case.forced.items():
            stack.enter_context(mock.patch.object(kernel, name, value))
        yield


def answers(case: Case, group: Any = None) -> Answers:
    """All that is asked of a case."""
    with forced(case):
        problem = problem_of(case, group)
        found: Answers = {}
        table = ngeval.evaluate(problem, case.methods, DAMPINGS, seed=3, gap=1e-12)
        found |= _numbers("table", table)
        assert type(kernel.logit_kernel(problem)).__name__ == case.kernel
        few = [method for method in FEW if method in case.methods]
        metric = ngeval.Metric(problem, [_batch(case, 5), _batch(case, 1), _batch(case, 2)])
        found |= _numbers("metric", ngeval.evaluate(problem, few, DAMPINGS, metric=metric))
        found |= _numbers("layers", ngeval.layer_table(problem, ["sgd", "ief"], [1e-3]))
        found |= _numbers("norms", ngeval.gradient_norms(problem))
        direction = torch.linspace(-1, 1, problem.num_parameters, dtype=torch.float64)
        found["jvp"], found["product"] = problem.jvp(direction), problem.fisher() @ direction
        found["diagonal"] = problem.fisher().diagonal()
        captured = CapturedRows(problem.rows, problem.residual.unsqueeze(1))
        found["captured gram"] = captured.gram()
        weights = torch.linspace(-1, 1, 2 * case.samples, dtype=torch.float64)
        found["combinations"] = captured.combinations(weights.reshape(2, -1))
        found["products"] = captured.products(weights.reshape(case.samples, 2, 1))
        other = problem.with_batch(*_batch(case, 4))
        found |= _numbers("other batch", ngeval.evaluate(other, few, [1e-3]))
    return found


def _batch(case: Case, samples: int) -> tuple[Tensor, Tensor]:
    other = problem_of(Case(case.model, samples), seed=samples)
    return other.function.inputs, other.distribution.targets


def _numbers(name: str, table: Any) -> Answers:
    """A table's columns; texts by how many differ from the first."""
    failed = table[table["status"] == "failed"] if "status" in table else table[:0]
    assert failed.empty, failed[["method", "reason"]].drop_duplicates().values.tolist()
    columns = table.select_dtypes("number")
    return {f"{name} {column}": torch.tensor(columns[column].to_numpy()) for column in columns}


def main(rank: int, size: int, store: str, output: str) -> None:
    """Answer everything as a rank of everyone, and as one of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=size
    )
    two = dist.new_group([0, 1])
    groups = {f"{size} ranks": dist.group.WORLD, **({"2 ranks": two} if rank < 2 else {})}
    found = {
        name: {case: answers(CASES[case], group) for case in CASES}
        for name, group in groups.items()
    }
    torch.save(found, Path(output) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
