"""What a model must satisfy before it is graded, tried on the batch itself."""

from __future__ import annotations

import statistics
import zlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngeval.errors import EngineError, ModelError
from ngeval.jacobians import EngineChoice, RowSource, row_matrix
from ngeval.jacobians.inner_products import inner_product
from ngeval.jacobians.vjp_rows import loop_rows
from ngeval.model.autograd import Parameters, model_errors
from ngeval.model.checks import is_finite
from ngeval.model.function import ModelFunction
from ngeval.model.inputs import map_tensors, named_tensors
from ngeval.model.sharding import fingerprint

ROUNDING_SAMPLES = 5
"""At most this many samples are differentiated again to measure the rounding of rows."""


def run_model(function: ModelFunction, chosen: Tensor | None = None) -> Tensor:
    """The raw outputs of the batch, each rank's part joined, or of some of its samples."""
    inputs = None
    if chosen is not None:
        inputs = map_tensors(function.inputs, lambda tensor: tensor[chosen.to(tensor.device)])

    def run() -> Tensor:
        part = function.local(at_least=1)
        with torch.no_grad(), model_errors():
            outputs = part(part.parameters, inputs, fused=True).detach()
        if part is function:
            return outputs
        local = function.shards.local_slice(function.num_samples)
        return outputs[: local.stop - local.start]  # none where the sample is another rank's

    return function.shards.concatenate(run)


def run_first(function: ModelFunction) -> tuple[ModelFunction, Tensor]:
    """The function as its model has to be run, and its raw outputs.

    A model that differentiates inside forward (forces, the residual of a differential equation)
    needs a graph even where its outputs alone are asked for.
    """
    try:
        return function, run_model(function)
    except ModelError as error:
        if "does not require grad" not in str(error):
            raise
        recording = replace(function, inner_gradients=True)
        try:
            return recording, run_model(recording)
        except ModelError:
            raise error from None


def check_same_problem(function: ModelFunction, targets: Any, options: object = ()) -> None:
    """Raise unless a problem is the same on all ranks of its group.

    Args:
        function: the model at θ on the whole batch.
        targets: the labels.
        options: what else has to be the same; its ``repr`` is compared.

    Raises:
        InputError: something differs between ranks.
    """
    if function.shards.alone:
        return
    weights = {n: p for n, p in function.originals.items() if n not in function.split}
    weights |= function.buffers
    function.shards.check_same(
        {
            "the inputs": fingerprint(tensor for _, tensor in named_tensors(function.inputs)),
            "the targets": fingerprint(tensor for _, tensor in named_tensors(targets)),
            "the weights": fingerprint(weights.values()),
            "the options": zlib.crc32(repr(options).encode()),
        }
    )


def check_outputs(function: ModelFunction, outputs: Tensor) -> None:
    """Raise unless outputs are finite floating-point numbers, batch first.

    Raises:
        ModelError: they are not.
    """
    if not outputs.is_floating_point():
        raise ModelError(f"the model's outputs are {outputs.dtype}, not floating-point numbers")
    if outputs.ndim < 2 or outputs.shape[0] != function.num_samples:
        raise ModelError(
            f"the model's outputs have shape {tuple(outputs.shape)}; expected "
            f"({function.num_samples}, …, outputs per sample), batch first"
        )
    if not is_finite(outputs):
        bad = (~torch.isfinite(outputs)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ModelError(f"the outputs of samples {bad[:10]} are NaN or infinite")


def check_split(function: ModelFunction, outputs: Tensor) -> None:
    """Raise if a ragged batch, passed as a whole, has other outputs than its samples alone.

    Raises:
        EngineError: it has.
    """
    if function.ragged is None:
        return
    whole = replace(function, inputs=function.ragged.converted(function.ragged.inputs), ragged=None)
    try:
        with torch.no_grad():
            together = whole(whole.parameters)
    except Exception:  # the model may take only single samples
        return
    allowed = max(torch.finfo(outputs.dtype).eps, function.inner_epsilon) ** 0.5
    if together.shape != outputs.shape or not torch.allclose(
        together, outputs, rtol=allowed, atol=allowed * float(outputs.abs().max())
    ):
        raise EngineError(
            "the samples that split= gives have other outputs than the batch as a whole (shapes "
            f"{tuple(outputs.shape)} and {tuple(together.shape)}): it gives other samples or "
            "another order, or the samples of the batch see each other"
        )


def check_repeatable(function: ModelFunction, outputs: Tensor) -> None:
    """Raise unless a second run and the halves of a shuffled batch give the same outputs.

    Every rank checks its own samples, and another rank's where it has only one.

    Raises:
        ModelError: two runs differ, or the model does not run on half of the batch.
        EngineError: a sample's outputs depend on the others.
    """
    shards = function.shards
    checked = shards.local_slice(function.num_samples, at_least=2)
    shards.synchronized(lambda: _check_repeatable(function.on(checked), outputs[checked]))


def _check_repeatable(function: ModelFunction, outputs: Tensor) -> None:
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
    halves = list(order.chunk(2)) if len(outputs) > 1 else []
    again = [_run_half(function, half) for half in halves]
    expected = [outputs[half.to(outputs.device)] for half in halves]
    # Halves that repeat the outputs to the last digits already are a second run.
    if not halves or not all(map(_equal, again, expected)):
        _check_deterministic(function, outputs)
    # The order of summation may differ between the two.
    epsilon = max(torch.finfo(outputs.dtype).eps, function.inner_epsilon)
    allowed = epsilon**0.5 * float(outputs.abs().max())
    for half, actual, whole in zip(halves, again, expected, strict=True):
        _check_independent(half, actual, whole, allowed)


def _run_half(function: ModelFunction, half: Tensor) -> Tensor:
    try:
        return run_model(function, half)
    except ModelError as error:
        raise ModelError(
            f"the model runs on the whole batch, but not on half of it: {error}"
        ) from error


def _equal(actual: Tensor, expected: Tensor) -> bool:
    """Whether tensors agree but for a hundred roundings."""
    tolerance = 100 * torch.finfo(expected.dtype).eps
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance
    )


def _check_deterministic(function: ModelFunction, first: Tensor) -> None:
    second = run_model(function)
    if not _equal(second, first):
        raise ModelError(
            "the model gave two different outputs for the same batch (largest difference "
            f"{float((first - second).abs().max()):.3g}); something in it is random or keeps "
            "state: call model.eval(), or switch it off"
        )


def _check_independent(half: Tensor, actual: Tensor, expected: Tensor, allowed: float) -> None:
    if actual.shape != expected.shape:
        raise EngineError(
            f"half of the batch gives outputs of shape {tuple(actual.shape)} in place of "
            f"{tuple(expected.shape)}: a sample's outputs depend on the batch (trimmed padding?)"
        )
    gaps = (actual - expected).abs().flatten(1).amax(1)
    if float(gaps.max()) > allowed:
        worst = int(half[int(gaps.argmax())])
        raise EngineError(
            "the samples of the batch see each other: the outputs of sample "
            f"{worst} change by {float(gaps.max()):.2g} when it is batched with others (batch "
            "statistics, attention over the batch?), so a per-sample Fisher is not defined"
        )


def check_gradients_add_up(choice: EngineChoice, gradient: Parameters, residual: Tensor) -> None:
    """Raise unless Σ_n g_n·v = g·v for a random v: an engine may miss parameters.

    Where they do not, float64 decides if the model runs in it: a ReLU may be at its kink.

    Raises:
        EngineError: they do not add up.
    """
    off = missed_gradients(choice, gradient)
    if off and (double := choice.in_double()) is not None:
        function = double.rows.function
        off = missed_gradients(double, function.vjp(residual.to(function.dtype)))
    if off:
        raise EngineError(
            "per-sample gradients do not add up to the batch gradient for "
            f"{', '.join(off[:5])} (relative gap): the {choice.rows.engine_name} engine does not "
            "treat this model rightly; try engine='loop', and report it"
        )


def missed_gradients(choice: EngineChoice, gradient: Parameters) -> list[str]:
    """The parameters whose gradients do not add up, each with its relative gap."""
    size = {name: float(products.abs().sum()) for name, products in choice.products.items()}
    tolerance = choice.rows.function.epsilon**0.5
    largest = max(size.values())
    off = []
    for name, products in choice.products.items():
        expected = float(inner_product(gradient[name], choice.probe.direction[name]))
        gap = abs(float(products.sum()) - expected)
        # A gradient that vanishes but for rounding agrees only to that rounding.
        if gap > tolerance * (size[name] + 1000 * tolerance * largest):
            off.append(f"{name} ({gap / max(size[name], 1e-300):.1e})")
    return off


class RowRounding(NamedTuple):
    """The error of rows by rounding, relative to their lengths.

    Attributes:
        relative: the median length of the error.
        entries: the root mean square error of each entry, float64, shape ``(P,)``.
    """

    relative: float
    entries: Tensor


def row_rounding(
    source: RowSource, residual: Tensor, samples: int = ROUNDING_SAMPLES
) -> RowRounding:
    """The error of a few rows by rounding, against float64.

    The reference is plain autograd on a sample alone.

    Args:
        source: of the rows.
        residual: u, for the shape of cotangents.
        samples: at most this many.

    Raises:
        ModelError: the model does not run in float64.
    """
    part, fields = source.local(residual)
    wide, generator = part.function.converted(torch.float64), torch.Generator().manual_seed(0)
    cotangents = torch.randn(fields.shape, generator=generator).to(fields)
    gaps: list[float] = []
    squares = torch.zeros(source.function.num_parameters, dtype=torch.float64, device=fields.device)
    for n in range(0, len(fields), max(1, -(-len(fields) // samples))):
        sample = slice(n, n + 1)
        vector = cotangents[sample].unsqueeze(1)
        rows = row_matrix(replace(part, function=part.function.on(sample)), vector)[0]
        with model_errors():
            alone = loop_rows(wide, sample, vector)
        exact = torch.cat([alone[name].reshape(-1) for name in wide.parameters])
        error = (rows - exact) / exact.norm().clamp_min(1e-300)
        gaps.append(float(error.norm()))
        squares += error.square()
    values = [gap for gaps in source.shards.gather(gaps) for gap in gaps]
    entries = (source.shards.sum(lambda: squares) / len(values)).sqrt()
    return RowRounding(statistics.median(values), entries)
