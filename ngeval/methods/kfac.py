"""``kfac``, ``ekfac`` and their variants: Kronecker-factored curvature of every layer.

See `ngeval.curvature.kronecker_factors` for the factors A and B, `ngeval.curvature.kronecker_block`
for damping and solving, and `ngeval.methods.label_sources` for the four sources of labels.
``kfac-ef`` is called eKFAC by Wu et al. (arXiv 2406.06420) and ``kfac-ief`` ieKFAC; ``ekfac`` is
the eigenvalue-corrected KFAC of George et al. (arXiv 1806.03884), often written EKFAC.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ngeval.curvature.kernel import Kernel
from ngeval.curvature.kronecker_block import DAMPINGS, EXACT, KroneckerBlock
from ngeval.curvature.kronecker_factors import (
    EXPAND,
    SHARINGS,
    Curvature,
    Factors,
    corrected_eigenvalues,
    layer_factors,
)
from ngeval.curvature.kronecker_layers import Layer, kronecker_layers
from ngeval.errors import EngineError, InputError, nearest_name
from ngeval.jacobians import CapturedRows, squared_sums
from ngeval.jacobians.terms import Term
from ngeval.methods.base import ParameterState
from ngeval.methods.label_sources import SAMPLED, Labels, parse_draws
from ngeval.model.inputs import named_tensors
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

DIAGONAL, GRADIENT, ZERO = "diagonal", "gradient", "zero"
RESTS = (DIAGONAL, GRADIENT, ZERO)
"""Treatments of parameters that KFAC does not cover."""

LARGEST_FACTOR = 8192
"""A layer with a factor of more rows (a vocabulary) is not covered."""


@dataclass(frozen=True)
class Kronecker:
    """D(λ) for every layer that is affine in its weight, or a table.

    Linear, convolution and recurrent layers, LoRA's A and B, embeddings; tied weights are shared
    over their uses as over positions.

    Attributes:
        name: in tables.
        labels: the source of the labels in the output factors.
        sharing: ``"expand"`` or ``"reduce"``, for weights shared over positions.
        damping: ``"exact"``, ``"factored"`` or ``"pi"``.
        rest: the update of other layers' parameters (norms, weights of two kinds of layer):
            ``"diagonal"``, g/(diag + λ) with the same labels; ``"gradient"``, g; ``"zero"``.
        corrected: whether the eigenvalues are the exact second moments in the Kronecker basis.
    """

    name: str
    labels: Labels
    sharing: str = EXPAND
    damping: str = EXACT
    rest: str = DIAGONAL
    corrected: bool = False

    def __post_init__(self) -> None:
        choices = ((self.sharing, SHARINGS), (self.damping, DAMPINGS), (self.rest, RESTS))
        for value, known in choices:
            if value not in known:
                raise InputError(f"method {self.name!r}: {value!r} is not in {', '.join(known)}")
        if self.corrected and self.damping != EXACT:
            raise InputError(
                f"method {self.name!r}: eigenvalue-corrected KFAC has no factors left to damp; "
                "leave out the kind of damping"
            )
        if self.corrected and self.sharing != EXPAND:
            raise InputError(
                f"method {self.name!r}: the corrected eigenvalues depend on the eigenbasis, and "
                f"the means over positions of {self.sharing!r} leave most of it undetermined; use "
                "ekfac with expand"
            )

    @classmethod
    def parse(cls, name: str, parameter: str = "") -> Kronecker:
        """Build the method from its full name and the words after the colon.

        They are one of a kind in any order, as ``"reduce:pi"``; among them, of sampled labels, the
        number of draws, as in ``"4:reduce"``.
        """
        kinds = {"sharing": SHARINGS, "damping": DAMPINGS, "rest": RESTS}
        labels, chosen, has_draws = Labels.of_method(name), dict[str, str](), False
        for word in parameter.split(":") if parameter else []:
            kind = next((kind for kind, words in kinds.items() if word in words), None)
            if labels.source == SAMPLED and word.isdecimal() and not has_draws:
                labels, has_draws = Labels(SAMPLED, parse_draws(name, word)), True
            elif kind is None or kind in chosen:
                known = [known for words in kinds.values() for known in words]
                fault = "names one thing twice" if kind else f"has an unknown {word!r}"
                raise InputError(f"method {name!r} {fault}; {nearest_name(word, known)}")
            else:
                chosen[kind] = word
        return cls(name, labels, corrected=name.startswith("ekfac"), **chosen)

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> KroneckerState:
        """Compute and decompose the factors, once for all methods that share them.

        Raises:
            EngineError: no layer is covered, or the factors do not fit in the memory budget.
        """
        seed = self.labels.relevant(seed)
        shared = kernel.once(_Blocks, self.labels, seed, self.sharing)
        blocks = shared.corrected if self.corrected else shared.plain
        return KroneckerState(problem, kernel, self, blocks, seed)

    def factors(self, problem: Problem, seed: int = 0) -> list[Factors]:
        """A, B and the gradient of every covered layer; see `prepare`."""
        return _factors(problem, self.labels, seed, self.sharing)


def _factors(problem: Problem, labels: Labels, seed: int, sharing: str) -> list[Factors]:
    layers = _covered(problem, sharing)
    return layer_factors(_captures(problem, labels, seed), layers, sharing, problem.shards)


class _Blocks:
    """The decomposed factors, which methods with the same labels and sharing have in common."""

    def __init__(self, problem: Problem, labels: Labels, seed: int, sharing: str) -> None:
        self.problem, self.labels, self.seed = problem, labels, seed
        self.plain: list[KroneckerBlock] = []
        factors = _factors(problem, labels, seed, sharing)
        while factors:  # each factor is freed once it is decomposed
            epsilon = problem.function.row_epsilon
            self.plain.append(KroneckerBlock.of(factors.pop(0), problem.num_samples, epsilon))

    @cached_property
    def corrected(self) -> list[KroneckerBlock]:
        """The blocks with exact second moments in their bases as eigenvalues."""
        problem = self.problem
        bases = {b.layer: (b.input_vectors, b.output_vectors) for b in self.plain}
        values = problem.shards.sum(
            lambda: corrected_eigenvalues(_captures(problem, self.labels, self.seed), bases)
        )
        return [replace(block, corrected=values[block.layer]) for block in self.plain]


class KroneckerState(ParameterState):
    """The blocks in their eigenbases, and the treatment of the other parameters."""

    def __init__(
        self,
        problem: Problem,
        kernel: Kernel,
        method: Kronecker,
        blocks: list[KroneckerBlock],
        seed: int,
    ) -> None:
        self.blocks = blocks
        self.kind = method.damping
        parameters = problem.function.parameters
        covered = {name for block in blocks for name in block.layer.parameters}
        self.rest = [name for name in parameters if name not in covered]
        count = sum(parameters[name].numel() for name in covered)
        self.coverage = 100 * count / problem.num_parameters
        self.notes = _notes(method, self.coverage, self.rest)
        self.diagonal: dict[str, Tensor] = {}
        if method.rest == DIAGONAL and self.rest:
            self.diagonal = kernel.once(_rest_diagonal, method.labels, seed, tuple(self.rest))
        self.keeps_gradient = method.rest == GRADIENT
        largest = [float(block.values.max()) for block in blocks]
        largest += [float(part.max()) for part in self.diagonal.values()]
        super().__init__(problem, max(largest))

    def direction(self, damping: float) -> Tensor:
        """D(λ) of every layer and the update of the other parameters, in float64."""
        gradient = self.problem.gradient()
        update = torch.zeros(len(gradient), dtype=torch.float64, device=gradient.device)
        parts = self.problem.function.views(update)
        for block in self.blocks:
            solved = block.solve(damping, self.kind)
            layer = block.layer
            if layer.weight:
                width = solved.shape[2] - (1 if layer.bias else 0)
                weight = solved[..., :width]
                weight = weight.mT if layer.transposed else weight
                parts[layer.weight].copy_(weight.reshape_as(parts[layer.weight]))
            if layer.bias:
                parts[layer.bias].copy_(solved[..., -1].reshape_as(parts[layer.bias]))
        plain = self.problem.function.views(gradient)
        for name in self.rest if self.keeps_gradient else []:
            parts[name].copy_(plain[name])
        for name, diagonal in self.diagonal.items():
            damped = (diagonal + damping).reshape_as(plain[name])
            parts[name].copy_(torch.where(damped > 0, plain[name] / damped, 0.0))
        return update


def _covered(problem: Problem, sharing: str) -> list[Layer]:
    """The covered layers, whose factors fit in the memory budget."""
    plan = problem.rows.plan
    if plan is None:
        raise EngineError(
            "Kronecker factors need the inputs and output gradients of layers, which the engine "
            f"{problem.engine!r} does not record; make the Problem with engine='layers'"
        )
    layers, large, needed = [], [], 0
    for layer in kronecker_layers(plan):
        groups, outputs, _ = layer.sizes
        diagonal = layer.lookup and sharing == EXPAND
        sides = (outputs,) if diagonal else (layer.width, outputs)
        if max(sides) <= LARGEST_FACTOR:
            layers.append(layer)
            # Each factor and its vectors, and the gradient and its rotation.
            entries = sum(side**2 for side in sides) + layer.width * outputs
            needed += 8 * groups * 2 * entries
        else:
            large.append(f"{layer.name or 'the model'} has {max(sides)}")
    if not layers:
        raise EngineError(
            "KFAC covers no layer of this model: it needs linear, convolution or recurrent "
            "layers, or tables, with a trainable weight, and factors of at most "
            f"{LARGEST_FACTOR} rows" + (f" ({', '.join(large[:3])})" if large else "")
        )
    if needed > problem.rows.memory:
        raise EngineError(
            f"the Kronecker factors of {len(layers)} layers take {describe_bytes(needed)}, over "
            f"the memory budget of {describe_bytes(problem.rows.memory)}; raise memory= or train "
            "fewer layers"
        )
    return layers


def _captures(
    problem: Problem, labels: Labels, seed: int
) -> Iterator[tuple[Curvature, list[Term]]]:
    """The rows of the curvature and of the gradient on this rank, block by block."""
    vectors, share, gradient = labels.with_residual(problem, seed)
    gradient = problem.shards.local(gradient)
    padding = {length: problem.shards.local(mask) for length, mask in _padding(problem).items()}
    for block, terms in CapturedRows(problem.rows, vectors).captures():
        part = Curvature(
            gradient[block.samples, block.vectors],
            share[block.vectors],
            block.vectors.start == 0,
            {length: mask[block.samples] for length, mask in padding.items()},
        )
        yield part, terms


def _padding(problem: Problem) -> dict[int, Tensor]:
    """Which positions are padding by a mask, shape ``(N, T)``, for every length T with a mask.

    The masks are the likelihood's and the model's inputs with "mask" in their names.
    """
    masks = [] if problem.distribution.mask is None else [problem.distribution.mask.flatten(1)]
    masks += [
        tensor != 0
        for name, tensor in named_tensors(problem.function.inputs)
        if "mask" in name and tensor.ndim == 2
    ]
    padding: dict[int, Tensor] = {}
    for mask in masks:
        length = mask.shape[1]
        padding[length] = ~mask.to(problem.device) | padding.get(length, torch.zeros_like(mask))
    return padding


def _rest_diagonal(
    problem: Problem, labels: Labels, seed: int, rest: tuple[str, ...]
) -> dict[str, Tensor]:
    return squared_sums(problem.rows, labels.vectors(problem, seed), rest)


def _notes(method: Kronecker, coverage: float, rest: list[str]) -> tuple[str, ...]:
    if not rest:
        return ()
    names = ", ".join(rest[:3]) + (", …" if len(rest) > 3 else "")
    how = {DIAGONAL: "by its diagonal", GRADIENT: "by the gradient", ZERO: "left at 0"}
    return (f"covers {coverage:.1f} % of the parameters, the rest ({names}) {how[method.rest]}",)
