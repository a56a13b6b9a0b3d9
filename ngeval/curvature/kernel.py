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

from ngeval.curvature.logit_kernel import DenseKernel, GramKernel, LogitKernel, choose_form
from ngeval.curvature.spectrum import Spectrum
from ngeval.problem.fisher import factor_columns
from ngeval.problem.problem import Problem

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
        >>> kernel.theta.matrix.shape
        torch.Size([6, 6])
        >>> state = ngeval.get_method("ief").prepare(problem, kernel)
        >>> state.direction(0.1).shape
        torch.Size([8])
    """

    def __init__(self, problem: Problem, *, exact: bool = True, pushes: int | None = None) -> None:
        self.problem = problem
        self.exact = exact
        self.pushes = pushes
        self._results: dict[Hashable, Any] = {}

    @cached_property
    def form(self) -> type[LogitKernel]:
        """The form that Θ is kept in.

        Raises:
            EngineError: not even the Gram matrix of the batch fits in the memory budget.
        """
        problem = self.problem
        return choose_form(problem.sizes, problem.rows.memory, exact=self.exact, pushes=self.pushes)

    @cached_property
    def theta(self) -> LogitKernel:
        """Θ in its form."""
        return self.problem.shards.synchronized(lambda: self.form(self.problem))

    @cached_property
    def dense(self) -> DenseKernel:
        """All of Θ, which the exact natural gradient needs even where `form` keeps less."""
        if isinstance(self.theta, DenseKernel):
            return self.theta
        return self.problem.shards.synchronized(lambda: GramKernel(self.problem))

    @property
    def cheapest(self) -> LogitKernel:
        """All of Θ if it is in memory, since its products need no pass through the model."""
        return self.dense if "dense" in self.__dict__ else self.theta

    @cached_property
    def residual_vectors(self) -> Tensor:
        """The residuals u as vectors ``(N, 1, *positions, C)``, as one tensor, known to Θ."""
        return self.problem.residual.unsqueeze(1)

    @cached_property
    def gradient_spectrum(self) -> Spectrum:
        """The spectrum of K_nm = g_n·g_m = u_nᵀΘ_nm u_m."""
        ones = torch.ones_like(self.problem.loss)
        return self.problem.shards.synchronized(
            lambda: self.theta.spectrum(self.residual_vectors, ones)
        )

    @cached_property
    def fisher_spectrum(self) -> Spectrum:
        """The spectrum of SᵀΘS, whose eigenvalues are those of F.

        dᵀFd and dᵀg of the natural gradient, and γ_min, are sums of squares of r's coefficients,
        so that a lost part of 10⁻⁴ changes them by 10⁻⁸.
        """
        problem = self.problem

        def compute() -> Spectrum:
            right = problem.distribution.whitened_residual().flatten()
            return self.dense.spectrum(factor_columns(problem), right, 1e-4)

        return problem.shards.synchronized(compute)

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
        if key not in self._results:
            self._results[key] = self.problem.shards.synchronized(
                lambda: compute(self.problem, *args, **kwargs)
            )
        result: T = self._results[key]
        return result
