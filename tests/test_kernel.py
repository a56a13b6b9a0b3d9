"""The two forms of the logit kernel agree, and spectra keep the digits of small rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ngeval
from ngeval.curvature import logit_kernel as kernel
from ngeval.curvature import spectrum
from ngeval.curvature.spectrum import Spectrum
from ngeval.problem.linearized import Sizes
from tests import problems

EPSILON = torch.finfo(torch.float64).eps
NAMES = [name for name in problems.NAMES if name.endswith("float64")]
FORMS = {  # largest explicit J, largest scaled Gram matrix
    "jacobian": (2**40, 2**40),
    "gram": (0, 2**40),
    "gram-unscaled": (0, 0),
}


def table_of(name, form, monkeypatch):
    explicit, graded = FORMS[form]
    monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", explicit)
    monkeypatch.setattr(spectrum, "GRADED_SIZE", graded)
    problem = problems.case(name).problem()
    table = ngeval.evaluate(problem, ["ef", "ief", "sf:2", "ng"], [1e-2, 1.0, 100.0], seed=3)
    expected = kernel.JacobianKernel if form == "jacobian" else kernel.GramKernel
    assert type(ngeval.Kernel(problem).theta) is expected
    return table


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        (Sizes(8, 3, 50), {}, "JacobianKernel"),
        (Sizes(10, 1000, 100), {}, "JacobianKernel"),  # few columns, though many rows
        (Sizes(160, 10, 10**7), {}, "GramKernel"),
        (Sizes(160, 10, 10**7), {"exact": False}, "StripKernel"),
        (Sizes(160, 10, 10**7), {"exact": False, "pushes": 5}, "StripKernel"),
        (Sizes(160, 10, 10**7), {"exact": False, "pushes": 4}, "MatrixFreeKernel"),
        (Sizes(160, 32_128, 10**8), {}, "MatrixFreeKernel"),
        (Sizes(700, 10, 10**7), {}, "StripKernel"),  # beyond an eigendecomposition
    ],
)
def test_the_form_that_suits_the_sizes(sizes, options, expected):
    assert kernel.choose_form(sizes, 2**33, **options).__name__ == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(8 * 4 * 8 * 3 * 50, "JacobianKernel"), (8 * 4 * 8 * 3 * 50 - 1, "GramKernel")],
)
def test_the_form_that_fits_in_the_budget(budget, expected):
    assert kernel.choose_form(Sizes(8, 3, 50), budget).__name__ == expected


def test_no_form_fits():
    with pytest.raises(ngeval.EngineError, match=r"at most 40 samples fit.*raise memory="):
        kernel.choose_form(Sizes(60, 3, 10**6), 40 * 40**2)


def test_what_methods_share_is_computed_once():
    problem = problems.case("categorical-mlp-float64").problem()
    shared, calls = ngeval.Kernel(problem), []

    def compute(of: ngeval.Problem, factor: int) -> int:
        calls.append(factor)
        return factor * of.num_samples

    def fails(of: ngeval.Problem) -> None:
        calls.append("failed")
        raise ngeval.EngineError("no")

    assert [shared.once(compute, 2), shared.once(compute, 3), shared.once(compute, 2)] == [
        14,
        21,
        14,
    ]
    for _ in range(2):
        with pytest.raises(ngeval.EngineError):
            shared.once(fails)
    assert calls == [2, 3, "failed", "failed"]
    assert shared.gradient_spectrum is shared.gradient_spectrum
    assert shared.theta is shared.dense


@pytest.mark.parametrize("form", ["gram", "gram-unscaled"])
@pytest.mark.parametrize("name", NAMES)
def test_forms_give_the_same_table(name, form, monkeypatch):
    columns = ["gamma", "decrease", "curvature", "update_norm", "gamma_min"]
    result = table_of(name, form, monkeypatch)
    expected = table_of(name, "jacobian", monkeypatch)
    np.testing.assert_allclose(result[columns], expected[columns], rtol=1e-8)


@pytest.fixture
def rows():
    """Eight rows, not orthogonal, whose lengths span seven orders of magnitude."""
    torch.manual_seed(0)
    lengths = torch.logspace(-7, 0, 8, dtype=torch.float64)[torch.randperm(8)]
    return lengths.unsqueeze(1) * torch.randn(8, 30, dtype=torch.float64)


@pytest.mark.parametrize("source", ["rows", "gram"])
def test_short_rows_keep_their_digits_beside_long_ones(source, rows):
    ones, zero = torch.ones(8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if source == "rows":
        result = Spectrum.of_rows(rows, EPSILON)
    else:
        result = Spectrum.of_gram(rows @ rows.T, EPSILON, ones)
    # Scaled to unit rows, the same equations are well conditioned.
    lengths = rows.norm(dim=1)
    unit = rows / lengths.unsqueeze(1)
    expected = torch.linalg.solve(unit @ unit.T, 1 / lengths) / lengths
    torch.testing.assert_close(result.solve(ones, zero)[0], expected, rtol=1e-6, atol=0)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    plain = vectors @ ((vectors.T @ ones) / values)
    assert float((plain / expected - 1).abs().max()) > 1e-5  # what the scaling is for


@pytest.mark.parametrize("source", ["rows", "gram"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_repeated_and_zero_rows_do_not_count(source, dtype, rows):
    rows = torch.cat([rows, rows[:3], 2 * rows[4:5], rows.sum(0, keepdim=True)])
    rows = torch.cat([rows, torch.zeros(1, 30, dtype=torch.float64)])
    result = (
        Spectrum.of_rows(rows, torch.finfo(dtype).eps)
        if source == "rows"
        else Spectrum.of_gram(
            rows @ rows.T, torch.finfo(dtype).eps, torch.ones(14, dtype=torch.float64)
        )
    )
    assert len(result.eigenvalues) == 8
    right = torch.arange(14, dtype=torch.float64)
    damped = torch.tensor([1e-3], dtype=torch.float64)
    exact = torch.linalg.solve(rows @ rows.T + 1e-3 * torch.eye(14, dtype=torch.float64), right)
    torch.testing.assert_close(rows.T @ result.solve(right, damped)[0], rows.T @ exact)


def test_the_zero_matrix_has_no_range():
    for result in (
        Spectrum.of_rows(torch.zeros(3, 5, dtype=torch.float64), EPSILON),
        Spectrum.of_gram(torch.zeros(3, 3, dtype=torch.float64), EPSILON, torch.ones(3)),
    ):
        assert (result.largest, len(result.eigenvalues)) == (0.0, 0)
        ones, zero = torch.ones(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        assert result.solve(ones, zero).tolist() == [[0.0, 0.0, 0.0]]


def test_overflow_is_named():
    with pytest.raises(ngeval.NumericalError, match="overflow"):
        Spectrum.of_gram(torch.full((2, 2), torch.inf, dtype=torch.float64), EPSILON, torch.ones(2))
