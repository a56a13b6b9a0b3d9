"""Some seventy small architectures, five samples of each, and their Jacobians by another route.

Nothing here imports ngeval. The Jacobian is plain autograd on every sample alone, one backward
pass for each output.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo_attention as attention
from tests import zoo_batches as batches
from tests import zoo_layers as layers
from tests import zoo_wiring as wiring

NUM_SAMPLES = 5

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """An architecture and a batch for it.

    Attributes:
        name: also the seed of its weights.
        build: makes the module.
        inputs: five samples.
        targets: as the likelihood asks.
        likelihood: by ngeval's name.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    targets: Tensor
    likelihood: str

    def model(self) -> nn.Module:
        """The module in float64 and eval mode, with no parameter or statistic at 0 or 1."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build().double().eval()
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
        return model


@dataclass(frozen=True)
class Truth:
    """Outputs ``(N, *positions, C)`` and, by parameter, Jacobians ``(N, outputs, numel)``."""

    outputs: Tensor
    jacobians: dict[str, Tensor]

    def rows(self, cotangents: Tensor) -> dict[str, Tensor]:
        """J_nᵀv for v of shape ``(N, Q, *positions, C)``: by parameter, ``(N·Q, numel)``."""
        vectors = cotangents.flatten(2)
        return {
            name: torch.stack([v @ j for v, j in zip(vectors, jacobian, strict=True)]).flatten(0, 1)
            for name, jacobian in self.jacobians.items()
        }

    @functools.cached_property
    def matrix(self) -> Tensor:
        """J as one matrix ``(N·outputs, P)``."""
        return torch.cat([j.flatten(0, 1) for j in self.jacobians.values()], 1)


def truth(entry: Entry) -> Truth:
    """Outputs and Jacobians, every sample by itself and every output by itself.

    The gradients are gathered in ``.grad``, since activation checkpointing of the older kind
    allows nothing else.
    """
    model = entry.model()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable}
    for n in range(NUM_SAMPLES):
        sample = select(entry.inputs, slice(n, n + 1))
        result = forward(model, sample)
        outputs.append(result.detach())
        for output in result.flatten():
            model.zero_grad(set_to_none=True)
            output.backward(retain_graph=True)
            for name, parameter in trainable.items():
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                rows[name].append(gradient.to_dense().flatten())
    jacobians = {
        name: torch.stack(stacked).unflatten(0, (NUM_SAMPLES, -1)) for name, stacked in rows.items()
    }
    return Truth(torch.cat(outputs), jacobians)


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """The outputs, however the model takes its inputs and returns them."""
    inputs = select(inputs, slice(None))
    result: Any
    if isinstance(inputs, dict):
        result = model(**inputs)
    else:
        result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    outputs: Tensor = result if isinstance(result, Tensor) else result.logits
    return outputs


def select(inputs: Inputs, samples: slice) -> Inputs:
    """Copies of some samples."""
    if isinstance(inputs, dict):
        return {key: value[samples].clone() for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(value[samples].clone() for value in inputs)
    return inputs[samples].clone()


def floats(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((NUM_SAMPLES, *shape), generator=generator, dtype=torch.float64)


def integers(high: int, *shape: int, low: int = 0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (NUM_SAMPLES, *shape), generator=generator)


def padded(high: int, length: int) -> Tensor:
    """Tokens from 1 on, with 0 for padding at the ends of some samples."""
    ids = integers(high, length, low=1)
    for n in range(NUM_SAMPLES):
        ids[n, length - n % 3 :] = 0
    return ids


ENTRIES: dict[str, Entry] = {}


def add(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    *positions: int,
    classes: int = 3,
    likelihood: str = "categorical",
) -> None:
    """Register an architecture; its outputs are ``(N, *positions, classes)``."""
    targets = integers(classes, *positions, seed=1)
    if likelihood == "gaussian":
        targets = floats(*positions, classes, seed=1)
    elif likelihood == "bernoulli":
        targets = integers(2, *positions, classes, seed=1).double()
    ENTRIES[name] = Entry(name, build, inputs, targets, likelihood)


VECTORS, SEQUENCES, SQUARE = floats(4), floats(3, 4), floats(NUM_SAMPLES, 4)
PAIRS = (floats(4), floats(4, seed=2))

add("called-twice", wiring.CalledTwice, VECTORS)
add("called-in-loop", wiring.CalledInLoop, SEQUENCES, likelihood="gaussian")
add("registered-twice", wiring.RegisteredTwice, VECTORS)
add("tied-weight", wiring.TiedWeight, VECTORS)
add("tied-third-name", wiring.TiedThirdName, VECTORS)
add("nested-outputs", wiring.NestedOutputs, VECTORS)
add("tied-kinds", wiring.TiedKinds, SEQUENCES, 3)
add("tied-autoencoder", wiring.TiedAutoencoder, VECTORS, classes=4, likelihood="gaussian")
add("functional-only", wiring.FunctionalOnly, VECTORS)
add("functional-and-module", wiring.FunctionalAndModule, VECTORS)
add("weight-penalised", wiring.WeightPenalised, VECTORS)
add("merged-positions", batches.MergedPositions, SEQUENCES, 3)
add("time-first", batches.TimeFirst, SEQUENCES, 3)
add("time-first-square", batches.TimeFirst, SQUARE, NUM_SAMPLES)
add("batch-last", batches.BatchLast, VECTORS)
add("merged-time-first", batches.MergedTimeFirst, SEQUENCES)
add("siamese-twice", batches.SiameseTwice, PAIRS)
add("siamese-concatenated", batches.SiameseConcatenated, PAIRS)
add("repeated", batches.Repeated, VECTORS)
add("sorted", batches.Sorted, VECTORS)
add("routed", batches.Routed, VECTORS)
add("mixture", batches.Mixture, VECTORS)
add("raw-parameters", batches.RawParameters, SEQUENCES)
add("layer-scaled", lambda: nn.Sequential(batches.LayerScaled(), nn.Linear(4, 3)), SEQUENCES, 3)
add("parameter-list", batches.Listed, VECTORS, likelihood="bernoulli")
add("position-embedding", batches.PositionEmbedding, SEQUENCES, 3)
add("position-embedding-square", batches.PositionEmbedding, SQUARE, NUM_SAMPLES)
add("prototypes", batches.Prototypes, VECTORS)
add("keyword-calls", wiring.Keywords, integers(6, 3), 3)
add("branching", batches.Branching, VECTORS)
add("constant-input", batches.ConstantInput, VECTORS)
add("auxiliary", wiring.Auxiliary, (integers(5), floats(3), integers(2, 1, seed=3).bool()))
add("dict-output", wiring.DictOutput, {"ids": integers(6, 3), "mask": (padded(6, 3) > 0).double()})
add("checkpointed", lambda: wiring.Checkpointed(reentrant=False), SEQUENCES, 3)
add("checkpointed-reentrant", lambda: wiring.Checkpointed(reentrant=True), SEQUENCES, 3)
add("in-place", wiring.InPlace, VECTORS)
add("detached", wiring.Detached, VECTORS)
add("unused", wiring.Unused, VECTORS)
add("parametrized", wiring.Parametrized, floats(2, 4))
add("activations", wiring.Activations, VECTORS, likelihood="bernoulli")
add("fourier", wiring.Fourier, floats(4, 4))
add("hooked", wiring.hooked, VECTORS)
add("patched", wiring.patched, VECTORS)
add("frozen", wiring.frozen, VECTORS)

add("text-convolution", layers.TextConvolution, padded(7, 6))
add("causal-convolution", layers.Causal, floats(2, 4), 4)
add("resnet", layers.resnet, floats(1, 4, 6))
add("densenet", layers.Dense, floats(1, 4, 4))
add("squeeze-excite", layers.SqueezeExcite, floats(3, 6, 4))
add("convnext", layers.ConvNext, floats(1, 6, 6))
add("unet", layers.UNet, floats(1, 4, 2), 4, 2)
add("volumes", layers.volumes, floats(1, 4, 3, 4))
add("odd-convolutions", layers.odd_convolutions, floats(2, 6, 7), likelihood="gaussian")
add("one-dimensional", layers.one_dimensional, floats(2, 7))
add("frames", layers.Frames, floats(2, 1, 3, 3))
add("lstm", layers.LongShortTerm, floats(3, 2), 3)
add("gru", layers.TimeFirstGru, integers(6, 3))
add("recurrent-cells", layers.Cells, floats(3, 2))
add("elman", layers.Elman, floats(3, 2))
add("subclassed", layers.Subclassed, floats(1, 3, 3))
add("sparse-embedding", layers.Sparse, integers(4, 6))
add("embedding-bag", layers.Bags, integers(6, 3))

add("gpt", attention.Gpt, integers(5, 3), 3, classes=5)
add("gpt-deep", lambda: attention.Gpt(2), integers(5, 2), 2, classes=5)
add("albert", attention.Albert, SEQUENCES)
add("vit", attention.Vit, floats(1, 4, 6))
add("vit-lora", lambda: attention.Vit(lora=True), floats(1, 4, 6))
add(
    "t5",
    attention.T5,
    {"input_ids": integers(4, 4), "decoder_input_ids": integers(4, 3, seed=2)},
    3,
    classes=4,
)
MASKED = {"input_ids": padded(7, 4), "mask": padded(7, 4) > 0}
add("bert", attention.Bert, MASKED)
add("bert-time-first", lambda: attention.Bert(batch_first=False), MASKED)
add("perceiver", attention.Perceiver, floats(4, 3))
add("torch-transformer", attention.TorchTransformer, (floats(2, 4), floats(3, 4, seed=2)), 3)
add("llama", attention.Llama, integers(6, 3), 3)
add("swin", attention.Swin, floats(6, 4))
