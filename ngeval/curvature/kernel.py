"""The kernel of a problem: Θ in one form, and all that methods share, computed at most once.

`ngeval.evaluate`, `ngeval.layer_table`, `ngeval.gamma_min` and the optimizers make a `Kernel` and
pass it to methods and to grading. Everything is computed at its first use, so that a kernel that
does not fit in memory fails only the methods that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ngeval.curvature.row_space import (
    GramSpace,
    JacobianSpace,
    LogitSpace,
    Products,
    RowSpace,
    SpanSpace,
    choose_form,
    dense_bytes,
    dense_is_feasible,
)
from ngeval.curvature.row_svd import RowSvd, row_lengths
from ngeval.errors import EngineError
from ngeval.problem.fisher import factor_columns
from ngeval.problem.linearized import Linearized
from ngeval.problem.problem import Problem
from ngeval.utils.text import describe_bytes

P = ParamSpec("P")
T = TypeVar("T")


class Kernel:
    """What the methods share on one problem.

    Ranks over which the samples are spread compute each part together, or all fail together.

    Args:
        problem: the model on its batch.
        exact: with all of Θ, for the exact natural gradient, if it is within reach.
        pushes: how many updates will be graded, if that is known; see `choose_form`.

    Example:
        >>> import torch, ngeval
        >>> model, inputs = torch.nn.Linear(3, 2).double(), torch.eye(3).double()
        >>> problem = ngeval.Problem(model, inputs, torch.tensor([0, 1, 1]), "categorical")
        >>> kernel = ngeval.Kernel(problem)
        >>> kernel.logits.theta.shape
        torch.Size([6, 6])
        >>> state = ngeval.get_method("ief").prepare(problem, kernel)
        >>> state.direction(0.1).shape
        torch.Size([8])
    """

    def __init__(self, problem: Problem, *, exact: bool = True, pushes: int | None = None) -> None:
        self.problem = problem
        self.exact = exact
        self.pushes = pushes
        self.noise, self.seed = 0.0, 0
        self.base: Kernel | None = None
        self._results: dict[Hashable, Any] = {}
        self._spans: list[SpanSpace] = []

    @cached_property
    def form(self) -> type[LogitSpace] | type[Products]:
        """What is kept of Θ.

        Raises:
            EngineError: not even the Gram matrix of the batch fits in the memory budget.
        """
        problem = self.problem
        return choose_form(problem.sizes, problem.rows.memory, exact=self.exact, pushes=self.pushes)

    @property
    def is_dense(self) -> bool:
        """Whether updates are computed in the span of all rows of J."""
        if "logits" in self.__dict__:
            return True
        try:
            return issubclass(self.form, LogitSpace)
        except EngineError:
            return False

    @cached_property
    def logits(self) -> LogitSpace:
        """The span of all rows of J, which the exact natural gradient needs.

        Raises:
            EngineError: Θ is out of reach.
        """
        problem = self.problem
        form = self.form if issubclass(self.form, JacobianSpace) else GramSpace
        if form is GramSpace and not dense_is_feasible(problem.sizes, problem.rows.memory):
            size = problem.num_samples * problem.num_outputs
            raise EngineError(
                f"the logit kernel of {size} outputs is out of reach: it takes "
                f"{describe_bytes(dense_bytes(problem.sizes))}; use fewer samples"
            )
        return problem.shards.synchronized(lambda: form(problem))

    @cached_property
    def _products(self) -> Products:
        form: Any = self.form
        products: Products = self.problem.shards.synchronized(lambda: form(self.problem))
        return products

    def space(self, vectors: Tensor) -> RowSpace:
        """A space that has the rows J_nᵀv_nq: that of all rows of J if it is kept.

        Args:
            vectors: v, shape ``(N, Q, *positions, C)``.
        """
        if self.is_dense:
            return self.logits
        for span in self._spans:
            if span.columns(vectors) is not None:
                return span
        span = self.problem.shards.synchronized(lambda: SpanSpace(self._products, vectors))
        self._spans.append(span)
        return span

    def use_span(self, span: SpanSpace) -> None:
        """Compute updates in this span alone, whatever form Θ would have."""
        self.__dict__["form"] = type(span.products)
        self._spans = [span]

    @cached_property
    def residual_vectors(self) -> Tensor:
        """The residuals u as vectors ``(N, 1, *positions, C)``, as one tensor."""
        return self.problem.residual.unsqueeze(1)

    @cached_property
    def gradients(self) -> RowSvd:
        """The per-sample gradients g_n = J_nᵀu_n in the coordinates of `space`, factored."""
        space, vectors = self.space(self.residual_vectors), self.residual_vectors
        return self.factor("gradients", space.rows(vectors), space.lengths(vectors))

    @cached_property
    def fisher_rows(self) -> RowSvd:
        """The rows SᵀJ of the Fisher F = (SᵀJ)ᵀ(SᵀJ) in the coordinates of `logits`, factored."""
        return self.factor("fisher", *fisher_rows(self.problem, self.logits.lower))

    def factor(self, key: Hashable, rows: Tensor, lengths: Tensor | None = None) -> RowSvd:
        """Factor rows.

        A perturbed kernel does not factor them again: what was factored by this key moves there.

        Args:
            key: names the rows.
            rows: in the coordinates of a space, shape ``(n, r)``.
            lengths: of the terms that each row is the sum of, shape ``(n,)``.
        """
        key = "factor", key
        if self.base is not None and key in self.base._results:
            base: RowSvd = self.base._results[key]
            return base.moved(rows)
        return self.memo(key, lambda: RowSvd.of(rows, lengths))

    def perturbed(self, noise: float, seed: int) -> Kernel:
        """The kernel of the same problem with everything changed at its rounding.

        Rows change relative to their lengths, logits relative to their sizes. What the methods
        and their grades then change by is an estimate of their errors.

        Args:
            noise: relative.
            seed: of the noise.
        """
        generator = torch.Generator().manual_seed(seed)
        problem = self.problem.with_noise(noise, generator) if self.is_dense else self.problem
        other = Kernel(problem, exact=self.exact)
        other.noise, other.seed, other.base = noise, seed, self
        other.__dict__["form"] = self.form
        if self.is_dense:
            other.__dict__["logits"] = self.logits.perturbed(noise, generator)
        else:  # the spans are those of the residuals as they are
            other._spans = [span.perturbed(noise, generator) for span in self._spans]
        return other

    def once(
        self, compute: Callable[Concatenate[Problem, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The result of ``compute(problem, …)``, computed at the first call with these arguments.

        The result must not refer to this kernel, so that its memory is free as soon as the kernel
        is dropped.

        Args:
            compute: a function or class, which is the key together with its arguments.
            args: hashable arguments besides the problem.
            kwargs: the same by name.
        """
        key = (compute, args, tuple(sorted(kwargs.items())))
        problem = self.problem
        return self.memo(
            key, lambda: problem.shards.synchronized(lambda: compute(problem, *args, **kwargs))
        )

    def memo(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of the first call with this key; it must not refer to this kernel."""
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result


def fisher_rows(problem: Linearized, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """SᵀJ for a matrix J of N·C rows, and the lengths of its terms, |S|ᵀ times those of J."""
    columns = jacobian.T.reshape(-1, *problem.outputs.shape)
    rows = problem.distribution.factor_transpose_product(columns).flatten(1).T.contiguous()
    norms = row_lengths(jacobian).reshape(problem.num_samples, -1, 1)
    lengths = torch.bmm(factor_columns(problem).flatten(2).abs(), norms).flatten()
    return rows, lengths
