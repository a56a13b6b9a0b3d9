"""Update rules: the protocol of a method, and the methods by name.

The names are plain data: importing this package, listing the methods and checking a name import
neither torch nor the methods themselves.
"""

from typing import TYPE_CHECKING, Any

from ngeval.methods.registry import (
    METHODS,
    MethodEntry,
    all_methods,
    check_name,
    get_method,
    get_methods,
    method_names,
)

if TYPE_CHECKING:
    from ngeval.methods.base import CotangentState, Method, ParameterState, State

__all__ = [
    "METHODS",
    "CotangentState",
    "Method",
    "MethodEntry",
    "ParameterState",
    "State",
    "all_methods",
    "check_name",
    "get_method",
    "get_methods",
    "method_names",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ngeval.methods import base  # noqa: PLC0415  (imports torch)

    return getattr(base, name)
