"""Modules of the zoo whose layers are plain and whose wiring is not."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.zoo_batches import CLASSES, WIDTH, Headed, LayerScaled, Scale


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


class TiedThirdName(TiedWeight):
    """The tied weight is also kept by modules that are never called, as T5 keeps its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = nn.Linear(WIDTH, WIDTH, bias=False), nn.Embedding(3, 2)
        self.shared.weight = self.inner.weight
        self.unused_too = nn.Embedding(3, 2)
        self.unused_too.weight = self.unused.weight


class NestedOutputs(Headed):
    """A module's second output is made from its first; both are used."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first = torch.tanh(x * self.scale)
            return first, first.square() + self.scale

    def __init__(self) -> None:
        super().__init__()
        self.pair = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(self.inner(x))
        return self.out(first * second)


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


class Keywords(nn.Module):
    """Layers called by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, WIDTH), nn.LayerNorm(WIDTH)
        self.scale, self.out = Scale(), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(input=self.embedding(input=ids))
        return self.out(input=self.scale(x=torch.tanh(hidden)))


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
