"""Kronecker factors of affine layers, from the terms of any capture.

For a layer z_nt = W ā_nt (ā = [a; 1] where the bias is trainable, t the positions at which it is
applied to sample n) and gradients b_nqt of cotangent q at its output, the layer's block of
Σ_nq (J_nᵀv_nq)(J_nᵀv_nq)ᵀ is that of the rows Σ_t b āᵀ, and about (1/M) A ⊗ B. Sources: Martens and
Grosse (arXiv 1503.05671) for one position; Grosse and Martens (arXiv 1602.01407) for convolutions;
Eschenhagen et al. (arXiv 2311.00636) for "expand" and "reduce" in general.

Letters: n samples, q cotangents, t positions, g groups, o outputs, i inputs with the one for the
bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngeval.jacobians.capture import Plan
from ngeval.jacobians.products import PIECE_ENTRIES, add_squared_column_sums
from ngeval.jacobians.terms import AffineTerm, Term

EXPAND, REDUCE = "expand", "reduce"
SHARINGS = (EXPAND, REDUCE)
"""What is done with the positions at which a layer's weight is shared; see `Factors`."""


@dataclass(frozen=True)
class Layer:
    """An affine layer by its trainable parameters.

    Attributes:
        name: the module's path.
        weight: the weight's parameter name, None if it is frozen.
        bias: the bias's, None if it is frozen or absent.
    """

    name: str
    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> list[str]:
        """The names that there are, the weight's first."""
        return [name for name in (self.weight, self.bias) if name]


@dataclass
class Factors:
    """A, B and M of a layer's block ≈ (1/M) A ⊗ B, and its gradient; all float64, summed.

    With sharing ``"expand"`` A = Σ_nt ā āᵀ, B = Σ_nqt b bᵀ and M = NT: every position counts as a
    sample. With ``"reduce"`` A = Σ_n (mean_t ā)(mean_t ā)ᵀ, B = Σ_nq (Σ_t b)(Σ_t b)ᵀ and M = N.
    Tokens that no output depends on (padding) are no positions. Both agree for T = 1.

    Attributes:
        layer: whose.
        inputs: A by group, shape ``(g, i, i)``.
        outputs: B by group, shape ``(g, o, o)``.
        gradient: Σ_nt b_nt āᵀ with b of the residual, shape ``(g, o, i)``.
        count: M.
    """

    layer: Layer
    inputs: Tensor
    outputs: Tensor
    gradient: Tensor
    count: float = 0.0


@dataclass(frozen=True)
class Curvature:
    """What the cotangents of a capture stand for, block by block.

    Attributes:
        gradient: c with u_n = Σ_q c_nq v_nq for the residual u, shape ``(n, q)``.
        share: 1 for the cotangents that make the curvature, 0 for others, shape ``(q,)``.
        first: the block is the first of its samples.
    """

    gradient: Tensor
    share: Tensor
    first: bool = True


def affine_layers(plan: Plan) -> list[Layer]:
    """The layers whose rows are sums of outer products, and whose weights are theirs alone."""
    uses = plan.uses()
    return [
        Layer(owner.name, owner.parameters.get("weight"), owner.parameters.get("bias"))
        for owner in plan.owners
        if owner.rule is not None
        and owner.rule.affine
        and not owner.replicate
        and all(uses[name] == 1 for name in owner.parameters.values())
    ]


def layer_factors(
    captures: Iterable[tuple[Curvature, list[Term]]], layers: Sequence[Layer], sharing: str
) -> list[Factors]:
    """The factors of some layers from captures of the whole batch.

    Args:
        captures: terms, block by block.
        layers: which layers.
        sharing: ``"expand"`` or ``"reduce"``.
    """
    found: dict[Layer, Factors] = {}
    for curvature, terms in captures:
        for layer, term in _of_layers(terms, layers):
            if layer not in found:
                found[layer] = _empty(layer, term)
            _add_term(found[layer], term, curvature, sharing)
    return [found[layer] for layer in layers if layer in found]


def corrected_eigenvalues(
    captures: Iterable[tuple[Curvature, list[Term]]], bases: dict[Layer, tuple[Tensor, Tensor]]
) -> dict[Layer, Tensor]:
    """Σ_nq (U_Bᵀ (Σ_t b āᵀ) U_A)², the diagonal of a layer's exact block in a Kronecker basis.

    Source: George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis" (arXiv 1806.03884), section 3.

    Args:
        captures: terms of the whole batch, block by block.
        bases: by layer U_A, shape ``(g, i, i)``, and U_B, shape ``(g, o, o)``.

    Returns:
        By layer, float64, shape ``(g, o, i)``.
    """
    sums = {
        layer.parameters[0]: inputs.new_zeros(len(inputs) * outputs.shape[1] * inputs.shape[1])
        for layer, (inputs, outputs) in bases.items()
    }
    for curvature, terms in captures:
        for layer, term in _of_layers(terms, list(bases)):
            add_squared_column_sums(sums, [_rotated(term, layer, *bases[layer], curvature)])
    return {
        layer: sums[layer.parameters[0]].reshape(len(inputs), outputs.shape[1], inputs.shape[1])
        for layer, (inputs, outputs) in bases.items()
    }


def _of_layers(terms: list[Term], layers: Sequence[Layer]) -> Iterator[tuple[Layer, AffineTerm]]:
    """The layers' terms: one each, since no other module has their parameters."""
    known = {(layer.weight, layer.bias): layer for layer in layers}
    for term in terms:
        if isinstance(term, AffineTerm) and (term.weight, term.bias) in known:
            yield known[term.weight, term.bias], term


def _empty(layer: Layer, term: AffineTerm) -> Factors:
    groups, outputs = term.cotangents.shape[3:]
    inputs = (term.fan_in if term.weight else 0) + (1 if term.bias else 0)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=term.cotangents.device)

    return Factors(
        layer,
        zeros(groups, inputs, inputs),
        zeros(groups, outputs, outputs),
        zeros(groups, outputs, inputs),
    )


def _add_term(factors: Factors, term: AffineTerm, curvature: Curvature, sharing: str) -> None:
    """Add the products of one capture, some samples at a time."""
    chosen = curvature.share.nonzero().squeeze(1)
    for samples in _sample_slices(term):
        inputs = _augmented(term, samples)  # (g, n, t, i)
        cotangents = term.cotangents[samples].to(torch.float64).movedim(3, 0)  # (g, n, q, t, o)
        there = _positions(term, samples).unsqueeze(2).to(torch.float64)  # (n, t, 1)
        of_gradient = torch.einsum("nq,gnqto->gnto", curvature.gradient[samples], cotangents)
        factors.gradient += of_gradient.flatten(1, 2).mT @ inputs.flatten(1, 2)
        rows, outputs = inputs * there, cotangents[:, :, chosen]
        counted = there.sum()
        if sharing == REDUCE:
            positions = there.sum(1, keepdim=True)
            rows = rows.sum(2, keepdim=True) / positions.clamp_min(1)
            outputs = outputs.sum(3, keepdim=True)
            counted = (positions > 0).sum()
        outputs = outputs.flatten(1, 3)
        factors.outputs += outputs.mT @ outputs
        if curvature.first:
            rows = rows.flatten(1, 2)
            factors.inputs += rows.mT @ rows
            factors.count += float(counted)


def _positions(term: AffineTerm, samples: slice) -> Tensor:
    """Which positions count, shape ``(n, t)``: not tokens that no output depends on.

    The pixels of a convolution all count, and so does a sample's only position.
    """
    cotangents = term.cotangents[samples]
    if term.positions == 1 or len(term.weight_shape) > 2:
        return cotangents.new_ones(len(cotangents), term.positions, dtype=torch.bool)
    return (cotangents != 0).any(dim=4).any(dim=3).any(dim=1)


def _augmented(term: AffineTerm, samples: slice) -> Tensor:
    """The ā of a layer, float64, shape ``(g, n, t, i)``."""
    count = len(term.cotangents[samples])
    ones = torch.ones(
        (term.groups, count, term.positions, 1),
        dtype=torch.float64,
        device=term.cotangents.device,
    )
    if not term.weight:
        return ones
    inputs = term.inputs(samples).to(torch.float64).movedim(2, 0)
    return torch.cat([inputs, ones], 3) if term.bias else inputs


def _rotated(
    term: AffineTerm, layer: Layer, inputs: Tensor, outputs: Tensor, curvature: Curvature
) -> AffineTerm:
    """The term of the layer's rows in a Kronecker basis, bias included."""
    chosen = curvature.share.nonzero().squeeze(1)
    cotangents = term.cotangents[:, chosen].to(torch.float64)
    return replace(
        term,
        weight=layer.parameters[0],
        bias=None,
        weight_shape=torch.Size((len(outputs) * outputs.shape[1], inputs.shape[1])),
        inputs=lambda samples: (_augmented(term, samples) @ inputs.unsqueeze(1)).movedim(0, 2),
        cotangents=torch.einsum("nqtgo,gop->nqtgp", cotangents, outputs),
        apply=None,
    )


def _sample_slices(term: AffineTerm) -> Iterator[slice]:
    """So many samples at a time that their float64 copies stay small."""
    outputs = term.cotangents.shape[4] * term.num_vectors
    width = term.positions * term.groups * max(term.fan_in + 1, outputs)
    step = max(1, PIECE_ENTRIES // width)
    for start in range(0, term.num_samples, step):
        yield slice(start, min(start + step, term.num_samples))
