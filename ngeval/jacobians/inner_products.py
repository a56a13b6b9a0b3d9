"""Inner products of rows, by whichever form takes fewer operations.

For two affine terms of one weight, the inner product of rows Σ_t b_t a_tᵀ and Σ_s b′_s a′_sᵀ is
Σ_ts (a_t·a′_s)(b_t·b′_s): no row is formed, at the cost of T·S products. The other form computes
the rows, a slice of the layer's outputs at a time, and multiplies them. Sums are in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ngeval.jacobians.terms import ALL, AffineTerm, EmbeddingTerm, LayerTerm, Term, split_rows
from ngeval.model.autograd import Parameters
from ngeval.model.directions import slices

PIECE_ENTRIES = 2**23
"""Entries of a temporary matrix, 64 MiB in float64: a larger one is slower, as it misses caches."""

TRIANGLE_SIZE = 512
"""From this many rows on, skipping half of a symmetric matrix pays for working in strips."""

TRAFFIC = 32
"""Multiplications in the time of computing an entry of a row and converting it to float64."""


def add_inner_products(
    out: Tensor,
    left: list[Term],
    right: list[Term],
    *,
    symmetric: bool = False,
    names: Collection[str] | None = None,
) -> None:
    """Add the inner products of all rows of one capture with those of another.

    Args:
        out: float64, shape ``(N·Q, M·R)``; row n·Q + q belongs to cotangent q of sample n.
        left: terms of N samples with Q cotangents.
        right: terms of M samples with R cotangents, of the same model.
        symmetric: both are the same capture; only the lower triangle has to be right.
        names: of the parameters whose part of the rows is multiplied; default: all.
    """
    for i, first in enumerate(left):
        for j, second in enumerate(right):
            shared = first.shapes.keys() & second.shapes.keys()
            if names is not None:
                shared &= set(names)
            if not shared or (symmetric and j > i):
                continue
            if symmetric and j < i:
                both = torch.zeros_like(out)
                _add_pair(both, first, second, shared, symmetric=False)
                out += both + both.T
            else:
                _add_pair(out, first, second, shared, symmetric=symmetric)


def needs_rows(term: Term) -> bool:
    """Whether inner products of a term's rows with each other are computed from whole rows."""
    return not _sequence_is_cheaper(term, term, symmetric=True)


def _add_pair(out: Tensor, left: Term, right: Term, shared: set[str], *, symmetric: bool) -> None:
    if isinstance(left, EmbeddingTerm) and isinstance(right, AffineTerm):
        _add_table_affine(out, left, right)
    elif isinstance(left, AffineTerm) and isinstance(right, EmbeddingTerm):
        transposed = torch.zeros_like(out.T)
        _add_table_affine(transposed, right, left)
        out += transposed.T
    elif not _sequence_is_cheaper(left, right, symmetric=symmetric):
        _add_rows(out, left, right, shared, symmetric=symmetric)
    elif isinstance(left, EmbeddingTerm) and isinstance(right, EmbeddingTerm):
        _add_table_table(out, left, right)
    elif isinstance(left, AffineTerm) and isinstance(right, AffineTerm):
        _add_affine_affine(out, left, right, shared, symmetric=symmetric)


def _sequence_is_cheaper(left: Term, right: Term, *, symmetric: bool) -> bool:
    """Whether both terms have factors whose products cost less than those of the rows.

    Compares counted multiplications; those in float32 count half. Entries that are written, read
    and converted once are limited by memory bandwidth: a row's counts as `TRAFFIC`
    multiplications, a joined product's as 8.
    """
    if isinstance(left, EmbeddingTerm) and isinstance(right, EmbeddingTerm):
        inputs, outputs = left.weight_shape[1:].numel(), left.num_units
    elif isinstance(left, AffineTerm) and isinstance(right, AffineTerm) and left.groups == 1:
        inputs, outputs = left.fan_in, left.fan_out
    else:
        return False
    here, there = (term.num_samples * term.positions for term in (left, right))
    vectors = left.num_vectors * right.num_vectors
    count = left.num_samples * right.num_samples * vectors
    # The two inner products, and their elementwise product (memory-bound, so it counts more).
    sequence = here * there * (inputs + vectors * (outputs + 8 * (left.positions > 1)))
    if symmetric and here * left.num_vectors >= TRIANGLE_SIZE:
        sequence //= 2
    single = 0.5 if left.cotangents.dtype.itemsize < 8 else 1.0
    multiplied = here * left.num_vectors + (0 if symmetric else there * right.num_vectors)
    written = left.num_samples * left.num_vectors
    written += 0 if symmetric else right.num_samples * right.num_vectors
    half = 0.5 if symmetric else 1.0
    rows = outputs * inputs * (single * multiplied + count * half + TRAFFIC * written)
    return sequence <= rows


def _add_affine_affine(
    out: Tensor, left: AffineTerm, right: AffineTerm, shared: set[str], *, symmetric: bool
) -> None:
    """Σ_ts (a_t·a′_s + 1)(b_t·b′_s), in strips of left samples."""
    weighted = left.weight in shared
    constant = float(left.bias is not None and left.bias in shared)
    right_b = _flat_cotangents(right, ALL)
    right_a = _flat_inputs(right) if weighted else None
    left_a = right_a if symmetric or not weighted else _flat_inputs(left)
    size, other = left.num_vectors * left.positions, right.num_vectors * right.positions
    for samples in _strips(left.num_samples, size, len(right_b), symmetric=symmetric):
        last = samples.stop if symmetric else right.num_samples  # the lower triangle is enough
        if symmetric:  # both are converted to float64 already
            strip = right_b[samples.start * size : samples.stop * size]
        else:
            strip = _flat_cotangents(left, samples)
        backward = strip @ right_b[: last * other].T
        factor = None
        if left_a is not None and right_a is not None:
            rows = slice(samples.start * left.positions, samples.stop * left.positions)
            factor = left_a[rows] @ right_a[: last * right.positions].T
            if constant:
                factor += constant
        target = out[
            samples.start * left.num_vectors : samples.stop * left.num_vectors,
            : last * right.num_vectors,
        ]
        _add_joined(target, backward, factor, left, right)


def _add_joined(
    target: Tensor, backward: Tensor, factor: Tensor | None, left: LayerTerm, right: LayerTerm
) -> None:
    """Add backward ⊙ factor, summed over both positions; None is a factor of ones."""
    once = left.positions == right.positions == 1
    if once and factor is None:
        target += backward
        return
    if once and factor is not None:
        # The innermost dimension is long: all samples with their cotangents.
        wide = factor if right.num_vectors == 1 else factor.repeat_interleave(right.num_vectors, 1)
        split = (-1, left.num_vectors)
        into = target.unflatten(0, split)
        into.addcmul_(backward.unflatten(0, split), wide.unsqueeze(1))
        return
    lead = (-1, left.num_vectors, left.positions)
    trail = (-1, right.num_vectors, right.positions)
    view = backward.unflatten(0, lead).unflatten(3, trail)
    if factor is not None:
        rows, columns = (-1, 1, left.positions), (-1, 1, right.positions)
        view = view * factor.unflatten(0, rows).unflatten(3, columns)
    target += view.sum((2, 5)).flatten(0, 1).flatten(1)


def _strips(count: int, size: int, columns: int, *, symmetric: bool) -> Iterator[slice]:
    """Slices of the left samples, which bound a temporary matrix and skip a triangle."""
    step = max(1, PIECE_ENTRIES // max(size * columns, 1))
    if symmetric and count * size >= TRIANGLE_SIZE:
        step = min(step, -(-count // 8))
    return slices(count, step)


def _flat_cotangents(term: LayerTerm, samples: slice) -> Tensor:
    return term.cotangents[samples].to(torch.float64).flatten(0, 2).flatten(1)


def _flat_inputs(term: AffineTerm) -> Tensor:
    return term.inputs(ALL).to(torch.float64).flatten(0, 1).flatten(1)


def _add_table_table(out: Tensor, left: EmbeddingTerm, right: EmbeddingTerm) -> None:
    """Σ_ts [index_t = index′_s] b_t·b′_s, in strips of left samples."""
    right_b = _flat_cotangents(right, ALL)
    size = left.num_vectors * left.positions
    for samples in _strips(left.num_samples, size, len(right_b), symmetric=False):
        indices = left.indices[samples].reshape(-1, 1)
        equal = (indices == right.indices.reshape(1, -1)) & (indices >= 0)
        target = out[samples.start * left.num_vectors : samples.stop * left.num_vectors]
        backward = _flat_cotangents(left, samples) @ right_b.T
        _add_joined(target, backward, equal.to(torch.float64), left, right)


def _add_table_affine(out: Tensor, left: EmbeddingTerm, right: AffineTerm) -> None:
    """Σ_ts (b′_s)_{index t} (b_t·a′_s): a table that is also the weight of a linear layer."""
    inputs = _flat_inputs(right)
    vectors, positions = left.num_vectors, left.positions
    other = (right.num_samples, right.num_vectors, right.positions)
    looked_up = right.cotangents.flatten(0, 2).flatten(1)
    step = max(1, PIECE_ENTRIES // (vectors * positions * len(looked_up)))
    for start in range(0, left.num_samples, step):
        indices = left.indices[start : start + step]
        strip = left.cotangents[start : start + step].to(torch.float64)
        along = (strip.flatten(0, 2) @ inputs.T).reshape(*strip.shape[:3], other[0], 1, other[2])
        entries = looked_up[:, indices.clamp_min(0).reshape(-1)].to(torch.float64)
        entries = entries.T * (indices >= 0).reshape(-1, 1)
        products = along * entries.reshape(len(strip), 1, positions, *other)
        target = out[start * vectors : (start + len(strip)) * vectors]
        target += products.sum((2, 5)).reshape(target.shape)


def pieces(term: Term, num_rows: int) -> Iterator[slice]:
    """Slices of the units for which that many rows fit in a temporary matrix."""
    units = term.num_units
    if units == 1:
        return iter((ALL,))
    return slices(units, max(1, PIECE_ENTRIES * units // (num_rows * max(term.row_size, 1))))


def _add_rows(out: Tensor, left: Term, right: Term, shared: set[str], *, symmetric: bool) -> None:
    cut = left if left.num_units == right.num_units else None
    for units in pieces(cut, sum(out.shape)) if cut else [ALL]:
        rows = left.rows(ALL, ALL, units)
        others = rows if symmetric else right.rows(ALL, ALL, units)
        for name in shared & rows.keys():
            wide = _wide(rows[name])
            if symmetric:
                _add_own_products(out, wide)
            else:
                out.addmm_(wide, _wide(others[name]).T)


def _wide(rows: Tensor) -> Tensor:
    """Rows as a float64 matrix; a scalar parameter has one column."""
    return rows.reshape(rows.shape[0] * rows.shape[1], -1).to(torch.float64)


def _add_own_products(target: Tensor, rows: Tensor) -> None:
    """Add R Rᵀ to the lower triangle of ``target``, in strips so that half is skipped."""
    size = target.shape[0]
    strips = 4 if size >= TRIANGLE_SIZE else 1
    bounds = sorted({size * i // strips for i in range(strips + 1)})
    for start, stop in itertools.pairwise(bounds):
        target[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)


def add_squared_column_sums(sums: Parameters, terms: list[Term]) -> None:
    """Add Σ_{n,q} of the rows' squares to flat float64 vectors by parameter."""
    for group in _groups(terms):
        only = group[0]
        if len(group) == 1 and isinstance(only, AffineTerm) and only.positions == only.groups == 1:
            _add_affine_squares(sums, only)
            continue
        cut = only if len({term.num_units for term in group}) == 1 else None
        total = sum(term.row_size for term in group)
        step = max(1, PIECE_ENTRIES // max(total, 1))
        for block in split_rows(only.num_samples, only.num_vectors, step):
            for units in pieces(cut, block.size) if cut else [ALL]:
                for name, rows in rows_of(group, block.samples, block.vectors, units).items():
                    wide = _wide(rows)
                    per_unit = sums[name].numel() // only.num_units if cut else 0
                    start = (units.start or 0) * per_unit
                    added = wide.square().sum(0)
                    sums[name][start : start + added.numel()] += added


def add_row_combinations(
    out: Tensor, starts: dict[str, int], terms: list[Term], weights: Mapping[str, Tensor]
) -> None:
    """Add W R for the rows R of a capture, a slice of the parameters at a time.

    Args:
        out: shape ``(k, P)``.
        starts: where a parameter begins in a flat vector, by name.
        terms: of B samples with Q cotangents.
        weights: W by parameter in float64, shape ``(k, B·Q)``; others' parts of R are left out.
    """
    for term in terms:
        if not term.shapes.keys() & weights.keys():
            continue
        for units in pieces(term, term.num_samples * term.num_vectors + len(out)):
            for name, rows in term.rows(ALL, ALL, units).items():
                if name not in weights:
                    continue
                per_unit = term.shapes[name].numel() // term.num_units
                start = starts[name] + (units.start or 0) * per_unit
                combined = weights[name] @ _wide(rows)
                out[:, start : start + combined.shape[1]] += combined.to(out.dtype)


def _add_affine_squares(sums: Parameters, term: AffineTerm) -> None:
    """Σ (b aᵀ)² = Σ b² (a²)ᵀ where the layer is applied once to a sample."""
    inputs = _flat_inputs(term).square()
    cotangents = term.cotangents.to(torch.float64).square().sum(1).flatten(1)
    if term.weight:
        squares = inputs.T @ cotangents if term.transposed else cotangents.T @ inputs
        sums[term.weight] += squares.reshape(-1)
    if term.bias:
        sums[term.bias] += cotangents.sum(0)


def _groups(terms: list[Term]) -> list[list[Term]]:
    """Terms grouped such that those of a parameter are together: rows are added before squaring."""
    groups: list[list[Term]] = []
    for term in terms:
        linked = [g for g in groups if any(other.shapes.keys() & term.shapes.keys() for other in g)]
        groups = [g for g in groups if g not in linked]
        groups.append([*itertools.chain.from_iterable(linked), term])
    return groups


def rows_of(terms: list[Term], samples: slice, vectors: slice, units: slice = ALL) -> Parameters:
    """The rows of some terms by parameter, summed over terms."""
    total: Parameters = {}
    for term in terms:
        for name, rows in term.rows(samples, vectors, units).items():
            total[name] = total[name] + rows if name in total else rows
    return total


def complete_rows(
    terms: list[Term], parameters: Parameters, samples: slice, lead: tuple[int, int]
) -> Parameters:
    """The rows of these parameters, zero where no term contributes, with their ``(N, Q)``."""
    rows = rows_of(terms, samples, ALL)
    return {
        name: rows[name] if name in rows else parameter.new_zeros(*lead, *parameter.shape)
        for name, parameter in parameters.items()
    }


def row_products(terms: list[Term], direction: Parameters) -> dict[str, Tensor]:
    """(J_nᵀv_nq)·d for every row, by parameter: float64, shape ``(N, Q)``."""
    total: dict[str, Tensor] = {}
    for term in terms:
        for name, product in _products(term, direction):
            total[name] = total[name] + product if name in total else product
    return total


def _products(term: Term, direction: Parameters) -> Iterator[tuple[str, Tensor]]:
    """Of one term; outer products are contracted without forming the row."""
    if isinstance(term, AffineTerm):
        if term.weight:
            yield term.weight, _contracted(term.cotangents, term.applied(direction[term.weight]))
        if term.bias:
            along = direction[term.bias].unflatten(0, (term.groups, -1))
            yield term.bias, _contracted(term.cotangents, along.expand(term.num_samples, 1, -1, -1))
    elif isinstance(term, EmbeddingTerm):
        along = direction[term.weight][term.indices.clamp_min(0)]
        yield term.weight, _contracted(term.cotangents, along * (term.indices >= 0).unsqueeze(2))
    else:
        for name, rows in term.rows(ALL, ALL, ALL).items():
            yield name, (_wide(rows) @ direction[name].reshape(-1).double()).reshape(rows.shape[:2])


def _contracted(cotangents: Tensor, along: Tensor) -> Tensor:
    """Σ b ⊙ along for each sample and cotangent: ``(n, q, …)`` and ``(n, …)`` to ``(n, q)``."""
    wide = along.expand(len(cotangents), *cotangents.shape[2:]).flatten(1).unsqueeze(2)
    products: Tensor = torch.bmm(cotangents.flatten(2), wide.to(cotangents.dtype))
    return products.squeeze(2).to(torch.float64)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Of two tensors of the same shape, in float64 without a float64 copy of large ones."""
    pieces = (tensor.flatten().split(PIECE_ENTRIES) for tensor in (left, right))
    return torch.stack([a.double() @ b.double() for a, b in zip(*pieces, strict=True)]).sum()
