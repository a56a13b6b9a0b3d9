"""Rows of recurrent layers in closed form: their gates are affine maps that are shared over time.

``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` run as one operation, inside which no gradient can be read
off. From the recorded inputs of a call its steps are computed again, one by one, and the
gradients at its outputs are pulled back to the outputs of every affine map:

    i_t = W_ih x_t + b_ih,   s_t = W_hh h_(t−1) + b_hh,   h_t = W_hr m_t (LSTM with projections).

Their rows are those of linear layers at T positions. A cell is a layer of one step.

Letters: n samples, k sequences of a sample, b = n·k, q cotangents, t times, h units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_unflatten

from ngeval.jacobians.capture_plan import HookedModule, LayerRule, RecordedCall, for_each
from ngeval.jacobians.layouts import RAGGED, TRIAL_SIZES, CallLayout
from ngeval.jacobians.terms import AffineTerm, Term
from ngeval.model.autograd import autograd_enabled
from ngeval.model.function import ModelFunction

LSTM, GRU = "LSTM", "GRU"


@dataclass(frozen=True)
class _AffineMap:
    """One affine map of a layer.

    Attributes:
        weight: path of the weight in the module.
        bias: path of the bias, None if the layer has none.
        inputs: shape ``(b, t, i)``.
        outputs: in a graph, of all times together, ``(b, t, o)``, or one ``(b, o)`` for each.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor | list[Tensor]


@dataclass(frozen=True)
class _Sequences:
    """The inputs of a call, batch first.

    Attributes:
        inputs: x, shape ``(b, t, i)``.
        states: h and, of an LSTM, c, each ``(b, layers·directions, h)``.
        present: which times belong to a sequence, ``(b, t)``; None: all.
        repeats: k.
    """

    inputs: Tensor
    states: list[Tensor]
    present: Tensor | None
    repeats: int


class _Unrolled:
    """The steps of a layer, in a graph from the outputs of its affine maps to its own outputs."""

    def __init__(self, module: Any, weights: dict[str, Tensor], sequences: _Sequences) -> None:
        self.mode, self.weights, self.present = _mode(module), weights, sequences.present
        self.bias = bool(module.bias)
        self.maps: list[_AffineMap] = []
        finals: list[list[Tensor]] = []
        inputs = sequences.inputs
        cell = isinstance(module, nn.RNNCellBase)
        directions = 1 if cell else 1 + module.bidirectional
        for layer in range(1 if cell else module.num_layers):
            outputs = []
            for reverse in range(directions):
                suffix = "" if cell else f"_l{layer}" + reverse * "_reverse"
                initial = [state[:, layer * directions + reverse] for state in sequences.states]
                hidden, final = self._direction(inputs, initial, suffix, reverse=bool(reverse))
                outputs.append(hidden)
                finals.append(final)
            inputs = torch.cat(outputs, 2)
        self.output = inputs
        self.states = [torch.stack(parts, 1) for parts in zip(*finals, strict=True)]

    def _direction(
        self, inputs: Tensor, states: list[Tensor], suffix: str, *, reverse: bool
    ) -> tuple[Tensor, list[Tensor]]:
        entering = self._affine("ih" + suffix, inputs)
        self._record("ih" + suffix, inputs, entering)
        times = range(inputs.shape[1])
        hidden: dict[int, Tensor] = {}
        before: dict[int, Tensor] = {}
        recurrent: dict[int, Tensor] = {}
        inner: dict[int, Tensor] = {}
        projection = self.weights.get("weight_hr" + suffix)
        steps = entering.unbind(1)
        for t in reversed(times) if reverse else times:
            before[t] = states[0]
            recurrent[t] = self._affine("hh" + suffix, states[0])
            new = _step(self.mode, steps[t], recurrent[t], states)
            if projection is not None:
                inner[t] = new[0]
                new[0] = linear(new[0], projection)
            hidden[t] = new[0]
            if self.present is not None:
                here = self.present[:, t : t + 1]
                new = [torch.where(here, a, b) for a, b in zip(new, states, strict=True)]
            states = new
        in_order = [hidden[t] for t in times]
        # An LSTM and a plain network see the sum i + s alone: one gradient is that of both.
        of_state = [recurrent[t] for t in times] if self.mode == GRU else entering
        self._record("hh" + suffix, torch.stack([before[t] for t in times], 1), of_state)
        if projection is not None:
            stacked = torch.stack([inner[t] for t in times], 1)
            self.maps.append(_AffineMap("weight_hr" + suffix, None, stacked.detach(), in_order))
        return torch.stack(in_order, 1), states

    def _affine(self, name: str, inputs: Tensor) -> Tensor:
        bias = self.weights[f"bias_{name}"] if self.bias else None
        outputs = linear(inputs, self.weights[f"weight_{name}"], bias)
        return outputs if outputs.requires_grad else outputs.requires_grad_()

    def _record(self, name: str, inputs: Tensor, outputs: Tensor | list[Tensor]) -> None:
        bias = f"bias_{name}" if self.bias else None
        self.maps.append(_AffineMap(f"weight_{name}", bias, inputs.detach(), outputs))

    def pull_back(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients at each map's outputs, ``(q, b, t, o)``, given those at some outputs."""
        targets = {
            id(part): part
            for each in self.maps
            for part in (each.outputs if isinstance(each.outputs, list) else [each.outputs])
        }
        tensors, single = list(targets.values()), len(gradients[0]) == 1
        pulled = torch.autograd.grad(
            outputs,
            tensors,
            [gradient[0] if single else gradient for gradient in gradients],
            is_grads_batched=not single,
            allow_unused=True,
        )
        count = len(gradients[0])
        found = {
            id(t): t.new_zeros(count, *t.shape) if g is None else g.unsqueeze(0) if single else g
            for t, g in zip(tensors, pulled, strict=True)
        }
        return [
            torch.stack([found[id(part)] for part in each.outputs], 2)
            if isinstance(each.outputs, list)
            else found[id(each.outputs)]
            for each in self.maps
        ]


def _mode(module: Any) -> str:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return LSTM
    return GRU if isinstance(module, nn.GRU | nn.GRUCell) else str(module.nonlinearity)


def _step(mode: str, entering: Tensor, recurrent: Tensor, states: list[Tensor]) -> list[Tensor]:
    """The states after one step, from i, s and the states before; of an LSTM m and c."""
    if mode == GRU:
        reset_in, update_in, new_in = entering.chunk(3, 1)
        reset_state, update_state, new_state = recurrent.chunk(3, 1)
        update = (update_in + update_state).sigmoid()
        new = (new_in + (reset_in + reset_state).sigmoid() * new_state).tanh()
        return [new + update * (states[0] - new)]
    total = entering + recurrent
    if mode == LSTM:
        enter, forget, content, leave = total.chunk(4, 1)
        cell = forget.sigmoid() * states[1] + enter.sigmoid() * content.tanh()
        return [leave.sigmoid() * cell.tanh(), cell]
    return [total.tanh() if mode == "tanh" else total.relu()]


def _recurrent_terms(function: ModelFunction, call: RecordedCall) -> list[Term]:
    """The affine terms of a call of a whole layer."""
    module: Any = call.hooked.module
    args, kwargs = tree_unflatten(call.leaves, call.spec)
    inputs = args[0] if args else kwargs["input"]
    batch_dim = 0 if module.batch_first else 1
    present, places = None, None
    if isinstance(inputs, PackedSequence):
        inputs, present, places = _padded(inputs)
    else:
        inputs = inputs.movedim(batch_dim, 0)
    count = len(inputs)
    initial = [state.movedim(1, 0) for state in _given_states(args, kwargs)] or [
        inputs.new_zeros(count, module.num_layers * (1 + module.bidirectional), size)
        for size in _state_sizes(module)
    ]
    repeats = call.layout.outputs[-1].repeats  # type: ignore[union-attr]  # `_recurrent_applies`
    sequences = _Sequences(inputs, initial, present, repeats)

    gradients = {}
    for index, gradient in call.gradients.items():
        place = index - (len(call.layout.outputs) - len(initial))
        if place >= 0:
            gradients[1 + place] = _batch_second(gradient, 1)
        elif places is None:
            gradients[0] = _batch_second(gradient, batch_dim)
        else:
            gradients[0] = _scattered(gradient, inputs.shape[:2], places)
    return _terms(function, call.hooked, sequences, gradients)


def _cell_terms(function: ModelFunction, calls: list[RecordedCall]) -> list[Term]:
    """The affine terms of calls of a cell: each is a sequence of one step, of the same sample."""
    module: Any = calls[0].hooked.module
    repeats = calls[0].layout.outputs[0].repeats  # type: ignore[union-attr]  # `_cell_applies`
    count = len(next(iter(calls[0].gradients.values())))
    parts: list[list[Tensor]] = []
    for call in calls:
        args, kwargs = tree_unflatten(call.leaves, call.spec)
        inputs = args[0] if args else kwargs["input"]
        initial = _given_states(args, kwargs) or [
            inputs.new_zeros(len(inputs), size) for size in _state_sizes(module)
        ]
        parts.append([part.unflatten(0, (count, repeats)) for part in (inputs, *initial)])
    inputs, *initial = (
        torch.cat(part, 1).flatten(0, 1).unsqueeze(1) for part in zip(*parts, strict=True)
    )
    gradients = {}
    for place in range(len(initial)):
        by_call = [call.gradients.get(place) for call in calls]
        known = next((g for g in by_call if g is not None), None)
        if known is not None:
            whole = torch.cat([torch.zeros_like(known) if g is None else g for g in by_call], 2)
            gradients[1 + place] = _batch_second(whole, 0).unsqueeze(2)
    sequences = _Sequences(inputs, initial, None, repeats * len(calls))
    return _terms(function, calls[0].hooked, sequences, gradients)


def _terms(
    function: ModelFunction,
    hooked: HookedModule,
    sequences: _Sequences,
    gradients: dict[int, Tensor],
) -> list[Term]:
    """The terms of the steps, given gradients ``(q, b, …)`` at the output (0) and states (1, 2)."""
    weights = function.tensors_of(hooked.name)
    with autograd_enabled():
        unrolled = _Unrolled(hooked.module, weights, sequences)
        outputs = [unrolled.output, *unrolled.states]
        chosen = [outputs[place] for place in gradients]
        pulled = unrolled.pull_back(chosen, list(gradients.values()))
    terms: list[Term] = []
    for each, gradient in zip(unrolled.maps, pulled, strict=True):
        weight, bias = hooked.parameters.get(each.weight), None
        if each.bias is not None:
            bias = hooked.parameters.get(each.bias)
        if weight or bias:
            terms.append(
                AffineTerm(
                    weight,
                    bias,
                    weights[each.weight].shape,
                    _by_sample(each.inputs, sequences),
                    _samples_first(gradient, sequences.repeats),
                    present=_of_samples(sequences),
                )
            )
    return terms


def _by_sample(inputs: Tensor, sequences: _Sequences) -> Callable[[slice], Tensor]:
    if sequences.present is not None:
        inputs = inputs * sequences.present.unsqueeze(2)
    chunks = inputs.unflatten(0, (-1, sequences.repeats)).flatten(1, 2).unsqueeze(2)
    return lambda samples: chunks[samples]


def _samples_first(gradient: Tensor, repeats: int) -> Tensor:
    """``(q, n·k, t, o)`` to ``(n, q, k·t, 1, o)``."""
    chunks: Tensor = gradient.unflatten(1, (-1, repeats)).movedim(1, 0)
    return chunks.flatten(2, 3).unsqueeze(3)


def _of_samples(sequences: _Sequences) -> Tensor | None:
    present = sequences.present
    if present is None:
        return None
    chunks: Tensor = present.unflatten(0, (-1, sequences.repeats)).flatten(1)
    return chunks


def _batch_second(gradient: Tensor, dim: int) -> Tensor:
    """``(n, q, …, k, …)``, k in place of dimension ``dim`` of a tensor, to ``(q, n·k, …)``."""
    return gradient.movedim(2 + dim, 1).flatten(0, 1).transpose(0, 1)


def _padded(packed: PackedSequence) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The sequences, which times they have, and sequence and time of every row of ``data``."""
    inputs, lengths = pad_packed_sequence(packed, batch_first=True)
    lengths = lengths.to(inputs.device)
    present = torch.arange(inputs.shape[1], device=inputs.device) < lengths.unsqueeze(1)
    order = packed.sorted_indices
    in_order = present if order is None else present[order]
    times, sequences = in_order.T.nonzero(as_tuple=True)
    return inputs, present, (sequences if order is None else order[sequences], times)


def _scattered(gradient: Tensor, shape: torch.Size, places: tuple[Tensor, Tensor]) -> Tensor:
    """Gradients at the rows of packed outputs, ``(q, rows, o)``, as ``(q, b, t, o)``."""
    whole = gradient.new_zeros(len(gradient), *shape, gradient.shape[2])
    whole[:, places[0], places[1]] = gradient
    return whole


def _state_sizes(module: Any) -> list[int]:
    """Units of the states that a layer starts from."""
    output = getattr(module, "proj_size", 0) or module.hidden_size
    return [output, module.hidden_size] if _mode(module) == LSTM else [output]


def _given_states(args: Any, kwargs: Any) -> list[Tensor]:
    states = args[1] if len(args) > 1 else kwargs.get("hx")
    return (
        list(states) if isinstance(states, tuple | list) else [states] if states is not None else []
    )


def _recurrent_applies(module: Any, layout: CallLayout) -> bool:
    """Whether a call is that of a batch of sequences, each of a single sample."""
    outputs, inputs = layout.outputs, layout.inputs
    state = outputs[-1]
    if state is None or state.dim != 1 or inputs[0] is None:
        return False
    if RAGGED in (inputs[0], outputs[0]):
        return all(part in (None, RAGGED) or part.dim == 1 for part in (*inputs[:1], *inputs[4:]))
    batch_dim = 0 if module.batch_first else 1
    return (
        len(layout.shapes[0] or ()) == 3
        and inputs[0].dim == batch_dim
        and all(part is None or part.dim == 1 for part in inputs[1:])
    )


def _cell_applies(_: Any, layout: CallLayout) -> bool:
    batched = len(layout.shapes[0] or ()) == 2
    return batched and all(part is None or part.dim == 0 for part in layout.inputs + layout.outputs)


def _affine_maps(module: Any) -> list[tuple[str, str]]:
    """Weights and biases by path."""
    names = [name for name, _ in module.named_parameters() if name.startswith("weight_")]
    return [(name, name.replace("weight_", "bias_", 1)) for name in names]


def _gate_scalars(module: Any, layout: CallLayout) -> int:
    """Outputs of the affine maps of one sample."""
    shape = layout.shapes[0] or torch.Size((0, 1))
    steps = shape.numel() // shape[-1] // TRIAL_SIZES[0]
    rows = sum(len(weight) for name, weight in module.named_parameters() if "weight_" in name)
    return int(steps * rows)


RECURRENT = LayerRule(
    _recurrent_applies, for_each(_recurrent_terms), _affine_maps, inner_scalars=_gate_scalars
)
CELL = LayerRule(_cell_applies, _cell_terms, _affine_maps, inner_scalars=_gate_scalars)

RECURRENT_RULES: dict[type[nn.Module], LayerRule] = {
    nn.RNN: RECURRENT,
    nn.LSTM: RECURRENT,
    nn.GRU: RECURRENT,
    nn.RNNCell: CELL,
    nn.LSTMCell: CELL,
    nn.GRUCell: CELL,
}
