"""Which engine is right for a model: tried, and checked sample by sample, not believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ngeval.errors import EngineError, InputError, ModelError, nearest_name
from ngeval.jacobians.inner_products import inner_product, row_products
from ngeval.jacobians.planner import Planner
from ngeval.jacobians.row_source import ENGINES, Block, RowSource
from ngeval.jacobians.terms import Term
from ngeval.jacobians.whole_model import loop_rows
from ngeval.model.function import ModelFunction, Parameters, model_errors
from ngeval.model.operations import OperationWatch
from ngeval.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and what it gave when it was tried.

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
    """The fastest source of rows that is right for a model.

    For random w and v, (J_nᵀw_n)·v must equal w_n·(Jv)_n for every sample n, with the rows from
    the engine and Jv from forward mode or, where that takes the model for another function (a
    ``no_grad`` in its forward, a padding index), from two backward passes. The first and the last
    sample are also compared with plain autograd on that sample alone, parameter by parameter:
    where the layer engine is wrong about one, another way of seeing that one is taken.

    Args:
        function: the model at θ on its batch.
        engine: an engine's name, or ``"auto"`` for the first that passes.
        memory: bytes for captures and rows.
        outputs: of the model on the batch, in its own dtype.
        residual: u, whose rows are tried beside random ones.
        check: compare; otherwise the first engine that runs is taken as it is.

    Raises:
        InputError: no such engine, or the memory budget is not positive.
        EngineError: the engine asked for cannot treat this model, or none can.
        ModelError: the model fails on a single sample.
    """
    if engine not in ("auto", *ENGINES):
        raise InputError(
            f"unknown engine {engine!r}; {nearest_name(str(engine), ('auto', *ENGINES))}"
        )
    # Single samples cannot be passed through a model whose parameters are in parts.
    every = ("layers",) if function.split else ENGINES
    names = every if engine == "auto" else (engine,)
    shards = function.shards
    probe = shards.synchronized(lambda: _Probe(function, outputs, residual))
    chosen, reasons = _first_right(names, memory, check, probe)
    if chosen is None and check and function.dtype.itemsize < 8 and not function.split:
        # Rounding can flip a ReLU between two ways of computing: ask again in float64.
        with contextlib.suppress(ModelError):
            double = shards.synchronized(
                lambda: _Probe(
                    _watched(function.converted(torch.float64)), outputs.double(), residual
                )
            )
            wide, again = _first_right(names, memory, check, double)
            if wide is not None:
                mode = wide.rows.function.forward_mode
                rows = replace(wide.rows, function=replace(function, forward_mode=mode))
                both = shards.synchronized(lambda: probe.row_products(rows))
                own = {n: part[:, 1] for n, part in both.items()}
                return EngineChoice(rows, probe.direction, probe.of_all(own))
            reasons = again
    if chosen is None:
        hint = "" if engine == "auto" else "; use engine='auto'"
        raise EngineError(f"engine {engine!r} cannot treat this model ({'; '.join(reasons)}){hint}")
    return chosen


def recheck_engine(rows: RowSource, outputs: Tensor, residual: Tensor) -> EngineChoice | None:
    """What a source of rows that was chosen on another batch gives on this one, None if wrong.

    Compared as `choose_engine` does, with the one mode of tangents that was found.

    Args:
        rows: with the function at θ on this batch.
        outputs: of the model on the batch, in its own dtype.
        residual: u.
    """
    function, shards = rows.function, rows.function.shards
    probe = shards.synchronized(lambda: _Probe(function, outputs, residual))
    both = _products_if_right(rows, probe)
    if both is None and function.dtype.itemsize < 8 and not function.split:
        # As in `choose_engine`: a ReLU that rounding flips is no fault.
        with contextlib.suppress(ModelError):
            double = replace(
                _watched(function.converted(torch.float64)), forward_mode=function.forward_mode
            )
            wide = replace(rows, function=double)
            other = shards.synchronized(lambda: _Probe(double, outputs.double(), residual))
            if _products_if_right(wide, other) is not None:
                both = shards.synchronized(lambda: probe.row_products(rows))
    if both is None:
        return None
    own = {n: part[:, 1] for n, part in both.items()}
    return EngineChoice(rows, probe.direction, probe.of_all(own))


def _products_if_right(rows: RowSource, probe: _Probe) -> Parameters | None:
    """The probe's products of rows, None where they are wrong or cannot be made."""
    try:
        both = rows.function.shards.synchronized(lambda: probe.row_products(rows))
    except Exception as error:  # a plan may fail in any way where the model is wired otherwise
        if is_out_of_memory(error):
            raise
        return None
    products = {n: part[:, 0] for n, part in both.items()}
    if _anywhere(probe, probe.wrong_parameters(products)):
        return None
    right = probe.agrees_with_tangent(products, rows.function.forward_mode)
    return both if right else None


def _first_right(
    names: Iterable[str], memory: int, check: bool, probe: _Probe
) -> tuple[EngineChoice | None, list[str]]:
    """The first of some engines that is right, or why none is."""
    function, reasons = probe.function, list[str]()
    apart: dict[int, Parameters] = {}  # by the place of the reason, what differs from the tangent
    for name in names:
        try:
            source, both = function.shards.synchronized(partial(_source, name, memory, probe))
        except Exception as error:  # an engine may fail on a model in any way
            if is_out_of_memory(error):
                raise
            reasons.append(f"{name}: {_first_line(error)}")
            continue
        products, own = ({n: part[:, i] for n, part in both.items()} for i in (0, 1))
        choice = EngineChoice(source, probe.direction, probe.of_all(own))
        if not check:
            return choice, []
        if wrong := _anywhere(probe, probe.wrong_parameters(products)):
            reasons.append(f"{name}: wrong per-sample gradients of {', '.join(sorted(wrong)[:3])}")
            continue
        for forward_mode in (True, False):
            if probe.agrees_with_tangent(products, forward_mode):
                rows = replace(source, function=replace(function, forward_mode=forward_mode))
                return replace(choice, rows=rows), []
        apart[len(reasons)] = products
        reasons.append(f"{name}: forward and backward derivatives differ")
    # A tangent for each parameter is dear: only where no engine is right.
    return None, [
        reason + (probe.unseen(apart[place]) if place in apart else "")
        for place, reason in enumerate(reasons)
    ]


def _source(name: str, memory: int, probe: _Probe) -> tuple[RowSource, Parameters]:
    """The source of an engine, and the probe's products of its rows.

    The layer engine's plan is mended until the probe finds no fault.
    """
    function = probe.function
    if name != "layers":
        source = RowSource(function, name, memory)
        return source, probe.row_products(source)
    with model_errors():
        planner = Planner(function)
        while True:
            plan = planner.plan()
            if plan.looped and function.split:
                raise EngineError(
                    f"rows of {', '.join(plan.looped[:3])} would take passes of single samples, or "
                    "of modules that fully_shard keeps in parts; train only parameters of modules "
                    "that hold no such parts (adapters as layers of their own, a head)"
                )
            source = RowSource(function, name, memory, plan, planner.sample_bytes)
            products = probe.row_products(source)
            wrong = probe.wrong_parameters({n: part[:, 0] for n, part in products.items()})
            wrong = _anywhere(probe, wrong)
            if not wrong or not planner.demote(wrong):
                return source, products


def _anywhere(probe: _Probe, names: set[str]) -> set[str]:
    """The names that any rank has: all must take the same way."""
    return set().union(*probe.function.shards.gather(names))


class _Probe:
    """Random cotangents w and a random direction v, and what they must give.

    Every rank looks at its own samples, or at one of another's if it has none.
    """

    def __init__(self, function: ModelFunction, outputs: Tensor, residual: Tensor) -> None:
        self.function = function
        self.part = function.local(at_least=1)
        count = function.num_samples
        tried = function.shards.local_slice(count, at_least=1)
        self.residual = residual[tried]
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        self.cotangents = random(outputs)[tried]
        self.direction: Parameters = {n: random(p) for n, p in function.parameters.items()}
        epsilon = torch.finfo(outputs.dtype).eps
        self.tolerance = 4 * max(epsilon, function.epsilon) ** 0.5
        self.ends = sorted({0, len(self.cotangents) - 1})
        with model_errors():
            singles = [self._single(n) for n in self.ends]
        self.end_products = {n: torch.stack([s[n] for s in singles]) for n in self.direction}
        self._tangents: dict[bool, Tensor | None] = {}

    def row_products(self, source: RowSource) -> Parameters:
        """(J_nᵀw_n)·v and (J_nᵀu_n)·v for every sample n, by parameter: float64, ``(N, 2)``."""
        zero = torch.zeros(len(self.cotangents), 2, dtype=torch.float64)
        products = {name: zero.clone() for name in self.direction}
        cotangents = torch.stack([self.cotangents, self.residual.to(self.cotangents)], 1)
        # Without the memory for a row there is no probe: the errors that say so come later.
        enough = max(source.memory, source.captured_bytes + source.sample_bytes)
        part = replace(source, function=self.part, memory=enough)
        for block in part.blocks(cotangents):

            def use(terms: list[Term], vectors: slice, block: Block = block) -> None:
                for name, found in row_products(terms, self.direction).items():
                    part = products[name][block.samples, block.vectors]
                    part[:, vectors] += found.cpu()

            part.stream(cotangents, block, use)
        return products

    def of_all(self, products: Parameters) -> Parameters:
        """The products of all ranks' samples, this one's given."""
        shards = self.function.shards
        own = shards.local_slice(self.function.num_samples)
        count = own.stop - own.start
        return shards.concatenate(lambda: {name: part[:count] for name, part in products.items()})

    def wrong_parameters(self, products: Parameters) -> set[str]:
        """The parameters whose rows differ from autograd's at the first or the last sample."""
        largest = max(float(expected.abs().max()) for expected in self.end_products.values())
        return {
            name
            for name, expected in self.end_products.items()
            if not self._close(products[name][self.ends], expected, 1e-3 * largest)
        }

    def agrees_with_tangent(self, products: Parameters, forward_mode: bool) -> bool:
        """Whether all samples' products are those of the tangent."""
        if forward_mode not in self._tangents:
            self._tangents[forward_mode] = self._along(self.direction, forward_mode)
        tangents = self._tangents[forward_mode]
        parts = torch.stack(list(products.values()))
        # Where parameters' parts cancel, and at a kink that another order of sums lies beyond (a
        # ReLU's 0), the sum is known no better than its parts.
        size = parts.square().sum(0).sqrt()
        agrees = tangents is not None and self._close(parts.sum(0), tangents, size)
        return all(self.function.shards.gather(int(agrees)))

    def unseen(self, products: Parameters) -> str:
        """Which parameters' forward derivatives are not those of their rows, for a message."""
        names = []
        for name, value in self.direction.items():
            only = {n: torch.zeros_like(v) for n, v in self.direction.items()} | {name: value}
            tangents = self._along(only, forward_mode=True)
            if tangents is not None and not self._close(products[name], tangents):
                names.append(name)
        listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        return f" for {listed} (detached, or under no_grad, in forward?)" if names else ""

    def _along(self, direction: Parameters, forward_mode: bool) -> Tensor | None:
        """w_n·(Jv)_n for every sample; None where this mode does not work."""
        function = replace(self.part, forward_mode=forward_mode)
        try:
            with model_errors():
                tangent = function.jvp(direction).double()
        except ModelError:  # the other mode may do
            return None
        return (self.cotangents.double() * tangent).flatten(1).sum(1).cpu()

    def _single(self, n: int) -> Parameters:
        """The products for one sample, run alone through plain autograd."""
        one = slice(n, n + 1)
        rows = loop_rows(self.part, one, self.cotangents[one].unsqueeze(1))
        return {name: inner_product(rows[name], v).cpu() for name, v in self.direction.items()}

    def _close(self, found: Tensor, expected: Tensor, floor: float | Tensor = 0.0) -> bool:
        scale = expected.abs() + 0.01 * expected.abs().max() + floor
        return bool(((found - expected).abs() <= self.tolerance * scale + 1e-300).all())


def _watched(function: ModelFunction) -> ModelFunction:
    """The function, knowing how its own code rounds."""
    with OperationWatch() as watch, torch.no_grad(), model_errors():
        function.on(slice(0, 2))(function.parameters)
    return replace(function, inner_epsilon=watch.epsilon)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
