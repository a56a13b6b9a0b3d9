"""The two forms of the logit kernel agree, and spectra keep the digits of small rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ngeval
from ngeval.curvature import row_space as kernel
from ngeval.curvature import row_svd
from ngeval.curvature.damped_inverse import DampedInverse, RowSum, ridge
from ngeval.curvature.gram_factor import GramFactor
from ngeval.curvature.row_svd import RowSvd
from ngeval.problem.linearized import Sizes
from tests import problems

NAMES = [name for name in problems.NAMES if name.endswith("float64")]
FORMS = {  # largest explicit J, largest matrix that the Jacobi method decomposes
    "jacobian": (2**40, 2**40),
    "gram": (0, 2**40),
    "gram-by-division": (0, 0),
}


def table_of(name, form, monkeypatch):
    explicit, jacobi = FORMS[form]
    monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", explicit)
    monkeypatch.setattr(row_svd, "JACOBI_SIZE", jacobi)
    problem = problems.case(name).problem()
    table = ngeval.evaluate(problem, ["ef", "ief", "sf:2", "ng"], [1e-2, 1.0, 100.0], seed=3)
    expected = kernel.JacobianSpace if form == "jacobian" else kernel.GramSpace
    assert ngeval.Kernel(problem).form is expected
    return table


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        (Sizes(8, 3, 50), {}, "JacobianSpace"),
        (Sizes(10, 1000, 100), {}, "JacobianSpace"),  # few columns, though many rows
        (Sizes(160, 10, 10**7), {}, "GramSpace"),
        (Sizes(160, 10, 10**7), {"exact": False}, "Strips"),
        (Sizes(160, 10, 10**7), {"exact": False, "pushes": 5}, "Strips"),
        (Sizes(160, 10, 10**7), {"exact": False, "pushes": 4}, "MatrixFree"),
        (Sizes(160, 32_128, 10**8), {}, "MatrixFree"),
        (Sizes(700, 10, 10**7), {}, "Strips"),  # beyond an eigendecomposition
    ],
)
def test_the_form_that_suits_the_sizes(sizes, options, expected):
    assert kernel.choose_form(sizes, 2**33, **options).__name__ == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(8 * 4 * 8 * 3 * 200, "JacobianSpace"), (8 * 4 * 8 * 3 * 200 - 1, "GramSpace")],
)
def test_the_form_that_fits_in_the_budget(budget, expected):
    assert kernel.choose_form(Sizes(8, 3, 200), budget).__name__ == expected


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
    assert shared.gradients is shared.gradients
    assert shared.space(shared.residual_vectors) is shared.logits


@pytest.mark.parametrize("form", ["gram", "gram-by-division"])
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


def svd_of(source, rows):
    return RowSvd.of(rows if source == "rows" else GramFactor.of(rows @ rows.T).lower)


@pytest.mark.parametrize("source", ["rows", "gram"])
def test_short_rows_keep_their_digits_beside_long_ones(source, rows):
    # Scaled to unit rows, the same equations are well conditioned.
    lengths = rows.norm(dim=1)
    unit = rows / lengths.unsqueeze(1)
    expected = unit.T @ torch.linalg.solve(unit @ unit.T, 1 / lengths)
    svd = svd_of(source, rows)
    for damping in (0.0, 1e-40):
        solution = ridge(svd, torch.ones(8, dtype=torch.float64), damping)
        # The coordinates of a Cholesky factor are another basis: lengths and products are the same.
        assert solution.size == pytest.approx(float(expected.norm()), rel=1e-7)
        images = svd.rows @ solution.vector * svd.scale * solution.size
        torch.testing.assert_close(images, torch.ones(8, dtype=torch.float64), rtol=1e-6, atol=0)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    plain = vectors @ (vectors.sum(0) / values)
    solved = torch.linalg.solve(unit @ unit.T, 1 / lengths) / lengths
    assert float((plain / solved - 1).abs().max()) > 1e-5  # what the scaling is for


@pytest.mark.parametrize("source", ["rows", "gram"])
def test_repeated_and_zero_rows_do_not_count(source, rows):
    rows = torch.cat([rows, rows[:3], 2 * rows[4:5], rows.sum(0, keepdim=True)])
    rows = torch.cat([rows, torch.zeros(1, 30, dtype=torch.float64)])
    svd = svd_of(source, rows)
    assert svd.at_zero.rank == 8
    target = torch.arange(14, dtype=torch.float64)
    exact = rows.T @ torch.linalg.solve(
        rows @ rows.T + 1e-3 * torch.eye(14, dtype=torch.float64), target
    )
    solution = ridge(svd, target, 1e-3)
    images = svd.rows @ solution.vector * svd.scale * solution.size
    torch.testing.assert_close(images, rows @ exact)


@pytest.mark.parametrize("damping", [0.0, 1e-300, 1.0, 1e300])
@pytest.mark.parametrize("size", [1e-170, 1.0, 1e150])
def test_rows_of_any_size(damping, size):
    torch.manual_seed(1)
    unit = torch.randn(4, 6, dtype=torch.float64)
    target = torch.ones(4, dtype=torch.float64)
    solution = ridge(RowSvd.of(unit * size), target, damping)
    # In numbers of a middling size: λ relative to size².
    relative = damping / size / size
    if relative > 1e14:
        expected = unit.T @ target
    else:
        matrix = unit @ unit.T + relative * torch.eye(4, dtype=torch.float64)
        expected = unit.T @ torch.linalg.solve(matrix, target)
    torch.testing.assert_close(solution.vector, expected / expected.norm(), rtol=1e-9, atol=1e-12)


def test_the_zero_matrix_has_no_range():
    zero, target = torch.zeros(3, 5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for svd in (RowSvd.of(zero), RowSvd.of(GramFactor.of(zero @ zero.T).lower)):
        assert (svd.largest, svd.rank) == (0.0, 0)
        for damping in (0.0, 1.0):
            assert not ridge(svd, target, damping).vector.any()


def test_overflow_is_named():
    infinite = torch.full((2, 2), torch.inf, dtype=torch.float64)
    with pytest.raises(ngeval.NumericalError, match="overflow"):
        RowSvd.of(infinite)
    with pytest.raises(ngeval.NumericalError, match="overflow"):
        GramFactor.of(infinite)


@pytest.mark.parametrize("damping", [0.0, 1e-18, 1e-9, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("graded", [0, 6])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_moved_rows_are_solved_as_if_factored_again(shape, graded, damping):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(0, -graded, shape[0], dtype=torch.float64).unsqueeze(1)
    rows = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = rows + 1e-10 * sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    near, again = RowSvd.of(rows).moved(moved), RowSvd.of(moved)
    total = moved.T @ target
    length = float((target.abs() * moved.norm(dim=1)).sum())
    other = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    pairs = [
        (ridge(near, target, damping), ridge(again, target, damping)),
        *(
            tuple(DampedInverse(svd, gradient).solve(damping) for svd in (near, again))
            for gradient in (RowSum(total, length, target), RowSum(other, float(other.norm())))
        ),
    ]
    before = ridge(RowSvd.of(rows), target, damping)
    assert float((before.vector - pairs[0][1].vector).norm()) > 0
    for result, expected in pairs:
        assert result.size == pytest.approx(expected.size, rel=1e-7)
        assert result.slope == pytest.approx(expected.slope, rel=1e-7)
        torch.testing.assert_close(result.vector, expected.vector, rtol=0, atol=1e-7)
        torch.testing.assert_close(result.image, expected.image, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 5, 12, 40])
def test_a_perturbed_gram_factor_has_the_perturbed_products(rank):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    rows[3] = rows[7]
    gram = rows @ rows.T
    factor = GramFactor.of(gram)
    noisy = factor.perturbed(1e-6, torch.Generator().manual_seed(2))
    lengths = factor.lengths * factor.lengths.unsqueeze(1)
    change = (noisy.lower @ noisy.lower.T - gram) / lengths
    # Beyond their rank, products are what those with the pivots make them.
    size = change[:, factor.pivots].std()
    assert 5e-7 < size < 2e-6
    torch.testing.assert_close(noisy.lower[3], noisy.lower[7], rtol=0, atol=1e-12)
    assert noisy.lower.shape == factor.lower.shape
