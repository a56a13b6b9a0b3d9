"""Names of weights in files and in models: the prefixes by which they differ."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""The components that ``torch.compile``, FSDP and activation checkpointing insert into names."""

WRAPPERS = frozenset({"module", "model", "net", "network", "_forward_module", "backbone_model"})
"""The names that programs which wrap a whole model give it."""

SAMPLES = 32
"""Names of the model by which prefixes are proposed."""

MAX_PROPOSED = 12
"""Proposed prefixes that are compared on all names."""

Shapes = Mapping[str, tuple[int, ...] | None]
"""The shape of each entry by its name; None fits every shape."""


@dataclass(frozen=True, order=True)
class Prefixes:
    """A prefix of a file's names that the model's do not have, and one of the model's own."""

    removed: str = ""
    added: str = ""

    def renamed(self, name: str) -> str | None:
        """A file's name as the model has it; None if it does not begin with the prefix."""
        return self.added + name[len(self.removed) :] if name.startswith(self.removed) else None

    @property
    def wraps(self) -> bool:
        """Whether what is removed is the name of a whole model in a wrapper."""
        return all(part in WRAPPERS for part in self.removed.split(".")[:-1])


def plain(name: str) -> str:
    """A name without the components of `INSERTED`."""
    for component in INSERTED:
        name = name.replace(component, "")
    return name


def fitting_prefixes(shapes: Shapes, expected: Shapes) -> list[Prefixes]:
    """The prefixes by which most of a model's names are in a file, with the same shapes.

    Several are returned where parts of the file fit the whole model equally well. No prefix, and
    the names of wrapped models, come before others.
    """
    if expected.keys() <= shapes.keys():
        return [Prefixes()]
    scores: dict[Prefixes, int] = {}
    for prefixes in [Prefixes(), *_proposed(list(shapes), list(expected))]:
        renamed = {prefixes.renamed(name): shape for name, shape in shapes.items()}
        common = [name for name in expected if name in renamed]
        same = [name for name in common if None in (renamed[name], expected[name])]
        same += [name for name in common if renamed[name] == expected[name]]
        scores[prefixes] = len(common) + len(set(same))
    most = max(scores.values())
    best = [prefixes for prefixes, score in scores.items() if score == most]
    if not most:
        return [_unwrapping(set(shapes), expected)]
    wrapping = [prefixes for prefixes in best if prefixes.wraps]
    if Prefixes() in best or len(wrapping) == 1:
        return wrapping[:1]
    return best if len(best) == 1 or most == 2 * len(expected) else [Prefixes()]


def _proposed(names: Sequence[str], expected: Sequence[str]) -> list[Prefixes]:
    """Prefixes that make some names equal; only those of wrappers if both sides have one."""
    by_end: dict[str, list[str]] = {}
    for name in names:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    votes: Counter[Prefixes] = Counter()
    step = -(-len(expected) // SAMPLES)
    for target in expected[:: max(1, step)]:
        for name in by_end.get(target.rpartition(".")[2], ()):
            prefixes = _differing(name, target)
            if not (prefixes.removed and prefixes.added) or prefixes.wraps:
                votes[prefixes] += 1
    return [prefixes for prefixes, _ in votes.most_common(MAX_PROPOSED)]


def _differing(name: str, target: str) -> Prefixes:
    """What two names begin with before their common end."""
    left, right = name.split("."), target.split(".")
    count = 0
    while count < min(len(left), len(right)) and left[-1 - count] == right[-1 - count]:
        count += 1
    left, right = left[: len(left) - count], right[: len(right) - count]
    return Prefixes("".join(f"{part}." for part in left), "".join(f"{part}." for part in right))


def _unwrapping(names: set[str], expected: Shapes) -> Prefixes:
    """The wrappers' names before all names of a file that no name of the model begins with."""
    first = {name.partition(".")[0] for name in names}
    begins = {name.partition(".")[0] for name in expected}
    if len(first) == 1 and first <= WRAPPERS and not first & begins:
        removed = f"{next(iter(first))}."
        inner = _unwrapping({name.removeprefix(removed) for name in names}, expected)
        return Prefixes(removed + inner.removed)
    return Prefixes()


def renamed(state: dict[str, T], names: list[str]) -> dict[str, T]:
    """Rename the keys of a state dict to a model's names, as far as they differ by prefixes."""
    short = {plain(key): value for key, value in state.items()}
    if len(short) < len(state):
        return state
    original = {plain(name): name for name in names}
    (prefixes, *others) = fitting_prefixes(dict.fromkeys(short), dict.fromkeys(original))
    whole = all(key.startswith(prefixes.removed) for key in short)
    prefixes = Prefixes() if others or not whole else prefixes
    result = {prefixes.renamed(key): value for key, value in short.items()}
    return {original.get(key or "", key or ""): value for key, value in result.items()}


def with_names(
    state: OrderedDict[str, Any], prefixes: Prefixes, original: Mapping[str, str]
) -> OrderedDict[str, Any]:
    """The part of a state dict that begins with a prefix, under the model's names.

    Its ``_metadata``, the versions of modules by which ``load_state_dict`` translates old names, is
    renamed with it.
    """
    result: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        if (name := prefixes.renamed(key)) is not None:
            result[original.get(name, name)] = value
    metadata = {}
    for module, entry in (getattr(state, "_metadata", None) or {}).items():
        place = prefixes.renamed(plain(f"{module}.") if module else "")
        if place is not None:
            metadata[place.removesuffix(".")] = entry
    result._metadata = metadata  # type: ignore[attr-defined]
    return result
