"""Problems whose samples are spread over ranks: what each is asked, alone or in a group.

As a script, one rank: ``python ranks_problems.py RANK SIZE STORE OUTPUT``. The ranks meet in a
file, answer all questions as a group of everyone and as a group of the first two, and each writes
its answers.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import ngeval
import ngeval.curvature.fisher_blocks  # before row_space.DENSE_SIZE, which it imports, is replaced
from ngeval.curvature import row_space as kernel
from ngeval.jacobians import CapturedRows, gram_matrix
from ngeval.model.function import ModelFunction
from tests import problems, zoo_attention

DAMPINGS = (1e-2, 1.0)
METHODS = (
    *("sgd", "ef", "ief", "sf:2", "ng", "diag", "diag-ef", "diag-sf:2", "diag-ief"),
    *("kfac", "ekfac", "kfac-ief", "kfac-sf:2", "kfac:reduce", "block-ng", "adamw:0"),
)
ROWS = ("sgd", "ef", "ief", "sf:2", "diag")
FEW = ("sgd", "ef", "ief", "sf:2", "ng", "diag", "block-ng")
SMALL = ("sgd", "ef", "ng", "diag")
TIGHT = {"memory": 53_000}

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
        dampings: to grade at. Small ones magnify rounding where only products of rows are kept.
        natural: also γ_min, for which the same is true.
    """

    model: str
    samples: int = 7
    methods: tuple[str, ...] = FEW
    options: dict[str, Any] = field(default_factory=dict)
    forced: dict[str, int] = field(default_factory=dict)
    kernel: str = "JacobianSpace"
    dampings: tuple[float, ...] = DAMPINGS
    natural: bool = True


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
    "mlp": Case("mlp", methods=METHODS, dampings=(0.0, 1e-6, *DAMPINGS)),
    "mlp, fewer samples than ranks": Case("mlp", 2, (*FEW, "kfac", "ekfac")),
    "mlp, little memory": Case(
        "mlp", methods=SMALL, options=TIGHT, forced=GRAM, kernel="GramSpace"
    ),
    "mlp, strip": Case("mlp", forced=STRIP, kernel="Strips"),
    "mlp, free": Case("mlp", forced=FREE, kernel="MatrixFree"),
    "mlp, vmap": Case("mlp", options={"engine": "vmap"}, forced=GRAM, kernel="GramSpace"),
    "conv, loop": Case("conv", options={"engine": "loop"}),
    "conv, gram": Case("conv", methods=(*FEW, "kfac", "ekfac"), forced=GRAM, kernel="GramSpace"),
    "tied, gram": Case("tied", forced=GRAM, kernel="GramSpace"),
    "sequence, strip": Case("sequence", methods=METHODS, forced=STRIP, kernel="Strips"),
    "words, free": Case("words", forced=FREE, kernel="MatrixFree"),
    "gpt, strip": Case("gpt", 7, ROWS, {}, STRIP, "Strips", natural=False),
}
TWO = ("conv, gram", "words, free")
"""Those that are also asked of two ranks."""


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
        result: Answers = {}
        dampings, natural = case.dampings, case.natural
        table = ngeval.evaluate(problem, case.methods, dampings, seed=3, gap=1e-12, natural=natural)
        result |= _numbers("table", table)
        pushes = len(case.methods) * len(dampings)
        form = ngeval.Kernel(problem, exact=natural, pushes=pushes).form
        assert form.__name__ == case.kernel
        metric = ngeval.Metric(problem, [_batch(case, 5), _batch(case, 1), _batch(case, 2)])
        result |= _numbers("metric", ngeval.evaluate(problem, ["ief"], dampings, metric=metric))
        if case.methods is METHODS:
            result |= _numbers("layers", ngeval.layer_table(problem, ["ief"], [1.0]))
        result |= _numbers("norms", ngeval.gradient_norms(problem))
        direction = torch.linspace(-1, 1, problem.num_parameters, dtype=torch.float64)
        result["jvp"], result["product"] = problem.jvp(direction), problem.fisher() @ direction
        result["diagonal"] = problem.fisher().diagonal()
        captured = CapturedRows(problem.rows, problem.residual.unsqueeze(1))
        result["captured gram"] = captured.gram()
        weights = torch.linspace(-1, 1, 2 * case.samples, dtype=torch.float64)
        result["combinations"] = captured.combinations(weights.reshape(2, -1))
        result["products"] = captured.products(weights.reshape(case.samples, 2, 1))
        other = problem.with_batch(*_batch(case, 4))
        result |= _numbers("other batch", ngeval.evaluate(other, ["ef"], [1.0], natural=False))
    return result


def _batch(case: Case, samples: int) -> tuple[Tensor, Tensor]:
    other = problem_of(Case(case.model, samples), seed=samples)
    return other.function.inputs, other.distribution.targets


def _numbers(name: str, table: Any) -> Answers:
    """A table's columns of numbers, but for estimates of rounding, which another order changes."""
    failed = table[table["status"] == "failed"] if "status" in table else table[:0]
    assert failed.empty, failed[["method", "reason"]].drop_duplicates().values.tolist()
    columns = table.select_dtypes("number")
    columns = columns.drop(columns=[name for name in columns if name.endswith("_error")])
    return {f"{name} {column}": torch.tensor(columns[column].to_numpy()) for column in columns}


def _told(action: Callable[[], Any]) -> str:
    """What an action raises, in words; nothing if it goes well."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _failing(method: str, rank: int, own: int, error: Exception, times: int) -> Any:
    """With a method of `ModelFunction` that fails on one rank the first few times."""
    plain, left = getattr(ModelFunction, method), [times if rank == own else 0]

    def wrapped(self: ModelFunction, *args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return plain(self, *args, **options)

    return mock.patch.object(ModelFunction, method, wrapped)


def out_of_memory(group: Any, rank: int) -> dict[str, Any]:
    """One rank has no memory for its part of a product; the next product is right."""
    problem = problem_of(CASES["mlp"], group)
    with _failing("vjp", rank, 1, torch.OutOfMemoryError("no room"), 1):
        output = _told(lambda: problem.vjp(problem.residual))
    again = problem.vjp(problem.residual)
    return {"told": output, "gap": float((again - problem.gradient()).norm())}


def memory_that_half_of_is_enough(group: Any, rank: int) -> dict[str, Any]:
    """One rank runs out of memory in a Gram matrix: all try again with half of it."""
    problem = problem_of(CASES["conv, gram"], group)
    vectors = problem.residual.unsqueeze(1)
    expected = gram_matrix(problem.rows, vectors)
    with _failing("__call__", rank, 2, torch.OutOfMemoryError("no room"), 1):
        result = gram_matrix(problem.rows, vectors)
    return {"gap": float((result - expected).norm() / expected.norm())}


@dataclass(frozen=True)
class Fails:
    """A method that fails on one rank, while the others make a product."""

    rank: int
    name: str = "fails"

    def prepare(self, problem: ngeval.Problem, kernel: ngeval.Kernel, seed: int = 0) -> Any:
        if self.rank == 1:
            raise ValueError("a bug of mine")
        return problem.vjp(problem.residual)


def failing_method(group: Any, rank: int) -> dict[str, Any]:
    """Its rows fail, and the other methods' rows are what they are without it."""
    problem = problem_of(CASES["mlp"], group)
    table = ngeval.evaluate(problem, ["sgd", Fails(rank), "ef", "ng"], [1.0])
    expected = ngeval.evaluate(problem_of(CASES["mlp"], group), ["sgd", "ef", "ng"], [1.0])
    local = table[table["method"] != "fails"]["gamma"].to_numpy()
    return {
        "told": table.set_index("method")["reason"]["fails"],
        "gap": float(abs(local / expected["gamma"].to_numpy() - 1).max()),
    }


class Adapted(nn.Module):
    """Frozen layers, a trainable correction of rank 2 and a trainable head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(4, 6), nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)
        for layer in (self.first, self.frozen):
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.frozen(x) + self.up(self.down(x))))


def adapted_problem(samples: int = 6, group: Any = None, **options: Any) -> ngeval.Problem:
    """With layers in parts where there is a group; options of `fully_shard`."""
    torch.manual_seed(1)
    model, inputs = Adapted().double().eval(), torch.randn(samples, 4, dtype=torch.float64)
    if group is not None:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        whole = options.pop("whole", [p for p in model.parameters() if p.requires_grad])
        mesh = DeviceMesh.from_group(group, "cpu")
        fsdp.fully_shard(model.frozen, mesh=mesh, **options)
        fsdp.fully_shard(model, mesh=mesh, ignored_params=set(whole), **options)
    return ngeval.Problem(
        model, inputs, torch.arange(samples) % 3, "categorical", group=group, memory=2**30
    )


ADAPTED_METHODS = ("sgd", "ef", "ief", "sf:2", "ng", "diag", "kfac", "block-ng")


def adapted_answers(names: str, group: Any = None, **options: Any) -> Answers:
    """Grades on two batches, and by a metric, with some kernels."""
    result: Answers = {}
    kernels = {"explicit": {}, "gram": GRAM, "free": FREE}
    for name in names.split():
        constants = kernels[name]
        with forced(Case("", forced=constants)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # FSDP2's, of views
            problem = adapted_problem(group=group, **options)
            table = ngeval.evaluate(problem, ADAPTED_METHODS, DAMPINGS, gap=1e-12)
            result |= _numbers(f"{name} table", table)
            inputs, targets = problem.function.inputs, problem.distribution.targets
            metric = ngeval.Metric(problem, [(inputs, targets), (inputs[:3], targets[:3])])
            result |= _numbers(
                f"{name} metric", ngeval.evaluate(problem, ["ef", "diag"], [1.0], metric=metric)
            )
            other = problem.with_batch(inputs[3:], targets[3:])
            result[f"{name} other batch"] = other.gradient()
    return result


def parts(group: Any, rank: int) -> dict[str, Any]:
    """A model whose frozen layers are in parts, and what is refused of such models."""
    return {
        "free explicit": adapted_answers("free explicit", group),
        "gram": adapted_answers("gram", group, reshard_after_forward=True),
        "uneven": _told(lambda: adapted_problem(7, group)),
        "trainable": _told(lambda: adapted_problem(group=group, whole=[])),
    }


def poor_sample(group: Any, rank: int) -> dict[str, Any]:
    """A rank's sample makes an infinite output."""

    class Divides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / x[:, :1]

    inputs = torch.ones(6, 4)
    inputs[5, 0] = 0.0
    targets = torch.zeros(6, dtype=torch.int64)
    torch.manual_seed(0)
    model = Divides(4, 3)
    return {
        "told": _told(lambda: ngeval.Problem(model, inputs, targets, "categorical", group=group))
    }


def other_things(group: Any, rank: int) -> dict[str, Any]:
    """Ranks with inputs, weights or metric batches of their own."""
    model, inputs, targets = problems.mlp(), torch.ones(6, 4), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)

    def made(shift: float = 0.0) -> ngeval.Problem:
        return ngeval.Problem(model, inputs + shift, targets, "categorical", group=group)

    result = {"inputs": _told(lambda: made(shift=float(rank == 2)))}
    metric = ngeval.Metric(made(), [(inputs + rank, targets)])
    result["metric"] = _told(lambda: metric.totals)
    with torch.no_grad():
        next(model.parameters())[0, 0] += rank
    return {**result, "weights": _told(made)}


def out_of_step(group: Any, rank: int) -> dict[str, Any]:
    """One rank asks for something else: all say so, then and from then on."""
    problem = problem_of(CASES["mlp"], group)
    ones = torch.ones(problem.num_parameters, dtype=torch.float64)
    ask = (lambda: problem.jvp(ones)) if rank == 1 else (lambda: problem.vjp(problem.residual))
    return {"told": _told(ask), "later": _told(lambda: problem.jvp(ones))}


TROUBLES = {
    trouble.__name__: trouble
    for trouble in (
        *(out_of_memory, memory_that_half_of_is_enough, failing_method, poor_sample),
        *(other_things, parts, out_of_step),
    )
}


def main(rank: int, size: int, store: str, output: str) -> None:
    """Answer everything as a rank of everyone, and as one of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=size
    )
    two = dist.new_group([0, 1])
    result: dict[str, Any] = {
        "all ranks": {name: answers(case, dist.group.WORLD) for name, case in CASES.items()}
    }
    if rank < 2:
        result["two ranks"] = {name: answers(CASES[name], two) for name in TWO}
    result["troubles"] = {
        name: trouble(dist.group.WORLD, rank) for name, trouble in TROUBLES.items()
    }
    torch.save(result, Path(output) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
