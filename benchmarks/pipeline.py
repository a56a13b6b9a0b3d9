"""The straightforward pipeline that ngeval is compared with, and the check that both agree.

What a careful person writes from the formulae with `torch.func`: at each damping, per-sample
gradients of the whole model by ``vmap(grad)``, their Gram matrix, a solve, the direction, its
Jacobian product by two reverse passes, γ. Nothing here uses ngeval's engine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import ngeval
from benchmarks.models import Workload, sum_loss

METHODS = ("sgd", "ef", "sf", "ief")
CHECK_DAMPINGS = (1e-2, 1.0, 1e2)
TOLERANCE = 1e-6


class DisagreementError(Exception):
    """Ours and the pipeline's numbers differ, so that their times are not comparable."""


class Pipeline:
    """γ of sgd, ef, sf and ief, one damping at a time."""

    def __init__(self, workload: Workload, sampled: Tensor) -> None:
        """Split the model's parameters; ``sampled`` are sf's labels."""
        self.model, self.arguments = workload.model, workload.arguments
        self.targets, self.sampled = workload.targets, sampled
        named = dict(workload.model.named_parameters())
        self.parameters = {n: p.detach() for n, p in named.items() if p.requires_grad}
        self.constants = {n: p.detach() for n, p in named.items() if not p.requires_grad}
        self.constants |= dict(workload.model.named_buffers())

    def gammas(self, damping: float) -> dict[str, float]:
        """γ of every method at one damping, from scratch."""
        # vmap and double backward have no rules for fused attention.
        with sdpa_kernel(SDPBackend.MATH):
            logits = self._outputs(self.parameters, self.arguments).double()
            probabilities = logits.softmax(-1)
            residual = probabilities - torch.nn.functional.one_hot(self.targets, logits.shape[-1])
            gammas = {}
            for name, direction in self._directions(damping, residual).items():
                tangent = self.jacobian_product(direction)
                mean = (probabilities * tangent).sum(-1, keepdim=True)
                curvature = (probabilities * (tangent - mean).square()).sum()
                gammas[name] = float(curvature.sqrt() / (residual * tangent).sum().abs())
        return gammas

    def _directions(self, damping: float, residual: Tensor) -> dict[str, Tensor]:
        data = self.sample_gradients(self.targets)
        gradient = data.sum(0)
        gram = damped(data @ data.T, damping)
        sizes = residual.flatten(1).square().sum(1)
        drawn = self.sample_gradients(self.sampled)
        inner = torch.linalg.solve(damped(drawn @ drawn.T, damping), drawn @ gradient)
        return {
            "sgd": gradient,
            "ef": torch.linalg.solve(gram, torch.ones_like(sizes)) @ data,
            "sf": (gradient - inner @ drawn) / damping,
            "ief": torch.linalg.solve(gram, sizes) @ data,
        }

    def sample_gradients(self, labels: Tensor) -> Tensor:
        """The rows g_n, in float64."""

        def loss(
            parameters: dict[str, Tensor], sample: tuple[Tensor, ...], label: Tensor
        ) -> Tensor:
            batch = tuple(t.unsqueeze(0) for t in sample)
            return sum_loss(self._outputs(parameters, batch), label)

        with sdpa_kernel(SDPBackend.MATH):
            rows = vmap(grad(loss), (None, 0, 0))(self.parameters, self.arguments, labels)
        return torch.cat([rows[name].flatten(1) for name in self.parameters], 1).double()

    def jacobian_product(self, direction: Tensor) -> Tensor:
        """J d in float64: the derivative of w ↦ Jᵀw along d, at unit size in the model's dtype."""
        scale = direction.abs().max()
        parts = (direction / scale).split([p.numel() for p in self.parameters.values()])
        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        along = [v.to(p).reshape(p.shape) for v, p in zip(parts, leaves.values(), strict=True)]
        outputs = self._outputs(leaves, self.arguments)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, list(leaves.values()), dummy, create_graph=True)
        return torch.autograd.grad(pulled, dummy, along)[0].double() * scale

    def _outputs(self, parameters: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
        return functional_call(self.model, {**parameters, **self.constants}, arguments)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def sampled_labels(problem: ngeval.Problem) -> Tensor:
    """The labels that ngeval's ``sf`` draws with seed 0."""
    return problem.distribution.sample(1, torch.Generator().manual_seed(0))[0]


def problem_of(
    workload: Workload, memory: int | None = None, dtype: str | torch.dtype = "auto"
) -> ngeval.Problem:
    return ngeval.Problem(
        workload.model,
        workload.inputs,
        workload.targets,
        workload.likelihood,
        memory=memory,
        dtype=dtype,
    )


def check(workload: Workload, dampings: Iterable[float] = CHECK_DAMPINGS) -> float:
    """The largest relative gap between ngeval's γ and the pipeline's, both in float64.

    The dampings are those at which neither side's rounding is amplified.

    Raises:
        DisagreementError: it exceeds `TOLERANCE`.
    """
    device = str(workload.device)
    moved = copy.deepcopy(workload).to(device, torch.float64)
    problem = problem_of(moved)
    table = ngeval.evaluate(problem, METHODS, dampings, seed=0)
    ours = table.set_index(["method", "damping"])["gamma"]
    pipeline = Pipeline(moved, sampled_labels(problem))
    gaps = [
        abs(float(ours[name, damping]) / gamma - 1)
        for damping in dampings
        for name, gamma in pipeline.gammas(damping).items()
    ]
    # A NaN counts as disagreement, whatever comes after it.
    if not all(gap <= TOLERANCE for gap in gaps):
        raise DisagreementError(f"γ differs by {max(gaps):.1e} from the pipeline's: {gaps}")
    return max(gaps)
