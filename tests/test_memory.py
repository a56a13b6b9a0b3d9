"""Budgets, and what happens when there was less memory than thought."""

from __future__ import annotations

import pytest
import torch

import ngeval
from ngeval.jacobians import gram_matrix
from ngeval.jacobians import row_source as rows
from ngeval.utils.memory import MIN_BYTES, free_memory, halving
from ngeval.utils.text import describe_bytes
from tests import problems
from tests.problems import relative_gap

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"


def test_free_memory_and_its_words():
    assert 0 < free_memory(torch.device("cpu")) < 2**50
    assert [describe_bytes(n) for n in (5, 2048, 3 * 2**19, 2**33)] == [
        *("5 B", "2.0 KiB", "1.5 MiB", "8.0 GiB")
    ]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_MESSAGE), MemoryError()],
)
def test_the_budget_is_halved_until_it_fits(error):
    request = []

    def attempt(memory: int) -> str:
        request.append(memory)
        if memory > 10 * 2**20:
            raise error
        return "done"

    assert halving(attempt, 64 * 2**20) == "done"
    assert request == [2**26, 2**25, 2**24, 2**23]


def test_other_errors_and_hopeless_ones_are_passed_on():
    def broken(_: int) -> None:
        raise RuntimeError("shapes differ")

    def never(_: int) -> None:
        raise RuntimeError(CPU_MESSAGE)

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(broken, 2**30)
    with pytest.raises(ngeval.EngineError, match="out of memory; use a smaller batch"):
        halving(never, 4 * MIN_BYTES)


@pytest.mark.parametrize("times", [1, 2])
def test_a_gram_matrix_survives_running_out_of_memory(monkeypatch, times):
    problem = problems.case("categorical-sequence-float64").problem(memory=2**22)
    vectors = torch.randn(7, 3, 3, 3, dtype=torch.float64)
    expected = gram_matrix(problem.rows, vectors)
    left = [times]
    real = rows.capture

    def short(*args: object) -> object:
        if left[0]:
            left[0] -= 1
            raise RuntimeError(CPU_MESSAGE)
        return real(*args)

    monkeypatch.setattr(rows, "capture", short)
    assert relative_gap(gram_matrix(problem.rows, vectors), expected) < 1e-13
    assert left == [0]


@pytest.mark.parametrize("memory", [4_000, 20_000, 10**9])
def test_grades_do_not_depend_on_the_budget(memory):
    case = problems.make("categorical-sequence-float64", num_samples=11)
    methods = ["sgd", "ef", "ief", "sf", "diag", "ng"]
    expected = ngeval.evaluate(case.problem(), methods, [1e-2, 1.0], gap=1e-12)
    result = ngeval.evaluate(case.problem(memory=memory), methods, [1e-2, 1.0], gap=1e-12)
    good = result["status"] == "ok"
    assert set(result["method"][good]) >= {"sgd", "diag", "ng"}
    assert result["reason"][~good].str.contains("memory").all()
    # Without room for more vectors a Krylov run ends early, and says so.
    short = (result["method"] == "ng") & result["note"].str.contains("apart after")
    assert memory == 4_000 or not short.any()
    good &= ~short
    values = result["gamma"][good].to_numpy()
    assert values == pytest.approx(expected["gamma"][good].to_numpy(), rel=1e-7)
