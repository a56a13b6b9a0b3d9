"""Kronecker factors of affine layers, from the terms of any capture.

For a layer z_nt = W ā_nt (ā = [a; 1] where the bias is trainable, t the positions at which it is
applied to sample n) and gradients b_nqt of cotangent q at its output, the layer's block of
Σ_nq (J_nᵀv_nq)(J_nᵀv_nq)ᵀ is that of the rows Σ_t b āᵀ, and about (1/M) A ⊗ B. Sources: Martens and
Grosse (arXiv 1503.05671) for one position; Grosse and Martens (arXiv 1602.01407) for convolutions;
Eschenhagen et al. (arXiv 2311.00636) for "expand" and "reduce" in general.

Letters: n samples, q cotangents, t positions, g groups, o outputs, i inputs, the bias's included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ngeval.curvature.kronecker_layers import Layer
from ngeval.curvature.second_moments import Counts, SecondMoment
from ngeval.jacobians.inner_products import add_squared_column_sums
from ngeval.jacobians.joined_calls import merged
from ngeval.jacobians.terms import AffineTerm, EmbeddingTerm, Term
from ngeval.model.directions import slices
from ngeval.model.sharding import SINGLE, Shards

EXPAND, REDUCE = "expand", "reduce"
SHARINGS = (EXPAND, REDUCE)
"""How the positions at which a layer's weight is shared are treated; see `Factors`."""

COPIED_ENTRIES = 2**20
"""Entries that are copied to float64 together: more would be slower, by cache misses."""


class Factors:
    """A, B and M of a layer's block ≈ (1/M) A ⊗ B, and its gradient; all float64, summed.

    With sharing ``"expand"`` A = Σ_nt ā āᵀ, B = Σ_nqt b bᵀ and M = NT: every position counts as a
    sample. With ``"reduce"`` A = Σ_n (mean_t ā)(mean_t ā)ᵀ, B = Σ_nq (Σ_t b)(Σ_t b)ᵀ and M = N.
    Padding, which a mask names, does not count as a position. Both agree for T = 1.

    Attributes:
        layer: the layer.
        inputs: A by group.
        outputs: B by group.
        gradient: Σ_nt b_nt āᵀ with b of the residual, shape ``(g, o, i)``.
        count: M.
    """

    def __init__(
        self, layer: Layer, sizes: Sequence[int], device: torch.device, sharing: str
    ) -> None:
        """Factors without any rows; ``sizes`` are g, o and i."""
        groups, outputs, inputs = sizes
        self.layer = layer
        self.inputs: SecondMoment | Counts
        if layer.lookup and sharing == EXPAND:
            self.inputs = Counts(inputs, device)
        else:
            self.inputs = SecondMoment(groups, inputs, device, thin=sharing == EXPAND)
        self.outputs = SecondMoment(groups, outputs, device, thin=sharing == EXPAND)
        self.gradient = torch.zeros(groups, outputs, inputs, dtype=torch.float64, device=device)
        self.count = 0.0


@dataclass(frozen=True)
class Curvature:
    """What the cotangents of a capture represent, block by block.

    Attributes:
        gradient: c with u_n = Σ_q c_nq v_nq for the residual u, shape ``(n, q)``.
        share: 1 for the cotangents that form the curvature, 0 for others, shape ``(q,)``.
        first: the block has the first cotangent of its samples, which is nonzero at every output.
        padding: the positions that a mask names padding, shape ``(n, T)``, by T.
    """

    gradient: Tensor
    share: Tensor
    first: bool = True
    padding: Mapping[int, Tensor] = field(default_factory=dict)


def layer_factors(
    captures: Iterable[tuple[Curvature, list[Term]]],
    layers: Sequence[Layer],
    sharing: str,
    shards: Shards = SINGLE,
) -> list[Factors]:
    """The factors of some layers from captures of the whole batch.

    Args:
        captures: terms, block by block; of this rank's samples where they are spread.
        layers: which layers.
        sharing: ``"expand"`` or ``"reduce"``.
        shards: this process's place in the group over which samples are spread.
    """
    local: dict[Layer, Factors] = {}

    def add_up() -> None:
        for curvature, terms in captures:
            for layer, term in _of_layers(terms, layers):
                if layer not in local:
                    sizes = (*layer.sizes[:2], layer.width)
                    local[layer] = Factors(layer, sizes, term.cotangents.device, sharing)
                if isinstance(term, AffineTerm):
                    _add_term(local[layer], term, curvature, sharing)
                elif sharing == EXPAND:
                    _add_lookups(local[layer], term, curvature)
                else:
                    _add_term(local[layer], _one_hot(term), curvature, sharing)

    shards.synchronized(add_up)
    return [
        _over_ranks(local.get(layer), layer, sharing, shards)
        for layer in layers
        if any(shards.gather(int(layer in local)))
    ]


def _over_ranks(local: Factors | None, layer: Layer, sharing: str, shards: Shards) -> Factors:
    """The sums over all ranks; one without samples has no factors."""
    if shards.alone and local is not None:
        return local
    known = None if local is None else (local.gradient.shape, local.gradient.device)
    shape, device = next(other for other in shards.gather(known) if other is not None)
    sums = Factors(layer, shape, device, sharing) if local is None else local
    count = torch.tensor(sums.count, dtype=torch.float64, device=sums.gradient.device)
    sums.gradient, count = shards.sum(lambda: (sums.gradient, count))
    sums.count = float(count)
    sums.inputs.summed(shards)
    sums.outputs.summed(shards)
    return sums


def corrected_eigenvalues(
    captures: Iterable[tuple[Curvature, list[Term]]],
    bases: dict[Layer, tuple[Tensor | None, Tensor]],
) -> dict[Layer, Tensor]:
    """Σ_nq (U_Bᵀ (Σ_t b āᵀ) U_A)², the diagonal of a layer's exact block in a Kronecker basis.

    Source: George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis" (arXiv 1806.03884), section 3.

    Args:
        captures: terms of the whole batch, block by block.
        bases: by layer U_A, shape ``(g, i, k)`` or None for the identity, and U_B, ``(g, o, m)``.

    Returns:
        By layer, float64, shape ``(g, m, k)``.
    """
    sums = {
        layer.parameters[0]: outputs.new_zeros(
            len(outputs)
            * outputs.shape[2]
            * (layer.sizes[2] if inputs is None else inputs.shape[2])
        )
        for layer, (inputs, outputs) in bases.items()
    }
    for curvature, terms in captures:
        if not bool(curvature.share.any()):
            continue
        for layer, term in _of_layers(terms, list(bases)):
            inputs, outputs = bases[layer]
            if isinstance(term, EmbeddingTerm) and inputs is None:
                rotated = _rotated_lookups(term, outputs, curvature)
                table = rotated.num_units * outputs.shape[2]
                squares = {layer.parameters[0]: outputs.new_zeros(table)}
                add_squared_column_sums(squares, [rotated])
                by_entry = squares[layer.parameters[0]].reshape(rotated.num_units, -1)
                sums[layer.parameters[0]] += by_entry.T.reshape(-1)
            elif isinstance(term, AffineTerm) and inputs is not None:
                rotated_term = _rotated(term, layer, inputs, outputs, curvature)
                add_squared_column_sums(sums, [rotated_term])
    return {
        layer: sums[layer.parameters[0]].reshape(len(outputs), outputs.shape[2], -1)
        for layer, (_, outputs) in bases.items()
    }


def _rotated_lookups(term: EmbeddingTerm, outputs: Tensor, curvature: Curvature) -> EmbeddingTerm:
    chosen = curvature.share.nonzero().squeeze(1)
    cotangents = term.cotangents[:, chosen].to(torch.float64) @ outputs[0]
    shape = torch.Size((term.num_units, outputs.shape[2]))
    return replace(term, weight_shape=shape, cotangents=cotangents)


def _of_layers(
    terms: list[Term], layers: Sequence[Layer]
) -> Iterator[tuple[Layer, AffineTerm | EmbeddingTerm]]:
    """The terms of the layers, one for each: that of all uses of its weight."""
    known = {(layer.weight, layer.bias): layer for layer in layers}
    parts: list[Term] = []
    for term in terms:
        if isinstance(term, EmbeddingTerm):
            parts += [term] if (term.weight, None) in known else []
        elif isinstance(term, AffineTerm):
            whole = (term.weight, term.bias) in known
            pieces = [term] if whole else [replace(term, bias=None), replace(term, weight=None)]
            parts += [piece for piece in pieces if (piece.weight, piece.bias) in known]
    for part in merged(parts):
        if isinstance(part, EmbeddingTerm):
            yield known[part.weight, None], part
        elif isinstance(part, AffineTerm):
            yield known[part.weight, part.bias], part


def _width(term: AffineTerm) -> int:
    """Length of ā, per group."""
    return (term.fan_in if term.weight else 0) + (1 if term.bias else 0)


def _add_term(factors: Factors, term: AffineTerm, curvature: Curvature, sharing: str) -> None:
    """Add the products of one capture, some samples at a time."""
    chosen = curvature.share.nonzero().squeeze(1)
    for samples in _sample_slices(term):
        inputs = _augmented(term, samples)  # (g, n, t, i)
        cotangents = term.cotangents[samples].to(torch.float64).movedim(3, 0)  # (g, n, q, t, o)
        there = _positions(term, samples, curvature)  # (n, t)
        of_gradient = torch.einsum("nq,gnqto->gnto", curvature.gradient[samples], cotangents)
        factors.gradient += of_gradient.flatten(1, 2).mT @ inputs.flatten(1, 2)
        rows, outputs, counted = inputs, cotangents[:, :, chosen], there.sum()
        if not bool(there.all()):
            rows = inputs * there.unsqueeze(2)
        if sharing == REDUCE:
            positions = there.sum(1).reshape(-1, 1, 1)
            rows = rows.sum(2, keepdim=True) / positions.clamp_min(1)
            outputs = outputs.sum(3, keepdim=True)
            counted = (positions > 0).sum()
        factors.outputs.add(outputs.flatten(1, 3))
        if curvature.first:
            factors.inputs.add(rows.flatten(1, 2))
            factors.count += float(counted)


def _add_lookups(factors: Factors, term: EmbeddingTerm, curvature: Curvature) -> None:
    """Add the products of one capture of a table: its A is the diagonal of counts."""
    chosen = curvature.share.nonzero().squeeze(1)
    width = term.positions * term.num_vectors * term.weight_shape[1]
    for samples in slices(term.num_samples, max(1, COPIED_ENTRIES // width)):
        cotangents = term.cotangents[samples].to(torch.float64)  # (n, q, t, d)
        indices = term.indices[samples]
        there = _positions(term, samples, curvature) & (indices >= 0)
        of_gradient = torch.einsum("nq,nqtd->ntd", curvature.gradient[samples], cotangents)
        valid = indices >= 0
        factors.gradient[0].index_add_(1, indices[valid], of_gradient[valid].T)
        factors.outputs.add(cotangents[:, chosen].flatten(0, 2).unsqueeze(0))
        if curvature.first:
            factors.inputs.add(indices[there])
            factors.count += float(there.sum())


def _one_hot(term: EmbeddingTerm) -> AffineTerm:
    """A table as a linear layer of one-hot vectors."""

    def inputs(samples: slice) -> Tensor:
        indices = term.indices[samples].unsqueeze(2)
        classes = torch.arange(term.num_units, device=indices.device)
        return (indices == classes).to(term.cotangents.dtype).unsqueeze(2)

    return AffineTerm(
        term.weight,
        None,
        term.weight_shape,
        inputs,
        term.cotangents.unsqueeze(3),
        transposed=True,
        present=term.indices >= 0,
    )


def _positions(term: AffineTerm | EmbeddingTerm, samples: slice, curvature: Curvature) -> Tensor:
    """Which positions count, shape ``(n, t)``: not padding.

    A position that a mask names padding is padding if no output depends on it. One without a mask
    counts even where its cotangent is 0, as that of a saturated unit is. All pixels of a
    convolution count, and so does a sample's only position.
    """
    cotangents = term.cotangents[samples].flatten(3)
    present = cotangents.new_ones(len(cotangents), term.positions, dtype=torch.bool)
    if isinstance(term, AffineTerm) and term.present is not None:
        present = term.present[samples]
    padding = _padding_of(term.positions, samples, curvature)
    affine_tokens = term.positions > 1 and len(term.weight_shape) == 2
    if padding is None or not affine_tokens or not curvature.first:
        return present
    reached: Tensor = (cotangents[:, 0] != 0).any(dim=2)
    return present & (reached | ~padding)


def _padding_of(length: int, samples: slice, curvature: Curvature) -> Tensor | None:
    """Which positions a mask names padding; one of fewer positions is that of the last ones."""
    for covered, padding in sorted(curvature.padding.items(), reverse=True):
        if covered <= length:  # virtual tokens stand before those of the data
            return nn.functional.pad(padding[samples], (length - covered, 0))
    return None


def _augmented(term: AffineTerm, samples: slice) -> Tensor:
    """The ā of a layer, float64, shape ``(g, n, t, i)``."""
    count = len(term.cotangents[samples])
    shape = (term.groups, count, term.positions, _width(term))
    augmented = torch.empty(shape, dtype=torch.float64, device=term.cotangents.device)
    if term.bias:
        augmented[..., -1] = 1
    if term.weight:
        augmented[..., : term.fan_in] = term.inputs(samples).movedim(2, 0)
    return augmented


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
        weight_shape=torch.Size((len(outputs) * outputs.shape[2], inputs.shape[2])),
        inputs=lambda samples: (_augmented(term, samples) @ inputs.unsqueeze(1)).movedim(0, 2),
        cotangents=torch.einsum("nqtgo,gop->nqtgp", cotangents, outputs),
        apply=None,
        transposed=False,
    )


def _sample_slices(term: AffineTerm) -> Iterator[slice]:
    """Samples in slices whose float64 copies stay small."""
    outputs = term.cotangents.shape[4] * term.num_vectors
    width = term.positions * term.groups * max(term.fan_in + 1, outputs)
    return slices(term.num_samples, max(1, COPIED_ENTRIES // width))
