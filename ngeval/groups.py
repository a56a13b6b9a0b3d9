"""Groups of parameters: layers, and whatever else a reader wants to tell apart."""

from __future__ import annotations

from collections.abc import Iterable


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by the module that owns them, in order.

    >>> layer_groups(["fc.weight", "fc.bias", "norm.weight"])
    {'fc': ['fc.weight', 'fc.bias'], 'norm': ['norm.weight']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0] or "(model)", []).append(name)
    return groups
