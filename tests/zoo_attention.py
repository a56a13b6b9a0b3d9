"""Transformers of the zoo."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, CLASSES = 4, 2, 3


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """(N, T, d) to (N, heads, T, d/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split(part) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(merge(mixed))


class Block(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), SelfAttention(causal)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Head and embedding are one weight; positions are embedded for the whole batch at once."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, WIDTH), nn.Embedding(6, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Albert(nn.Module):
    """One block three times, each time checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.out(x[:, 0])


class LoRA(nn.Module):
    """A frozen layer and its trainable correction of rank 2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Vit(nn.Module):
    """Patches by convolution, a class token, positions as a parameter."""

    def __init__(self, lora: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 7, WIDTH))
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        if lora:
            self.requires_grad_(False)
            self.head.requires_grad_(True)
            self.block.attention.qkv = LoRA(self.block.attention.qkv)
            self.block.mlp[0] = LoRA(self.block.mlp[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class RootMeanSquare(nn.Module):
    """T5's norm, a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


class T5Attention(nn.Module):
    """Returns its relative position bias, for the layers above to use."""

    def __init__(self, relative: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.relative = nn.Embedding(5, HEADS) if relative else None

    def forward(
        self, x: Tensor, context: Tensor, bias: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.relative is not None:
            rows, columns = torch.arange(x.shape[1]), torch.arange(context.shape[1])
            gaps = (columns.unsqueeze(0) - rows.unsqueeze(1)).clamp(-2, 2) + 2
            bias = self.relative(gaps).permute(2, 0, 1).unsqueeze(0)
        scores = split(self.q(x)) @ split(self.k(context)).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        return self.o(merge(scores.softmax(-1) @ split(self.v(context)))), bias


class T5Block(nn.Module):
    def __init__(self, relative: bool, cross: bool) -> None:
        super().__init__()
        self.norm1, self.attention = RootMeanSquare(), T5Attention(relative)
        self.norm2, self.cross = (RootMeanSquare(), T5Attention()) if cross else (None, None)
        self.norm3, self.enter = RootMeanSquare(), nn.Linear(WIDTH, 6, bias=False)
        self.leave = nn.Linear(6, WIDTH, bias=False)

    def forward(
        self, x: Tensor, bias: Tensor | None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.norm1(x)
        mixed, bias = self.attention(normed, normed, bias, causal=context is not None)
        x = x + mixed
        if self.cross is not None and self.norm2 is not None and context is not None:
            x = x + self.cross(self.norm2(x), context)[0]
        return x + self.leave(torch.relu(self.enter(self.norm3(x)))), bias


class T5(nn.Module):
    """Encoder and decoder: one embedding for both and the head, one bias for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(4, WIDTH)
        self.encoder = nn.ModuleList([T5Block(True, False), T5Block(False, False)])
        self.decoder = nn.ModuleList([T5Block(True, True)])
        self.norm, self.head = RootMeanSquare(), nn.Linear(WIDTH, 4, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> SimpleNamespace:
        context, bias = self.shared(input_ids), None
        for block in self.encoder:
            context, bias = block(context, bias)
        x, bias = self.shared(decoder_input_ids), None
        for block in self.decoder:
            x, bias = block(x, bias, context)
        return SimpleNamespace(logits=self.head(self.norm(x) * WIDTH**-0.5))


class Bert(nn.Module):
    """Torch's attention with padding, position numbers of shape (1, T) in a buffer, a pooler."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, WIDTH, padding_idx=0)
        self.positions, self.types = nn.Embedding(5, WIDTH), nn.Embedding(2, WIDTH)
        self.register_buffer("position_ids", torch.arange(5).unsqueeze(0), persistent=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, 0.1, batch_first=batch_first)
        self.norm, self.pooler = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out, self.batch_first = nn.Linear(WIDTH, CLASSES), batch_first

    def forward(self, input_ids: Tensor, mask: Tensor) -> SimpleNamespace:
        x = self.tokens(input_ids) + self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = x + self.types(torch.zeros_like(input_ids))
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0])
        first = x[:, 0] if self.batch_first else x[0]
        return SimpleNamespace(logits=self.out(torch.tanh(self.pooler(first))), hidden=x)


class Perceiver(nn.Module):
    """Latents of the model's own ask the sample; keys and values have other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, WIDTH))
        self.attention = nn.MultiheadAttention(
            WIDTH, HEADS, kdim=3, vdim=3, add_bias_kv=True, batch_first=True
        )
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.unsqueeze(0).repeat(len(x), 1, 1)
        return self.out(torch.tanh(self.attention(latents, x, x)[0]).prod(1))


class TorchTransformer(nn.Module):
    """Torch's own encoder and decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dim_feedforward": 6, "batch_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, norm_first=True, **options)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        decoded = self.decoder(target, self.encoder(source), tgt_mask=mask, tgt_is_causal=True)
        return self.out(decoded)


class Llama(nn.Module):
    """Rotated queries, heads that share keys, a gated layer, torch's RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm1, self.norm2 = nn.Embedding(6, 8), nn.RMSNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, width, bias=False) for width in (8, 4, 4))
        self.o, self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False) for shape in ((8, 8), (8, 6), (8, 6), (6, 8))
        )
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, CLASSES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        normed = self.norm1(x)
        query, key = rotate(split(self.q(normed))), rotate(split(self.k(normed), 1))
        value = split(self.v(normed), 1)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        x = x + self.o(merge(mixed))
        normed = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.norm(x))


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    speeds = 10.0 ** -torch.arange(half, dtype=x.dtype)
    angles = torch.arange(x.shape[-2], dtype=x.dtype).unsqueeze(1) * speeds
    left, right = x[..., :half], x[..., half:]
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], -1
    )


class Swin(nn.Module):
    """Windows as (N·windows, T, d), and a table of biases looked up by a buffer.

    A softmax does not see the bias of the keys: its gradient is 0, up to rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.table = nn.Parameter(torch.randn(5, HEADS))
        steps = torch.arange(3)
        self.register_buffer("index", steps.unsqueeze(0) - steps.unsqueeze(1) + 2)
        self.reduce, self.out = nn.Linear(3 * WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.norm(x.roll(1, 1).unflatten(1, (2, 3)).flatten(0, 1))
        query, key, value = (split(layer(windows)) for layer in (self.q, self.k, self.v))
        bias = self.table[self.index.flatten()].view(3, 3, HEADS).permute(2, 0, 1)
        mixed = functional.scaled_dot_product_attention(query, key, value, bias.unsqueeze(0))
        reduced = torch.tanh(self.reduce(merge(mixed).flatten(1)))
        return self.out(reduced.unflatten(0, (len(x), 2)).mean(1))
