"""Convolutional and recurrent networks of the zoo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 3


class TextConvolution(nn.Module):
    """Convolutions of two widths over embedded tokens, the strongest response of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.narrow = nn.Conv1d(3, 4, 2, padding=1)
        self.wide = nn.Conv1d(3, 2, 3, padding="same", bias=False)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        result = [torch.tanh(conv(x)).amax(2) for conv in (self.narrow, self.wide)]
        return self.out(torch.cat(result, 1))


class Causal(nn.Module):
    """Dilated causal convolutions with a gate; the layers work on what was padded by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(2))
        self.mix = nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in range(2))
        self.out = nn.Conv1d(2, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        for filters, mix in zip(self.filters, self.mix, strict=True):
            padded = functional.pad(x, (filters.dilation[0], 0))
            values, gates = filters(padded).chunk(2, 1)
            x = x + mix(torch.tanh(values) * torch.sigmoid(gates))
        return self.out(x).transpose(1, 2)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        hidden += self.shortcut(x)
        return self.activation(hidden)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        BasicBlock(2, 2, 1),
        BasicBlock(2, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )


class Dense(nn.Module):
    """Every layer sees what all those before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 2, 3, padding=1, bias=False))
            for c in (2, 4)
        )
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.out(functional.max_pool2d(x, 2).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Depthwise-separable, then channels weighed by what all pixels say."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
        self.pointwise, self.norm = nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm(self.pointwise(self.depthwise(x))))
        weights = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out((x * weights).mean((2, 3)))


class ConvNext(nn.Module):
    """Channels last: a norm and linear layers on (N, H, W, C), and a scale of the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 2, stride=2)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, padding_mode="circular")
        self.norm = nn.LayerNorm(3, eps=1e-6)
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.gamma, self.out = nn.Parameter(torch.full((3,), 0.5)), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.gamma * self.down(functional.gelu(self.up(hidden)))
        return self.out((x + hidden.permute(0, 3, 1, 2)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up by transposed convolution, and a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 2, 3, padding=1)
        self.down = nn.Conv2d(2, 4, 2, stride=2)
        self.bottom = nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ELU())
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.out = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.enter(x))
        risen = self.up(self.bottom(self.down(skip)))
        return self.out(torch.cat([skip, torch.tanh(risen)], 1)).permute(0, 2, 3, 1)


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0)),
        nn.GroupNorm(1, 2),
        nn.Tanh(),
        nn.ConvTranspose3d(2, 2, 2, groups=2),
        nn.AvgPool3d(2),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def odd_convolutions() -> nn.Module:
    """Every option of a convolution, some of them where they are asymmetric."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, (2, 3), padding="same"),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.Conv2d(2, 2, 2, padding="valid", padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(2, 2, 2, padding="same", padding_mode="zeros", dilation=2, groups=2),
        nn.Flatten(),
        nn.Linear(40, CLASSES),
    )


def one_dimensional() -> nn.Module:
    """Norms on (N, C, L) and on (N, C), strides, a transposed convolution with output padding."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="replicate"),
        nn.BatchNorm1d(4),
        nn.Softplus(),
        nn.ConvTranspose1d(4, 2, 2, stride=2, output_padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )


class Frames(nn.Module):
    """Video: the pictures of all samples through one network as (N·T, 1, H, W), then a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
        )
        self.remember, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.look(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.out(self.remember(seen)[0][:, -1])


class LongShortTerm(nn.Module):
    """Two directions, two layers, and a first state from another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(2, 8)
        self.lstm = nn.LSTM(2, 2, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.start(x[:, 0]).unflatten(1, (4, 2)).transpose(0, 1).contiguous()
        return self.out(self.lstm(x, (first, torch.tanh(first)))[0])


class TimeFirstGru(nn.Module):
    """Tokens in the order that ``nn.GRU`` has by default, its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.gru, self.out = nn.GRU(3, 4), nn.Linear(4, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.gru(self.embedding(ids.T))[1][-1])


class Cells(nn.Module):
    """Recurrence by hand: a cell is called once for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(2, 3), nn.GRUCell(3, 3)
        self.first, self.out = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = after = self.first.expand(len(x), -1)
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
            after = self.gru(hidden, after)
        return self.out(after)


class Elman(nn.Module):
    """A recurrent network made of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(2, 3), nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = torch.tanh(self.enter(step) + self.again(state))
        return self.out(state)


class Subclassed(nn.Module):
    """Layers that inherit from torch's and compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Standardised(1, 2, 2), Centred(8)
        self.inner, self.out = Cosine(8, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).flatten(1)
        return self.out(torch.tanh(self.inner(self.norm(hidden))))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / weight.norm(), self.bias)


class Centred(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.norm(dim=1)


class Sparse(nn.Module):
    """An embedding whose gradient is a sparse tensor, and tokens that occur twice in a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(4, 3, sparse=True), nn.Linear(3, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(ids).sum(1)))


class Bags(nn.Module):
    """Torch has neither a forward-mode rule nor a second derivative for bags of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(6, 3, mode="mean"), nn.Linear(3, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.bag(ids)))
