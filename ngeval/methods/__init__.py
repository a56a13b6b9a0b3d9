"""Update rules: the protocol of a method, and the methods by name.

The names are plain data: importing this package, listing the methods and checking a name import
neither torch nor the methods themselves.
"""

from typing import TYPE_CHECKING

from ngeval.methods.registry import (
    METHODS,
    MethodEntry,
    all_methods,
    check_name,
    get_method,
    get_methods,
    method_names,
)
from ngeval.utils.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ngeval.methods.base import Method, ParameterState, State

__getattr__, __dir__ = _lazy_names(
    __name__, {"ngeval.methods.base": ["Method", "ParameterState", "State"]}
)

__all__ = [
    "METHODS",
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
