"""The dense truth: every quantity of ngeval again, by explicit loops and explicit matrices.

Nothing here imports ngeval or shares its route. Jacobians come from plain autograd, sample by
sample and output by output; H is an explicit matrix, an expectation over all labels; the Fisher
is a P×P matrix; updates are solved for in parameter space. Everything is float64 and
sum-reduced; the outputs of a sample are flattened over its positions (C = positions × classes).

λ = 0 is the pseudo-inverse: a direction in the span of the rows counts if its squared singular
value, after every row is scaled to unit norm, exceeds ``CUTOFF`` of the largest.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CUTOFF = 1e-13
EPS = float(torch.finfo(torch.float64).eps)

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A likelihood by name, with its constants."""

    name: str
    variance: float = 1.0
    ignore_index: int = -100


@dataclass(frozen=True)
class Dense:
    """One problem as explicit float64 matrices.

    Attributes:
        family: the likelihood.
        logits: z, ``(N, *positions, classes)``.
        targets: the observed labels.
        jacobian: J, ``(N, C, P)``.
        residual: u, ``(N, C)``.
        curvature: H, ``(N, C, C)``.
    """

    family: Family
    logits: Tensor
    targets: Tensor
    jacobian: Tensor
    residual: Tensor
    curvature: Tensor

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.jacobian.shape[0])


def build(model: nn.Module, inputs: Inputs, targets: Tensor, family: Family) -> Dense:
    """Compute z, J, u and H of a model on a batch."""
    z, jacobian = logits_and_jacobian(model, inputs)
    return Dense(
        family, z, targets, jacobian, residual(z, targets, family), curvature(z, targets, family)
    )


def one_sample(inputs: Inputs, n: int) -> Inputs:
    """Sample n as a batch of one, floating-point tensors as float64 copies."""

    def take(tensor: Tensor) -> Tensor:
        row = tensor[n : n + 1].clone()
        return row.double() if row.is_floating_point() else row

    if isinstance(inputs, dict):
        return {key: take(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(take(value) for value in inputs)
    return take(inputs)


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call the model the way its inputs ask for."""
    result: Any
    if isinstance(inputs, dict):
        result = model(**inputs)
    elif isinstance(inputs, tuple):
        result = model(*inputs)
    else:
        result = model(inputs)
    outputs: Tensor = result if isinstance(result, Tensor) else result.logits
    return outputs


def logits_and_jacobian(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """z and J by one backward pass for every output of every sample."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    first = first[0] if isinstance(first, tuple) else first
    all_logits, all_rows = [], []
    for n in range(first.shape[0]):
        outputs = forward(model, one_sample(inputs, n)).squeeze(0)
        rows = []
        for output in outputs.flatten():
            parts = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros(p.numel(), dtype=torch.float64) if d is None else d.flatten()
                        for p, d in zip(parameters, parts, strict=True)
                    ]
                )
            )
        all_logits.append(outputs.detach())
        all_rows.append(torch.stack(rows))
    return torch.stack(all_logits), torch.stack(all_rows)


def _positions(z: Tensor, targets: Tensor, family: Family) -> list[list[tuple[Tensor, int]]]:
    """For each sample its positions: (logits of the position, label; −1 for padding)."""
    samples = []
    for n in range(z.shape[0]):
        rows = z[n].reshape(-1, z.shape[-1])
        labels = targets[n].reshape(-1)
        samples.append(
            [
                (row, -1 if int(label) == family.ignore_index else int(label))
                for row, label in zip(rows, labels, strict=True)
            ]
        )
    return samples


def loss(z: Tensor, targets: Tensor, family: Family) -> Tensor:
    """ℓ_n = −log p(y_n|z_n), summed over positions: ``(N,)``."""
    totals = []
    if family.name == "categorical":
        for positions in _positions(z, targets, family):
            terms = [row.logsumexp(0) - row[y] for row, y in positions if y >= 0]
            totals.append(sum(terms, torch.zeros((), dtype=torch.float64)))
    elif family.name == "gaussian":
        for mean, target in zip(z.double().flatten(1), targets.double().flatten(1), strict=True):
            constant = 0.5 * mean.numel() * math.log(2 * math.pi * family.variance)
            totals.append(((mean - target) ** 2).sum() / (2 * family.variance) + constant)
    else:
        for row, label in zip(z.double().flatten(1), targets.double().flatten(1), strict=True):
            q = torch.sigmoid(row)
            totals.append(-(label * q.log() + (1 - label) * (1 - q).log()).sum())
    return torch.stack(totals)


def residual(z: Tensor, targets: Tensor, family: Family) -> Tensor:
    """u_n = ∇_z ℓ_n, flattened over positions: ``(N, C)``."""
    if family.name == "gaussian":
        return (z.double() - targets.double()).flatten(1) / family.variance
    if family.name == "bernoulli":
        return (1 / (1 + (-z.double()).exp()) - targets.double()).flatten(1)
    samples = []
    for positions in _positions(z.double(), targets, family):
        parts = []
        for row, y in positions:
            part = torch.zeros_like(row)
            if y >= 0:
                part = row.exp() / row.exp().sum()
                part[y] -= 1
            parts.append(part)
        samples.append(torch.cat(parts))
    return torch.stack(samples)


def curvature(z: Tensor, targets: Tensor, family: Family) -> Tensor:
    """H_n = E_y[u(y) u(y)ᵀ] as explicit matrices, by the sum over all labels: ``(N, C, C)``."""
    if family.name == "gaussian":
        size = z[0].numel()
        return (torch.eye(size, dtype=torch.float64) / family.variance).repeat(z.shape[0], 1, 1)
    if family.name == "bernoulli":
        return torch.stack([_bernoulli_curvature(row) for row in z.double().flatten(1)])
    samples = []
    for positions in _positions(z.double(), targets, family):
        size = z.shape[-1]
        total = torch.zeros(len(positions) * size, len(positions) * size, dtype=torch.float64)
        for t, (row, y) in enumerate(positions):
            if y >= 0:
                block = slice(t * size, (t + 1) * size)
                total[block, block] = _softmax_curvature(row)
        samples.append(total)
    return torch.stack(samples)


def _softmax_curvature(row: Tensor) -> Tensor:
    p = row.exp() / row.exp().sum()
    total = torch.zeros(row.numel(), row.numel(), dtype=torch.float64)
    for label in range(row.numel()):
        score = p.clone()
        score[label] -= 1
        total += p[label] * torch.outer(score, score)
    return total


def _bernoulli_curvature(row: Tensor) -> Tensor:
    q = 1 / (1 + (-row).exp())
    total = torch.zeros(row.numel(), row.numel(), dtype=torch.float64)
    for labels in itertools.product((0.0, 1.0), repeat=row.numel()):
        y = torch.tensor(labels, dtype=torch.float64)
        probability = torch.where(y > 0, q, 1 - q).prod()
        total += probability * torch.outer(q - y, q - y)
    return total


def per_sample_gradients(dense: Dense) -> Tensor:
    """G, the rows g_nᵀ = u_nᵀJ_n: ``(N, P)``."""
    return torch.stack([j.T @ u for j, u in zip(dense.jacobian, dense.residual, strict=True)])


def gradient(dense: Dense) -> Tensor:
    """The batch gradient g = Σ_n g_n: ``(P,)``."""
    return per_sample_gradients(dense).sum(0)


def fisher(dense: Dense) -> Tensor:
    """F = Σ_n J_nᵀH_nJ_n: ``(P, P)``."""
    total = torch.zeros(dense.jacobian.shape[2], dense.jacobian.shape[2], dtype=torch.float64)
    for j, h in zip(dense.jacobian, dense.curvature, strict=True):
        total += j.T @ h @ j
    return total


def fisher_rows(dense: Dense) -> Tensor:
    """A with AᵀA = F: the rows H_n^{1/2}J_n with the symmetric root, ``(NC, P)``."""
    rows = []
    for j, h in zip(dense.jacobian, dense.curvature, strict=True):
        values, vectors = torch.linalg.eigh(h)
        # A softmax has H1 = 0: what remains of that eigenvalue is rounding.
        values = torch.where(values > 1e-14 * values.max(), values, 0.0).clamp_min(0)
        rows.append((vectors * values.sqrt()) @ vectors.T @ j)
    return torch.cat(rows)


def sampled_rows(dense: Dense, labels: Tensor) -> Tensor:
    """Ĝ/√k with rows ĝ = J_nᵀû for labels of shape ``(k, N, *positions)``: ``(kN, P)``."""
    rows = []
    if dense.family.name == "categorical":
        # Draws need not carry the padding of the observed targets.
        labels = torch.where(dense.targets == dense.family.ignore_index, dense.targets, labels)
    for draw in labels:
        sampled = residual(dense.logits, draw, dense.family)
        rows += [j.T @ u for j, u in zip(dense.jacobian, sampled, strict=True)]
    return torch.stack(rows) / math.sqrt(labels.shape[0])


def relative_spectrum(rows: Tensor) -> Tensor:
    """Squared singular values of the rows scaled to unit norm, over the largest, descending."""
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / torch.where(norms > 0, norms, 1.0), 0.0)
    values: Tensor = torch.linalg.svdvals(unit).square()
    return values / values[0] if float(values[0]) > 0 else values


def reduced_svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of the rows, without what lies below the cut-off."""
    rank = int((relative_spectrum(rows) > CUTOFF).sum())
    left, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    return left[:, :rank], sigma[:rank], right[:rank]


def fit_rows(rows: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """(AᵀA + λI)⁻¹Aᵀb through the SVD of A; A⁺b at λ = 0."""
    left, sigma, right = reduced_svd(rows)
    return right.T @ (sigma / (sigma**2 + damping) * (left.T @ wanted))


def solve_curvature(rows: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(AᵀA + λI)⁻¹v with the explicit P×P matrix; (AᵀA)⁺v by the SVD of A at λ = 0."""
    if damping > 0:
        matrix = rows.T @ rows + damping * torch.eye(rows.shape[1], dtype=torch.float64)
        solved: Tensor = torch.linalg.solve(matrix, vector)
        return solved
    _, sigma, right = reduced_svd(rows)
    return right.T @ (right @ vector / sigma**2)


def sgd(dense: Dense) -> Tensor:
    """d = g."""
    return gradient(dense)


def ef(dense: Dense, damping: float) -> Tensor:
    """d = (GᵀG + λI)⁻¹g."""
    return fit_rows(per_sample_gradients(dense), torch.ones(dense.num_samples).double(), damping)


def ief(dense: Dense, damping: float) -> Tensor:
    """d = (GᵀG + λI)⁻¹Gᵀs with s_n = ‖u_n‖²."""
    squares = (dense.residual**2).sum(1)
    return fit_rows(per_sample_gradients(dense), squares, damping)


def sf(dense: Dense, labels: Tensor, damping: float) -> Tensor:
    """d = (F̂ + λI)⁻¹g with F̂ the sampled Fisher of the given labels ``(k, N, *positions)``."""
    return solve_curvature(sampled_rows(dense, labels), gradient(dense), damping)


def ng(dense: Dense, damping: float) -> Tensor:
    """d = (F + λI)⁻¹g."""
    if damping > 0:
        matrix = fisher(dense) + damping * torch.eye(dense.jacobian.shape[2]).double()
        solved: Tensor = torch.linalg.solve(matrix, gradient(dense))
        return solved
    return solve_curvature(fisher_rows(dense), gradient(dense), 0.0)


def _divide(numerator: Tensor, diagonal: Tensor, damping: float, exponent: float) -> Tensor:
    entries = []
    for top, value in zip(numerator.tolist(), diagonal.tolist(), strict=True):
        bottom = value + damping
        entries.append(top / bottom**exponent if bottom > 0 else 0.0)
    return torch.tensor(entries, dtype=torch.float64)


def diag(dense: Dense, damping: float) -> Tensor:
    """d = g / (diag F + λ); an entry with diag F + λ = 0 is 0."""
    return _divide(gradient(dense), fisher(dense).diagonal(), damping, 1.0)


def diag_ef(dense: Dense, damping: float, exponent: float = 1.0) -> Tensor:
    """d = g / (Σ_n g_n² + λ)^ρ; an entry with Σ_n g_n² + λ = 0 is 0."""
    squares = (per_sample_gradients(dense) ** 2).sum(0)
    return _divide(gradient(dense), squares, damping, exponent)


def update(dense: Dense, method: str, damping: float, labels: Tensor | None = None) -> Tensor:
    """The update of a method by its ngeval name; ``sf:k`` needs its labels."""
    family, _, parameter = method.partition(":")
    if family == "sf":
        assert labels is not None
        return sf(dense, labels, damping)
    if family == "diag-ef":
        return diag_ef(dense, damping, float(parameter or 1.0))
    if family == "sgd":
        return sgd(dense)
    return {"ef": ef, "ief": ief, "ng": ng, "diag": diag}[family](dense, damping)


def curvature_along(dense: Dense, direction: Tensor) -> float:
    """dᵀFd = Σ_n t_nᵀH_nt_n with t_n = J_nd."""
    total = 0.0
    for j, h in zip(dense.jacobian, dense.curvature, strict=True):
        tangent = j @ direction
        total += float(tangent @ h @ tangent)
    return total


def gamma(dense: Dense, direction: Tensor) -> float:
    """γ(d) = √(dᵀFd)/|dᵀg|."""
    return math.sqrt(curvature_along(dense, direction)) / abs(float(direction @ gradient(dense)))


def gamma_min(dense: Dense) -> float:
    """γ_min = (gᵀF⁺g)^(−1/2)."""
    g = gradient(dense)
    return 1 / math.sqrt(float(g @ solve_curvature(fisher_rows(dense), g, 0.0)))


def floor(dense: Dense) -> float:
    """(Σ_n u_nᵀH_n⁺u_n)^(−1/2) with explicit pseudo-inverses."""
    total = 0.0
    for u, h in zip(dense.residual, dense.curvature, strict=True):
        total += float(u @ torch.linalg.pinv(h, rtol=1e-13, hermitian=True) @ u)
    return 1 / math.sqrt(total)


def curvature_rows(dense: Dense, method: str, labels: Tensor | None = None) -> Tensor | None:
    """A with AᵀA the method's own curvature; None for methods that invert no matrix."""
    family = method.partition(":")[0]
    if family in ("ef", "ief"):
        return per_sample_gradients(dense)
    if family == "ng":
        return fisher_rows(dense)
    if family == "sf":
        assert labels is not None
        return sampled_rows(dense, labels)
    return None


def condition(dense: Dense, method: str, damping: float, labels: Tensor | None = None) -> float:
    """By how much rounding of the problem's entries may grow in γ of a method's update.

    The product of two factors: the condition number of the damped curvature on its range (for
    ``sf``, whose g leaves that range, down to λ alone, and squared at λ = 0, where the
    pseudo-inverse is applied twice), and the cancellation Σ_n|u_nᵀt_n| / |dᵀg| in γ's
    denominator.
    """
    factor = 1.0
    rows = curvature_rows(dense, method, labels)
    if rows is not None:
        sigma = reduced_svd(rows)[1]
        if len(sigma) == 0:
            return math.inf
        largest, smallest = float(sigma[0]) ** 2, float(sigma[-1]) ** 2
        if method.startswith("sf"):
            factor = (largest + damping) / damping if damping > 0 else (largest / smallest) ** 2
        else:
            factor = (largest + damping) / (smallest + damping)
    direction = update(dense, method, damping, labels)
    tangents = torch.stack([j @ direction for j in dense.jacobian])
    terms = (tangents * dense.residual).sum(1)
    decrease = abs(float(terms.sum()))
    return factor * float(terms.abs().sum()) / decrease if decrease > 0 else math.inf


def has_clear_rank(rows: Tensor, lowest: float = 1e-20, highest: float = 1e-9) -> bool:
    """Whether no relative squared singular value is near a cut-off, so that λ = 0 is defined."""
    spectrum = relative_spectrum(rows)
    return not bool(((spectrum > lowest) & (spectrum < highest)).any())
