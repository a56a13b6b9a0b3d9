"""FAdam: Adam as a natural gradient with a diagonal empirical Fisher, corrected accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngeval.errors import InputError
from ngeval.fadam.state_checks import Range, check_state, number_in

CORRECTIONS: dict[str, dict[str, Any]] = {
    "debiased Fisher": {"debiased_fisher": False},
    "adaptive epsilon": {"adaptive_epsilon": False},
    "clipping": {"clip": None},
    "natural momentum": {"natural_momentum": False},
    "natural weight decay": {"natural_weight_decay": False},
}
"""The corrections of FAdam to AdamW, each with the option that switches it off."""

WITHOUT_CORRECTIONS: dict[str, Any] = {k: v for off in CORRECTIONS.values() for k, v in off.items()}
"""Options with which `FAdam` is AdamW."""

RELATIVE_EPSILON = 0.01
"""ε₂ of Algorithm 1: ε is at most this fraction of the gradient's RMS."""

NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "a number ≥ 0")
BETA = Range(lambda x: 0 <= x < 1, "a number in [0, 1)")
CLIP = Range(lambda x: x > 0, "a positive number, or None")
RANGES = {
    "lr": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "exponent": Range(lambda x: 0 < x <= 1, "a number in (0, 1], and ½ is that of Adam"),
}

BLOCK = 1 << 18
"""Entries that are processed at a time on a CPU, so that they stay in the cache."""


class FAdam(Optimizer):
    """Fisher Adam (Hwang, arXiv 2405.12807, Algorithm 1).

    For every tensor θ with gradient g at its step t, RMS taken over the tensor's entries::

        β̂₂ = β₂ (1 − β₂^(t−1)) / (1 − β₂^t)       debiased Fisher
        f  ← β̂₂ f + (1 − β̂₂) g²                   the empirical Fisher's diagonal
        ε̂  = min(ε, 0.01 RMS(g))                  adaptive epsilon
        ḡ  = g / (f^ρ + ε̂^(2ρ))                   the invariant natural gradient
        ḡ  ← ḡ / max(1, RMS(ḡ) / c)               clipping
        m  ← β₁ m + (1 − β₁) ḡ                    natural momentum
        w̄  = θ / (f^ρ + ε̂^(2ρ)), clipped as ḡ is  natural weight decay
        θ  ← θ − η (m + λ w̄)

    Each of the five corrections can be switched off, which restores the behaviour of AdamW:

    - ``debiased_fisher=False``: f ← β₂ f + (1 − β₂) g², divided by 1 − β₂^t where it is used. The
      two agree up to rounding, so this option changes nothing of substance.
    - ``adaptive_epsilon=False``: ε̂ = ε.
    - ``clip=None``: nothing is clipped.
    - ``natural_momentum=False``: m ← β₁ m + (1 − β₁) g, and the step is that of m / (1 − β₁^t)
      over f^ρ + ε̂^(2ρ); clipping then acts on the step.
    - ``natural_weight_decay=False``: θ ← θ − ηλθ beforehand.

    With all of them off (`WITHOUT_CORRECTIONS`) and ρ = ½ it takes the steps of
    `torch.optim.AdamW`, bit for bit, if the options are numbers. A tensor option is read as the
    number that it holds, whereas AdamW computes with it in the tensor's dtype.

    The paper leaves some cases open; they are defined as follows. A tensor whose gradient is zero
    (or has an RMS of zero in its dtype) has ε̂ = ε, because with ε̂ = 0 a step would be 0/0. For the
    same reason ε̂^(2ρ) is at least 4·10⁻²⁹ in float32 (the smallest number to the power ¾). Without
    clipping, weight decay moves no entry past zero in a step: where f = 0, θ/ε̂^(2ρ) would move it
    far beyond. Parameters in half precision have a state in float32 and are stepped in float32. A
    gradient that is NaN or infinite is not checked for: as with torch's optimizers it spoils its
    own entry only, and the tensor is not clipped. An entry whose g² overflows (|g| > 10¹⁹ in
    float32) has f = ∞ and does not move.

    On a GPU the host waits for the RMS values twice a step.

    Args:
        params: tensors, pairs of names and tensors, or groups of them with further options.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        clip: c; None does not clip.
        exponent: ρ in (0, 1]; ½ is the root of Adam, 1 divides by the Fisher itself.
        debiased_fisher: average g² with β̂₂; False: with β₂, and debias where it is used.
        adaptive_epsilon: bound ε by the gradient's RMS.
        natural_momentum: average ḡ; False: average g, debias, then divide.
        natural_weight_decay: decay by w̄; False: by θ.
        maximize: step along the gradient, not against it.
        foreach: step all tensors of a dtype together (None and True), or one by one.

    Raises:
        InputError: an option is out of range; a parameter is complex.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> FAdam([weight], lr=0.1, weight_decay=0.0).step(lambda: weight.square().sum().backward())
        >>> weight.data
        tensor([ 2.9900, -3.9900])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-3,
        clip: float | None = 1.0,
        exponent: float = 0.5,
        *,
        debiased_fisher: bool = True,
        adaptive_epsilon: bool = True,
        natural_momentum: bool = True,
        natural_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "exponent": exponent,
            "debiased_fisher": debiased_fisher,
            "adaptive_epsilon": adaptive_epsilon,
            "natural_momentum": natural_momentum,
            "natural_weight_decay": natural_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_parameters(group)
            _numbers_of(group)
        except InputError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step on the gradients in ``.grad``; parameters without one do not move.

        A closure evaluates the loss and its gradients before the step; its loss is returned.

        Raises:
            InputError: a gradient is sparse, or an option of a group out of range; nothing has
                moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_numbers_of(group) for group in self.param_groups]
        for group in groups:
            _check_gradients(group)
        for group in groups:
            for bucket in self._buckets(group):
                _step(bucket, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, which stays in float32 for half-precision parameters.

        Raises:
            InputError: the state is of another optimizer or of other parameters, or an option in it
                is out of range; nothing has changed.
        """
        check_state(self, state_dict, ("momentum", "fisher"))
        for group in state_dict["param_groups"]:
            _numbers_of(group)
        super().load_state_dict(dict(state_dict))
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            # torch casts a state to the dtype of its parameter, and half precision loses digits.
            for name in {"momentum", "fisher"} & set(state_dict["state"].get(key, ())):
                value = state_dict["state"][key][name]
                self.state[parameter][name] = value.to(
                    parameter.device, _working_dtype(parameter), copy=True
                )

    def _buckets(self, group: dict[str, Any]) -> Iterator[_Bucket]:
        """The tensors that are stepped together: of one device, dtype and step count.

        On a CPU a bucket has about `BLOCK` entries, so that they are in the cache when reused.
        """
        buckets: dict[Any, list[Sequence[Tensor]]] = {}
        entries = 0
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                zeros = torch.zeros_like(parameter, dtype=_working_dtype(parameter))
                state["momentum"], state["fisher"] = zeros, zeros.clone()
            steps = float(state["step"]) + 1
            part = index
            if group["foreach"] is not False:
                part = entries // BLOCK if parameter.device.type == "cpu" else 0
                entries += parameter.numel()
            tensors = state["step"], parameter, parameter.grad, state["momentum"], state["fisher"]
            kind = steps, parameter.device, parameter.dtype, part
            buckets.setdefault(kind, []).append(tensors)
        for (steps, *_), members in buckets.items():
            yield _Bucket(steps, *map(list, zip(*members, strict=True)))


class _Bucket(NamedTuple):
    """Tensors that are stepped together; ``steps`` counts the step in progress."""

    steps: float
    counts: list[Tensor]
    parameters: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]
    fishers: list[Tensor]


def _step(bucket: _Bucket, group: Mapping[str, Any]) -> None:
    torch._foreach_add_(bucket.counts, torch.tensor(1.0))  # a float would be copied for each
    working, stored = bucket.momenta[0].dtype, bucket.parameters[0].dtype
    parameters, gradients = bucket.parameters, bucket.gradients
    if working != stored:
        parameters = [parameter.to(working) for parameter in parameters]
        gradients = [gradient.to(working) for gradient in gradients]
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    lr, decay, clip = group["lr"], group["weight_decay"], group["clip"]
    if decay and not group["natural_weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * decay)
    _update_fishers(bucket, gradients, group)
    bases = _bases(bucket, gradients, group)
    momenta, beta1 = bucket.momenta, group["betas"][0]
    natural, count = group["natural_momentum"], len(parameters)
    decays = bool(decay) and group["natural_weight_decay"]
    divided, unbiased = gradients, 1.0
    if not natural:
        torch._foreach_lerp_(momenta, gradients, 1 - beta1)
        divided, unbiased = momenta, 1 - beta1**bucket.steps
    # Weights are clipped beside the gradients, in the same pass.
    tensors = divided + parameters if decays else divided
    limits = [clip * unbiased] * count + [clip] * count
    scales = _scales(tensors, bases + bases, limits)
    if natural:
        torch._foreach_mul_(momenta, beta1)
        factors = [(1 - beta1) * scale for scale in scales[:count]]
        torch._foreach_addcdiv_(momenta, gradients, bases, factors)
    if decays:
        _decay(parameters, bases, [-lr * decay * scale for scale in scales[count:]], clip)
    if natural:
        torch._foreach_add_(parameters, momenta, alpha=-lr)
    else:
        factors = [-(lr / unbiased) * scale for scale in scales[:count]]
        torch._foreach_addcdiv_(parameters, momenta, bases, factors)
    if working != stored:
        torch._foreach_copy_(bucket.parameters, parameters)


def _update_fishers(bucket: _Bucket, gradients: list[Tensor], group: Mapping[str, Any]) -> None:
    """The average f ← β f + (1 − β) g², with Adam's β₂ or the debiased one."""
    beta = group["betas"][1]
    if group["debiased_fisher"]:
        beta *= (1 - beta ** (bucket.steps - 1)) / (1 - beta**bucket.steps)
    torch._foreach_mul_(bucket.fishers, beta)
    torch._foreach_addcmul_(bucket.fishers, gradients, gradients, 1 - beta)


def _bases(bucket: _Bucket, gradients: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """f^ρ + ε̂^(2ρ), by which gradients and weights are divided."""
    exponent, beta2 = group["exponent"], group["betas"][1]
    if exponent == 0.5:
        bases = list(torch._foreach_sqrt(bucket.fishers))
    else:
        bases = list(torch._foreach_pow(bucket.fishers, exponent))
    if not group["debiased_fisher"]:
        torch._foreach_div_(bases, (1 - beta2**bucket.steps) ** exponent)
    floor = torch.finfo(bases[0].dtype).tiny ** 0.75
    epsilons = [group["eps"]] * len(bases)
    if group["adaptive_epsilon"]:
        limits = (RELATIVE_EPSILON * rms for rms in _rms(gradients))
        epsilons = [min(group["eps"], limit or math.inf) for limit in limits]
    torch._foreach_add_(bases, [max(e ** (2 * exponent), floor) for e in epsilons])
    return bases


def _decay(
    parameters: list[Tensor], bases: list[Tensor], factors: list[float], clip: float
) -> None:
    """θ ← θ − ηλ w̄; without clipping, no entry changes by more than |θ|."""
    if math.isinf(clip):
        bases = list(torch._foreach_clamp_min(bases, -factors[0]))
    torch._foreach_addcdiv_(parameters, parameters, bases, factors)


def _scales(tensors: list[Tensor], bases: list[Tensor], limits: list[float]) -> list[float]:
    """1 / max(1, RMS(a / b) / limit) for each tensor a; further bases and limits are ignored."""
    if math.isinf(limits[0]):
        return [1.0] * len(tensors)
    # A comparison with NaN is false: a tensor that has a NaN is not clipped.
    return [
        limit / rms if rms > limit else 1.0
        for rms, limit in zip(_rms(tensors, bases), limits, strict=False)
    ]


def _rms(tensors: list[Tensor], bases: list[Tensor] | None = None) -> list[float]:
    """The root mean square of each tensor, or of each divided by its base."""
    small = sum(tensor.numel() for tensor in tensors) <= 2 * BLOCK
    if bases is not None and tensors[0].device.type == "cpu" and not small:
        norms = [_quotient_norm(a, b) for a, b in zip(tensors, bases, strict=False)]
    else:
        parts = tensors if bases is None else torch._foreach_div(tensors, bases[: len(tensors)])
        norms = torch.stack(list(torch._foreach_norm(parts))).tolist()
    pairs = zip(norms, tensors, strict=True)
    return [norm / math.sqrt(tensor.numel() or 1) for norm, tensor in pairs]


def _quotient_norm(tensor: Tensor, base: Tensor) -> float:
    """‖a/b‖; in blocks for large tensors, because new memory is the bottleneck on a CPU."""
    if tensor.numel() <= BLOCK or not (tensor.is_contiguous() and base.is_contiguous()):
        return float(torch.linalg.vector_norm(tensor / base))
    blocks = zip(tensor.view(-1).split(BLOCK), base.view(-1).split(BLOCK), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(a / b)) for a, b in blocks))


def _numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its options as numbers in range: ∞ for no clipping, the entry of a tensor."""
    betas, clip = group["betas"], group["clip"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise InputError(f"FAdam: betas must be two numbers (β₁, β₂), not {betas!r}")
    numbers = {name: number_in(group[name], f"FAdam: {name}", RANGES[name]) for name in RANGES}
    first = number_in(betas[0], "FAdam: the first of betas", BETA)
    second = number_in(betas[1], "FAdam: the second of betas", BETA)
    limit = math.inf if clip is None else number_in(clip, "FAdam: clip", CLIP)
    return {**group, **numbers, "betas": (first, second), "clip": limit}


def _check_parameters(group: Mapping[str, Any]) -> None:
    for index, parameter in enumerate(group["params"]):
        if parameter.is_complex():
            raise InputError(
                f"FAdam: {_name(group, index)} is complex, and its Fisher is not defined; give "
                "FAdam the real and imaginary parts, torch.view_as_real(parameter)"
            )


def _check_gradients(group: Mapping[str, Any]) -> None:
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise InputError(
                f"FAdam: the gradient of {_name(group, index)} is sparse; its momentum would "
                "be dense, so make the gradient dense too: nn.Embedding(…, sparse=False)"
            )


def _name(group: Mapping[str, Any], index: int) -> str:
    """A parameter's name where the group records it, or its position in the group."""
    names: Sequence[str] = group.get("param_names") or ()
    return names[index] if index < len(names) else f"parameter {index} of its group"


def _working_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's state and steps."""
    return torch.promote_types(parameter.dtype, torch.float32)
