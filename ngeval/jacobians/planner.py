"""Which module's calls show the rows of which parameter: found by trial, mended where wrong.

Every trainable parameter gets the cheapest way of seeing it that works, in this order:

0. nowhere, at a place whose module is never called, if it has other places (a tied embedding that
   is kept under a third name);
1. its module's rule (closed forms), or its module as a unit;
2. expanded to one copy for each sample, if its first dimension is 1 and its module has others
   inside (class tokens, position embeddings);
3. the nearest module around it that is called with samples, as a unit
   (``nn.MultiheadAttention`` uses its output layer's weight without calling it);
4. a loop over samples of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngeval.jacobians.capture import capture, forward
from ngeval.jacobians.capture_plan import CapturePlan
from ngeval.jacobians.inner_products import pieces
from ngeval.jacobians.layer_rules import HookedModule, rule_for
from ngeval.jacobians.layouts import CallLayout, call_layouts, trial_batch
from ngeval.model.function import ModelFunction
from ngeval.utils.memory import is_out_of_memory

REPLICATE, LOOP, NOWHERE = "replicate", "loop", "nowhere"


@dataclass(frozen=True)
class _Way:
    """One way of seeing a parameter at one of its places: a module's path, or a word for it."""

    kind: str
    module: str = ""


class Planner:
    """Makes a plan, and other plans without the ways that were found wrong."""

    def __init__(self, function: ModelFunction) -> None:
        """Run the model on two and on three samples."""
        self.function = function
        self.modules = dict(function.model.named_modules(remove_duplicate=False))
        self.expanded: set[int] = set()
        self.copies: list[str] = []
        self.trial = call_layouts(function)
        self._expand()
        self.ways = {slot: self._ways(slot) for slot in self._places()}

    @property
    def sample_bytes(self) -> int:
        """What autograd keeps for one sample more."""
        return self.trial.sample_bytes

    def _expand(self) -> None:
        """Make one for each sample of what is the same for all, where the model bears it.

        A layer after an expanded one sees samples, so each is tried with those before it.
        """
        for slot in self._places():
            path, _, _ = slot.rpartition(".")
            name = self.function.slots[slot]
            shape = self.function.parameters[name].shape
            if shape[:1] == (1,) and any(True for _ in self.modules[path].children()):
                self._try(self.expanded, [*self.copies, name])
        owners = {id(self.modules[slot.rpartition(".")[0]]) for slot in self._places()}
        for module in list(self.trial.calls):
            calls = self.trial.calls.get(module, [])
            if module in owners and calls and all(_same_for_all(call) for call in calls):
                self._try(self.expanded | {module}, self.copies)

    def _try(self, expanded: set[int], copies: list[str]) -> None:
        """Keep these expansions if the outputs stay what they are."""
        try:
            trial = call_layouts(self.function, expanded, copies)
        except Exception as error:  # whatever a user's module says of such tensors
            if is_out_of_memory(error):
                raise
            return
        if _equal(trial.outputs, self.trial.outputs):
            self.trial, self.expanded, self.copies = trial, expanded, copies

    def _places(self) -> list[str]:
        """The slots of trainable parameters; a module registered twice counts once."""
        seen: set[tuple[int, str]] = set()
        places = []
        for slot, name in self.function.slots.items():
            path, _, local = slot.rpartition(".")
            key = (id(self.modules[path]), local)
            if name in self.function.parameters and key not in seen:
                seen.add(key)
                places.append(slot)
        return places

    def _ways(self, slot: str) -> list[_Way]:
        path, _, _ = slot.rpartition(".")
        module = self.modules[path]
        calls = self.trial.calls.get(id(module), [])
        ways = []
        name = self.function.slots[slot]
        if not calls and sum(other == name for other in self.function.slots.values()) > 1:
            ways.append(_Way(NOWHERE))
        if name in self.copies:
            ways.append(_Way(REPLICATE))
        rule = rule_for(module)
        if (
            rule
            and calls
            and all(call.outputs[0] is not None and rule.applies(module, call) for call in calls)
        ):
            ways.append(_Way("rule", path))
        while True:
            if self._is_unit(path):
                ways.append(_Way("unit", path))
            if not path:
                return [*ways, _Way(LOOP)]
            path = path.rpartition(".")[0]

    def _is_unit(self, path: str) -> bool:
        calls = self.trial.calls.get(id(self.modules[path]), [])
        return (
            bool(calls)
            and all(any(layout is not None for layout in call.outputs) for call in calls)
            and not self._has_parts(path)
        )

    def _has_parts(self, path: str) -> bool:
        """Whether it holds parameters in parts, which are there only while the model runs."""
        slots, prefix = self.function.slots, f"{path}." if path else ""
        return any(slots[s] in self.function.split for s in slots if s.startswith(prefix))

    def plan(self) -> CapturePlan:
        """The plan of the first way left for each place, tried on two samples."""
        while True:
            plan = self._assemble()
            broken = self._broken(plan)
            if broken is None:
                return plan
            self.demote(broken)

    def demote(self, names: set[str]) -> bool:
        """Take the next way for the places of these parameters; False if one has none left."""
        left = True
        for slot, ways in self.ways.items():
            if self.function.slots[slot] in names:
                left = left and len(ways) > 1
                self.ways[slot] = ways[1:] if len(ways) > 1 else ways
        return left

    def _assemble(self) -> CapturePlan:
        looped = {
            self.function.slots[slot] for slot, ways in self.ways.items() if ways[0].kind == LOOP
        }
        owners: dict[str, HookedModule] = {}
        replicated = []
        for slot, ways in self.ways.items():
            name, way = self.function.slots[slot], ways[0]
            if name in looped or way.kind == NOWHERE:  # a loop sees all places of a parameter
                continue
            if way.kind == REPLICATE:
                replicated.append(name)
                continue
            owner = owners.setdefault(f"{way.kind} {way.module}", self._owner(way))
            prefix = f"{way.module}." if way.module else ""
            owner.parameters[slot.removeprefix(prefix)] = name
        order = [name for name in self.function.parameters if name in looped]
        return CapturePlan(list(owners.values()), list(dict.fromkeys(replicated)), order)

    def _owner(self, way: _Way) -> HookedModule:
        module = self.modules[way.module]
        calls = self.trial.calls[id(module)]
        rule = rule_for(module) if way.kind == "rule" else None
        return HookedModule(
            way.module, module, {}, calls, rule, replicate=id(module) in self.expanded
        )

    def _broken(self, plan: CapturePlan) -> set[str] | None:
        """The parameters of the first owner or copy with which the model does not run, if any."""
        trial = replace(self.function, inputs=trial_batch(self.function, 2))
        with torch.no_grad():
            expected = trial(trial.parameters)
        if _runs(trial, CapturePlan(plan.owners, plan.replicated), expected):
            return None
        parts = [CapturePlan([owner]) for owner in plan.owners]
        parts += [CapturePlan([], [name]) for name in plan.replicated]
        for part in parts:
            if not _runs(trial, part, expected):
                names = {name for owner in part.owners for name in owner.parameters.values()}
                return names | set(part.replicated)
        return None


def _runs(trial: ModelFunction, plan: CapturePlan, expected: Tensor) -> bool:
    """Whether the model gives the same outputs as ever, and rows, with this plan."""
    vectors = torch.ones_like(expected).unsqueeze(1)
    try:
        outputs = forward(trial, plan, trial.inputs)[2]
        for term in capture(trial, plan, slice(0, len(expected)), vectors):
            for units in pieces(term, len(expected)):
                term.rows(slice(None), slice(None), units)
                break
    except Exception as error:  # whatever a user's module says of such inputs
        if is_out_of_memory(error):
            raise
        return False
    return _equal(outputs, expected)


def _equal(outputs: Tensor, expected: Tensor) -> bool:
    """But for rounding."""
    scale = float(expected.abs().max())
    return outputs.shape == expected.shape and torch.allclose(
        outputs, expected, rtol=1e-3, atol=1e-3 * scale
    )


def _same_for_all(call: CallLayout) -> bool:
    """Whether the call gives one tensor, which is the same for all samples."""
    return len(call.outputs) == 1 and call.outputs[0] is None and call.shapes[0] is not None
