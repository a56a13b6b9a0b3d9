"""Precision: badly conditioned Gram matrices, duplicates, forms of a product, narrow dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ngeval
from ngeval.jacobians import gram_matrix
from ngeval.jacobians import inner_products as products

METHODS = ["sgd", "ef", "ief", "sf", "ng"]
DAMPINGS = [1e-9, 1e-6, 1e-3, 1.0]


def learnt(
    spread: float, sharpness: float = 8, samples: int = 24
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A float32 network that has learnt its samples to very different degrees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 4))
    inputs = torch.randn(samples, 12)
    targets = model(inputs).argmax(1)
    with torch.no_grad():
        # Samples along the network's own decisions, at a growing distance from them.
        inputs *= torch.linspace(0.3, spread, samples).unsqueeze(1)
        model[2].weight *= sharpness
    return model.eval(), inputs, targets


@pytest.mark.parametrize("sharpness", [8, 30])
def test_float32_grades_are_those_of_float64(sharpness):
    model, inputs, targets = learnt(4.0, sharpness)
    tables = {}
    for dtype in (torch.float32, torch.float64):
        problem = ngeval.Problem(model, inputs, targets, "categorical", dtype=dtype)
        tables[dtype] = ngeval.evaluate(problem, METHODS, DAMPINGS)
        if dtype == torch.float64:
            gram = gram_matrix(problem.rows, problem.residual.unsqueeze(1))
            condition = float(torch.linalg.cond(gram))
    assert condition > (1e10 if sharpness > 8 else 1e6)
    result, expected = (tables[dtype] for dtype in tables)
    assert (result["status"] == "ok").all()
    gaps = result.assign(gap=np.abs(result["gamma"] / expected["gamma"] - 1))
    assert gaps["gap"].max() < 1e-3, gaps[["method", "damping", "gap"]]


def test_duplicates_and_perfectly_learnt_samples_count():
    model, inputs, targets = learnt(2.0)
    twice = torch.cat([inputs, inputs[:5]]), torch.cat([targets, targets[:5]])
    with torch.no_grad():
        far = 1e3 * inputs[-1:]
        sure = model(far).argmax(1)
    batch = torch.cat([twice[0], far]), torch.cat([twice[1], sure])
    for dtype in (torch.float32, torch.float64):
        problem = ngeval.Problem(model, *batch, "categorical", dtype=dtype)
        table = ngeval.evaluate(problem, METHODS, [0.0, *DAMPINGS])
        allowed = {"ok"} if dtype == torch.float64 else {"ok", "uncertain"}
        assert set(table["status"]) <= allowed
        assert (table["num_samples"] == 30).all()
        assert (table["gamma_over_ng"] > 1 - 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_models_run_with_float64_algebra(method):
    model, inputs, targets = learnt(1.0)
    problem = ngeval.Problem(model, inputs, targets, "categorical", dtype=torch.bfloat16)
    table = ngeval.evaluate(problem, [method], [1e-2, 1.0])
    assert set(table["status"]) <= {"ok", "uncertain"}
    assert (table["dtype"] == "bfloat16").all()
    wide = nn.Sequential(*[layer.to(torch.bfloat16) for layer in model]).double()
    rounded = inputs.to(torch.bfloat16).double()
    exact = ngeval.Problem(wide, rounded, targets, "categorical")
    expected = ngeval.evaluate(exact, [method], [1e-2, 1.0])
    assert table["gamma"].tolist() == pytest.approx(expected["gamma"].tolist(), rel=0.2)


class TwoPlaces(nn.Module):
    """A table of tokens that is also the head, between layers at several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4, padding_idx=0)
        self.inner, self.mix = nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(self.inner(self.tokens(ids))))
        return self.head(self.mix(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("piece", [1, 50, 2**23])
def test_rows_and_sequences_give_the_same_products(monkeypatch, queries, piece):
    torch.manual_seed(0)
    model, ids = TwoPlaces().double().eval(), torch.randint(9, (7, 5))
    problem = ngeval.Problem(model, ids, ids, "categorical", engine="layers")
    vectors = torch.randn(7, queries, 5, 9, dtype=torch.float64)
    loop = ngeval.Problem(model, ids, ids, "categorical", engine="loop")
    expected = gram_matrix(loop.rows, vectors)
    monkeypatch.setattr(products, "PIECE_ENTRIES", piece)
    for triangle in (2, 10**6):
        monkeypatch.setattr(products, "TRIANGLE_SIZE", triangle)
        for cheaper in (True, False):
            monkeypatch.setattr(products, "_sequence_is_cheaper", lambda *_, yes=cheaper, **__: yes)
            result = gram_matrix(problem.rows, vectors)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
