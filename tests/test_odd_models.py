"""Models on which derivatives go astray: each is graded rightly, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ngeval
from ngeval.curvature import row_space as kernel
from tests import reference


class RegisteredTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b, self.out = self.a, nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class NormWithoutGradient(nn.Module):
    """Forward-mode AD does not heed ``no_grad``; backward does."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            scale = self.a.weight.norm()
        return self.out(torch.tanh(self.a(x) / scale))


class Sorted(nn.Module):
    """A layer sees the samples in another order, the first and the last in their own."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return self.out(torch.tanh(self.a(x[order])))[order.argsort()]


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.embedding(x).sum(1)))


class Aliased(nn.Module):
    """A tied weight and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.out, self.again = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.again.weight = self.out.weight

    def forward(self, x):
        return self.again(torch.tanh(self.out(self.rnn(x)[0][:, -1])))


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "padded":
        ids = torch.randint(1, 6, (6, 3), generator=generator)
        ids[2:4, 0] = 0
        return ids
    if name == "aliased":
        return torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    if name == "sorted":
        x[:, 0] = torch.tensor([9.0, 7.0, 8.0, 5.0, 6.0, 1.0])
    return x


MODELS = {
    "registered-twice": RegisteredTwice,
    "no-grad": NormWithoutGradient,
    "sorted": Sorted,
    "padded": Padded,
    "aliased": Aliased,
    "compiled": lambda: torch.compile(nn.Linear(4, 3), backend="eager"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_figure_is_the_references(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().double().eval(), inputs_of(name)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    before = {key: (type(value), id(value)) for key, value in model.named_parameters()}
    problem = ngeval.Problem(model, x, y, "categorical")
    dense = reference.build(model, x, y, reference.Family("categorical"))
    fisher = reference.fisher(dense)
    vector = torch.randn(problem.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(problem.fisher() @ vector, fisher @ vector)
    torch.testing.assert_close(problem.fisher().diagonal(), fisher.diagonal())
    assert problem.gamma(vector) == pytest.approx(reference.gamma(dense, vector), rel=1e-9)
    norms = reference.per_sample_gradients(dense).norm(dim=1)
    result = ngeval.gradient_norms(problem)["gradient_norm"].tolist()
    torch.testing.assert_close(torch.tensor(result, dtype=torch.float64), norms)
    assert {key: (type(value), id(value)) for key, value in model.named_parameters()} == before


def test_a_badly_wrong_label_does_not_upset_a_large_gram_matrix(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 9)).double()
    x = torch.randn(95, 20, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
        model[2].bias[3] += 25
    y[0] = 1  # its probability is about 1e-11
    tables = []
    for entries in (2**30, 0):
        monkeypatch.setattr(kernel, "EXPLICIT_ENTRIES", entries)
        problem = ngeval.Problem(model, x, y, "categorical")
        form = kernel.JacobianSpace if entries else kernel.GramSpace
        assert ngeval.Kernel(problem).form is form
        tables.append(ngeval.evaluate(problem, ["ng", "ef", "ief"], [1e-3, 1.0]))
    explicit, gram = (table[["gamma", "gamma_min"]].to_numpy() for table in tables)
    torch.testing.assert_close(
        torch.from_numpy(gram), torch.from_numpy(explicit), rtol=1e-6, atol=0
    )


def test_bfloat16_rows_leave_a_rank():
    torch.manual_seed(0)
    model, x = nn.Linear(20, 10).bfloat16(), torch.randn(32, 20).bfloat16()
    problem = ngeval.Problem(model, x, torch.arange(32) % 10, "categorical")
    table = ngeval.evaluate(problem, ["ef", "ief", "ng"], [1e-2, 1.0])
    assert (table["status"] == "ok").all()
    assert (table["gamma_over_ng"] > 0.9).all()


def test_what_happens_to_the_callers_batch_and_mode_later():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = ngeval.gamma_min(ngeval.Problem(model, x, y, "categorical"))
    problem = ngeval.Problem(model, x, y, "categorical")
    x.zero_()
    y.zero_()
    assert ngeval.gamma_min(problem) == expected
    model.train()
    with pytest.raises(ngeval.ModelError, match="train mode"):
        problem.gamma(torch.ones(problem.num_parameters))


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (nn.Linear(4, 3, dtype=torch.complex64), torch.randn(5, 4), "complex"),
        (nn.LazyLinear(3), torch.randn(5, 4), "no values"),
        (nn.Linear(4, 3, device="meta"), torch.randn(5, 4), "no values"),
        (
            nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3)),
            torch.ones(5, 2, dtype=torch.long),
            "max_norm",
        ),
    ],
    ids=["complex", "lazy", "meta", "max-norm"],
)
def test_refused_with_a_reason(model, x, words):
    with pytest.raises(ngeval.ModelError, match=words):
        ngeval.Problem(model, x, torch.tensor([0, 1, 2, 0, 1]), "categorical")


@pytest.mark.parametrize("gap", [5.0, 30.0, 50.0, 200.0])
def test_the_fisher_of_a_confident_prediction_keeps_its_digits(gap):
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[:, 2] += gap
    bound = ngeval.Categorical().bind(logits, torch.tensor([2, 2, 2, 2]))
    tangent = torch.randn(4, 5, dtype=torch.float64)
    p = bound.log_probabilities.exp()
    differences = tangent.unsqueeze(2) - tangent.unsqueeze(1)
    exact = (p.unsqueeze(2) * p.unsqueeze(1) * differences).sum(2)  # H t without a cancellation
    torch.testing.assert_close(bound.fisher_product(tangent), exact, rtol=1e-12, atol=0)
    through = bound.factor_product(bound.factor_transpose_product(tangent))
    torch.testing.assert_close(through, exact, rtol=1e-11, atol=0)
