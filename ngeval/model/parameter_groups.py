"""Groups of parameters: layers, or any other partition that results are reported by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ngeval.errors import InputError, nearest_name

Groups = str | int | Mapping[str, Iterable[str]] | Callable[[str], str]
"""How parameters are grouped; see `make_groups`."""

ROOT = "(model)"
"""The layer of parameters that the model itself owns."""

REST = "(rest)"
"""The group of parameters that a mapping does not name."""


@dataclass(frozen=True)
class Group:
    """Some of the parameters.

    Attributes:
        name: of the group.
        parameters: their names.
        places: their slices of a flat vector.
    """

    name: str
    parameters: tuple[str, ...]
    places: tuple[slice, ...] = field(hash=False)  # slices are not hashable before Python 3.12

    @property
    def num_parameters(self) -> int:
        """The number of scalars."""
        return sum(place.stop - place.start for place in self.places)


def make_groups(sizes: Mapping[str, int], groups: Groups) -> list[Group]:
    """Group parameters.

    Args:
        sizes: the trainable parameters with their numbers of scalars, in order.
        groups: ``"layer"``, ``"parameter"``, a number of name components, a mapping from group to
            names, or a function from name to group; see `ngeval.layer_table`.

    Raises:
        InputError: an invalid value, an unknown name, a name in two groups, or an empty group.

    >>> [group.name for group in make_groups({"a.b.weight": 4, "a.b.bias": 2, "c": 1}, 1)]
    ['a', 'c']
    """
    of_name = _naming(list(sizes), groups)
    members: dict[str, dict[str, slice]] = {}
    start = 0
    for name, size in sizes.items():
        group = of_name(name)
        if not isinstance(group, str):
            raise InputError(f"groups gave {group!r} for parameter {name!r}; it must be a string")
        members.setdefault(group, {})[name] = slice(start, start + size)
        start += size
    return [Group(name, tuple(m), tuple(m.values())) for name, m in members.items()]


def _naming(names: Sequence[str], groups: Groups) -> Callable[[str], str]:
    """The function from a parameter's name to its group's."""
    if isinstance(groups, Mapping):
        return _named_groups(names, groups)
    if callable(groups):
        return groups
    if groups == "layer":
        return lambda name: name.rpartition(".")[0] or ROOT
    if groups == "parameter":
        return lambda name: name
    if isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1:
        return lambda name: ".".join(name.split(".")[:groups])
    raise InputError(
        f"groups must be 'layer', 'parameter', a number of name components ≥ 1, a mapping from "
        f"group to parameter names or a function of the name, not {groups!r}"
    )


def _named_groups(
    names: Sequence[str], groups: Mapping[str, Iterable[str]]
) -> Callable[[str], str]:
    group_of: dict[str, str] = {}
    for group, members in groups.items():
        listed = [members] if isinstance(members, str) else list(members)
        if not listed:
            raise InputError(f"group {group!r} has no parameter")
        for name in listed:
            if name not in names:
                raise InputError(
                    f"group {group!r}: no trainable parameter {name!r}; "
                    f"{nearest_name(str(name), names)}"
                )
            if name in group_of:
                raise InputError(
                    f"parameter {name!r} is in two groups, {group_of[name]!r} and {group!r}"
                )
            group_of[name] = group
    return lambda name: group_of.get(name, REST)
