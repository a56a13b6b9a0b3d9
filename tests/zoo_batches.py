"""Modules of the zoo that differ in where the samples are, and in what the batch shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CLASSES = 4, 3


class Scale(nn.Module):
    """A custom leaf module with a parameter of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Headed(nn.Module):
    """What most modules here share: a layer inside and a layer for the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)


class MergedPositions(nn.Module):
    """(N, T, d) seen as (N·T, d) by a layer, a norm and a custom module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.scale = nn.Linear(WIDTH, 6), nn.LayerNorm(6), Scale(6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.scale(torch.tanh(self.norm(self.inner(x.flatten(0, 1)))))
        return self.out(flat.unflatten(0, x.shape[:2]).cumsum(1))


class TimeFirst(nn.Module):
    """(T, N, d) inside; with T = N the shapes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.scale = nn.Linear(WIDTH, 6), nn.LayerNorm(6), Scale(6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale(torch.tanh(self.norm(self.inner(x.transpose(0, 1))))).cumsum(0)
        return self.out(hidden).transpose(0, 1)


class BatchLast(nn.Module):
    """(d, N) inside: a custom layer that multiplies from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(6, WIDTH)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.weight @ x.T).T)


class MergedTimeFirst(Headed):
    """(T·N, d): the samples are the fast index of a merged dimension."""

    def forward(self, x: Tensor) -> Tensor:
        swapped = x.transpose(0, 1)
        hidden = torch.tanh(self.inner(swapped.flatten(0, 1))).unflatten(0, swapped.shape[:2])
        return self.out(hidden.sum(0))


class SiameseTwice(Headed):
    """Two views of a sample through one layer, one after the other."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out((self.inner(left).sin() - self.inner(right).cos()).square())


class SiameseConcatenated(Headed):
    """Two views of a sample through one layer, together in a batch of 2N."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        first, second = self.inner(torch.cat([left, right])).chunk(2)
        return self.out((first.sin() - second.cos()).square())


class Repeated(Headed):
    """Every sample three times in a row: (3N, d)."""

    def forward(self, x: Tensor) -> Tensor:
        phases = torch.arange(3, dtype=x.dtype).repeat(len(x)).unsqueeze(1)
        hidden = torch.tanh(self.inner(x.repeat_interleave(3, 0) + phases))
        return self.out(hidden.unflatten(0, (-1, 3)).prod(1))


class Sorted(Headed):
    """A layer sees the samples in an order that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.out(torch.tanh(self.inner(x[order])))[order.argsort()]


class Routed(nn.Module):
    """Hard experts: each sees those samples alone that are sent to it, none perhaps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0).long() == i
            hidden[chosen] = torch.tanh(expert(x[chosen]))
        return self.out(hidden)


class Mixture(nn.Module):
    """Two branches, mixed by a gate that sees the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "deep": nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, CLASSES)),
                "wide": nn.Linear(WIDTH, CLASSES),
            }
        )
        self.gate = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(1)
        outputs = torch.stack([branch(x) for branch in self.branches.values()], 1)
        return torch.einsum("nb,nbc->nc", gate, outputs)


class RawParameters(nn.Module):
    """Parameters of a parent module: a token, positions, a scale, a temperature of no shape."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.scale, self.temperature = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(()))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.out(torch.tanh(x * self.scale).prod(1)) / self.temperature.exp()


class LayerScaled(nn.Module):
    """A block that owns a parameter, and children that own theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(self.inner(self.norm(x)))


class Listed(nn.Module):
    """Parameters in a list and a dict, which are modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(2))
        self.biases = nn.ParameterDict({"a": torch.randn(WIDTH), "b": torch.randn(WIDTH)})
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases.values(), strict=True):
            x = torch.tanh(x @ weight + bias)
        return self.out(x)


class PositionEmbedding(nn.Module):
    """Embeddings of positions: outputs (T, d) and (1, T, d), which the batch shares."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.segments = nn.Embedding(6, WIDTH), nn.Embedding(3, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        x = x + self.norm(self.positions(steps)) + self.segments(steps.unsqueeze(0) // 2)
        return self.out(torch.tanh(x).cumsum(1))


class ConstantInput(nn.Module):
    """A layer on a constant of one row, and one on a vector without any batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.randn(1, 3))
        self.code = nn.Parameter(torch.randn(3))
        self.shift, self.weights = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tanh(self.weights(self.code)).view(CLASSES, WIDTH)
        return functional.linear(torch.tanh(x + self.shift(self.constant)), weight)


class Prototypes(Headed):
    """A layer sees the samples, and a constant of as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.randn(5, WIDTH))
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        known, seen = torch.tanh(self.inner(self.prototypes)), torch.tanh(self.inner(x))
        return self.out(torch.softmax(seen @ known.T, 1))


class Branching(nn.Module):
    """Python asks for a value of the data: ``vmap`` cannot trace that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scale(x)
        return self.out(torch.tanh(scaled) if float(scaled.detach().sum()) < 1e9 else scaled)
