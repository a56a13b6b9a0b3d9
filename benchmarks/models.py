"""The models that are measured, in plain torch, each with its batch: `build`.

Sizes are those of networks in use; weights are seeded random ones, or briefly trained where the
trained network's imbalance of gradients matters. ``quick`` gives toys of the same kinds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SEED = 0

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A model in eval mode and its batch."""

    name: str
    model: nn.Module
    inputs: Inputs
    targets: Tensor
    likelihood: str = "categorical"

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The positional arguments of the model's forward."""
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def to(self, device: str, dtype: torch.dtype | None = None) -> Workload:
        """A copy of the batch elsewhere; the model itself moves."""
        moved = tuple(
            t.to(device, dtype if t.is_floating_point() else None) for t in self.arguments
        )
        inputs = moved if isinstance(self.inputs, tuple) else moved[0]
        model = self.model.to(device=device, dtype=dtype)
        return replace(self, model=model, inputs=inputs, targets=self.targets.to(device))


def sum_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_n ℓ_n over all positions."""
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, targets.reshape(-1), reduction="sum")


def build(name: str, device: str = "cpu", *, quick: bool = False, trained: bool = True) -> Workload:
    """A model with its batch, the same one on every call.

    ``trained=False`` leaves out the brief training of mlp and cnn, for measuring memory, where
    its own peak would be in the way.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        workload = BUILDERS[name](quick, trained)
        workload.model.eval()
    return workload.to(device)


# Convolutions and perceptrons


def mlp(widths: Iterable[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def _build_mlp(quick: bool, trained: bool) -> Workload:
    samples, width = (24, 48) if quick else (160, 256)
    model = mlp([64, width, width, 10])
    inputs, targets = digits()
    if trained:
        batches = list(zip(inputs.split(32), targets.split(32), strict=True))
        _train(model, batches * 3)
    return Workload("mlp", model, inputs[:samples], targets[:samples])


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        # The parameter-free shortcut of the original ResNet-20: subsample, pad channels with 0.
        short = functional.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 5 + (self.added,))
        return functional.relu(y + short)


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], blocks: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        before = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                stages.append(ResidualBlock(before, width, 2 if i > 0 and j == 0 else 1))
                before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(functional.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def _images(samples: int, classes: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise around a mean image of each class."""
    targets = torch.randint(0, classes, (samples,))
    means = torch.randn(classes, 3, size, size)
    return 0.5 * means[targets] + torch.randn(samples, 3, size, size), targets


def _build_cnn(quick: bool, trained: bool) -> Workload:
    samples, widths, blocks = (6, (4, 8, 8), 1) if quick else (64, (16, 32, 64), 3)
    model = ResNet(widths, blocks, 10)
    inputs, targets = _images(samples, 10)
    if trained:
        _train(model, [(inputs, targets)] * 8)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # so that one pass sets the running statistics
    with torch.no_grad():
        model.train()(inputs)
    for norm in norms:
        norm.momentum = 0.1
    return Workload("cnn", model, inputs, targets)


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# Transformers


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank correction, built as PEFT builds it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.02)  # at 0 the gradient of A would vanish
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


class Attention(nn.Module):
    """Multi-head attention, over another sequence if one is given."""

    def __init__(self, width: int, heads: int, *, bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q(x), self.k(source), self.v(source))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


def _feed_forward(width: int, inner: int, activation: nn.Module, *, bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, inner, bias=bias), activation, nn.Linear(inner, width, bias=bias)
    )


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.mlp = _feed_forward(width, 4 * width, nn.GELU(approximate="tanh"), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _add_lora(model: nn.Module, rank: int) -> None:
    """Freeze the model; LoRA on every attention's q and v."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.q, module.v = LoraLinear(module.q, rank), LoraLinear(module.v, rank)


def _small_weights(model: nn.Module) -> None:
    """GPT-2's initialisation."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class VisionTransformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def _build_vit(quick: bool, trained: bool) -> Workload:
    samples, layers, width, patch, classes = (4, 2, 48, 8, 10) if quick else (32, 6, 192, 4, 100)
    model = VisionTransformer(layers, width, 3, patch, classes)
    _add_lora(model, 8)
    model.head.requires_grad_(True)
    return Workload("vit", model, *_images(samples, classes))


class Gpt(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _small_weights(self)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        # (1, T) positions, broadcast over the batch, as in GPT-2.
        index = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.words(tokens) + self.positions(index)
        return self.head(self.norm(self.blocks(x)))


def _build_gpt(quick: bool, trained: bool) -> Workload:
    samples, length, vocabulary = (3, 6, 50) if quick else (8, 64, 50257)
    shape = (2, 24, 2, vocabulary, 16) if quick else (12, 768, 12, vocabulary, 1024)
    tokens = torch.randint(0, vocabulary, (samples, length + 1))
    return Workload("gpt", Gpt(*shape), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class CrossBlock(nn.Module):
    """A T5 block without relative position bias; with attention to ``memory`` in the decoder."""

    def __init__(self, width: int, heads: int, inner: int, *, decoder: bool) -> None:
        super().__init__()
        norms = 3 if decoder else 2
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(norms))
        self.own = Attention(width, heads, bias=False, causal=decoder)
        self.cross = Attention(width, heads, bias=False) if decoder else None
        self.mlp = _feed_forward(width, inner, nn.ReLU(), bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.own(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory)
        return x + self.mlp(self.norms[-1](x))


class T5(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.encoder, self.decoder = (
            nn.ModuleList(CrossBlock(width, heads, inner, decoder=decoder) for _ in range(layers))
            for decoder in (False, True)
        )
        self.encoder_norm, self.decoder_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        _small_weights(self)
        nn.init.normal_(self.words.weight)

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        x = self.words(source)
        for block in self.encoder:
            x = block(x)
        memory, y = self.encoder_norm(x), self.words(shifted)
        for block in self.decoder:
            y = block(y, memory)
        scale = self.words.embedding_dim**-0.5  # T5's own, with tied embeddings
        return functional.linear(scale * self.decoder_norm(y), self.words.weight)


def _build_t5(quick: bool, trained: bool) -> Workload:
    samples, source_length, length = (3, 5, 3) if quick else (160, 64, 8)
    shape = (2, 24, 2, 32, 40) if quick else (12, 768, 12, 3072, 32128)
    model = T5(*shape)
    _add_lora(model, 8)
    source = torch.randint(0, shape[-1], (samples, source_length))
    targets = torch.randint(0, shape[-1], (samples, length))
    shifted = functional.pad(targets[:, :-1], (1, 0))
    return Workload("t5", model, (source, shifted), targets)


class HubT5(nn.Module):
    """An unmodified T5 of transformers with LoRA of peft on its queries and values."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        import peft  # noqa: PLC0415  (the "hf" extra is needed for this model alone)
        import transformers  # noqa: PLC0415

        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(decoder_start_token_id=0, use_cache=False, **config)
        )
        lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=["q", "v"])
        self.model = peft.get_peft_model(model, lora)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:  # begins at zero, where half of the gradients vanish
                nn.init.normal_(parameter, std=0.02)

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        return self.model(input_ids=source, decoder_input_ids=shifted).logits


def _build_t5_small(quick: bool, trained: bool) -> Workload:
    """T5-small's sizes; two label tokens for each sample, 160 in all."""
    samples, length, targets = (3, 5, 2) if quick else (80, 64, 2)
    sizes = (
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        if quick
        else {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8}
    )
    source = torch.randint(1, sizes["vocab_size"], (samples, length))
    labels = torch.randint(1, sizes["vocab_size"], (samples, targets))
    shifted = functional.pad(labels[:, :-1], (1, 0))
    return Workload("t5-small", HubT5(sizes), (source, shifted), labels)


BUILDERS: dict[str, Callable[[bool, bool], Workload]] = {
    "mlp": _build_mlp,
    "cnn": _build_cnn,
    "vit": _build_vit,
    "gpt": _build_gpt,
    "t5": _build_t5,
    "t5-small": _build_t5_small,
}
