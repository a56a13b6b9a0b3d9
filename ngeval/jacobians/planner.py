"""The making of a capture plan: which module's calls show the rows of which parameter, by trial.

A parameter has one or more places: slots of modules that hold it. For each place the cheapest
strategy is taken that works, in this order:

0. nowhere, if the module there is never called and the parameter has other places (a tied embedding
   that is kept under a third name);
1. its module's rule (closed forms), that of a linear layer where a bare parameter is the weight of
   ``F.linear`` (``nn.MultiheadAttention``'s joint projection), or the VJP of its module as a
   function;
2. expanded to one copy for each sample, if its first dimension is 1 and its module has children
   (class tokens, position embeddings);
3. the VJP of the nearest enclosing module that is called with samples (``nn.MultiheadAttention``
   uses its output layer's weight without calling it);
4. a loop over samples of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ngeval.jacobians.capture import capture, forward
from ngeval.jacobians.capture_plan import CapturePlan, HookedModule
from ngeval.jacobians.inner_products import pieces
from ngeval.jacobians.layer_rules import RULES, rule_for
from ngeval.jacobians.layouts import RAGGED, CallLayout, call_layouts, trial_batch
from ngeval.jacobians.terms import ALL
from ngeval.model.function import ModelFunction
from ngeval.utils.memory import is_out_of_memory

NOWHERE, RULE, MODULE_VJP, REPLICATE, LOOP = "nowhere", "rule", "module-vjp", "replicate", "loop"
FUNCTION, INTERLEAVED = "function", "interleaved-function"


@dataclass(frozen=True)
class _Strategy:
    """One way to obtain a parameter's rows at one of its places, with the module to hook."""

    kind: str
    module: str = ""


class Planner:
    """Makes a plan, and then other plans without the strategies that turned out wrong.

    Attributes:
        strategies: by place, those that are left, best first.
    """

    def __init__(self, function: ModelFunction) -> None:
        """Run the model on two and on three samples."""
        self.function = function
        self.modules: dict[str, nn.Module] = dict(
            function.model.named_modules(remove_duplicate=False)
        )
        self.expanded: set[int] = set()
        self.copies: list[str] = []
        self.trial = call_layouts(function)
        places = self._places()
        self._expand(places)
        self.strategies = {slot: self._strategies_for(slot) for slot in places}

    def plan(self) -> CapturePlan:
        """The plan of the first strategy left for each place with which the model runs."""
        while True:
            plan = self._assemble()
            failing = self._failing(plan)
            if failing is None:
                return plan
            self.demote(failing)

    def demote(self, names: set[str]) -> bool:
        """Take the next strategy for the places of these parameters; False if one has none left."""
        all_have = True
        for slot, strategies in self.strategies.items():
            if self.function.slots[slot] in names:
                all_have = all_have and len(strategies) > 1
                self.strategies[slot] = strategies[1:] or strategies
        return all_have

    def _places(self) -> list[str]:
        """The slots of trainable parameters; a module that is registered twice counts once."""
        seen: set[tuple[int, str]] = set()
        places = []
        for slot, name in self.function.slots.items():
            path, _, local = slot.rpartition(".")
            key = (id(self.modules[path]), local)
            if name in self.function.parameters and key not in seen:
                seen.add(key)
                places.append(slot)
        return places

    def _expand(self, places: list[str]) -> None:
        """Expand to one copy per sample what is the same for all, where the model allows it.

        A layer after an expanded one sees samples, so each is tried with those before it.
        """
        calls = [call for calls in self.trial.calls.values() for call in calls]
        # torch crashes on initial states of a wrong shape beside a packed sequence.
        packed = any(RAGGED in call.inputs for call in calls)
        for slot in [] if packed else places:
            name = self.function.slots[slot]
            shape = self.function.parameters[name].shape
            if shape[:1] == (1,) and any(True for _ in self._module_of(slot).children()):
                self._try_expanded(self.expanded, [*self.copies, name])
        with_parameters = {id(self._module_of(slot)) for slot in places}
        for key in list(self.trial.calls):
            calls = self.trial.calls.get(key, [])
            if key in with_parameters and calls and all(_same_for_all(call) for call in calls):
                self._try_expanded(self.expanded | {key}, self.copies)

    def _module_of(self, slot: str) -> nn.Module:
        return self.modules[slot.rpartition(".")[0]]

    def _try_expanded(self, expanded: set[int], copies: list[str]) -> None:
        """Keep these expansions if they leave the outputs unchanged."""
        try:
            trial = call_layouts(self.function, expanded, copies)
        except Exception as error:  # a user's module may raise anything on such tensors
            if is_out_of_memory(error):
                raise
            return
        if _equal(trial.outputs, self.trial.outputs):
            self.trial, self.expanded, self.copies = trial, expanded, copies

    def _strategies_for(self, slot: str) -> list[_Strategy]:
        path = slot.rpartition(".")[0]
        module, name = self.modules[path], self.function.slots[slot]
        calls = self.trial.calls.get(id(module), [])
        strategies = []
        if not calls and list(self.function.slots.values()).count(name) > 1:
            strategies.append(_Strategy(NOWHERE))
        if name in self.copies:
            strategies.append(_Strategy(REPLICATE))
        rule = rule_for(module)
        if (
            rule
            and calls
            and not (rule.inner_scalars and self._is_in_parts(path))
            and all(call.outputs[0] is not None and rule.applies(module, call) for call in calls)
        ):
            strategies.append(_Strategy(RULE, path))
        elif weight := self._weight_of_function(name):
            strategies.append(_Strategy(FUNCTION, weight))
            if self._may_be_interleaved(weight):
                strategies.append(_Strategy(INTERLEAVED, weight))
        parts = path.split(".")
        enclosing = dict.fromkeys(".".join(parts[:i]) for i in range(len(parts), -1, -1))
        strategies += [_Strategy(MODULE_VJP, p) for p in enclosing if self._can_differentiate(p)]
        return [*strategies, _Strategy(LOOP)]

    def _weight_of_function(self, name: str) -> str | None:
        """The weight of ``F.linear`` if this parameter is that or its bias, and nothing else is."""
        slots = list(self.function.slots.values())
        keys = [key for key in self.trial.calls if isinstance(key, tuple) and name in key]
        if len(keys) != 1 or slots.count(name) > 1 or self.function.split:
            return None
        weight, bias = keys[0]
        shared = sum(isinstance(key, tuple) and key[0] == weight for key in self.trial.calls) > 1
        linear = RULES[nn.Linear]
        fits = all(
            call.outputs[0] is not None and linear.applies(None, call)
            for call in self.trial.calls[keys[0]]
        )
        return weight if fits and not shared and weight != bias else None

    def _can_differentiate(self, path: str) -> bool:
        """Whether a module is called with samples, and has all its parameters on this rank."""
        calls = self.trial.calls.get(id(self.modules[path]), [])
        per_sample = all(
            any(layout is not None for layout in call.outputs)
            and RAGGED not in (*call.inputs, *call.outputs)
            for call in calls
        )
        return bool(calls) and per_sample and not self._is_in_parts(path)

    def _is_in_parts(self, path: str) -> bool:
        slots, prefix = self.function.slots, f"{path}." if path else ""
        return any(slots[s] in self.function.split for s in slots if s.startswith(prefix))

    def _assemble(self) -> CapturePlan:
        slots = self.function.slots
        first = {slot: strategies[0] for slot, strategies in self.strategies.items()}
        looped = {slots[slot] for slot, strategy in first.items() if strategy.kind == LOOP}
        hooked: dict[_Strategy, HookedModule] = {}
        replicated = []
        for slot, strategy in first.items():
            name = slots[slot]
            # A loop covers all places of a parameter.
            if name in looped or strategy.kind == NOWHERE:
                continue
            if strategy.kind == REPLICATE:
                replicated.append(name)
                continue
            if strategy.kind in (FUNCTION, INTERLEAVED):
                linear = hooked.setdefault(strategy, self._linear_function(strategy))
                linear.parameters["weight" if name == strategy.module else "bias"] = name
                continue
            if strategy not in hooked:
                module = self.modules[strategy.module]
                rule = rule_for(module) if strategy.kind == RULE else None
                calls, replicate = self.trial.calls[id(module)], id(module) in self.expanded
                hooked[strategy] = HookedModule(strategy.module, module, {}, calls, rule, replicate)
            prefix = f"{strategy.module}." if strategy.module else ""
            hooked[strategy].parameters[slot.removeprefix(prefix)] = name
        in_order = [name for name in self.function.parameters if name in looped]
        return CapturePlan(list(hooked.values()), list(dict.fromkeys(replicated)), in_order)

    def _calls_of_function(self, weight: str) -> list[CallLayout]:
        calls = self.trial.calls
        return next(calls[key] for key in calls if isinstance(key, tuple) and key[0] == weight)

    def _may_be_interleaved(self, weight: str) -> bool:
        parts = [part for call in self._calls_of_function(weight) for part in call.outputs]
        return any(part is not None and part.repeats > 1 for part in parts)

    def _linear_function(self, strategy: _Strategy) -> HookedModule:
        """What stands for the uses of a weight by ``F.linear``."""
        weight = strategy.module
        outputs, inputs = self.function.parameters[weight].shape
        module = nn.Linear(inputs, outputs, device="meta")
        calls = self._calls_of_function(weight)
        if strategy.kind == INTERLEAVED:
            calls = [call.interleaved() for call in calls]
        return HookedModule(weight, module, {}, calls, RULES[nn.Linear], of_function=weight)

    def _failing(self, plan: CapturePlan) -> set[str] | None:
        """The parameters of the first hook or copy with which the model does not run, if any."""
        trial = replace(self.function, inputs=trial_batch(self.function, 2))
        with torch.no_grad():
            expected = trial(trial.parameters)
        if _runs(trial, CapturePlan(plan.modules, plan.replicated), expected):
            return None
        parts = [CapturePlan([hooked]) for hooked in plan.modules]
        parts += [CapturePlan([], [name]) for name in plan.replicated]
        for part in parts:
            if not _runs(trial, part, expected):
                return set(part.uses())
        return None


def _runs(trial: ModelFunction, plan: CapturePlan, expected: Tensor) -> bool:
    """Whether the model gives its usual outputs with this plan, and rows can be computed."""
    vectors = torch.ones_like(expected).unsqueeze(1)
    try:
        outputs = forward(trial, plan, trial.inputs).outputs
        for term in capture(trial, plan, slice(0, len(expected)), vectors):
            term.rows(ALL, ALL, next(pieces(term, len(expected))))
    except Exception as error:  # a user's module may raise anything on such inputs
        if is_out_of_memory(error):
            raise
        return False
    return _equal(outputs, expected)


def _equal(outputs: Tensor, expected: Tensor) -> bool:
    """Up to rounding."""
    scale = float(expected.abs().max())
    return outputs.shape == expected.shape and torch.allclose(
        outputs, expected, rtol=1e-3, atol=1e-3 * scale
    )


def _same_for_all(call: CallLayout) -> bool:
    """Whether the call returns a single tensor, which is the same for all samples."""
    return len(call.outputs) == 1 and call.outputs[0] is None and call.shapes[0] is not None
