"""Terms that are used while the backward pass goes by, kept captures, and combined cotangents."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ngeval
from ngeval.jacobians import CapturedRows, gram_matrix
from ngeval.jacobians import row_source as rows
from ngeval.jacobians.inner_products import rows_of
from tests import problems, zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning"),
]

EVERY = slice(None)


@pytest.fixture(params=sorted(zoo.ENTRIES))
def problem(request):
    entry = zoo.ENTRIES[request.param]
    try:
        return ngeval.Problem(
            entry.model(), entry.inputs, entry.targets, entry.likelihood, engine="layers"
        )
    except ngeval.EngineError:
        pytest.skip("refused; the zoo says which may be")


def cotangents_of(problem, count=3):
    generator = torch.Generator().manual_seed(5)
    shape = (problem.num_samples, count, *problem.outputs.shape[1:])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_streamed_terms_are_the_captured_ones(problem):
    vectors = cotangents_of(problem)
    (block,) = problem.rows.blocks(vectors)
    expected = problem.rows.rows(vectors, block)
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def use(terms, vectors):
        result = rows_of(terms, EVERY, EVERY)
        for name in result:
            # All of a parameter's terms come together: nothing is to be added later.
            assert (name, vectors.start) not in seen
            seen[name, vectors.start] = result[name]

    problem.rows.stream(vectors, block, use)
    for name, whole in expected.items():
        for q in range(vectors.shape[1]):
            part = seen.get((name, q), torch.zeros_like(whole[:, q : q + 1]))
            torch.testing.assert_close(part[:, 0], whole[:, q], rtol=1e-10, atol=1e-12)


def test_kept_captures_serve_everything(problem):
    vectors = cotangents_of(problem)
    (block,) = problem.rows.blocks(vectors)
    lead = vectors.shape[:2]
    every = torch.cat([r.reshape(*lead, -1) for r in problem.rows.rows(vectors, block).values()], 2)
    flat = every.flatten(0, 1)
    kept = CapturedRows(problem.rows, vectors)
    scale = float((flat @ flat.T).abs().max())
    torch.testing.assert_close(kept.gram() / scale, flat @ flat.T / scale, rtol=0, atol=1e-10)
    weights = torch.randn(4, len(flat), dtype=torch.float64)
    torch.testing.assert_close(kept.combinations(weights), weights @ flat, rtol=1e-9, atol=1e-9)
    mixing = torch.randn(len(vectors), 2, vectors.shape[1], dtype=torch.float64)
    others = torch.einsum("nrq,nqp->nrp", mixing, every).flatten(0, 1)
    expected = flat @ others.T
    scale = float(expected.abs().max())
    torch.testing.assert_close(kept.products(mixing) / scale, expected / scale, rtol=0, atol=1e-10)


def test_captures_are_made_once_where_there_is_room(monkeypatch):
    problem = problems.case("categorical-sequence-float64").problem()
    vectors = cotangents_of(problem)
    built = []
    real = rows.capture
    monkeypatch.setattr(rows, "capture", lambda *args: built.append(1) or real(*args))
    kept = CapturedRows(problem.rows, vectors)
    kept.gram()
    kept.combinations(torch.ones(1, vectors.shape[0] * vectors.shape[1], dtype=torch.float64))
    assert len(built) == 1


@pytest.mark.parametrize("memory", [6_000, 20_000])
def test_captures_that_do_not_fit_are_made_anew(memory):
    case = problems.case("categorical-sequence-float64")
    wide, narrow = case.problem(), case.problem(memory=memory)
    vectors = cotangents_of(wide)
    kept = CapturedRows(narrow.rows, vectors)
    assert kept._keep(narrow.rows, vectors) is None
    gram = gram_matrix(wide.rows, vectors)
    torch.testing.assert_close(kept.gram(), gram, rtol=1e-11, atol=1e-11)
    weights = torch.randn(2, len(gram), dtype=torch.float64)
    torch.testing.assert_close(
        kept.combinations(weights),
        CapturedRows(wide.rows, vectors).combinations(weights),
        rtol=1e-11,
        atol=1e-11,
    )


def test_nothing_is_kept_of_a_layer_once_it_was_used():
    """When the last layer's term is used, the first layer's has not been made yet."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    inputs, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    problem = ngeval.Problem(model, inputs, targets, "categorical", engine="layers")
    vectors = cotangents_of(problem, 1)
    (block,) = problem.rows.blocks(vectors)
    order = []
    problem.rows.stream(
        vectors, block, lambda terms, vectors: order.append([set(term.shapes) for term in terms])
    )
    assert order == [[{"2.weight", "2.bias"}], [{"0.weight", "0.bias"}], []]


class UnderNoGrad(nn.Module):
    """A layer whose output carries no gradient has rows of zeros."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = nn.Linear(6, 3), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.inner(self.norm(x))
        return self.outer(x) + hidden


def test_a_layer_under_no_grad_has_rows_of_zeros():
    torch.manual_seed(0)
    model = UnderNoGrad().double()
    inputs, targets = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    tables = []
    for engine in ("layers", "loop"):
        problem = ngeval.Problem(model, inputs, targets, "categorical", engine=engine)
        tables.append(ngeval.evaluate(problem, ["sgd", "ef", "ief", "ng", "diag"], [1e-3]))
        norms = ngeval.gradient_norms(problem)["gradient_norm"]
        tables[-1].attrs["norms"] = norms.tolist()
    layers, loop = tables
    assert (layers["status"] == "ok").all()
    assert layers["gamma"].tolist() == pytest.approx(loop["gamma"].tolist(), rel=1e-9)
    assert layers.attrs["norms"] == pytest.approx(loop.attrs["norms"], rel=1e-12)
