"""Random problems, drawn from where people are and from the edges; each from one seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn

import ngeval

METHODS = (
    *("sgd", "ef", "ief", "sf", "sf:2", "sf:4", "ng", "block-ng"),
    *("diag", "diag:0.5", "diag-sf", "diag-ef", "diag-ef:0.5", "diag-ief"),
)
SCALES = ("absolute", "absolute", "mean", "relative")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_NATS = 700.0


@dataclass(frozen=True)
class Drawn:
    """A model on a batch, and what is asked of ngeval about it.

    Attributes:
        name: what kind of problem it is, for the table.
        model: in eval mode.
        inputs: of the batch.
        targets: its labels.
        family: of the likelihood.
        variance: of a Gaussian.
        options: of `ngeval.Problem`.
        methods: as users type them.
        dampings: λ.
        scale: what λ multiplies.
        natural: whether γ_min is wanted.
        metric: inputs and targets of another batch that grades, or None.
        seed: of the draws of labels.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    family: str
    variance: float = 1.0
    options: dict[str, object] = field(default_factory=dict)
    methods: tuple[str, ...] = METHODS
    dampings: tuple[float, ...] = (1e-6, 1e-3, 1.0)
    scale: str = "absolute"
    natural: bool = True
    metric: tuple[Tensor, Tensor] | None = None
    seed: int = 0

    @property
    def likelihood(self) -> str:
        """As users type it."""
        return f"gaussian:{self.variance}" if self.family == "gaussian" else self.family

    def problem(self) -> ngeval.Problem:
        """The `ngeval.Problem`."""
        return ngeval.Problem(
            self.model, self.inputs, self.targets, self.likelihood, **self.options
        )


class Positions(nn.Module):
    """A sequence model: positions see the earlier positions of their own sample."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4)
        self.outer = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)).cumsum(1))


class Attention(nn.Module):
    """One attention head over the positions of a sample."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(width, 3), nn.Linear(width, 3)
        self.outer = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return self.outer(torch.softmax(q @ q.transpose(1, 2), -1) @ self.value(x))


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def _mlp(width: int, outputs: int, generator: np.random.Generator) -> nn.Module:
    hidden = int(generator.integers(2, 9))
    act = [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU][generator.integers(5)]
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    if generator.random() < 0.25:
        layers.append(nn.LayerNorm(hidden))
    layers.append(act())
    if generator.random() < 0.2:
        layers += [nn.Linear(hidden, hidden), act()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs, bias=bool(generator.random() < 0.9)))


def _conv(width: int, outputs: int, generator: np.random.Generator) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, width)),
        nn.Conv1d(1, 2, min(3, width)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * (width - min(3, width) + 1), outputs),
    )


FLAT: dict[str, Callable[[int, int, np.random.Generator], nn.Module]] = {
    "linear": lambda w, c, _: nn.Linear(w, c),
    "mlp": _mlp,
    "conv": _conv,
    "tied": lambda w, c, _: Tied(w, c),
}
SEQUENCES: dict[str, Callable[[int, int], nn.Module]] = {
    "positions": Positions,
    "attention": Attention,
}


def draw(seed: int) -> Drawn:
    """The problem of a seed."""
    generator = np.random.default_rng(seed)
    if generator.random() < 0.03:
        return _real(generator, seed)
    torch.manual_seed(seed)
    family = ["categorical", "categorical", "bernoulli", "gaussian"][generator.integers(4)]
    outputs = int(generator.integers(2, 6)) if family == "categorical" else 1
    outputs = outputs if family == "categorical" else int(generator.choice([1, 1, 2, 3]))
    samples = int(generator.choice([1, 2, 3, 5, 8, 13, 20, 30]))
    width = int(generator.integers(1, 7))
    sequence = generator.random() < 0.2
    if sequence:
        kind = ["positions", "attention"][generator.integers(2)]
        samples, model = min(samples, 8), SEQUENCES[kind](width, outputs)
        inputs = torch.randn(samples, int(generator.integers(2, 5)), width)
    else:
        kind = list(FLAT)[generator.integers(len(FLAT))]
        model, inputs = FLAT[kind](width, outputs, generator), torch.randn(samples, width)
    if generator.random() < 0.2:  # features in their own units, as incomes or areas are
        inputs = inputs * torch.from_numpy(10.0 ** generator.uniform(-3, 3, width)).float()
    if samples > 2 and generator.random() < 0.25:
        inputs[samples // 2 :] = inputs[: samples - samples // 2].clone()
    stored = "float32" if generator.random() < 0.5 else "float64"
    dtype = (DTYPES | HALVES)[
        stored if generator.random() < 0.85 else ["bfloat16", "float16"][generator.integers(2)]
    ]
    model, inputs = model.to(dtype).eval(), inputs.to(dtype)
    largest = 10.0 ** generator.uniform(-1, np.log10(MOST_NATS))
    _scale_logits(model, inputs, largest if dtype not in HALVES.values() else min(largest, 30))
    targets = _targets(model, inputs, family, generator)
    metric = None
    if generator.random() < 0.25:
        metric = inputs, targets
        if generator.random() < 0.5:
            others = inputs[torch.from_numpy(generator.permutation(samples))] * 1.1
            metric = others, _targets(model, others, family, generator)
    return Drawn(
        f"{family} {kind}",
        model,
        inputs,
        targets,
        family,
        float(generator.choice([0.5, 1.0, 25.0])) if family == "gaussian" else 1.0,
        _options(generator),
        tuple(generator.permutation(METHODS)[: generator.integers(1, 6)].tolist()),
        tuple(sorted(set(_dampings(generator)))),
        SCALES[generator.integers(4)],
        bool(generator.random() < 0.7),
        metric,
        int(generator.integers(1000)),
    )


def _scale_logits(model: nn.Module, inputs: Tensor, largest: float) -> None:
    """Multiply the last layer so that the largest logit has a given size."""
    with torch.no_grad():
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        factor = largest / max(float(model(inputs).abs().max()), 1e-6)
        for parameter in last.parameters(recurse=False):
            parameter.mul_(min(factor, 1e4))


def _targets(
    model: nn.Module, inputs: Tensor, family: str, generator: np.random.Generator
) -> Tensor:
    """Labels that the model has right, wrong, or anything between; some padding in sequences."""
    with torch.no_grad():
        z = model(inputs).double()
    if family == "gaussian":
        residual = torch.from_numpy(
            generator.standard_normal(z.shape) * 10.0 ** generator.uniform(-8, 2)
        )
        if generator.random() < 0.2:  # some samples are fitted exactly
            residual[: len(z) // 2] = 0
        return (z + residual).to(torch.float64)
    share = generator.choice([0.0, 0.1, 0.5, 1.0])  # of labels at random
    if family == "bernoulli":
        labels = (z > 0).double()
        random = torch.from_numpy(generator.random(z.shape) < 0.5).double()
        return torch.where(torch.from_numpy(generator.random(z.shape) < share), random, labels)
    labels = z.argmax(-1)
    random = torch.from_numpy(generator.integers(z.shape[-1], size=labels.shape))
    labels = torch.where(torch.from_numpy(generator.random(labels.shape) < share), random, labels)
    if generator.random() < 0.3:
        labels.reshape(-1)[0] = z.reshape(-1, z.shape[-1])[0].argmin()
    if labels.ndim > 1 and generator.random() < 0.6:
        labels[0, 1:] = -100
    return labels


def _options(generator: np.random.Generator) -> dict[str, object]:
    options: dict[str, object] = {}
    if generator.random() < 0.25:
        options["dtype"] = list(DTYPES.values())[generator.integers(2)]
    if generator.random() < 0.3:
        options["engine"] = ["layers", "vmap", "loop"][generator.integers(3)]
    if generator.random() < 0.4:
        options["memory"] = int(10.0 ** generator.uniform(3.5, 6))
    return options


def _dampings(generator: np.random.Generator) -> list[float]:
    count = int(generator.integers(1, 5))
    values = (10.0 ** generator.uniform(-12, 4, count)).tolist()
    if generator.random() < 0.3:
        values[0] = 0.0
    if generator.random() < 0.05:
        values.append(float(generator.choice([1e-16, 1e15, 1e30])))
    return values


@functools.cache
def _trained(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A small network trained on a data set that scikit-learn ships."""
    load = getattr(datasets, f"load_{name}")
    features, labels = load(return_X_y=True)
    if name == "digits":  # 4 × 4 pixels: the right values take P × P matrices
        features = features.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    features = torch.tensor(features / np.maximum(features.std(0), 1e-3), dtype=torch.float32)
    torch.manual_seed(0)
    family = {"diabetes": "gaussian", "breast_cancer": "bernoulli"}.get(name, "categorical")
    outputs = {"wine": 3, "digits": 10}.get(name, 1)
    targets = torch.tensor(labels)
    if family != "categorical":
        targets = targets.float().unsqueeze(1)
    model = nn.Sequential(nn.Linear(features.shape[1], 6), nn.Tanh(), nn.Linear(6, outputs))
    losses = {
        "gaussian": nn.functional.mse_loss,
        "bernoulli": nn.functional.binary_cross_entropy_with_logits,
        "categorical": nn.functional.cross_entropy,
    }
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        losses[family](model(features), targets).backward()
        optimizer.step()
    return model.eval(), features, targets, family


def _real(generator: np.random.Generator, seed: int) -> Drawn:
    """A trained network at default settings, on a batch of its data."""
    name = ["diabetes", "wine", "breast_cancer", "digits"][generator.integers(4)]
    model, features, targets, family = _trained(name)
    count = 12 if name == "digits" else int(generator.choice([20, 60]))
    chosen = torch.from_numpy(generator.permutation(len(features))[:count])
    methods = ("sgd", "ef", "ief", "sf", "diag", "ng")
    return Drawn(
        f"trained on {name}",
        model,
        features[chosen],
        targets[chosen],
        family,
        methods=methods,
        natural=bool(generator.random() < 0.8),
        seed=seed % 1000,
    )
