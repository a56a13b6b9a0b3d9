"""Updates where digits are easily lost, against ball arithmetic from Jacobians by loops."""

from __future__ import annotations

import math

import pytest
import torch
from flint import arb, ctx
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import ngeval
from ngeval.curvature import row_space
from ngeval.likelihoods import Categorical
from tests.search.right import Right, Updates, gamma_min, rows_of, tiny_dampings


def right_of(model: nn.Module, inputs: Tensor, targets: Tensor, family: str) -> Right:
    return Right(rows_of(model, inputs, targets, family, 1.0))


def check(table, right: Right, tolerance: float = 1e-7) -> None:
    updates = Updates(right)
    for _, row in table.iterrows():
        expected = updates.grade(row["method"], arb(row["damping_absolute"]), [], right)
        name = f"{row['method']} at {row['damping']}"
        assert row["status"] == "ok", name
        assert row["gamma"] == pytest.approx(expected.gamma, rel=tolerance), name
        assert row["decrease"] == pytest.approx(expected.decrease, rel=tolerance), name


def regression(count: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A float32 network that was trained on features in their own units."""
    features, values = load_diabetes(return_X_y=True)
    inputs = torch.tensor(features / features.std(0), dtype=torch.float32)
    targets = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return model.eval(), inputs[:count], targets[:count]


class TestRegression:
    @pytest.fixture(scope="class")
    @staticmethod
    def data():
        return regression()

    @pytest.fixture(scope="class")
    @staticmethod
    def right(data):
        return right_of(*data, "gaussian")

    def test_float32_networks_at_default_dampings(self, data, right):
        problem = ngeval.Problem(*data, "gaussian")
        assert problem.dtype == torch.float64
        table = ngeval.evaluate(problem, ["ef", "ief", "ng", "diag"])
        check(table, right)
        least = gamma_min(right, tiny_dampings(right.fisher, right.bits)[1])
        assert table["gamma_min"][0] == pytest.approx(least, rel=1e-7)

    def test_the_order_of_samples_does_not_matter(self, data):
        model, inputs, targets = data
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
        tables = [
            ngeval.evaluate(ngeval.Problem(model, x, y, "gaussian"), ["ef", "ief", "ng"])
            for x, y in ((inputs, targets), (inputs[order], targets[order]))
        ]
        first, second = (table["gamma"].tolist() for table in tables)
        assert first == pytest.approx(second, rel=1e-9)

    def test_a_damping_of_zero_beside_another_changes_nothing(self, data):
        problem = ngeval.Problem(*data, "gaussian")
        alone = ngeval.evaluate(problem, ["ef", "ief", "ng"], [1.0])
        beside = ngeval.evaluate(problem, ["ef", "ief", "ng"], [0.0, 1.0])
        expected = beside[beside["damping"] == 1.0]["gamma"].tolist()
        assert alone["gamma"].tolist() == pytest.approx(expected, rel=1e-12)

    def test_tables_of_layers_and_optimizers_make_the_same_update(self, data, right):
        problem = ngeval.Problem(*data, "gaussian")
        for method in ("ef", "ief"):
            expected = Updates(right).grade(method, arb(1e-3), [], right).gamma
            layers = ngeval.layer_table(problem, [method], [1e-3], natural=False)
            assert layers["gamma_total"][0] == pytest.approx(expected, rel=1e-7)
            update = ngeval.get_method(method).prepare(problem, ngeval.Kernel(problem))
            assert problem.gamma(update.direction(1e-3)) == pytest.approx(expected, rel=1e-7)


class Adapted(nn.Module):
    """Frozen features in bfloat16 below a head in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.base(x.to(self.base.weight.dtype)))
        return self.head(hidden.to(self.head.weight.dtype))


def test_half_precision_below_an_adapter_is_graded_in_float64():
    torch.manual_seed(0)
    model, inputs, targets = Adapted().eval(), torch.randn(8, 6), torch.arange(8) % 3
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    check(
        ngeval.evaluate(problem, ["ef", "ief", "ng"], [1e-6, 1e-3]),
        right_of(model, inputs, targets, "categorical"),
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("draws", [1, 4])
def test_sampled_fisher_of_more_rows_than_parameters_at_tiny_dampings(scale, draws):
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2, bias=False).double(), scale * torch.randn(12, 3).double()
    targets = torch.arange(12) % 2
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    right, name = right_of(model, inputs, targets, "categorical"), f"sf:{draws}"
    labels = problem.distribution.sample(draws, torch.Generator().manual_seed(0))
    sampled = list(labels.reshape(draws, 12, 1).numpy())
    curvature = Updates(right).curvature("sf", sampled)
    largest = float(max(curvature[i, i] for i in range(6)))
    dampings = [largest * relative for relative in (1e-16, 1e-12, 1e-6, 1.0)]
    table = ngeval.evaluate(problem, [name], dampings)
    for _, row in table.iterrows():
        expected = Updates(right).grade(name, arb(row["damping"]), sampled, right)
        assert row["gamma"] == pytest.approx(expected.gamma, rel=1e-7)
        assert row["update_norm"] == pytest.approx(expected.norm, rel=1e-7)


def test_drawn_labels_that_equal_the_data_do_not_disturb_another_batch():
    torch.manual_seed(0)
    model, inputs = nn.Linear(2, 2).double(), 40 * torch.randn(6, 2).double()
    targets = model(inputs).argmax(1)  # the model is sure of them, so it draws them
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    metric = ngeval.Metric(problem, [(inputs, targets)])
    own = ngeval.evaluate(problem, ["sf", "sf:4"], [1e-6, 1.0], natural=False)
    other = ngeval.evaluate(problem, ["sf", "sf:4"], [1e-6, 1.0], metric=metric)
    certain = (own["status"] == "ok") & (other["status"] == "ok")
    assert certain.any()
    expected = own["gamma"][certain].tolist()
    assert other["gamma"][certain].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nats", [1.0, 40.0, 120.0, 350.0, 690.0, 737.0, 900.0, 1300.0, 2000.0])
@pytest.mark.parametrize("form", ["jacobian", "gram", "krylov"])
def test_one_improbable_label(monkeypatch, nats, form):
    """Its probability is 0 in float64 from 745 nats, its square root from 1490."""
    if form != "jacobian":
        monkeypatch.setattr(row_space, "EXPLICIT_ENTRIES", 0)
    if form == "krylov":
        monkeypatch.setattr(row_space, "DENSE_SIZE", 0)
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4).double()
    targets = model(inputs).argmax(1)
    with torch.no_grad():
        worst = model(inputs[:1])[0].argmin()
        inputs[0] *= nats / float(model(inputs[:1])[0].max() - model(inputs[:1])[0].min())
    targets[0] = worst
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    table = ngeval.evaluate(problem, ["ef", "ief", "ng"], [1e-6, 1e-3, 1.0])
    right = right_of(model, inputs, targets, "categorical")
    exact = nats < 1400 and form != "krylov"
    if exact:
        assert (table["status"] == "ok").all()
    if nats > 1490:
        assert (table["status"][table["method"] == "ng"] == "uncertain").all()
    check(table[table["status"] == "ok"], right, 1e-7 if exact else 1e-3)
    for _, row in table.iterrows():
        exact = Updates(right).grade("ng", arb(row["damping"]), [], right).gamma
        assert row["gamma_ng_lower"] <= exact * (1 + 1e-9)
        assert row["gamma_ng_upper"] >= exact * (1 - 1e-9)


@pytest.mark.parametrize("nats", [300.0, 600.0, 700.0])
@pytest.mark.parametrize("entries", [0, 2**22])
def test_learnt_samples_underflow_nowhere(monkeypatch, nats, entries):
    monkeypatch.setattr(row_space, "EXPLICIT_ENTRIES", entries)
    model = nn.Linear(2, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.fill_(nats)
    inputs, targets = torch.eye(2).double(), torch.ones(2, 1).double()
    problem = ngeval.Problem(model, inputs, targets, "bernoulli")
    norms = ngeval.gradient_norms(problem)
    assert norms["gradient_norm"].tolist() == pytest.approx([math.exp(-nats)] * 2, rel=1e-9)
    assert norms["residual_norm"].tolist() == pytest.approx([math.exp(-nats)] * 2, rel=1e-9)
    methods = ["sgd", "ef", "ief", "diag", "diag-ef", "diag-ief", "kfac-ief", "ng", "block-ng"]
    table = ngeval.evaluate(problem, methods, [1e-3, 1e15], natural=entries > 0)
    assert (table["status"] == "ok").all()
    # √(2 p q q²)/(2 q²) for p ≈ 1 and q = e^−nats, for every update along (1, 1).
    expected = math.exp(nats / 2) / 2**0.5
    assert table["gamma"].tolist() == pytest.approx([expected] * len(table), rel=1e-9)


def test_a_saturated_token_counts_for_kfac():
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.inner(x)).sum(1))

    model, tokens, targets = Pooled().double().eval(), torch.randn(5, 3, 4).double(), None
    tokens[1, 2] *= 1e4  # tanh' is 0 in float64
    targets = torch.arange(5) % 2
    problem = ngeval.Problem(model, tokens, targets, "categorical")
    assert [f.count for f in ngeval.get_method("kfac").factors(problem)] == [15, 5]


@pytest.mark.parametrize("gaps", [(900.0, 1060.0), (730.0, 1350.0), (0.5, 1290.0)])
def test_the_factor_of_probabilities_that_underflow(gaps):
    logits = torch.tensor([[0.0, -gaps[0], -gaps[1]]], dtype=torch.float64)
    bound = Categorical().bind(logits, torch.tensor([0]))
    with ctx.workprec(5000):
        weights = [arb(float(value)).exp() for value in logits[0]]
        p = [weight / sum(weights[1:], weights[0]) for weight in weights]
        # S for classes in the order of falling p, from its formula.
        first = (p[0] * (p[1] + p[2])).sqrt()
        second = (p[1] * p[2] / (p[1] + p[2])).sqrt()
        columns = [
            [first, -first * p[1] / (p[1] + p[2]), -first * p[2] / (p[1] + p[2])],
            [arb(0), second, -second],
        ]
        expected = [[float(x.mid()) for x in c] for c in columns]
    unit = torch.eye(3, dtype=torch.float64)
    for k, values in enumerate(expected):
        column = bound.factor_product(unit[k].reshape(1, 3))[0]
        row = torch.stack([bound.factor_transpose_product(e.reshape(1, 3))[0, k] for e in unit])
        for result in (column, row):
            assert result.tolist() == pytest.approx(values, rel=1e-11, abs=1e-12 * max(values))


def test_an_update_of_nothing_but_rounding_is_not_ok():
    """A float32 sample that is learnt to the last digit has a residual that nobody knows."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    targets = model(inputs).detach() + torch.tensor([[0.0], [1.0], [2.0], [-1.0]])
    problem = ngeval.Problem(model, inputs, targets, "gaussian", dtype="model")
    assert problem.residual[0] == 0
    table = ngeval.evaluate(problem, ["ef", "ief", "diag-ief"], [0.0], natural=False)
    assert (table["status"] == "uncertain").all()


def test_a_gradient_that_underflows_is_named_where_it_is_the_measure():
    torch.manual_seed(0)
    model, inputs = nn.Linear(2, 1, bias=False), torch.eye(2)
    with torch.no_grad():
        model.weight.fill_(200.0)
    targets = torch.ones(2, 1)
    problem = ngeval.Problem(model, inputs, targets, "bernoulli", dtype="model")
    table = ngeval.evaluate(problem, ["ief"], [0.0, 1.0], natural=False)
    assert table["gamma_over_sgd"].isna().all()
    assert table["note"].str.contains("no gamma_over_sgd").all()
