"""Recurrent layers and cells: their rows against plain autograd, and their Kronecker factors."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ngeval
from ngeval.jacobians import row_matrix
from ngeval.jacobians.terms import whole_block

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

SAMPLES, TIMES = 5, 6
LENGTHS = torch.tensor([4, 6, 2, 6, 1])

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
LAYERS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", **DEEP}),
    ("GRU", {"bias": False, "batch_first": True}),
    ("GRU", DEEP),
    ("LSTM", {"num_layers": 3}),
    ("LSTM", {"proj_size": 2, "bias": False}),
    ("LSTM", {"proj_size": 2, **DEEP}),
]


class Tagger(nn.Module):
    """Every output and the last states enter the result; learned initial states are optional."""

    def __init__(self, kind: str, *, packed: bool, initial: bool, **options) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(3, 4, **options)
        self.packed, self.kind = packed, kind
        width, directions = self.layer.proj_size or 4, 1 + self.layer.bidirectional
        self.head = nn.Linear(width * directions, 2)
        sizes = [width, 4] if kind == "LSTM" else [width]
        count = self.layer.num_layers * directions
        states = [nn.Parameter(torch.randn(count, 1, size)) for size in sizes]
        self.initial = nn.ParameterList(states if initial else [])

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        states = tuple(state.expand(-1, len(inputs), -1).contiguous() for state in self.initial)
        states = (states if self.kind == "LSTM" else states[0]) if states else None
        first = self.layer.batch_first
        sequence = inputs if first else inputs.transpose(0, 1)
        if self.packed:
            sequence = pack_padded_sequence(
                sequence, lengths, batch_first=first, enforce_sorted=False
            )
        outputs, last = self.layer(sequence, states)
        if self.packed:
            outputs, _ = pad_packed_sequence(outputs, batch_first=first)
        outputs = self.head(outputs if first else outputs.transpose(0, 1)).square()
        if self.packed:
            there = torch.arange(outputs.shape[1]) < lengths.unsqueeze(1)
            outputs = outputs * there.unsqueeze(2)
        last = last if isinstance(last, tuple) else (last,)
        return outputs.sum(1) + sum(state.mean((0, 2)).unsqueeze(1) for state in last)


def jacobian_rows(model: nn.Module, inputs: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
    """J_nᵀv, one sample and one cotangent at a time."""
    parameters = list(model.parameters())
    rows = []
    for n, sample_vectors in enumerate(vectors):
        outputs = model(*(part[n : n + 1] for part in inputs))[0]
        for vector in sample_vectors:
            gradients = torch.autograd.grad(
                outputs, parameters, vector, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def compare(model: nn.Module, inputs: tuple[Tensor, ...], count: int = 2) -> ngeval.Problem:
    """The rows of one and of three cotangents; the problem."""
    targets = torch.arange(len(inputs[0])) % count
    problem = ngeval.Problem(model, inputs, targets, "categorical")
    assert problem.engine == "layers"
    for vectors in (1, 3):
        cotangents = torch.randn(
            len(targets), vectors, count, generator=torch.Generator().manual_seed(1)
        ).double()
        expected = jacobian_rows(model, inputs, cotangents)
        gap = (row_matrix(problem.rows, cotangents) - expected).abs().max()
        assert gap < 1e-12 * expected.abs().max()
    return problem


def rules(problem: ngeval.Problem) -> dict[str, bool]:
    """Which modules have their rows in closed form."""
    return {hooked.name: hooked.rule is not None for hooked in problem.rows.plan.modules}


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "learned"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_layers(kind, options, packed, initial):
    torch.manual_seed(0)
    model = Tagger(kind, packed=packed, initial=initial, **options).double().eval()
    inputs = torch.randn(SAMPLES, TIMES, 3, dtype=torch.float64)
    assert rules(compare(model, (inputs, LENGTHS)))["layer"]


class Cells(nn.Module):
    """A cell in a loop, from given or from default states; two sequences for each sample."""

    def __init__(self, cell: nn.Module, *, folded: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.folded = cell, nn.Linear(4, 2), folded

    def forward(self, inputs: Tensor) -> Tensor:
        sequences = torch.cat([inputs, inputs.flip(1)], 1).unflatten(1, (2, -1)).flatten(0, 1)
        sequences = sequences if self.folded else inputs
        state = None
        for step in sequences.unbind(1):
            state = self.cell(step, state)
        hidden = state[0] + state[1] if isinstance(state, tuple) else state
        if self.folded:
            hidden = hidden.unflatten(0, (-1, 2)).sum(1)
        return self.head(hidden)


class OwnCell(nn.Module):
    """A cell without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.entering = nn.Parameter(torch.randn(3, 4))
        self.recurrent = nn.Parameter(torch.randn(4, 4) / 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, inputs: Tensor, state: Tensor | None) -> Tensor:
        state = inputs.new_zeros(len(inputs), 4) if state is None else state
        return self.norm(torch.tanh(inputs @ self.entering + state @ self.recurrent))


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell", "OwnCell"])
def test_cells(kind, folded):
    torch.manual_seed(0)
    cell = OwnCell() if kind == "OwnCell" else getattr(nn, kind)(3, 4)
    model = Cells(cell, folded=folded).double().eval()
    problem = compare(model, (torch.randn(SAMPLES, TIMES, 3, dtype=torch.float64),))
    assert rules(problem)["cell"] == (kind != "OwnCell")
    # Products of rows take one product of terms for a parameter, however often it is used.
    cotangents = problem.residual.unsqueeze(1)
    terms = problem.rows.capture(cotangents, whole_block(cotangents))
    names = [name for term in terms for name in term.shapes]
    assert len(names) == len(set(names))


class UnrolledGru(nn.Module):
    """The same function as a GRU, by linear layers that are called once for each time."""

    def __init__(self, layer: nn.GRU, head: nn.Linear) -> None:
        super().__init__()
        self.entering, self.recurrent = nn.Linear(3, 12), nn.Linear(4, 12)
        with torch.no_grad():
            for linear, name in ((self.entering, "ih"), (self.recurrent, "hh")):
                linear.weight.copy_(getattr(layer, f"weight_{name}_l0"))
                linear.bias.copy_(getattr(layer, f"bias_{name}_l0"))
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs.new_zeros(len(inputs), 4)
        for step in inputs.unbind(1):
            a, b = self.entering(step).chunk(3, 1), self.recurrent(state).chunk(3, 1)
            reset, update = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
            state = (1 - update) * torch.tanh(a[2] + reset * b[2]) + update * state
        return self.head(state)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(inputs)[1][-1])


def test_kronecker_factors_are_those_of_the_linear_layers_inside():
    torch.manual_seed(0)
    model = LastState().double().eval()
    unrolled = UnrolledGru(model.layer, model.head).double().eval()
    inputs, targets = torch.randn(SAMPLES, TIMES, 3).double(), torch.arange(SAMPLES) % 2
    methods = ["kfac", "kfac:reduce", "kfac:pi", "ekfac", "kfac-ef"]
    tables = [
        ngeval.evaluate(ngeval.Problem(m, inputs, targets, "categorical"), methods, [1e-2, 1.0])
        for m in (model, unrolled)
    ]
    assert (tables[0]["coverage"] == 100).all()
    assert tables[0]["gamma"].tolist() == pytest.approx(tables[1]["gamma"].tolist(), rel=1e-9)


def test_positions_of_kronecker_factors_are_those_of_packed_sequences():
    """A packed batch has the factors of its samples alone, each at its own length."""
    torch.manual_seed(0)
    model = Tagger("LSTM", packed=True, initial=False).double().eval()
    inputs = torch.randn(SAMPLES, TIMES, 3, dtype=torch.float64)
    method = ngeval.methods.kfac.Kronecker.parse("kfac")

    def count(samples: slice) -> list[float]:
        batch = (inputs[samples], LENGTHS[samples])
        targets = torch.zeros(len(batch[1]), dtype=torch.long)
        problem = ngeval.Problem(model, batch, targets, "categorical", probes=False)
        return [f.count for f in method.factors(problem) if f.layer.name == "layer"]

    assert count(slice(0, SAMPLES)) == [float(LENGTHS.sum())] * 2
