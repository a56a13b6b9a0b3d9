"""Modules of the zoo whose layers are plain and whose wiring is not."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

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


class CalledTwice(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class CalledInLoop(Headed):
    """A residual layer applied three times, and on two shapes: (N, T, d), then (N, d)."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.inner(x))
        return self.out(torch.tanh(self.inner(x.mean(1))))


class RegisteredTwice(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.inner(x)))))


class TiedWeight(Headed):
    """One weight in two modules, each with its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.other(torch.tanh(self.inner(x)))))


class TiedKinds(nn.Module):
    """One tensor held by modules of two kinds: a norm and a custom module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), Scale()
        self.scale.scale = self.norm.weight
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scale(torch.tanh(self.norm(x))))


class TiedAutoencoder(nn.Module):
    """A weight used through its module, and transposed without it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(WIDTH, CLASSES), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)


class FunctionalOnly(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(functional.linear(x, self.inner.weight, self.inner.bias)))


class FunctionalAndModule(Headed):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(functional.linear(x, self.inner.weight))
        return self.out(torch.tanh(self.inner(hidden)))


class WeightPenalised(Headed):
    """A layer's output is divided by its weight's norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x) / self.inner.weight.norm()))


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


class Keywords(nn.Module):
    """Layers called by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, WIDTH), nn.LayerNorm(WIDTH)
        self.scale, self.out = Scale(), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(input=self.embedding(input=ids))
        return self.out(input=self.scale(x=torch.tanh(hidden)))


class Branching(nn.Module):
    """Python asks for a value of the data: ``vmap`` cannot trace that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scale(x)
        return self.out(torch.tanh(scaled) if float(scaled.detach().sum()) < 1e9 else scaled)


class FeatureWise(nn.Module):
    """A custom module with two inputs, one by keyword, that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.mix = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, *, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gain = condition @ self.gain
        return x * gain, {"mixed": (x * self.mix).sum(-1, keepdim=True)}


class Auxiliary(nn.Module):
    """A tuple of inputs of several kinds, for modules that take and return several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.film = nn.Embedding(5, WIDTH), FeatureWise()
        self.bilinear, self.out = nn.Bilinear(WIDTH, 3, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, kind: Tensor, x: Tensor, use: Tensor) -> Tensor:
        hidden, extra = self.film(self.embedding(kind), condition=x)
        hidden = torch.where(use, hidden, extra["mixed"])
        return self.out(self.bilinear(torch.tanh(hidden), x))


class DictOutput(nn.Module):
    """Keyword inputs, and an object with ``.logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(6, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> SimpleNamespace:
        hidden = torch.tanh(self.embedding(ids)) * mask.unsqueeze(-1)
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.out(pooled), hidden=hidden)


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList(LayerScaled() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


class InPlace(nn.Module):
    """What layers return is overwritten, more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.more = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale = nn.LayerNorm(WIDTH), Scale()
        self.gain, self.out = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.inner(x), 0.3, inplace=True)
        hidden = self.more(x)
        hidden += x
        x = self.scale(hidden).add_(self.gain)
        x = self.norm(x)
        x[:, 0] = 0
        return self.out(x.tanh_()).mul_(2)


class Detached(Headed):
    """The layer's first call, and all that ``blind`` does, are cut off from the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blind = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.tanh(self.inner(x) + self.blind(x)).detach()
        return self.out(torch.tanh(self.inner(x) + shift))


class Unused(Headed):
    """Modules and a parameter that no outputs depend on; one of the modules is called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.spare_norm = nn.Linear(3, 2), nn.BatchNorm1d(WIDTH)
        self.spare_parameter = nn.Parameter(torch.ones(2))
        self.spare_call = nn.Linear(WIDTH, 2)
        self.spare_embedding = nn.Embedding(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.spare_call(x)
        return self.out(torch.tanh(self.inner(x)))


UNUSED = ("spare.", "spare_norm.", "spare_parameter", "spare_call.", "spare_embedding.")


class Parametrized(nn.Module):
    """Normalised weights: the trainable parameters are children of a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
        self.inner = parametrizations.weight_norm(nn.Linear(9, WIDTH), dim=None)
        self.out = parametrizations.spectral_norm(nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.conv(x)).flatten(1))))


class Activations(nn.Module):
    """Activations with parameters, of one and of many slopes, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one, self.many = nn.Linear(WIDTH, 6), nn.PReLU(), nn.PReLU(6)
        self.bilinear = nn.Bilinear(6, 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.bilinear(self.one(hidden), self.many(-hidden))


class Fourier(nn.Module):
    """Complex numbers on the way, and a custom layer in frequency space."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.inner = nn.Parameter(torch.randn(3, WIDTH, 2)), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        x = torch.tanh(self.inner(torch.fft.irfft(spectrum, n=x.shape[1], dim=1)))
        return self.out(x.mean(1)) / math.sqrt(2)


def hooked() -> nn.Module:
    """The user's own hooks change what a layer sees and what it returns."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def patched() -> nn.Module:
    """A layer whose ``forward`` was replaced on the object."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    original = model[0].forward
    model[0].forward = lambda x: original(3 * x).square()
    return model


def frozen() -> nn.Module:
    """A whole layer, one weight and one bias are constants; so is a norm between them."""
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.PReLU(),
        nn.Linear(WIDTH, CLASSES),
    )
    for part in (model[0], model[2].weight, model[3].bias, model[4], model[5].bias):
        part.requires_grad_(False)
    return model
