"""The parts that rows J_nᵀv consist of, by kind of layer.

A layer that is called once contributes one term to the rows of its parameters; a tied weight, or
a layer that is called twice, contributes several. A term computes its rows for any slice of the
weight's first dimension, its units, so that they never have to exist all at once, and, where they
are outer products, has their factors.

Letters: n samples, q cotangents of a sample, t positions (tokens, pixels) at which the layer is
applied to a sample, g groups, o and i the layer's outputs and inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngeval.model.autograd import Parameters, model_errors

ALL = slice(None)

PATCH_ENTRIES = 2**21
"""Entries of the patches from which a convolution's rows are computed at a time."""


@dataclass(frozen=True)
class Block:
    """Some samples, some of the Q cotangents of each, and the numbers of their rows."""

    samples: slice
    vectors: slice
    rows: slice

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.rows.stop - self.rows.start)


class Term(ABC):
    """One summand of the rows of some parameters, for N samples with Q cotangents each."""

    @property
    @abstractmethod
    def lead(self) -> tuple[int, int]:
        """``(N, Q)``, the leading dimensions of its rows."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters that it contributes to, with their shapes."""

    @abstractmethod
    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        """Rows for some samples and cotangents, and some of the weight's first dimension.

        Returns:
            By parameter name, shape ``(samples, Q, *parameter.shape)``, the first dimension of the
            parameter restricted to ``units`` (all of it where `num_units` is 1).
        """

    def combined(self, weights: Tensor) -> Term:
        """The term of the cotangents Σ_q w_nrq v_nq, in which it is linear; w is ``(N, R, Q)``."""

        def compute(samples: slice, vectors: slice) -> Parameters:
            rows = self.rows(samples, ALL, ALL)
            chosen = weights[samples, vectors]
            return {name: _combine(chosen, value) for name, value in rows.items()}

        return ComputedTerm((self.num_samples, weights.shape[1]), self.shapes, compute)

    @property
    def num_samples(self) -> int:
        """N."""
        return self.lead[0]

    @property
    def num_vectors(self) -> int:
        """Q."""
        return self.lead[1]

    @property
    def num_units(self) -> int:
        """The number of units into which the rows can be cut."""
        return 1

    @property
    def row_size(self) -> int:
        """The number of scalars in one row."""
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass(frozen=True)
class ComputedTerm(Term):
    """Rows that are computed when they are used: norms, a module's VJP under ``vmap``, a loop.

    From slices of samples and cotangents ``compute`` gives rows ``(samples, Q, *parameter.shape)``.
    """

    leading: tuple[int, int]
    parameter_shapes: dict[str, torch.Size]
    compute: Callable[[slice, slice], Parameters]

    @property
    def lead(self) -> tuple[int, int]:
        return self.leading

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return self.parameter_shapes

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        with model_errors():
            return self.compute(samples, vectors)


@dataclass(frozen=True)
class StoredTerm(Term):
    """Rows that are in memory.

    Attributes:
        values: by parameter, shape ``(N, Q, *parameter.shape)``.
        units: into how many units the first dimension of the parameters can be cut.
    """

    values: Parameters
    units: int = 1

    @property
    def lead(self) -> tuple[int, int]:
        return leading_shape(next(iter(self.values.values())))

    @property
    def num_units(self) -> int:
        return self.units

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape[2:] for name, value in self.values.items()}

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        if self.units == 1:
            return {name: value[samples, vectors] for name, value in self.values.items()}
        return {name: value[samples, vectors, units] for name, value in self.values.items()}


class LayerTerm(Term):
    """A term with the gradients b at a layer's output, shape ``(n, q, t, …)``."""

    weight_shape: torch.Size
    cotangents: Tensor

    @property
    def lead(self) -> tuple[int, int]:
        return leading_shape(self.cotangents)

    @property
    def positions(self) -> int:
        """T, how often the layer is applied to a sample."""
        return int(self.cotangents.shape[2])


@dataclass(frozen=True)
class AffineTerm(LayerTerm):
    """A layer z_t = W a_t + b: the row of W is Σ_t b_t a_tᵀ, that of the bias Σ_t b_t.

    Here b_t is the gradient of vᵀz at the layer's output. A convolution is the layer applied to
    the patch of every output pixel, in each of G groups.
    Source: Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799).

    Attributes:
        weight: the weight's parameter name, None if it is frozen.
        bias: the bias's parameter name, None if it is frozen or absent.
        weight_shape: as the layer holds it.
        inputs: gives a for a slice of the samples, shape ``(n, t, g, i)``; patches are extracted
            only when they are used.
        cotangents: b, shape ``(n, q, t, g, o)``.
        apply: gives D a for another weight D, shape ``(n, t, g, o)``; None where that is a product
            with a.
        transposed: the layer holds Wᵀ, inputs first.
        present: which positions a sample has, shape ``(n, t)``; None: all.
    """

    weight: str | None
    bias: str | None
    weight_shape: torch.Size
    inputs: Callable[[slice], Tensor]
    cotangents: Tensor
    apply: Callable[[Tensor], Tensor] | None = None
    transposed: bool = False
    present: Tensor | None = None

    @property
    def groups(self) -> int:
        """G."""
        return int(self.cotangents.shape[3])

    @property
    def num_units(self) -> int:
        """The weight's first dimension; groups are not cut."""
        return int(self.weight_shape[0]) if self.groups == 1 else 1

    @property
    def fan_in(self) -> int:
        """The length of a, per group."""
        return int(self.weight_shape[0]) if self.transposed else self.weight_shape[1:].numel()

    @property
    def fan_out(self) -> int:
        """The length of b, per group."""
        return int(self.cotangents.shape[4])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        shapes = {}
        if self.weight:
            shapes[self.weight] = self.weight_shape
        if self.bias:
            shapes[self.bias] = torch.Size((self.groups * self.fan_out,))
        return shapes

    def combined(self, weights: Tensor) -> AffineTerm:
        return replace(self, cotangents=_combine(weights, self.cotangents))

    def applied(self, direction: Tensor) -> Tensor:
        """D a at every position, in the model's dtype: shape ``(n, t, g, o)``."""
        if self.apply is not None:
            return self.apply(direction)
        if self.transposed:
            weight = direction.flatten(1).unsqueeze(0)
        else:
            weight = direction.reshape(self.groups, -1, self.fan_in).transpose(1, 2)
        inputs = self.inputs(ALL)
        moved = inputs.flatten(0, 1).transpose(0, 1) @ weight
        result: Tensor = moved.transpose(0, 1).unflatten(0, inputs.shape[:2])
        return result

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        """Σ_t b_t a_tᵀ and Σ_t b_t; where Wᵀ is held, the latter with the first units alone."""
        cotangents = self.cotangents[samples, vectors]
        if self.transposed:
            return self._transposed_rows(samples, cotangents, units)
        if self.groups == 1:
            cotangents = cotangents[..., units]
        rows = {}
        if self.weight:
            rows[self.weight] = self._weight_rows(samples, cotangents)
        if self.bias:
            rows[self.bias] = cotangents.sum(2).flatten(2)
        return rows

    def _weight_rows(self, samples: slice, cotangents: Tensor) -> Tensor:
        count, num_vectors, positions, groups, outputs = cotangents.shape
        left = cotangents.permute(0, 3, 1, 4, 2).reshape(count, groups, -1, positions)
        products = left.new_empty(count, groups, num_vectors * outputs, self.fan_in)
        first = samples.start or 0
        # Patches of a few samples at a time stay in the cache, and reuse allocated memory.
        step = max(1, PATCH_ENTRIES // max(1, positions * groups * self.fan_in))
        for start in range(0, count, step):
            stop = min(start + step, count)
            right = self.inputs(slice(first + start, first + stop)).transpose(1, 2)
            torch.matmul(left[start:stop], right, out=products[start:stop])
        split: Tensor = products.unflatten(2, (num_vectors, outputs)).transpose(1, 2)
        return split.reshape(count, num_vectors, groups * outputs, *self.weight_shape[1:])

    def _transposed_rows(self, samples: slice, cotangents: Tensor, units: slice) -> Parameters:
        rows = {}
        if self.weight:
            inputs = self.inputs(samples).squeeze(2)[..., units].mT
            right = cotangents.squeeze(3).transpose(1, 2)  # (n, t, q, o)
            products: Tensor = inputs @ right.flatten(2)
            split: Tensor = products.unflatten(2, right.shape[2:]).transpose(1, 2)
            rows[self.weight] = split.reshape(*split.shape[:3], *self.weight_shape[1:])
        if self.bias and not units.start:
            rows[self.bias] = cotangents.sum(2).flatten(2)
        return rows


@dataclass(frozen=True)
class EmbeddingTerm(LayerTerm):
    """A table looked up at T indices: the row is Σ_t e_{index t} b_tᵀ.

    Attributes:
        weight: the table's parameter name.
        weight_shape: ``(V, d)``.
        indices: shape ``(n, t)``; −1 where no gradient flows back (padding).
        cotangents: b, shape ``(n, q, t, d)``.
    """

    weight: str
    weight_shape: torch.Size
    indices: Tensor
    cotangents: Tensor

    @property
    def num_units(self) -> int:
        """V."""
        return int(self.weight_shape[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {self.weight: self.weight_shape}

    def combined(self, weights: Tensor) -> EmbeddingTerm:
        return replace(self, cotangents=_combine(weights, self.cotangents))

    def rows(self, samples: slice, vectors: slice, units: slice) -> Parameters:
        """The gradients of equal indices, summed."""
        first, last, _ = units.indices(self.num_units)
        cotangents, indices = self.cotangents[samples, vectors], self.indices[samples]
        count, num_vectors, _, width = cotangents.shape
        rows = cotangents.new_zeros(count, num_vectors, last - first, width)
        sample, position = ((indices >= first) & (indices < last)).nonzero(as_tuple=True)
        vector = torch.arange(num_vectors, device=rows.device)
        where = (sample.unsqueeze(1), vector, indices[sample, position].unsqueeze(1) - first)
        rows.index_put_(where, cotangents[sample, :, position], accumulate=True)
        return {self.weight: rows}


def leading_shape(tensor: Tensor) -> tuple[int, int]:
    """The first two dimensions, N and Q."""
    return tensor.shape[0], tensor.shape[1]


def _combine(weights: Tensor, values: Tensor) -> Tensor:
    """Σ_q w_nrq x_nq…: ``(n, r, q)`` and ``(n, q, …)`` to ``(n, r, …)``."""
    if values.ndim == 2:  # of a scalar parameter
        return _combine(weights, values.unsqueeze(2)).squeeze(2)
    # In the order of memory, in which the trailing dimensions flatten without a copy.
    order = sorted(range(2, values.ndim), key=values.stride, reverse=True)
    flat = values.permute(0, 1, *order).flatten(2)
    combined = torch.bmm(weights.to(values.dtype), flat)
    split = combined.unflatten(2, [values.shape[dim] for dim in order])
    result: Tensor = split.permute(0, 1, *(2 + order.index(d) for d in range(2, values.ndim)))
    return result


def whole_block(cotangents: Tensor) -> Block:
    """The block of all rows."""
    count, vectors = cotangents.shape[:2]
    return Block(slice(0, count), slice(0, vectors), slice(0, count * vectors))


def split_rows(num_samples: int, num_vectors: int, limit: int) -> list[Block]:
    """Split N samples with Q cotangents each into blocks of at most ``limit`` rows.

    Whole samples where they fit, some of the cotangents of a single sample otherwise.
    """
    if limit >= num_vectors:
        step, width = limit // num_vectors, num_vectors
    else:
        step, width = 1, limit
    blocks = []
    for n in range(0, num_samples, step):
        last = min(n + step, num_samples)
        for q in range(0, num_vectors, width):
            stop = min(q + width, num_vectors)
            rows = slice(n * num_vectors + q, (last - 1) * num_vectors + stop)
            blocks.append(Block(slice(n, last), slice(q, stop), rows))
    return blocks
