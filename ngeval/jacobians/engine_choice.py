"""The choice of an engine for a model: each is tried, and checked sample by sample by a `Probe`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ngeval.errors import EngineError, InputError, ModelError, nearest_name
from ngeval.jacobians.operation_count import predicted_seconds
from ngeval.jacobians.probe import Probe
from ngeval.jacobians.row_source import ENGINES, RowSource
from ngeval.model.autograd import Parameters
from ngeval.model.function import ModelFunction
from ngeval.model.no_gradient import why_no_gradient
from ngeval.utils.memory import is_out_of_memory

SLOWER, WORTHWHILE = 1.25, 0.05
"""``vmap`` is taken instead of layers if these take so many times longer, and seconds more."""

Candidate = tuple[str, Callable[[], tuple[RowSource, Parameters]]]
"""An engine's name, and a function that gives its rows and the probe's products of them."""

Reason = Callable[[], str]
"""Why an engine is not right; called for a message, as it may take a tangent for each parameter."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine that passed its check, and what it gave there.

    Attributes:
        rows: the source of rows.
        probe: what it was checked with, whose ``direction`` is v.
        products: (J_nᵀu_n)·v for every sample, by parameter: float64, shape ``(N,)``.
    """

    rows: RowSource
    probe: Probe
    products: Parameters

    def in_double(self) -> EngineChoice | None:
        """The same rows in float64; None where the model is in float64, or cannot be."""
        double = self.probe.in_double()
        if double is None:
            return None
        rows = replace(self.rows, function=double.function)
        return _chosen(rows, double, double.row_products(rows))


def choose_engine(
    function: ModelFunction,
    engine: str,
    memory: int,
    outputs: Tensor,
    residual: Tensor,
    *,
    check: bool = True,
) -> EngineChoice:
    """The fastest engine whose rows are right for a model.

    Rows are right if they agree with a tangent and, at two samples, with plain autograd; see
    `Probe`. The tangent comes from forward mode or, where that differentiates another function (a
    ``no_grad`` in the forward pass, a padding index), from two backward passes. Where the layer
    engine is wrong about a parameter, it reads that one's rows off in another way.

    Args:
        function: the model at θ on its batch.
        engine: an engine's name, or ``"auto"`` for the first that passes.
        memory: bytes for captures and rows.
        outputs: of the model on the batch, in its own dtype.
        residual: u, whose rows are tried beside random ones.
        check: compare; otherwise take the first engine that runs.

    Raises:
        InputError: no such engine, or the memory budget is not positive.
        EngineError: the named engine cannot treat this model, or none can.
        ModelError: the model fails on a single sample.
    """
    if engine not in ("auto", *ENGINES):
        raise InputError(
            f"unknown engine {engine!r}; {nearest_name(str(engine), ('auto', *ENGINES))}"
        )
    # Single samples cannot be passed through a model whose parameters are in parts.
    engines = ("layers",) if function.split else ENGINES
    names = engines if engine == "auto" else (engine,)
    probe = _probe_of(function, outputs, residual)

    def candidates(probe: Probe) -> list[Candidate]:
        return [(name, partial(probe.try_engine, name, memory)) for name in names]

    choice, reasons = _first_right(probe, candidates, (True, False), check=check)
    if choice is None:
        hint = "" if engine == "auto" else "; use engine='auto'"
        listed = "; ".join(reason() for reason in reasons)
        raise EngineError(f"engine {engine!r} cannot treat this model ({listed}){hint}")
    if engine == "auto" and check and not function.split and _is_slow(choice.rows, residual):
        faster, _ = _first_right(
            probe, lambda p: [("vmap", partial(p.try_engine, "vmap", memory))], (True, False)
        )
        return faster or choice
    return choice


def _is_slow(rows: RowSource, residual: Tensor) -> bool:
    """Whether layers without a rule make the layer engine slower than ``vmap`` of the model.

    Where little time is lost, it is taken nevertheless: Kronecker factors need it.
    """
    plan = rows.plan
    if plan is None or not (plan.looped or any(hooked.rule is None for hooked in plan.modules)):
        return False
    local, part = rows.local(residual)
    try:
        by_layers, by_vmap = (
            predicted_seconds(source, part.unsqueeze(1))
            for source in (local, replace(local, engine_name="vmap", plan=None))
        )
    except Exception as error:  # ``vmap`` may fail on a model in any way
        if is_out_of_memory(error):
            raise
        return False
    return by_layers > SLOWER * by_vmap and by_layers - by_vmap > WORTHWHILE


def recheck_engine(rows: RowSource, outputs: Tensor, residual: Tensor) -> EngineChoice | None:
    """Check rows whose engine was chosen on another batch; None if they are wrong on this one.

    Compared as in `choose_engine`, with the mode of differentiation that was chosen there. The
    rows have the function at θ on this batch.
    """
    probe = _probe_of(rows.function, outputs, residual)

    def candidates(probe: Probe) -> list[Candidate]:
        source = replace(rows, function=probe.function)
        return [(rows.engine_name, lambda: (source, probe.row_products(source)))]

    return _first_right(probe, candidates, (rows.function.forward_mode,))[0]


def _probe_of(function: ModelFunction, outputs: Tensor, residual: Tensor) -> Probe:
    try:
        return function.shards.synchronized(lambda: Probe(function, outputs, residual))
    except ModelError as error:
        reason = why_no_gradient(function) if "does not require grad" in str(error) else None
        raise ModelError(reason) if reason else error from None


def _first_right(
    probe: Probe,
    candidates: Callable[[Probe], list[Candidate]],
    forward_modes: Sequence[bool],
    *,
    check: bool = True,
) -> tuple[EngineChoice | None, list[Reason]]:
    """The first of some candidates that is right, or the reasons why none is.

    Each that is not is tried again in float64 before the next: rounding can flip a ReLU between
    two ways of computing.
    """
    function, reasons = probe.function, []
    for place, candidate in enumerate(candidates(probe)):
        choice, reason = _tried(probe, candidate, forward_modes, check)
        if choice is not None:
            return choice, []
        if check and (double := probe.in_double()) is not None:
            wide, reason = _tried(double, candidates(double)[place], forward_modes, check)
            if wide is not None:
                mode = wide.rows.function.forward_mode
                rows = replace(wide.rows, function=replace(function, forward_mode=mode))
                return _chosen(rows, probe, probe.row_products(rows)), []
        reasons.append(reason)
    return None, reasons


def _tried(
    probe: Probe, candidate: Candidate, forward_modes: Sequence[bool], check: bool
) -> tuple[EngineChoice | None, Reason]:
    """A candidate, or None and why its rows are not right."""
    name, rows_and_products = candidate
    try:
        source, products = probe.shards.synchronized(rows_and_products)
    except Exception as error:  # an engine may fail on a model in any way
        if is_out_of_memory(error):
            raise
        return None, partial(str, f"{name}: {_first_line(error)}")
    choice = _chosen(source, probe, products)
    if not check:
        return choice, str
    of_random = {n: part[:, 0] for n, part in products.items()}
    if wrong := probe.wrong_parameters(of_random):
        listed = ", ".join(sorted(wrong)[:3])
        return None, partial(str, f"{name}: wrong per-sample gradients of {listed}")
    for forward_mode in forward_modes:
        if probe.agrees_with_tangent(of_random, forward_mode):
            function = replace(source.function, forward_mode=forward_mode)
            return replace(choice, rows=replace(source, function=function)), str
    return None, partial(_difference, name, probe, of_random)


def _difference(name: str, probe: Probe, products: Parameters) -> str:
    if probe.tangent_error:
        return (
            f"{name}: the model has neither forward-mode nor second derivatives "
            f"({probe.tangent_error}); give its autograd.Function a jvp, or leave out "
            "once_differentiable"
        )
    names = probe.undifferentiated(products)
    return f"{name}: forward and backward derivatives differ{names}"


def _chosen(rows: RowSource, probe: Probe, products: Parameters) -> EngineChoice:
    of_residual = {name: part[:, 1] for name, part in products.items()}
    return EngineChoice(rows, probe, probe.of_all_samples(of_residual))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
