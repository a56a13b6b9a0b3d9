"""The check of an engine's rows on a model's own batch: random projections, sample by sample.

For random cotangents w_n and a random direction v, (J_nᵀw_n)·v must equal w_nᵀ(Jv)_n for every
sample n: the left side from the engine's rows, the right side from a tangent. The first and the
last sample are also compared, parameter by parameter, with plain autograd on that sample alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ngeval.errors import EngineError, ModelError
from ngeval.jacobians.inner_products import inner_product, row_products
from ngeval.jacobians.planner import Planner
from ngeval.jacobians.row_source import RowSource
from ngeval.jacobians.terms import Block, Term
from ngeval.jacobians.vjp_rows import loop_rows
from ngeval.model.autograd import Parameters, model_errors
from ngeval.model.function import ModelFunction
from ngeval.model.operations import OperationWatch


class Probe:
    """Random cotangents w and a random direction v, and what any right engine gives for them.

    Of this rank's samples, or of one of another rank's if it has none. All ranks come to the same
    decisions: what is wrong on one is wrong.

    Attributes:
        function: the model at θ on its batch.
        direction: v, by parameter.
        tangent_error: why the last tangent failed.
    """

    def __init__(self, function: ModelFunction, outputs: Tensor, residual: Tensor) -> None:
        """Draw w and v, and differentiate the first and the last sample alone.

        The rows of the residual are used beside random ones.

        Raises:
            ModelError: the model fails on a single sample.
        """
        self.function = function
        self.shards = function.shards
        samples = self.shards.local_slice(function.num_samples, at_least=1)
        self._outputs, self._residual = outputs, residual
        self._checked = function.on(samples)
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        self._cotangents = random(outputs)[samples]
        self._residuals = residual[samples]
        self.direction: Parameters = {n: random(p) for n, p in function.parameters.items()}
        epsilon = torch.finfo(outputs.dtype).eps
        self._tolerance = 4 * max(epsilon, function.epsilon) ** 0.5
        self._ends = sorted({0, len(self._cotangents) - 1})
        with model_errors():
            singles = [self._single(n) for n in self._ends]
        self._end_products = {n: torch.stack([s[n] for s in singles]) for n in self.direction}
        self.tangent_error = ""
        self._double: list[Probe] = []
        self._tangents: dict[bool, Tensor | None] = {}

    def in_double(self) -> Probe | None:
        """The same probe in float64; None where the model is in float64, or cannot be.

        Where two ways of computing differ in a narrower type, they may be on two sides of a ReLU's
        kink, which is nobody's fault. What is wrong in float64 is wrong.
        """
        if self.function.dtype.itemsize < 8 and not self.function.split and not self._double:
            with contextlib.suppress(ModelError):
                self._double = [self.shards.synchronized(self._converted)]
        return self._double[0] if self._double else None

    def _converted(self) -> Probe:
        function = self.function.converted(torch.float64)
        with OperationWatch() as watch, torch.no_grad(), model_errors():
            function.on(slice(0, 2))(function.parameters)
        function = replace(function, inner_epsilon=watch.epsilon)
        return Probe(function, self._outputs.double(), self._residual)

    def try_engine(self, name: str, memory: int) -> tuple[RowSource, Parameters]:
        """The source of an engine, and the probe's products of its rows.

        The layer engine's plan is revised until the probe finds no wrong parameter.

        Raises:
            EngineError: the plan needs a loop over samples, which a model in parts does not allow.
            ModelError: the model fails.
        """
        if name != "layers":
            source = RowSource(self.function, name, memory)
            return source, self.row_products(source)
        with model_errors():
            planner = Planner(self.function)
            while True:
                plan = planner.plan()
                if plan.looped and self.function.split:
                    raise EngineError(
                        f"rows of {', '.join(plan.looped[:3])} would take passes of single "
                        "samples, or of modules that fully_shard keeps in parts; train only "
                        "parameters of modules that hold no such parts (adapters as layers of "
                        "their own, a head)"
                    )
                source = RowSource(self.function, name, memory, plan, planner.trial.sample_bytes)
                products = self.row_products(source)
                wrong = self.wrong_parameters({n: part[:, 0] for n, part in products.items()})
                if wrong and (double := self.in_double()):
                    wide = double.row_products(replace(source, function=double.function))
                    wrong &= double.wrong_parameters({n: part[:, 0] for n, part in wide.items()})
                if not wrong or not planner.demote(wrong):
                    return source, products

    def row_products(self, source: RowSource) -> Parameters:
        """(J_nᵀw_n)·v and (J_nᵀu_n)·v for every sample n, by parameter: float64, ``(N, 2)``."""
        return self.shards.synchronized(partial(self._row_products, source))

    def _row_products(self, source: RowSource) -> Parameters:
        zero = torch.zeros(len(self._cotangents), 2, dtype=torch.float64)
        products = {name: zero.clone() for name in self.direction}
        cotangents = torch.stack([self._cotangents, self._residuals.to(self._cotangents)], 1)
        # A budget below one row is an error of whoever needs the rows, not of the probe.
        enough = max(source.memory, source.captured_bytes + source.sample_bytes)
        checked = replace(source, function=self._checked, memory=enough)
        for block in checked.blocks(cotangents):

            def use(terms: list[Term], vectors: slice, block: Block = block) -> None:
                for name, values in row_products(terms, self.direction).items():
                    target = products[name][block.samples, block.vectors]
                    target[:, vectors] += values.cpu()

            checked.stream(cotangents, block, use)
        return products

    def wrong_parameters(self, products: Parameters) -> set[str]:
        """The parameters whose rows differ from autograd's at the first or the last sample."""
        largest = max(float(expected.abs().max()) for expected in self._end_products.values())
        wrong = {
            name
            for name, expected in self._end_products.items()
            if not self._close(products[name][self._ends], expected, 1e-3 * largest)
        }
        return set().union(*self.shards.gather(wrong))

    def agrees_with_tangent(self, products: Parameters, forward_mode: bool) -> bool:
        """Whether all samples' products are those of the tangent."""
        if forward_mode not in self._tangents:
            self._tangents[forward_mode] = self._tangent_products(self.direction, forward_mode)
        tangents = self._tangents[forward_mode]
        parts = torch.stack(list(products.values()))
        # The sum is known no better than its parts: they may cancel, or another order of
        # summation may end beyond a kink (a ReLU's 0).
        size = parts.square().sum(0).sqrt()
        right = tangents is not None and self._close(parts.sum(0), tangents, size)
        return all(self.shards.gather(right))

    def of_all_samples(self, products: Parameters) -> Parameters:
        """The products of the whole batch, from those of this process's samples."""
        local = self.shards.local_slice(self.function.num_samples)
        count = local.stop - local.start
        return self.shards.concatenate(lambda: {n: part[:count] for n, part in products.items()})

    def undifferentiated(self, products: Parameters) -> str:
        """For a message: the parameters whose tangents differ from the products of their rows."""
        names = []
        for name, value in self.direction.items():
            only = {n: torch.zeros_like(v) for n, v in self.direction.items()} | {name: value}
            tangents = self._tangent_products(only, forward_mode=True)
            if tangents is not None and not self._close(products[name], tangents):
                names.append(name)
        listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        return f" for {listed} (detached, or under no_grad, in forward?)" if names else ""

    def _tangent_products(self, direction: Parameters, forward_mode: bool) -> Tensor | None:
        """w_n·(Jv)_n for every sample; None where this mode does not work."""
        function = replace(self._checked, forward_mode=forward_mode)
        try:
            with model_errors():
                tangent = function.jvp(direction).double()
        except ModelError as error:  # the other mode may work
            self.tangent_error = str(error).splitlines()[0][:200]
            return None
        self.tangent_error = ""
        return (self._cotangents.double() * tangent).flatten(1).sum(1).cpu()

    def _single(self, n: int) -> Parameters:
        """The products for one sample, run alone through plain autograd."""
        sample = slice(n, n + 1)
        rows = loop_rows(self._checked, sample, self._cotangents[sample].unsqueeze(1))
        return {name: inner_product(rows[name], v).cpu() for name, v in self.direction.items()}

    def _close(self, values: Tensor, expected: Tensor, floor: float | Tensor = 0.0) -> bool:
        scale = expected.abs() + 0.01 * expected.abs().max() + floor
        return bool(((values - expected).abs() <= self._tolerance * scale + 1e-300).all())
