"""The choice of an engine for a model: each is tried, and checked sample by sample by a `Probe`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ngeval.errors import EngineError, InputError, ModelError, nearest_name
from ngeval.jacobians.probe import Probe
from ngeval.jacobians.rank_exchange import probe_of
from ngeval.jacobians.row_source import ENGINES, RowSource
from ngeval.model.function import ModelFunction, Parameters
from ngeval.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class EngineChoice:
    """An engine that passed its check, and what it gave there.

    Attributes:
        rows: the source of rows.
        direction: v, a random direction in parameter space.
        products: (J_nᵀu_n)·v for every sample, by parameter: float64, shape ``(N,)``.
    """

    rows: RowSource
    direction: Parameters
    products: Parameters


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
    probe = probe_of(function, outputs, residual)
    choice, reasons = _first_right(names, memory, check, probe)
    if choice is None and check and _can_widen(function):
        with contextlib.suppress(ModelError):
            wide, reasons = _first_right(names, memory, check, probe.in_double())
            if wide is not None:
                mode = wide.rows.function.forward_mode
                rows = replace(wide.rows, function=replace(function, forward_mode=mode))
                return _chosen(rows, probe, probe.row_products(rows))
    if choice is None:
        hint = "" if engine == "auto" else "; use engine='auto'"
        raise EngineError(f"engine {engine!r} cannot treat this model ({'; '.join(reasons)}){hint}")
    return choice


def recheck_engine(rows: RowSource, outputs: Tensor, residual: Tensor) -> EngineChoice | None:
    """Check rows whose engine was chosen on another batch; None if they are wrong on this one.

    Compared as in `choose_engine`, with the mode of differentiation that was chosen there.

    Args:
        rows: with the function at θ on this batch.
        outputs: of the model on the batch, in its own dtype.
        residual: u.
    """
    function = rows.function
    probe = probe_of(function, outputs, residual)
    products = _products_if_right(rows, probe)
    if products is None and _can_widen(function):
        with contextlib.suppress(ModelError):
            double = probe.in_double()
            if _products_if_right(replace(rows, function=double.function), double) is not None:
                products = probe.row_products(rows)
    return None if products is None else _chosen(rows, probe, products)


def _can_widen(function: ModelFunction) -> bool:
    """Whether to ask again in float64: rounding can flip a ReLU between two ways of computing."""
    return function.dtype.itemsize < 8 and not function.split


def _chosen(rows: RowSource, probe: Probe, products: Parameters) -> EngineChoice:
    of_residual = {name: part[:, 1] for name, part in products.items()}
    return EngineChoice(rows, probe.direction, probe.of_all_samples(of_residual))


def _products_if_right(rows: RowSource, probe: Probe) -> Parameters | None:
    """The probe's products of rows, None where they are wrong or cannot be computed."""
    try:
        products = probe.row_products(rows)
    except Exception as error:  # a plan may fail in any way on a model that is wired differently
        if is_out_of_memory(error):
            raise
        return None
    of_random = {name: part[:, 0] for name, part in products.items()}
    if probe.wrong_parameters(of_random):
        return None
    right = probe.agrees_with_tangent(of_random, rows.function.forward_mode)
    return products if right else None


def _first_right(
    names: Sequence[str], memory: int, check: bool, probe: Probe
) -> tuple[EngineChoice | None, list[str]]:
    """The first of some engines that is right, or the reasons why none is."""
    reasons: list[str] = []
    differing: dict[int, Parameters] = {}  # by index of the reason, products unlike the tangent's
    for name in names:
        try:
            source, products = probe.try_engine(name, memory)
        except Exception as error:  # an engine may fail on a model in any way
            if is_out_of_memory(error):
                raise
            reasons.append(f"{name}: {_first_line(error)}")
            continue
        choice = _chosen(source, probe, products)
        if not check:
            return choice, []
        of_random = {n: part[:, 0] for n, part in products.items()}
        if wrong := probe.wrong_parameters(of_random):
            reasons.append(f"{name}: wrong per-sample gradients of {', '.join(sorted(wrong)[:3])}")
            continue
        for forward_mode in (True, False):
            if probe.agrees_with_tangent(of_random, forward_mode):
                function = replace(source.function, forward_mode=forward_mode)
                return replace(choice, rows=replace(source, function=function)), []
        differing[len(reasons)] = of_random
        reasons.append(f"{name}: forward and backward derivatives differ")
    # A tangent for each parameter is expensive: only where no engine is right.
    for index, of_random in differing.items():
        reasons[index] += probe.undifferentiated(of_random)
    return None, reasons


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
