"""Subjects of *fadam*: a character GPT, one regression in two forms, and a VQ-VAE.

Nothing is downloaded: the data are the help topics that ship with Python (their text varies a
little between its versions), a random teacher network, and scikit-learn's digits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]

VOCABULARY = 64
"""The most frequent characters of the training text; the last token stands for all others."""

CONTEXT = 32
"""Characters in a sequence."""

NOISE = 0.2
"""σ of the regressions' targets around the teacher, whose outputs have variance 1."""

BINS = 16
"""Classes of the discrete regression: targets in intervals of equal width from −3 to 3, the first
and the last of which are unbounded."""

COMMITMENT = 0.25
"""Weight of the VQ-VAE's commitment loss."""


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        name: in tables.
        build: makes the model, from torch's global generator.
        batches: ``(steps, seed) -> iterator``, the training batches.
        loss: the training loss of a batch.
        held_out: the loss to compare, on the ``"validation"`` or on the ``"test"`` data.
        unit: of ``held_out``.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Callable[[nn.Module, str], float]
    unit: str


# A character GPT


class Block(nn.Module):
    """A causal transformer block with pre-normalisation; the perceptron is four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixing, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, T, width)`` in and out."""
        parts = self.mixing(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.outer(functional.gelu(self.inner(self.norms[1](x))))
        return y


class CharacterGpt(nn.Module):
    """Logits of the next character at every position, shape ``(N, T, VOCABULARY)``.

    Positions are learnt, and the head is not tied to the embedding.
    """

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape ``(N, T)``, T at most `CONTEXT`."""
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.words(tokens) + places)))
        return logits


@cache
def text() -> dict[str, Tensor]:
    """The help topics as tokens: a tenth of the paragraphs is validation, and a tenth is test.

    Topics quote each other, so repeated paragraphs are dropped.
    """
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for index, paragraph in enumerate(dict.fromkeys(whole.split("\n\n"))):
        kind = {8: "validation", 9: "test"}.get(index % 10, "train")
        parts[kind].append(paragraph)
    joined = {kind: "\n\n".join(paragraphs) for kind, paragraphs in parts.items()}
    common = Counter(joined["train"]).most_common(VOCABULARY - 1)
    codes = {character: code for code, (character, _) in enumerate(common)}
    return {
        kind: torch.tensor([codes.get(character, VOCABULARY - 1) for character in string])
        for kind, string in joined.items()
    }


def sequences(kind: str, count: int, generator: torch.Generator) -> Batch:
    """Random pieces of the text, and the next character at every position."""
    tokens = text()[kind]
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
    pieces = tokens[starts + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def character_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a character, in nats."""
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def language(batch_size: int = 16, held_out: int = 256) -> Subject:
    """The character GPT."""

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield sequences("train", batch_size, generator)

    def measure(model: nn.Module, kind: str) -> float:
        generator = torch.Generator().manual_seed(0)
        return float(character_loss(model, sequences(kind, held_out, generator)))

    return Subject(
        "character GPT", CharacterGpt, batches, character_loss, measure, "nats per character"
    )


# One regression in two forms


@cache
def teacher() -> nn.Module:
    """A random function of six numbers, with values of mean 0 and variance 1 approximately."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, last = nn.Linear(6, 24), nn.Linear(24, 1)
        net = nn.Sequential(first, nn.Tanh(), last).requires_grad_(False)
        nn.init.normal_(first.weight)
        values = net(torch.randn(10_000, 6))
        last.weight /= values.std()
        last.bias.copy_((last.bias - values.mean()) / values.std())
    return net


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the teacher's values, and the values with noise: ``(N, 6), (N, 1), (N, 1)``."""
    inputs = torch.randn(count, 6, generator=generator)
    values = teacher()(inputs)
    return inputs, values, values + NOISE * torch.randn(count, 1, generator=generator)


def edges() -> Tensor:
    """The ``BINS − 1`` boundaries between classes."""
    return torch.linspace(-3, 3, BINS + 1)[1:-1]


def class_probabilities(values: Tensor) -> Tensor:
    """Class probabilities for a teacher's value: the normal mass in each bin, ``(N, BINS)``."""
    below = torch.special.ndtr((edges().double() - values.double()) / NOISE)
    ends = torch.zeros_like(below[:, :1]), torch.ones_like(below[:, :1])
    return torch.cat([ends[0], below, ends[1]], 1).diff(dim=1).clamp_min(0)


def perceptron(outputs: int) -> nn.Module:
    """6-64-64-C."""
    layers = [nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    return nn.Sequential(*layers)


def regression(form: str, batch_size: int = 64, held_out: int = 2048) -> Subject:
    """The teacher's values with noise, as numbers or as classes.

    ``"continuous"``: the network outputs the mean of a normal density with the true σ.
    ``"discrete"``: it outputs the probabilities of the bins. The held-out loss of both is the KL
    divergence from the true distribution to the network's, in nats, so that 0 is perfect and the
    two forms can be compared.
    """
    discrete = form == "discrete"

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            inputs, _, noisy = points(batch_size, generator)
            yield inputs, torch.bucketize(noisy[:, 0], edges()) if discrete else noisy

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if discrete:
            return functional.cross_entropy(model(batch[0]), batch[1])
        errors: Tensor = (model(batch[0]) - batch[1]).square().sum(1)
        return errors.mean() / (2 * NOISE**2)

    def measure(model: nn.Module, kind: str) -> float:
        generator = torch.Generator().manual_seed(100 + (kind == "test"))
        inputs, values, _ = points(held_out, generator)
        outputs = model(inputs).double()
        if not discrete:
            return float((outputs - values).square().mean() / (2 * NOISE**2))
        truth = class_probabilities(values)
        terms = torch.xlogy(truth, truth) - truth * torch.log_softmax(outputs, 1)
        return float(terms.sum(1).mean())

    outputs = BINS if discrete else 1
    return Subject(
        f"{form} regression", lambda: perceptron(outputs), batches, loss, measure, "KL in nats"
    )


# A VQ-VAE


class VqVae(nn.Module):
    """Digits as four codes of a book, each of eight numbers (van den Oord et al. 2017)."""

    def __init__(self, width: int = 96, latents: int = 4, codes: int = 32, size: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, latents * size)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents * size, width), nn.ReLU(), nn.Linear(width, 64)
        )
        self.book = nn.Parameter(0.3 * torch.randn(codes, size))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction, and the codebook and commitment losses of each sample.

        The nearest codes replace the encoder's outputs, with a straight-through gradient.
        """
        encoded = self.encoder(pixels).unflatten(1, (-1, self.book.shape[1]))
        nearest = torch.cdist(encoded.detach(), self.book.detach()).argmin(-1)
        codes = self.book[nearest]
        codebook = (codes - encoded.detach()).square().sum((1, 2))
        commitment = (codes.detach() - encoded).square().sum((1, 2))
        straight_through = encoded + (codes - encoded).detach()
        return self.decoder(straight_through.flatten(1)), codebook + COMMITMENT * commitment


@cache
def digits() -> dict[str, Tensor]:
    """Pixels in [0, 1]: 1437 images to train with, 180 each for validation and testing."""
    pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    parts = pixels[order].split([len(pixels) - 360, 180, 180])
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def vq_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of a reconstruction, plus its codebook and commitment losses."""
    reconstruction, terms = model(batch[0])
    losses: Tensor = (reconstruction - batch[0]).square().sum(1) + terms
    return losses.mean()


def vq_vae(batch_size: int = 64) -> Subject:
    """The VQ-VAE; its held-out loss is the mean squared error of a pixel."""

    def batches(steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        pixels = digits()["train"]
        for _ in range(steps):
            images = pixels[torch.randint(len(pixels), (batch_size,), generator=generator)]
            yield images, images

    def measure(model: nn.Module, kind: str) -> float:
        pixels = digits()[kind]
        return float((model(pixels)[0] - pixels).square().mean())

    return Subject("VQ-VAE", VqVae, batches, vq_loss, measure, "squared error of a pixel")
