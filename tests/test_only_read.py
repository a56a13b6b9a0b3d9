"""The caller's module is only read, compiled or not, and why it has no gradient is said."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import ngeval

INPUTS, TARGETS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def graded(model: nn.Module, **options) -> ngeval.Problem:
    problem = ngeval.Problem(model, INPUTS, TARGETS, "categorical", **options)
    ngeval.evaluate(problem, ["sgd", "ef", "ng"], [1e-3])
    return problem


class Remembers(nn.Module):
    """Keeps what it has seen in every way that modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen, self.by_length, self.last, self.calls = [], {}, None, 0
        self.register_buffer("cache", None)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.linear(inputs)
        self.seen.append(outputs)
        self.by_length[len(inputs)] = outputs
        self.last, self.cache, self.new = outputs, inputs, outputs
        self.calls += 1
        return outputs


def test_what_forward_stores_is_not_kept():
    model = Remembers().eval()
    graded(model)
    assert (model.seen, model.by_length, model.last, model.calls) == ([], {}, None, 0)
    assert model.cache is None
    assert not hasattr(model, "new")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_norms_by_hooks(norm):
    normed = getattr(torch.nn.utils, norm)
    model = nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), normed(nn.Linear(5, 3))).eval()
    with torch.no_grad():
        model(INPUTS)
    before = [module.weight for module in (model[0], model[2])]
    graded(model, dtype=torch.float64)
    assert all(module.weight is w for module, w in zip((model[0], model[2]), before, strict=True))
    assert model[0].weight.dtype == torch.float32
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


def test_recurrent_layers_keep_their_list_of_weights():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.layer(inputs.unflatten(1, (2, 2)))[1][0][-1])

    model = Last().eval()
    graded(model)
    weights = model.layer._flat_weights
    assert all(any(w is p for p in model.layer.parameters()) for w in weights)


@pytest.mark.parametrize("how", ["model", "blocks", "function"])
def test_compiled_models_are_not_compiled_again(how):
    compiled: list[object] = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
            self.activation = torch.tanh
            if how == "function":
                self.activation = torch.compile(lambda x: torch.tanh(x) + 1, backend=backend)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.activation(self.first(inputs)))

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net().eval()
    expected = [] if how == "function" else ngeval.evaluate(graded(model), ["ef"], [1e-3])["gamma"]
    if how == "model":
        model.compile(backend=backend)
    elif how == "blocks":
        model.first = torch.compile(model.first, backend=backend)
    with torch.no_grad():
        model(INPUTS)
    count = len(compiled)
    assert count > 0
    problem = graded(model)
    assert len(compiled) == count
    if how != "function":
        actual = ngeval.evaluate(problem, ["ef"], [1e-3])["gamma"]
        assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


class Residual(nn.Module):
    """The residual u″ + u of a differential equation, by derivatives inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.requires_grad_()
        u = self.net(inputs)
        first = torch.autograd.grad(u.sum(), inputs, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), inputs, create_graph=True)[0] + u


def test_derivatives_inside_forward():
    torch.manual_seed(0)
    model = Residual().double().eval()
    inputs = torch.linspace(0.1, 3, 5, dtype=torch.float64).unsqueeze(1)
    problem = ngeval.Problem(model, inputs, torch.zeros(5, 1).double(), "gaussian")
    table = ngeval.evaluate(problem, ["sgd", "ng"], [1.0])
    rows = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        model(x.clone().unsqueeze(0)).squeeze(),
                        model.parameters(),
                        materialize_grads=True,
                    )
                ]
            )
            for x in inputs
        ]
    )
    gradient = rows.T @ problem.residual.flatten()
    fisher = rows.T @ rows
    natural = torch.linalg.solve(fisher + torch.eye(len(fisher)).double(), gradient)
    for update, gamma in zip((gradient, natural), table["gamma"], strict=True):
        expected = (update @ fisher @ update).sqrt() / (update @ gradient).abs()
        assert gamma == pytest.approx(float(expected), rel=1e-9)
    following = problem.with_batch(inputs + 0.1, torch.zeros(5, 1).double())
    assert following.engine == problem.engine


class CutOff(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.encoder, self.head = how, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "unused":
            return inputs[:, :3] * 2
        if self.how == "detach":
            return self.head(self.encoder(inputs)).detach()
        with torch.no_grad():
            return self.head(self.encoder(inputs))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no_grad", r"the model \(CutOff\) calls encoder \(Linear\) under torch.no_grad"),
        ("detach", r"the model \(CutOff\) returns tensors that are cut off"),
        ("unused", "depend on no trainable parameter .*forward uses none of them"),
    ],
)
def test_why_there_is_no_gradient(how, message):
    with pytest.raises(ngeval.ModelError, match=message):
        ngeval.Problem(CutOff(how).eval(), INPUTS, TARGETS, "categorical")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


def test_functions_that_can_be_differentiated_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return Once.apply(self.linear(inputs))

    with pytest.raises(ngeval.EngineError, match=r"neither forward-mode nor second .* a jvp"):
        ngeval.Problem(Net().eval(), INPUTS, TARGETS, "categorical")


def test_complex_buffers():
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("turns", torch.polar(torch.ones(2), torch.tensor([0.3, 1.0])))

        def forward(self, inputs: Tensor) -> Tensor:
            pairs = torch.view_as_complex(self.linear(inputs).unflatten(1, (2, 2)).contiguous())
            return self.head(torch.view_as_real(pairs * self.turns).flatten(1))

    problem = graded(Rotary().eval())
    assert problem.function.dtype == torch.float64
    assert problem.function.buffers["turns"].dtype == torch.complex128


def test_nested_inputs_are_refused():
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(ngeval.InputError, match=r"nested tensor, .* pad it"):
        ngeval.Problem(nn.Linear(4, 3).eval(), nested, TARGETS[:2], "categorical")
