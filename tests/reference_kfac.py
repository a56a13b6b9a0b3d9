"""Kronecker factors by hooks, loops and explicit Kronecker products; nothing here imports ngeval.

Row-major flattening throughout: vec of a weight (o, i) lists row by row, so that the block of a
layer is B ⊗ A and B ⊗ A times vec(D) is vec(B D A).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import reference


@dataclass(frozen=True)
class Layer:
    """One layer's ā and b for every sample and position, and where its parameters are.

    Attributes:
        inputs: ā by sample, ``(T, i)`` each.
        outputs: b by sample, ``(Q, T, o)`` each, of the curvature's cotangents.
        residuals: b of the residual by sample, ``(T, o)`` each.
        places: of the rows (weight and bias of output o together) in the flat vector of length P:
            index matrix ``(o, i)``.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    residuals: list[Tensor]
    places: Tensor

    @property
    def gradient(self) -> Tensor:
        """Σ b āᵀ of the residual, ``(o, i)``."""
        return sum(b.T @ a for a, b in zip(self.inputs, self.residuals, strict=True))


def layers(
    model: nn.Module, inputs: reference.Inputs, dense: reference.Dense, cotangents: Tensor
) -> dict[str, Layer]:
    """Every Linear and ungrouped Conv2d with a trainable weight, by plain hooks on single samples.

    Args:
        model: the model.
        inputs: the batch.
        dense: its z, J, u, H.
        cotangents: v of the curvature, ``(N, Q, C)``.
    """
    model = copy.deepcopy(model).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    starts, total = {}, 0
    for name, parameter in parameters.items():
        starts[name], total = total, total + parameter.numel()
    expected = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.requires_grad
    }
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in expected.items():
        module.register_forward_hook(
            lambda _, args, out, name=name: calls.__setitem__(name, (args[0], out))
        )
    actual: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {
        name: ([], [], []) for name in expected
    }
    for n in range(dense.num_samples):
        outputs = reference.forward(model, reference.one_sample(inputs, n))
        flat = outputs.flatten()
        for name, module in expected.items():
            argument, built = calls[name]
            rows = [
                torch.autograd.grad(output, built, retain_graph=True, allow_unused=True)[0]
                for output in flat
            ]
            jacobian = torch.stack([torch.zeros_like(built) if r is None else r for r in rows])
            a, b = _positions(module, argument, jacobian)
            if module.bias is not None and module.bias.requires_grad:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
            actual[name][0].append(a.detach())
            actual[name][1].append(torch.einsum("qc,cto->qto", cotangents[n], b))
            actual[name][2].append(torch.einsum("c,cto->to", dense.residual[n], b))
    result = {}
    for name, (a, b, u) in actual.items():
        weight = expected[name].weight
        width = weight[0].numel()
        places = starts[f"{name}.weight" if name else "weight"] + torch.arange(weight.numel())
        places = places.reshape(len(weight), width)
        bias = f"{name}.bias" if name else "bias"
        if bias in starts:
            places = torch.cat([places, starts[bias] + torch.arange(len(weight)).unsqueeze(1)], 1)
        result[name] = Layer(a, b, u, places)
    return result


def _positions(module: nn.Module, given: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's inputs ``(T, i)`` and Jacobian ``(C, T, o)`` of one sample."""
    if isinstance(module, nn.Conv2d):
        patches = nn.functional.unfold(
            given, module.kernel_size, module.dilation, module.padding, module.stride
        )
        return patches[0].T, jacobian.squeeze(1).flatten(2).transpose(1, 2)
    features = given.shape[-1]
    return given.reshape(-1, features), jacobian.reshape(len(jacobian), -1, jacobian.shape[-1])


def factors(layer: Layer, sharing: str, *, skip: bool = False) -> tuple[Tensor, Tensor, float]:
    """A, B, M; ``skip`` leaves out positions at which every b is zero."""
    a_total = b_total = 0.0
    count = 0.0
    for a, b in zip(layer.inputs, layer.outputs, strict=True):
        keep = [t for t in range(len(a)) if not skip or bool((b[:, t] != 0).any())]
        if sharing == "expand":
            for t in keep:
                a_total = a_total + torch.outer(a[t], a[t])
                for row in b[:, t]:
                    b_total = b_total + torch.outer(row, row)
            count += len(keep)
        elif keep:
            mean = a[keep].mean(0)
            a_total = a_total + torch.outer(mean, mean)
            for row in b.sum(1):
                b_total = b_total + torch.outer(row, row)
            count += 1
    return a_total, b_total, count


def exact_block(layer: Layer) -> Tensor:
    """Σ vec(Σ_t b āᵀ) vec(…)ᵀ, the layer's exact block, ``(oi, oi)``."""
    total = 0.0
    for a, b in zip(layer.inputs, layer.outputs, strict=True):
        for rows in b:
            vector = (rows.T @ a).flatten()
            total = total + torch.outer(vector, vector)
    return total


def solve(
    layer: Layer, factors: tuple[Tensor, Tensor, float], damping: float, kind: str, samples: int
) -> Tensor:
    """D(λ) by a dense solve with explicit Kronecker products, ``(o, i)``."""
    a, b, count = factors
    eye_a, eye_b = torch.eye(len(a)).double(), torch.eye(len(b)).double()
    gradient = layer.gradient.flatten()
    if kind == "exact":
        matrix = torch.kron(b, a) / count + damping * torch.eye(len(gradient)).double()
    else:
        # The mean-reduced curvature and its damping; N times it is the sum's.
        mean_a, mean_b, mean_damping = a / count, b / samples, damping / samples
        pi = 1.0
        if kind == "pi":
            pi = ((mean_a.trace() / len(a)) / (mean_b.trace() / len(b))).sqrt()
        root = mean_damping**0.5
        matrix = samples * torch.kron(mean_b + root / pi * eye_b, mean_a + root * pi * eye_a)
    return torch.linalg.solve(matrix, gradient).reshape(len(b), len(a))


Labels = Callable[[reference.Dense], Tensor]


def exact_labels(dense: reference.Dense) -> Tensor:
    """A square root of every H by its eigendecomposition: ``(N, C, C)``, cotangents in rows."""
    values, vectors = torch.linalg.eigh(dense.curvature)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).mT


def data_labels(dense: reference.Dense) -> Tensor:
    """The residuals, ``(N, 1, C)``."""
    return dense.residual.unsqueeze(1)


def improved_labels(dense: reference.Dense) -> Tensor:
    """The residuals at unit length."""
    return (dense.residual / dense.residual.norm(dim=1, keepdim=True)).unsqueeze(1)
