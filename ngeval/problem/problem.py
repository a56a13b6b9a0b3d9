"""`Problem`: a model at θ, a batch and a likelihood; J and its transpose as products.

Everything is sum-reduced: the loss is L = Σ_n ℓ_n and its gradient g = Σ_n J_nᵀu_n.
Logit-space quantities (outputs, residuals, tangents) are float64; vectors in parameter space
have the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ngeval.errors import InputError
from ngeval.jacobians import OnePass, RowSource, choose_engine
from ngeval.likelihoods import Likelihood, get_likelihood
from ngeval.model.checks import Inputs
from ngeval.model.directions import Direction, largest, vector_of
from ngeval.model.fsdp import split_parameters
from ngeval.model.function import ModelFunction, Output, model_errors, unwrapped
from ngeval.model.operations import OperationWatch
from ngeval.model.sharding import Shards, shards_of
from ngeval.problem.next_batch import Chain, batch_key, following
from ngeval.problem.probes import (
    check_gradients_add_up,
    check_outputs,
    check_repeatable,
    check_same_problem,
    run_model,
)
from ngeval.utils.memory import free_memory

if TYPE_CHECKING:
    from ngeval.problem.fisher import FisherOperator

T = TypeVar("T")


class Problem:
    """A model at its present θ on one batch: what γ, the Fisher and every update are made of.

    The model is only read. Trainable parameters (``requires_grad``) are θ, in the order of
    ``model.named_parameters()``; all others are constants. If θ is changed in place later, the
    problem notices and raises; make a new one.

    Attributes:
        likelihood: the likelihood object.
        distribution: p(·|z) at this batch's logits (see `ngeval.likelihoods`).
        outputs: z in float64, shape ``(N, *positions, C)``.
        residual: u = ∇_z ℓ in float64, the outputs' shape.
        loss: ℓ_n = −log p(y_n|z_n) in float64, shape ``(N,)``.
        rows: the source of per-sample Jacobian rows.

    Example:
        >>> import torch, ngeval
        >>> model = torch.nn.Linear(3, 2).double()
        >>> problem = ngeval.Problem(
        ...     model, torch.eye(3).double(), torch.tensor([0, 1, 1]), "categorical"
        ... )
        >>> problem.num_samples, problem.num_outputs, problem.num_parameters
        (3, 2, 8)
        >>> bool(problem.gamma(problem.gradient()) > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        targets: Tensor,
        likelihood: str | Likelihood,
        *,
        output: Output = None,
        dtype: torch.dtype | None = None,
        engine: str = "auto",
        memory: int | None = None,
        probes: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        """Run the model and check that it can be graded.

        Args:
            model: an ``nn.Module`` in eval mode that returns a tensor of outputs, or an object
                with ``.logits``.
            inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments) of
                tensors, all batch first.
            targets: labels; shape and dtype as the likelihood asks.
            likelihood: a name (``"categorical"``, ``"gaussian:0.5"``, ``"bernoulli"``) or a
                `Likelihood`.
            output: which of the model's outputs is z, if it returns several: a key or attribute
                (``"logits"``), an index, or a function of what the model returns.
            dtype: run the model in this dtype instead of its own, e.g. ``torch.float64``.
            engine: ``"layers"`` (layer by layer), ``"vmap"`` (of the whole model), ``"loop"``, or
                ``"auto"``: the first of these that is found right for the model.
            memory: bytes to work in besides the model and one forward and backward pass; default:
                four fifths of what is free. Chunks are cut to it.
            probes: check that two forward passes agree, that a sample's outputs do not depend on
                the others in the batch, and that Σ_n g_n is the batch gradient.
            group: a ``torch.distributed`` process group over which the samples are spread. Every
                rank makes the same Problem, of the whole batch, and asks for the same things in
                the same order; each passes its own part of the samples through the model, and all
                get the same results. ``memory`` is then that of each rank.

        Raises:
            ModelError: train mode, NaN weights, nothing trainable, random outputs.
            InputError: inputs or targets do not fit, or differ between the ranks of the group.
            EngineError: samples see each other, or per-sample gradients do not add up to the
                batch gradient.
        """
        shards = shards_of(group)
        with torch.inference_mode(False):  # tensors made here take part in backward passes
            shards.synchronized(
                lambda: self._set_up(
                    *(model, inputs, targets, likelihood, output, dtype, engine, memory, probes),
                    shards,
                )
            )

    def _set_up(
        self,
        model: nn.Module,
        inputs: Inputs,
        targets: Tensor,
        likelihood: str | Likelihood,
        output: Output,
        dtype: torch.dtype | None,
        engine: str,
        memory: int | None,
        probes: bool,
        shards: Shards,
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
        model = unwrapped(model)
        split = split_parameters(model, shards)
        if split and dtype is not None:
            raise InputError("dtype= is not for models in parts: convert before fully_shard")
        self.function = ModelFunction.of(model, inputs, dtype, output, shards, split)
        self.likelihood = get_likelihood(likelihood)
        check_same_problem(self.function, targets, (self.likelihood.name, engine, dtype, probes))
        with OperationWatch() as watch:
            raw = run_model(self.function)
        self._attention = any(shards.gather(int(watch.attention)))
        self.function = replace(self.function, inner_epsilon=max(shards.gather(watch.epsilon)))
        self._bind(raw, targets)
        if probes:
            check_repeatable(self.function, raw)
        if memory is None:
            memory = free_memory(self.function.device)
        if not isinstance(memory, int) or memory <= 0:
            raise InputError(
                f"memory must be a positive whole number of bytes (2**30 for 1 GiB), not {memory!r}"
            )
        memory = min(shards.gather(memory))  # it decides what is computed
        choice = choose_engine(self.function, engine, memory, raw, self.residual, check=probes)
        self._take(choice.rows)
        self._chain = Chain(engine, probes, {batch_key(self.function): self.rows})
        if probes:
            check_gradients_add_up(choice, self.function.unflatten(self.gradient()))

    def _bind(self, raw: Tensor, targets: Tensor) -> None:
        """Take the model's outputs, and the likelihood at these."""
        check_outputs(self.function, raw)
        self.outputs = raw.detach().to(torch.float64)
        self.distribution = self.likelihood.bind(self.outputs, targets)
        self.residual = self.distribution.residual()
        self.loss = self.distribution.loss()

    def _take(self, rows: RowSource) -> None:
        """Use a source of rows; nothing is remembered yet."""
        self.rows = rows
        self.rows.blocks(self.residual.unsqueeze(1))  # a budget below a row is an error now
        self.function = self.rows.function
        self._memory: dict[str, Any] = {}
        self._pass: OnePass | None = None
        self._inherited = False  # a plan of another batch

    def with_batch(self, inputs: Inputs, targets: Tensor) -> Problem:
        """A problem of the same model, at the weights that it has now, on another batch.

        Likelihood, ``output=``, ``dtype=``, ``engine=`` and ``memory=`` are those of this problem,
        and so is all that was found out about the model. Only where a single sample has another
        shape or dtype (a longer sequence), or there is one sample where there were more (or more
        where there was one), are the engine and its plan chosen anew, once for each such shape;
        all problems of a chain share what was found.

        The probes are run again on the 2nd, 4th, 8th, 16th, … batch of a shape, and the plan is
        chosen anew if they fail; their part in the cost of a step goes to nothing. A model whose
        wiring depends on the samples' values (sorted by length, routed) is thus found out where
        such a batch shows it; between these batches a plan that went wrong is not noticed.

        Args:
            inputs: as for `Problem`; any number of samples.
            targets: their labels.

        Raises:
            ModelError: train mode, NaN weights; a parameter was replaced by another tensor, or
                its ``requires_grad`` was changed.
            InputError: inputs or targets do not fit.
            EngineError: samples see each other, or no engine treats the model on this batch.

        Example:
            >>> import torch, ngeval
            >>> model = torch.nn.Linear(2, 3)
            >>> first = ngeval.Problem(model, torch.eye(2), torch.tensor([0, 2]), "categorical")
            >>> next_one = first.with_batch(torch.ones(5, 2), torch.tensor([0, 1, 2, 1, 0]))
            >>> next_one.num_samples, next_one.engine
            (5, 'layers')
        """
        with torch.inference_mode(False):
            return self.shards.synchronized(lambda: following(self, inputs, targets))

    def one_pass(self) -> OnePass | None:
        """A recorded forward pass of the batch, for whoever takes rows and an update from it.

        That of `with_batch`, which is handed out once, or a new one; None where the engine has
        none, or where its captures do not fit in their part of the memory budget.
        """
        self.function.check_unchanged()
        recorded, self._pass = self._pass, None
        if recorded is None and OnePass.fits(self.rows, self.num_samples):
            with torch.inference_mode(False):
                recorded = OnePass(self.rows)
        return recorded

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
    def notes(self) -> list[str]:
        """What had to be worked around in this model, for a reader of its numbers."""
        found = sorted(self.function.notes)
        if self._attention:
            found.append("fused attention is replaced by its definition for tangents")
        inner = self.function.inner_epsilon
        if inner > torch.finfo(self.function.dtype).eps:
            found.append(f"the model's own code rounds to {inner:.1e}, coarser than its weights")
        if self.function.dtype.itemsize < 4:
            found.append("directions that rows of this dtype span only to rounding are left out")
        if not self.function.forward_mode:
            found.append("tangents by two backward passes (forward mode is missing or differs)")
        if self.rows.plan is not None and self.rows.plan.looped:
            names = ", ".join(self.rows.plan.looped[:3])
            found.append(f"per-sample gradients of {names} by a loop over samples")
        return found

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
        return self.remember("gradient", lambda: self.vjp(self.residual))

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

        def pushed() -> Tensor:
            with model_errors():
                parts = [part.jvp(tangent).to(torch.float64) for _, part in self._parts()]
            return parts[0] if len(parts) == 1 else torch.cat([self.outputs[:0], *parts])

        return self.shards.concatenate(pushed) * scale

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀw, the update that a cotangent field w stands for: shape ``(P,)``, model's dtype.

        Args:
            cotangent: w of the outputs' shape.
        """
        if cotangent.shape != self.outputs.shape:
            raise InputError(
                f"the cotangent has shape {tuple(cotangent.shape)}, the outputs have "
                f"{tuple(self.outputs.shape)}"
            )
        scale = cotangent.abs().max()
        if scale == 0:
            return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)

        def pulled() -> Tensor:
            total: Tensor | None = None
            with model_errors():
                for samples, part in self._parts():
                    found = part.flatten(part.vjp(cotangent[samples] / scale))
                    total = found if total is None else total.add_(found)
            if total is None:
                return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
            return total

        return self.shards.sum(pulled).mul_(scale.to(self.dtype))

    def _parts(self) -> Iterator[tuple[slice, ModelFunction]]:
        """This rank's samples in as few parts as the memory budget has room for a pass over."""
        # Activations, and gradients or tangents of the same size beside them.
        limit = max(1, self.rows.memory // max(1, 3 * self.rows.sample_bytes))
        own = self.shards.local_slice(self.num_samples)
        if self.shards.alone and limit >= self.num_samples:
            yield own, self.function
            return
        for start in range(own.start, own.stop, limit):
            samples = slice(start, min(start + limit, own.stop))
            yield samples, self.function.on(samples)

    def fisher(self) -> FisherOperator:
        """The exact Fisher F = Σ_n J_nᵀH_nJ_n as a linear operator."""
        # Imported here: `fisher` is built on `Problem`, this is only its front door.
        from ngeval.problem.fisher import FisherOperator  # noqa: PLC0415

        return FisherOperator(self)

    def gamma(self, direction: Direction) -> float:
        """γ(d) = √(dᵀFd) / |dᵀg| of any update; see `ngeval.gamma`."""
        # Imported here: `metrics` is built on `Problem`, this is only its front door.
        from ngeval.problem.gamma import gamma  # noqa: PLC0415

        return gamma(self, direction)

    def as_vector(self, direction: Direction) -> Tensor:
        """Check a direction and flatten it to length P.

        Raises:
            InputError: wrong length or shape, missing or unknown names, values not finite.
        """
        return vector_of(direction, self.function).to(self.device)

    def remember(self, key: str, compute: Callable[[], T]) -> T:
        """Compute something derived from this problem once (the kernel, a factorisation)."""
        if key not in self._memory:
            # By all ranks or by none, so that they go on in step.
            self._memory[key] = self.shards.synchronized(compute)
        result: T = self._memory[key]
        return result

    def recall(self, key: str) -> Any:
        """What was remembered under a key, or None."""
        return self._memory.get(key)

    def forget(self) -> None:
        """Let go of what was remembered, which holds this problem in turn and would outlive it."""
        self._memory.clear()
