"""The engines agree with each other on every architecture, and ``auto`` picks a right one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ngeval
from ngeval.jacobians import gram_matrix, squared_column_sums
from ngeval.problem.fisher import unit_cotangents


class Transposed(nn.Module):
    """Sees (positions, samples): with as many positions as samples, shapes tell nothing."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x.transpose(0, 1)))).transpose(0, 1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(nn.functional.linear(x, self.inner.weight, self.inner.bias)))


class Branching(nn.Module):
    """Control flow that depends on the data: ``vmap`` cannot trace it."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x * self.scale if bool(x.sum() > 1e9) else torch.tanh(x * self.scale))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.out(self.norm(self.attention(x, x, x)[0]))[:, 0]


class Residual(nn.Module):
    """An activation that works in place, twice on what another layer returned."""

    def __init__(self):
        super().__init__()
        self.inner, self.more, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.relu(self.inner(x), inplace=True)
        return self.out(x + torch.relu_(self.more(x)))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


IMAGES = (3, 2, 6, 5)
ZOO = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4), "layers"),
    "linear": (lambda: nn.Linear(4, 3), (6, 4), "layers"),
    "one-sample": (lambda: nn.Linear(4, 3), (1, 4), "layers"),
    "no-bias": (lambda: nn.Linear(4, 3, bias=False), (6, 4), "layers"),
    "frozen-weight": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "0.weight", "1.bias"),
        (6, 4),
        "layers",
    ),
    "frozen-layer": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "0.weight", "0.bias"),
        (6, 4),
        "layers",
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        (4, 2, 4),
        "layers",
    ),
    "pooled": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        (4, 3, 4),
        "layers",
    ),
    "in-place": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (6, 4),
        "layers",
    ),
    "residual-in-place": (Residual, (6, 4), "layers"),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same"),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2), bias=False),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        IMAGES,
        "layers",
    ),
    "conv-one-pixel": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, (6, 5)), nn.Flatten()),
        IMAGES,
        "layers",
    ),
    "grouped-conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)),
        IMAGES,
        "layers",
    ),
    "batch-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(24, 3)
        ),
        IMAGES,
        "layers",
    ),
    "attention": (Attention, (3, 2, 4), "layers"),
    "called-twice": (Twice, (5, 4), "layers"),
    "tied": (Tied, (5, 4), "layers"),
    "functional": (Functional, (5, 4), "layers"),
    "hooked": (hooked, (5, 4), "layers"),
    "transposed": (Transposed, (3, 3, 3), "layers"),
    "branching": (Branching, (4, 4), "layers"),
}


@pytest.fixture(params=list(ZOO), ids=list(ZOO))
def case(request):
    build, shape, engine = ZOO[request.param]
    torch.manual_seed(0)
    model = build().double().eval()
    inputs = torch.randn(shape, dtype=torch.float64)
    outputs = model(inputs)
    targets = torch.randint(0, outputs.shape[-1], outputs.shape[:-1])
    return model, inputs, targets, engine


def test_auto_picks_the_engine_expected(case):
    model, inputs, targets, engine = case
    assert ngeval.Problem(model, inputs, targets, "categorical").engine == engine


def test_engines_agree_with_the_loop(case):
    model, inputs, targets, engine = case
    actual = {}
    vectorises = type(model) is not Branching  # its control flow depends on the data
    for name in {engine, "loop"} | ({"vmap"} if vectorises else set()):
        problem = ngeval.Problem(model, inputs, targets, "categorical", engine=name)
        cotangents = unit_cotangents(problem)
        rows = [
            torch.cat(list(part.values()), 1).double()
            for _, part in problem.rows.iterate(cotangents)
        ]
        actual[name] = (
            torch.cat(rows),
            gram_matrix(problem.rows, cotangents),
            squared_column_sums(problem.rows, cotangents),
        )
    rows = actual["loop"][0]
    expected = (rows, rows @ rows.T, rows.square().sum(0))
    for name, results in actual.items():
        for result, truth in zip(results, expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("engine", ["layers", "vmap", "loop"])
@pytest.mark.parametrize("memory", [1000, 3000])
def test_a_small_memory_budget_changes_nothing(engine, memory):
    model, inputs = nn.Linear(4, 3).double(), torch.randn(7, 2, 4, dtype=torch.float64)
    targets = torch.zeros(7, 2, dtype=torch.long)
    wide = ngeval.Problem(model, inputs, targets, "categorical", engine=engine)
    narrow = ngeval.Problem(model, inputs, targets, "categorical", engine=engine, memory=memory)
    cotangents = unit_cotangents(wide)
    assert len(narrow.rows.blocks(cotangents)) > 1
    torch.testing.assert_close(
        gram_matrix(wide.rows, cotangents), gram_matrix(narrow.rows, cotangents)
    )
    torch.testing.assert_close(wide.fisher().diagonal(), narrow.fisher().diagonal())


def test_a_budget_below_a_row_says_so_at_once():
    model, inputs = nn.Linear(100, 3), torch.randn(7, 100)
    with pytest.raises(ngeval.EngineError, match=r"not even one sample.*raise memory"):
        ngeval.Problem(
            *(model, inputs, torch.zeros(7, dtype=torch.long), "categorical"),
            engine="vmap",
            memory=1000,
        )


def test_an_engine_that_cannot_is_refused_with_the_reason():
    model, inputs = Branching().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(ngeval.EngineError, match=r"vmap.*data-d.*auto"):
        ngeval.Problem(
            model, inputs, torch.zeros(5, dtype=torch.long), "categorical", engine="vmap"
        )


def test_unknown_engine_and_memory():
    model, inputs, targets = nn.Linear(4, 3), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ngeval.InputError, match="did you mean 'layers'"):
        ngeval.Problem(model, inputs, targets, "categorical", engine="layer")
    with pytest.raises(ngeval.InputError, match="memory"):
        ngeval.Problem(model, inputs, targets, "categorical", memory=0)


def test_hooks_are_gone_afterwards_also_after_an_exception():

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    problem = ngeval.Problem(
        model, torch.randn(5, 4), torch.zeros(5, dtype=torch.long), "categorical"
    )
    with pytest.raises(ngeval.ModelError):
        squared_column_sums(problem.rows, torch.zeros(5, 1, 7))
    assert all(not module._forward_hooks for module in model.modules())
