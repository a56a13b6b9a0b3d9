"""Which engine is right for a model: tried, and checked sample by sample, not believed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ngeval.errors import EngineError, InputError, ModelError, nearest_name
from ngeval.functional import ModelFunction, Parameters, model_errors
from ngeval.jacobians.engines import ENGINES, loop_rows
from ngeval.jacobians.rows import RowSource


def choose_rows(
    function: ModelFunction, engine: str, memory: int, *, check: bool = True
) -> RowSource:
    """The fastest source of rows that is right for a model.

    For random w and v, (J_nᵀw_n)·v must equal w_n·(Jv)_n for every sample n, with the rows from
    the engine and Jv from forward mode or, where that takes the model for another function (a
    ``no_grad`` in its forward, a padding index), from two backward passes. The first and the last
    sample are also compared with plain autograd on that sample alone.

    Args:
        function: the model at θ on its batch.
        engine: an engine's name, or ``"auto"`` for the first that passes.
        memory: bytes for rows.
        check: compare; otherwise the first engine that runs is taken as it is.

    Raises:
        InputError: no such engine, or the memory budget is not positive.
        EngineError: the engine asked for cannot treat this model, or none can.
        ModelError: the model fails on a single sample.
    """
    if engine not in ("auto", *ENGINES):
        raise InputError(f"unknown engine {engine!r}; {nearest_name(str(engine), ENGINES)}")
    if not isinstance(memory, int) or memory <= 0:
        raise InputError(f"memory must be a positive number of bytes, not {memory!r}")
    probe = _Probe(function)
    reasons = []
    for name in ENGINES if engine == "auto" else [engine]:
        source = RowSource(function, name, max(memory, 4 * RowSource(function, name).row_bytes))
        try:
            products = probe.row_products(source)
        except Exception as error:  # an engine may fail on a model in any way
            reasons.append(f"{name}: {_first_line(error)}")
            continue
        if not check:
            return RowSource(function, name, memory)
        if not probe.agrees_with_single_samples(products):
            reasons.append(f"{name}: wrong per-sample gradients")
            continue
        for forward_mode in (True, False):
            if probe.agrees_with_tangent(products, forward_mode):
                chosen = replace(function, forward_mode=forward_mode)
                return RowSource(chosen, name, memory)
        reasons.append(f"{name}: forward and backward derivatives differ")
    hint = "" if engine == "auto" else "; use engine='auto'"
    raise EngineError(f"engine {engine!r} cannot treat this model ({'; '.join(reasons)}){hint}")


class _Probe:
    """Random cotangents w and a random direction v, and what they must give."""

    def __init__(self, function: ModelFunction) -> None:
        self.function = function
        with torch.no_grad(), model_errors():
            outputs = function(function.parameters)
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        self.cotangents = random(outputs)
        self.direction: Parameters = {n: random(p) for n, p in function.parameters.items()}
        epsilon = torch.finfo(outputs.dtype).eps
        self.tolerance = 4 * max(epsilon, torch.finfo(function.dtype).eps) ** 0.5
        self.ends = sorted({0, len(outputs) - 1})
        with model_errors():
            self.end_products = torch.stack([self._single(n) for n in self.ends])
        self._tangents: dict[bool, Tensor | None] = {}

    def row_products(self, source: RowSource) -> Tensor:
        """(J_nᵀw_n)·v for every sample, float64."""
        products = torch.zeros(len(self.cotangents), dtype=torch.float64)
        for block, rows in source.iterate(self.cotangents.unsqueeze(1)):
            for name, tensor in rows.items():
                along = tensor.double() @ self.direction[name].double().reshape(-1)
                products[block.rows] += along.cpu()
        return products

    def agrees_with_single_samples(self, products: Tensor) -> bool:
        return self._close(products[self.ends], self.end_products)

    def agrees_with_tangent(self, products: Tensor, forward_mode: bool) -> bool:
        if forward_mode not in self._tangents:
            function = replace(self.function, forward_mode=forward_mode)
            try:
                with model_errors():
                    tangent = function.jvp(self.direction).double()
                terms = self.cotangents.double() * tangent
                self._tangents[forward_mode] = terms.flatten(1).sum(1).cpu()
            except ModelError:  # the other mode may do
                self._tangents[forward_mode] = None
        tangents = self._tangents[forward_mode]
        return tangents is not None and self._close(products, tangents)

    def _single(self, n: int) -> Tensor:
        """The product for one sample, run alone through plain autograd."""
        one = slice(n, n + 1)
        rows = loop_rows(self.function, one, self.cotangents[one].unsqueeze(1))
        return torch.stack(
            [(rows[name].double() * v.double()).sum().cpu() for name, v in self.direction.items()]
        ).sum()

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        scale = expected.abs() + 0.01 * expected.abs().max()
        return bool(((found - expected).abs() <= self.tolerance * scale + 1e-300).all())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
