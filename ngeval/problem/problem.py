"""`Problem`: a model at θ, a batch and a likelihood; the way in to everything ngeval computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ngeval.errors import EngineError, InputError, ModelError
from ngeval.likelihoods import Likelihood, Loss, Weighted, get_likelihood
from ngeval.likelihoods.weighted import weighted
from ngeval.model.directions import Direction
from ngeval.model.fsdp import split_parameters
from ngeval.model.function import ModelFunction, unwrapped
from ngeval.model.inputs import Inputs, Ragged
from ngeval.model.operations import OperationWatch
from ngeval.model.outputs import Output, reading_of
from ngeval.model.precision import AUTO, MODEL, candidate_dtypes, names_dtype
from ngeval.model.renewed import at_present
from ngeval.model.sharding import shards_of
from ngeval.problem.fisher import FisherOperator
from ngeval.problem.gamma import gamma
from ngeval.problem.linearized import Linearized
from ngeval.problem.mistakes import check_meaning
from ngeval.problem.next_batch import Chain, by_known_plan
from ngeval.problem.probes import (
    check_outputs,
    check_repeatable,
    check_same_problem,
    check_split,
    run_first,
    run_model,
)
from ngeval.utils.memory import free_memory


class Problem(Linearized):
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
        targets: Any,
        likelihood: Loss,
        *,
        weights: Tensor | None = None,
        split: Callable[[Any, int], Any] | None = None,
        output: Output = None,
        dtype: torch.dtype | str = AUTO,
        engine: str = "auto",
        memory: int | None = None,
        probes: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        """Run the model and check that it can be graded.

        Args:
            model: an ``nn.Module`` in eval mode that returns a tensor of outputs, or an object
                with ``.logits``.
            inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword
                arguments, or the model's one argument where ``forward`` does not take its keys).
                Their tensors are batch first; None, booleans, numbers and text are the same for
                all samples.
            targets: labels; their shape and dtype depend on the likelihood.
            likelihood: a name (``"categorical"``, ``"gaussian:0.5"``, ``"bernoulli"``, …), a loss
                of torch (``nn.CrossEntropyLoss(label_smoothing=0.1)``), a dict from the model's
                outputs to such losses, which are summed (targets are then a dict with the same
                keys), or a `Likelihood`.
            weights: a number ≥ 0 for each sample, by which its loss, its residual and its H are
                multiplied.
            split: for batches that cannot be indexed by sample: ``split(inputs, n)`` gives the
                inputs of sample n alone, a batch of one. ``inputs`` may then be any object. Every
                pass through the model is one for each sample, and so is each backward pass, by the
                engine ``"loop"``.
            output: which of the model's outputs is z, if it returns several: a key or attribute
                (``"logits"``), an index, or a differentiable function of what the model returns,
                such as ``torch.log`` for a model that ends in a softmax.
            dtype: what the model is graded in. ``"auto"``: float64 where six copies of its
                parameters fit in ``memory`` and the device computes in float64 at half the rate of
                float32, and where the model's code accepts it; else its own types, with half
                precision as float32. ``"model"``: its own types. Or a ``torch.dtype``.
            engine: ``"layers"`` (layer by layer), ``"vmap"`` (of the whole model), ``"loop"``, or
                ``"auto"``: the first of these that passes its check on the model.
            memory: bytes to work in besides the model and one forward and backward pass; default:
                four fifths of what is free. Work is split into chunks that fit.
            probes: check that two forward passes agree, that a sample's outputs do not depend on
                the others in the batch, and that Σ_n g_n is the batch gradient.
            group: a ``torch.distributed`` process group over which the samples are spread. Every
                rank makes the same Problem, of the whole batch, and calls the same functions in
                the same order; each passes its own part of the samples through the model, and all
                get the same results. ``memory`` is then that of each rank.

        Raises:
            ModelError: train mode, NaN weights, nothing trainable, random outputs.
            InputError: inputs or targets do not fit, or differ between the ranks of the group.
            EngineError: samples see each other, or per-sample gradients do not add up to the
                batch gradient.
        """
        shards = shards_of(group)

        def set_up() -> None:
            plain = unwrapped(model)
            budget = free_memory(_device_of(plain)) if memory is None else memory
            _check_memory(budget)
            resolved, labels = get_likelihood(likelihood), targets
            if weights is not None:
                resolved, labels = weighted(resolved, labels, weights)
            batch, chosen = inputs, engine
            if split is not None:
                batch, chosen = Ragged.of(inputs, split, labels), _loop_engine(engine)
            parts = split_parameters(plain, shards)
            candidates = candidate_dtypes(plain, MODEL if parts else dtype, budget)
            if parts and dtype not in (AUTO, MODEL):
                raise InputError("dtype= is not for models in parts: convert before fully_shard")
            for candidate in candidates:
                try:
                    reading = reading_of(resolved, output, labels)
                    function = ModelFunction.of(plain, batch, candidate, reading, shards, parts)
                    chain = Chain(chosen, probes)
                    self._set_up(function, labels, resolved, chain, budget)
                except (ModelError, EngineError) as error:
                    if candidate is candidates[-1] or not names_dtype(error):
                        raise
                else:
                    return

        with torch.inference_mode(False):  # tensors made here take part in backward passes
            shards.synchronized(set_up)

    def _set_up(
        self,
        function: ModelFunction,
        targets: Any,
        likelihood: Likelihood,
        chain: Chain,
        memory: int,
    ) -> None:
        shards = function.shards
        options = (likelihood.name, chain.engine, function.cast, chain.probes)
        check_same_problem(function, targets, options)
        with OperationWatch() as watch:
            function, raw = run_first(function)
        self._fused_attention = any(shards.gather(int(watch.attention)))
        function = replace(function, inner_epsilon=max(shards.gather(watch.epsilon)))
        super().__init__(function, likelihood, raw, targets)
        if chain.probes:
            check_split(function, raw)
            check_meaning(function, likelihood, raw)
            check_repeatable(function, raw)
        self._chain = chain
        self._inherited = False
        chain.choose(self, min(shards.gather(memory)), raw)  # the memory decides what is computed

    def with_batch(self, inputs: Inputs, targets: Any, weights: Tensor | None = None) -> Problem:
        """A problem of the same model, at the weights that it has now, on a different batch.

        Likelihood, ``output=``, ``dtype=``, ``engine=`` and ``memory=`` are those of this problem,
        and so is all that was learned about the model. Only where a single sample has a different
        shape or dtype (a longer sequence), or there is one sample where there were more (or more
        where there was one), are the engine and its plan chosen again, once for each such shape;
        all problems of a chain share them.

        The probes are run again on the 2nd, 4th, 8th, 16th, … batch of a shape, and the plan is
        made again if they fail; their share of the cost of a step vanishes. A model whose wiring
        depends on the samples' values (sorted by length, routed) is thus noticed where such a
        batch shows it; between these batches a plan that went wrong is not noticed.

        Args:
            inputs: as for `Problem`; any number of samples.
            targets: their labels.
            weights: of the samples, if those of this problem have weights.

        Raises:
            ModelError: train mode, NaN weights; a parameter was replaced by a different tensor, or
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
        if isinstance(self.likelihood, Weighted) != (weights is not None):
            raise InputError("give weights= for all batches of a problem, or for none")
        if weights is not None:
            targets = weighted(self.likelihood, targets, weights)[1]
        with torch.inference_mode(False):
            return self.shards.synchronized(lambda: self._with_batch(inputs, targets))

    def _with_batch(self, inputs: Inputs, targets: Any) -> Problem:
        if (ragged := self.function.ragged) is not None:
            inputs = Ragged.of(inputs, ragged.split, targets)
        function = at_present(self.function, inputs)
        check_same_problem(function, targets)
        planned = by_known_plan(self._chain, self, function, targets)
        problem = Problem.__new__(Problem)
        if planned is None:
            problem._set_up(function, targets, self.likelihood, self._chain, self.rows.memory)
            return problem
        rows, raw, recorded = planned
        Linearized.__init__(problem, rows.function, self.likelihood, raw, targets)
        problem.use_rows(rows)
        problem._fused_attention, problem._chain = self._fused_attention, self._chain
        problem._inherited = True
        self._chain.record(problem, recorded)
        return problem

    def choose_engine_again(self) -> bool:
        """Choose the engine on this problem's own batch, where its plan is of an earlier batch.

        For what only shows when rows are made: a model that is routed by its data may not have the
        tensors that the plan names. Later batches of the kind have the new plan.

        Returns:
            Whether there was anything to choose: False if the plan was made on this very batch.

        Raises:
            ModelError: the weights have changed since the problem was made.
            EngineError: no engine treats the model on this batch.
        """
        self.function.check_unchanged()
        if not self._inherited:
            return False
        with torch.inference_mode(False):
            raw = run_model(self.function)
            check_outputs(self.function, raw)
            self._inherited, self.recorded = False, None
            self._chain.choose(self, self.rows.memory, raw)
        return True

    @property
    def notes(self) -> list[str]:
        """What had to be worked around in this model, for a reader of its numbers."""
        notes = sorted(self.function.notes)
        if self._fused_attention:
            notes.append("fused attention is replaced by its definition for tangents")
        inner = self.function.inner_epsilon
        if inner > torch.finfo(self.function.dtype).eps:
            notes.append(f"the model's own code rounds to {inner:.1e}, coarser than its weights")
        if not self.function.forward_mode:
            notes.append("tangents by two backward passes (forward mode is missing or differs)")
        if self.rows.plan is not None and self.rows.plan.looped:
            names = ", ".join(self.rows.plan.looped[:3])
            notes.append(f"per-sample gradients of {names} by a loop over samples")
        return notes

    def fisher(self) -> FisherOperator:
        """The exact Fisher F = Σ_n J_nᵀH_nJ_n as a linear operator."""
        return FisherOperator(self)

    def gamma(self, direction: Direction) -> float:
        """γ(d) = √(dᵀFd) / |dᵀg| of any update; see `ngeval.gamma`."""
        return gamma(self, direction)


def _device_of(model: nn.Module) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device for p in parameters), torch.device("cpu"))


def _loop_engine(engine: str) -> str:
    if engine not in ("auto", "loop"):
        raise InputError(f"samples of split= are passed one by one: engine='loop', not {engine!r}")
    return "loop"


def _check_memory(memory: int) -> None:
    if not isinstance(memory, int) or memory <= 0:
        raise InputError(
            f"memory must be a positive whole number of bytes (2**30 for 1 GiB), not {memory!r}"
        )
