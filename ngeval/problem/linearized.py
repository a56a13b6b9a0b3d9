"""A model at θ on a batch, to first order: z, J and its transpose as products, u and g.

Everything is sum-reduced: the loss is L = Σ_n ℓ_n and its gradient g = Σ_n g_n = Σ_n J_nᵀu_n.
Logit-space quantities (outputs, residuals, tangents) are float64; vectors in parameter space
have the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ngeval.errors import InputError
from ngeval.jacobians import OnePass, RowSource
from ngeval.likelihoods import Likelihood
from ngeval.model.autograd import model_errors
from ngeval.model.directions import Direction, largest, vector_of
from ngeval.model.function import ModelFunction
from ngeval.model.outputs import bound
from ngeval.model.sharding import Shards
from ngeval.problem.probes import check_outputs

UNDERFLOW = 1e-100
"""Rounding of a logit makes no residual this small; a probability that underflows does."""


class Sizes(NamedTuple):
    """The sizes that decide how something is computed.

    Attributes:
        samples: N.
        outputs: C, of one sample, all its positions together.
        parameters: P, the trainable scalars.
    """

    samples: int
    outputs: int
    parameters: int


class Linearized:
    """The first-order expansion of a model's outputs and losses on one batch.

    Attributes:
        function: the model as a function of its trainable parameters.
        recorded: a recorded forward pass of the batch, until `one_pass` hands it out.
        fisher_diagonal: diag F once `FisherOperator.diagonal` has computed it.

    The other attributes are those of `ngeval.Problem`.
    """

    rows: RowSource
    recorded: OnePass | None = None

    def __init__(
        self, function: ModelFunction, likelihood: Likelihood, raw: Tensor, targets: Any
    ) -> None:
        """Evaluate the likelihood at the model's raw outputs; `use_rows` completes the object.

        Raises:
            ModelError: the outputs are not finite floating-point numbers, batch first.
            InputError: the targets do not fit the outputs.
        """
        check_outputs(function, raw)
        self.function = function
        self.likelihood = likelihood
        self.outputs = raw.detach().to(torch.float64)
        self.distribution = bound(function.output, likelihood, self.outputs, targets)
        self.residual = self.distribution.residual()
        self.loss = self.distribution.loss()

    def use_rows(self, rows: RowSource) -> None:
        """Take rows from this source from now on; what was computed from others is dropped.

        Raises:
            EngineError: not even one row fits in the memory budget.
        """
        rows.blocks(self.residual.unsqueeze(1))  # raises where a row is over the budget
        self.rows = rows
        self.function = rows.function
        self.fisher_diagonal: Tensor | None = None
        self._gradient: Tensor | None = None

    def with_noise(self, noise: float, generator: torch.Generator) -> Self:
        """The same problem with its logits changed at their rounding; equal samples stay equal.

        Args:
            noise: relative to the largest logit of each sample.
            generator: of the noise, on the CPU.
        """
        flat = self.outputs.flatten(1)
        _, places = torch.unique(flat, dim=0, return_inverse=True)
        change = torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(flat)[places]
        other = copy(self)
        changed = flat + noise * flat.abs().amax(1, keepdim=True) * change
        targets = self.distribution.targets
        other.outputs = changed.reshape_as(self.outputs)
        other.distribution = bound(self.function.output, self.likelihood, other.outputs, targets)
        # What underflows stays 0, also where it does so only just. In float64 a 0 is meant.
        residual = other.distribution.residual()
        kept = self.residual != 0
        if self.function.dtype != torch.float64:
            kept |= residual.abs() > UNDERFLOW
        other.residual = residual * kept
        other._gradient = other.fisher_diagonal = None
        return other

    def one_pass(self) -> OnePass | None:
        """A recorded forward pass of the batch, for callers that take rows and an update from it.

        The one that `Problem.with_batch` recorded, which is handed out once, or a new one; None
        where the engine has none, or where its captures do not fit in their share of the memory.
        """
        self.function.check_unchanged()
        recorded, self.recorded = self.recorded, None
        if recorded is None and OnePass.fits(self.rows, self.num_samples):
            with torch.inference_mode(False):
                recorded = OnePass(self.rows)
        return recorded

    @property
    def sizes(self) -> Sizes:
        """N, C and P."""
        return Sizes(self.num_samples, self.num_outputs, self.num_parameters)

    @property
    def num_samples(self) -> int:
        """N, the number of samples in the batch."""
        return int(self.outputs.shape[0])

    @property
    def num_outputs(self) -> int:
        """C, the number of outputs per sample (all its positions together)."""
        return self.outputs[0].numel()

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable scalars."""
        return self.function.num_parameters

    @property
    def shards(self) -> Shards:
        """This process's place in the group over which the samples are spread."""
        return self.function.shards

    @property
    def engine(self) -> str:
        """Which engine is in use, ``"layers"``, ``"vmap"`` or ``"loop"``."""
        return self.rows.engine_name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of vectors in parameter space."""
        return self.function.dtype

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return self.function.device

    def gradient(self) -> Tensor:
        """The batch gradient g = Jᵀu of L = Σ_n ℓ_n: shape ``(P,)``, the model's dtype."""
        if self._gradient is None:
            self._gradient = self.shards.synchronized(lambda: self.vjp(self.residual))
        return self._gradient

    def jvp(self, direction: Direction) -> Tensor:
        """T = J d, the first-order change of the outputs along d.

        Args:
            direction: a vector of length P, or a dict with a tensor for every trainable
                parameter.

        Returns:
            float64, shape ``(N, *positions, C)``.

        Raises:
            InputError: the direction does not fit the parameters or is not finite.
        """
        vector = self.as_vector(direction)
        if not vector.is_floating_point():
            vector = vector.to(torch.float64)
        # At unit size in the model's dtype, so that 1/λ neither overflows nor loses digits.
        scale = largest(vector)
        if scale == 0:
            return torch.zeros_like(self.outputs)
        tangent = self.function.unflatten(vector / scale)

        def local() -> Tensor:
            with model_errors():
                parts = [part.jvp(tangent).to(torch.float64) for _, part in self._parts()]
            return parts[0] if len(parts) == 1 else torch.cat([self.outputs[:0], *parts])

        return self.shards.concatenate(local) * scale

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀw, the update of a cotangent field w: shape ``(P,)``, the model's dtype.

        Args:
            cotangent: w of the outputs' shape.

        Raises:
            InputError: w has a different shape.
        """
        if cotangent.shape != self.outputs.shape:
            raise InputError(
                f"the cotangent has shape {tuple(cotangent.shape)}, the outputs have "
                f"{tuple(self.outputs.shape)}"
            )
        scale = cotangent.abs().max()
        if scale == 0:
            return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)

        def local() -> Tensor:
            total: Tensor | None = None
            with model_errors():
                for samples, part in self._parts():
                    term = part.flatten(part.vjp(cotangent[samples] / scale))
                    total = term if total is None else total.add_(term)
            if total is None:  # a rank without samples
                return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
            return total

        return self.shards.sum(local).mul_(scale.to(self.dtype))

    def _parts(self) -> Iterator[tuple[slice, ModelFunction]]:
        """This rank's samples in as few parts as the memory budget has room for a pass over."""
        # Activations, and gradients or tangents of the same size beside them.
        limit = max(1, self.rows.memory // max(1, 3 * self.rows.sample_bytes))
        local = self.shards.local_slice(self.num_samples)
        if self.shards.alone and limit >= self.num_samples:
            yield local, self.function
            return
        for start in range(local.start, local.stop, limit):
            samples = slice(start, min(start + limit, local.stop))
            yield samples, self.function.on(samples)

    def as_vector(self, direction: Direction) -> Tensor:
        """Check a direction and flatten it to length P.

        Raises:
            InputError: wrong length or shape, missing or unknown names, values not finite.
        """
        return vector_of(direction, self.function).to(self.device)
