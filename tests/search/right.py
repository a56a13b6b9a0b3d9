"""Right values: explicit sums over samples in ball arithmetic (Arb), from Jacobians by loops.

Every number is an `arb`: a midpoint with a proved radius. The precision grows with the logits, so
that a label's probability of e⁻⁷⁰⁰ has all its digits. Everything is computed in parameter space,
matrix by matrix; ngeval works in logit space.

Index letters: n samples, t positions, k classes or outputs of a position, p parameters.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flint import arb, arb_mat, ctx
from torch import Tensor, nn

BITS = 400
"""Bits of precision beside those that the spread of the logits takes."""

ACCURACY = 60
"""Bits that each number of a grade has to have."""

DOUBTFUL = (1e-60, 1e-9)
"""What a row has left beside the rows before it, relative to its length, where rank is a matter of
rounding."""

RANK = (2, 2.05)
"""λ = 0 stands for two tiny dampings, 2^(−bits/2) and less, relative to the curvature's trace: far
below each eigenvalue that is not 0 exactly. See `rank_is_clear`."""


@dataclass(frozen=True)
class Rows:
    """A model at one batch, in float64.

    Attributes:
        logits: z, shape ``(N, T, K)``; T = 1 where a sample has a single position.
        jacobian: ∂z/∂θ, shape ``(N, T, K, P)``.
        targets: class indices ``(N, T)`` (−100 for padding), or values ``(N, T, K)``.
        family: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        variance: σ² of a Gaussian.
        layers: for each layer that owns parameters, their places in θ.
        rounding: relative, of the entries of u.
        places: of each sample, that of the first sample equal to it.
    """

    logits: np.ndarray
    jacobian: np.ndarray
    targets: np.ndarray
    family: str
    variance: float
    layers: Mapping[str, np.ndarray]
    rounding: float = 0.0
    places: Sequence[int] = ()

    def factors(self, n: int, t: int, target: np.ndarray) -> list[arb]:
        """What rounding multiplies u by: equal samples with equal labels get the same."""
        if not self.rounding:
            return [arb(1)] * self.logits.shape[-1]
        key = zlib.crc32(np.asarray(target).tobytes())
        noise = np.random.default_rng([self.places[n], t, key]).standard_normal(
            self.logits.shape[-1]
        )
        return [arb(1 + self.rounding * float(value)) for value in noise]


def rows_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, family: str, variance: float
) -> Rows:
    """Run a float64 copy of the model sample by sample and differentiate output by output."""
    wide = copy.deepcopy(model).double().eval()
    named = [(n, p) for n, p in wide.named_parameters() if p.requires_grad]
    layers: dict[str, list[int]] = {}
    start = 0
    for name, parameter in named:
        places = range(start, start + parameter.numel())
        layers.setdefault(name.rpartition(".")[0], []).extend(places)
        start += parameter.numel()
    logits, jacobian = [], []
    for n in range(len(inputs)):
        sample = inputs[n : n + 1]
        z = wide(sample.double() if sample.is_floating_point() else sample)[0]
        logits.append(z.detach().numpy().reshape(-1, z.shape[-1]))
        gradients = [
            torch.autograd.grad(
                value, [p for _, p in named], retain_graph=True, materialize_grads=True
            )
            for value in z.reshape(-1)
        ]
        flat = [torch.cat([g.reshape(-1) for g in row]).numpy() for row in gradients]
        jacobian.append(np.stack(flat).reshape(*logits[-1].shape, -1))
    shape = (len(inputs), logits[0].shape[0])
    values = targets.double().numpy() if targets.is_floating_point() else targets.numpy()
    return Rows(
        np.stack(logits),
        np.stack(jacobian),
        values.reshape(shape if family == "categorical" else (*shape, -1)),
        family,
        variance,
        {name: np.array(places) for name, places in layers.items()},
    )


def perturbed(rows: Rows, epsilon: float, generator: np.random.Generator) -> Rows:
    """The same rows, logits and residuals with relative errors of size epsilon."""
    keys: dict[bytes, int] = {}
    places = [keys.setdefault(z.tobytes() + j.tobytes(), n) for n, (z, j) in enumerate(
        zip(rows.logits, rows.jacobian, strict=True)
    )]  # fmt: skip
    scale = np.abs(rows.logits).max(axis=(1, 2), keepdims=True)
    noise = generator.standard_normal(rows.logits.shape)[places]
    factors = generator.standard_normal(rows.jacobian.shape)[places]
    return Rows(
        rows.logits + epsilon * scale * noise,
        rows.jacobian * (1 + epsilon * factors),
        rows.targets,
        rows.family,
        rows.variance,
        rows.layers,
        epsilon,
        places,
    )


class Right:
    """What a batch's gradient, Fisher and updates are."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        spread = float(np.ptp(rows.logits)) + float(np.abs(rows.logits).max())
        self.bits = BITS + math.ceil(4 * spread * math.log2(math.e))
        ctx.prec = self.bits
        self.num_samples = len(rows.logits)
        self.num_parameters = rows.jacobian.shape[-1]
        self._distribution()
        self.sample_gradients = self.pull_samples(self.residual)
        self.gradient = self._total(self.sample_gradients)
        self._fisher: arb_mat | None = None

    def _distribution(self) -> None:
        """p of every class or the mean of every output, and u with all its digits."""
        rows, zero = self.rows, arb(0)
        self.probabilities: list[list[list[arb]]] = []
        for n in range(self.num_samples):
            sample = []
            for z, target in zip(rows.logits[n], rows.targets[n], strict=True):
                values = [arb(float(v)) for v in z]
                if rows.family == "categorical":
                    # Padding has p = 0 throughout, so neither u nor H.
                    padded = int(target) == -100
                    powers = [(v - values[0]).exp() for v in values]
                    total = sum(powers, zero)
                    sample.append([zero if padded else power / total for power in powers])
                elif rows.family == "bernoulli":
                    sample.append([1 / (1 + (-v).exp()) for v in values])
                else:
                    sample.append(values)
            self.probabilities.append(sample)
        self.residual = self.residual_of(rows.targets)

    def _position(self, n: int, t: int, target: np.ndarray) -> list[arb]:
        """u of one position for a label."""
        family, p = self.rows.family, self.probabilities[n][t]
        if family == "categorical":
            label = int(target)
            if self.rows.targets[n][t] == -100:
                return [arb(0)] * len(p)
            others = sum((q for k, q in enumerate(p) if k != label), arb(0))
            return [-others if k == label else q for k, q in enumerate(p)]
        values = [arb(float(v)) for v in np.atleast_1d(target)]
        if family == "bernoulli":
            complements = [1 / (1 + arb(float(v)).exp()) for v in self.rows.logits[n][t]]
            return [(1 - y) * q - y * c for y, q, c in zip(values, p, complements, strict=True)]
        return [(z - y) / arb(self.rows.variance) for y, z in zip(values, p, strict=True)]

    def residual_of(self, targets: np.ndarray) -> list[list[list[arb]]]:
        """u for other labels, in the shape of the batch's."""
        return [
            [self._rounded(n, t, targets[n][t]) for t in range(len(self.rows.logits[n]))]
            for n in range(self.num_samples)
        ]

    def _rounded(self, n: int, t: int, target: np.ndarray) -> list[arb]:
        factors = self.rows.factors(n, t, target)
        return [u * f for u, f in zip(self._position(n, t, target), factors, strict=True)]

    def pull_samples(self, cotangents: list[list[list[arb]]]) -> arb_mat:
        """J_nᵀw_n of every sample, shape ``(N, P)``."""
        width = len(self.rows.logits[0]) * len(self.rows.logits[0][0])
        result = []
        for n, sample in enumerate(cotangents):
            flat = [value for position in sample for value in position]
            block = arb_mat(self.rows.jacobian[n].reshape(width, self.num_parameters).tolist())
            product = arb_mat([flat]) * block
            result.append([product[0, p] for p in range(self.num_parameters)])
        return arb_mat(result)

    @staticmethod
    def _total(rows: arb_mat) -> arb_mat:
        ones = arb_mat([[1] * rows.nrows()])
        return (ones * rows).transpose()

    def weights(self, n: int, t: int) -> arb_mat:
        """H of one position, shape ``(K, K)``."""
        p, family = self.probabilities[n][t], self.rows.family
        places = range(len(p))
        if family == "categorical":
            # Sums of the other classes, so that nothing cancels where one class has nearly all.
            others = [sum((q for j, q in enumerate(p) if j != k), arb(0)) for k in places]
            return arb_mat(
                [[p[k] * others[k] if j == k else -p[j] * p[k] for j in places] for k in places]
            )
        if family == "bernoulli":
            complements = [1 / (1 + arb(float(v)).exp()) for v in self.rows.logits[n][t]]
            values = [q * c for q, c in zip(p, complements, strict=True)]
        else:
            values = [1 / arb(self.rows.variance) for _ in places]
        return arb_mat([[values[k] if j == k else 0 for j in places] for k in places])

    def curvature(self, direction: arb_mat) -> arb:
        """Σ tᵀHt over positions, for the tangent t of a direction."""
        return sum(
            ((j * direction).transpose() * (h * (j * direction)))[0, 0] for j, h in self.parts
        )

    @property
    def parts(self) -> Iterator[tuple[arb_mat, arb_mat]]:
        """J and H of every position."""
        for n, sample in enumerate(self.rows.jacobian):
            for t, rows in enumerate(sample):
                yield arb_mat(rows.tolist()), self.weights(n, t)

    @property
    def fisher(self) -> arb_mat:
        """F = Σ_n J_nᵀ H_n J_n, shape ``(P, P)``."""
        if self._fisher is None:
            with ctx.workprec(self.bits):
                total = arb_mat(self.num_parameters, self.num_parameters)
                for j, h in self.parts:
                    total += j.transpose() * (h * j)
                self._fisher = total
        return self._fisher

    def has_clear_rank(self, method: str) -> bool:
        """Whether the rank of a method's curvature is not a matter of rounding."""
        jacobian = self.rows.jacobian
        if method in ("ef", "ief"):
            sizes = [[abs(float(v.mid())) for p in sample for v in p] for sample in self.residual]
            norms = np.linalg.norm(jacobian, axis=3).reshape(self.num_samples, -1)
            return rank_is_clear(self.sample_gradients, (np.array(sizes) * norms).sum(1).tolist())
        flat = jacobian.reshape(-1, *jacobian.shape[2:])
        if self.rows.family == "categorical":  # H sees differences of logits
            lengths = np.linalg.norm(flat, axis=2)
            scales = (lengths[:, 1:] + lengths[:, :1]).reshape(-1)
            flat = flat[:, 1:] - flat[:, :1]
        else:
            scales = np.linalg.norm(flat, axis=2).reshape(-1)
        matrix = flat.reshape(-1, self.num_parameters)
        layers = self.rows.layers.values() if method == "block-ng" else [slice(None)]
        return all(
            rank_is_clear(arb_mat(matrix[:, places].tolist()), scales.tolist()) for places in layers
        )

    def squared_residuals(self) -> list[arb]:
        """s_n = ‖u_n‖²."""
        return [
            sum((u * u for position in sample for u in position), arb(0))
            for sample in self.residual
        ]


def damped(matrix: arb_mat, damping: arb, right: arb_mat) -> arb_mat:
    """(A + λI)⁻¹ b."""
    size = matrix.nrows()
    shifted = matrix + arb_mat(
        [[damping if i == j else 0 for j in range(size)] for i in range(size)]
    )
    return shifted.solve(right)


def trace(matrix: arb_mat) -> arb:
    """Σ_i A_ii."""
    return sum((matrix[i, i] for i in range(matrix.nrows())), arb(0))


def vector(values: Sequence[arb]) -> arb_mat:
    """A column."""
    return arb_mat([[value] for value in values])


class Updates:
    """The updates of every method, by their definitions in parameter space."""

    def __init__(self, right: Right) -> None:
        self.right = right

    def grade(self, method: str, damping: arb, sampled: list[np.ndarray], metric: Right) -> Grade:
        """The grade of d(λ), by as few bits as the balls of the result allow."""
        result = Grade(*[math.nan] * 4)
        for bits in (BITS, self.right.bits):
            try:
                with ctx.workprec(bits):
                    direction = self.direction(method, damping, sampled)
            except ZeroDivisionError:  # singular within its balls
                continue
            result, accuracy = grade(direction, metric)
            if accuracy >= ACCURACY:
                break
        return result

    def direction(self, method: str, damping: arb, sampled: list[np.ndarray]) -> arb_mat:
        """d(λ) of a method, for λ > 0, or ≥ 0 for a diagonal.

        Args:
            method: as users type it.
            damping: λ, added to the sum-reduced curvature.
            sampled: the labels that a method with draws from the model uses.
        """
        name, _, option = method.partition(":")
        if name == "sgd":
            return self.right.gradient
        if name in ("ef", "ief"):
            return self._empirical(name == "ief", damping)
        if name == "ng":
            return damped(self.right.fisher, damping, self.right.gradient)
        if name == "block-ng":
            return self._block(damping)
        if name == "sf":
            return self._sampled(damping, sampled)
        return self._diagonal(name, option, damping, sampled)

    def curvature(self, method: str, sampled: list[np.ndarray]) -> arb_mat:
        """The matrix that λ is added to."""
        right, name = self.right, method.partition(":")[0]
        if name in ("ef", "ief"):
            return right.sample_gradients * right.sample_gradients.transpose()
        if name == "sf":
            return self.sampled_fisher(sampled)
        if name == "ng":
            return right.fisher
        if name == "block-ng":
            return self._diagonal_blocks()
        entries = self.diagonal(name, sampled)
        size = len(entries)
        return arb_mat([[entries[i] if i == j else 0 for j in range(size)] for i in range(size)])

    def _empirical(self, improved: bool, damping: arb) -> arb_mat:
        right = self.right
        gradients = right.sample_gradients
        values = right.squared_residuals() if improved else [arb(1)] * right.num_samples
        kernel = gradients * gradients.transpose()
        return gradients.transpose() * damped(kernel, damping, vector(values))

    def _sampled(self, damping: arb, sampled: list[np.ndarray]) -> arb_mat:
        """By the identity of Woodbury, whose differences balls show to be exact enough."""
        gradient = self.right.gradient
        parts = self._sampled_gradients(sampled)
        rows = arb_mat([row for part in parts for row in part.tolist()])
        solved = damped(rows * rows.transpose(), damping * len(sampled), rows * gradient)
        return (gradient - rows.transpose() * solved) * (1 / damping)

    def _sampled_gradients(self, sampled: list[np.ndarray]) -> list[arb_mat]:
        return [self.right.pull_samples(self.right.residual_of(labels)) for labels in sampled]

    def sampled_fisher(self, sampled: list[np.ndarray]) -> arb_mat:
        """F̂ = (1/k) Σ_k Ĝ_kᵀĜ_k."""
        total = arb_mat(self.right.num_parameters, self.right.num_parameters)
        for rows in self._sampled_gradients(sampled):
            total += rows.transpose() * rows
        return total * (arb(1) / len(sampled))

    def _diagonal_blocks(self) -> arb_mat:
        """F with 0 between layers."""
        size = self.right.num_parameters
        layer = np.empty(size, int)
        for number, places in enumerate(self.right.rows.layers.values()):
            layer[places] = number
        fisher = self.right.fisher
        return arb_mat(
            [
                [fisher[i, j] if layer[i] == layer[j] else 0 for j in range(size)]
                for i in range(size)
            ]
        )

    def _block(self, damping: arb) -> arb_mat:
        right = self.right
        result = [arb(0)] * right.num_parameters
        for places in right.rows.layers.values():
            chosen = places.tolist()
            block = arb_mat([[right.fisher[i, j] for j in chosen] for i in chosen])
            part = damped(block, damping, vector([right.gradient[i, 0] for i in chosen]))
            for place, i in enumerate(chosen):
                result[i] = part[place, 0]
        return vector(result)

    def diagonal(self, name: str, sampled: list[np.ndarray]) -> list[arb]:
        """The f of a diagonal method."""
        right, size = self.right, self.right.num_parameters
        if name == "diag":
            return [right.fisher[p, p] for p in range(size)]
        if name == "diag-sf":
            matrix = self.sampled_fisher(sampled)
            return [matrix[p, p] for p in range(size)]
        weights = [arb(1)] * right.num_samples
        if name == "diag-ief":
            squares = right.squared_residuals()
            # As documented, a residual that float64 cannot represent is 0, and its sample left out.
            known = [float(s.mid().sqrt()) > 0 for s in squares]
            weights = [1 / s if k else arb(0) for s, k in zip(squares, known, strict=True)]
        gradients = right.sample_gradients
        return [
            sum((w * gradients[n, p] * gradients[n, p] for n, w in enumerate(weights)), arb(0))
            for p in range(size)
        ]

    def _diagonal(self, name: str, option: str, damping: arb, sampled: list[np.ndarray]) -> arb_mat:
        exponent = arb(float(option)) if option and name in ("diag", "diag-ef", "diag-ief") else 1
        divisors = [entry + damping for entry in self.diagonal(name, sampled)]
        return vector(
            [
                arb(0) if value.is_zero() else self.right.gradient[p, 0] / value**exponent
                for p, value in enumerate(divisors)
            ]
        )


@dataclass(frozen=True)
class Grade:
    """What an update is worth: γ, dᵀg, dᵀFd and ‖d‖, as floats rounded from balls."""

    gamma: float
    decrease: float
    curvature: float
    norm: float


def grade(direction: arb_mat, metric: Right) -> tuple[Grade, int]:
    """γ(d) = √(dᵀFd)/|dᵀg| by the Fisher and the gradient of a batch, and its accuracy in bits."""
    ctx.prec = metric.bits
    curvature = metric.curvature(direction)
    decrease = (direction.transpose() * metric.gradient)[0, 0]
    norm = (direction.transpose() * direction)[0, 0].sqrt()
    gamma = curvature.sqrt() / abs(decrease)
    values = gamma, decrease, curvature, norm
    accuracy = min(value.rel_accuracy_bits() for value in values)
    return Grade(*(float(value.mid()) for value in values)), accuracy


def rank_is_clear(rows: arb_mat, lengths: Sequence[float]) -> bool:
    """Whether each row is either in the span of the others or clearly not, by Gram–Schmidt.

    Args:
        rows: of a curvature's square root.
        lengths: of the terms that each row is the sum of.
    """
    sizes = [max(length, 1e-300) for length in lengths]
    with ctx.workprec(2 * BITS):  # squares lose half of the digits
        rest = arb_mat(rows).mid()
        squares = [sum((v * v for v in row), arb(0)).mid() for row in rest.tolist()]
        remaining = list(range(len(sizes)))
        while remaining:
            parts = [float(abs(squares[i]).sqrt()) / sizes[i] for i in remaining]
            best = int(np.argmax(parts))
            if parts[best] <= DOUBTFUL[0]:
                return True
            if parts[best] < DOUBTFUL[1]:
                return False
            pivot = remaining.pop(best)
            unit = arb_mat([rest.tolist()[pivot]]) * (1 / squares[pivot].sqrt())
            shares = rest * unit.transpose()
            rest = (rest - shares * unit).mid()
            squares = [(s - shares[i, 0] ** 2).mid() for i, s in enumerate(squares)]
    return True


def tiny_dampings(matrix: arb_mat, bits: int) -> list[arb]:
    """Dampings that stand for λ = 0."""
    ctx.prec = bits
    return [trace(matrix) * arb(2) ** -int(bits / part) for part in RANK]


def gamma_min(right: Right, damping: arb) -> float:
    """(gᵀ(F + λI)⁻¹g)^(−1/2), which is γ_min for a λ below every eigenvalue of F but 0."""
    try:
        solved = damped(right.fisher, damping, right.gradient)
    except ZeroDivisionError:  # singular within its balls
        return math.nan
    return float((1 / (solved.transpose() * right.gradient)[0, 0].sqrt()).mid())
