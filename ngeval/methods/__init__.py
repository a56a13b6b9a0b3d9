"""Update rules: what a method is, and the methods by name."""

from ngeval.methods.base import CotangentState, Method, ParameterState, State
from ngeval.methods.registry import METHODS, MethodEntry, all_methods, get_method, get_methods

__all__ = [
    "METHODS",
    "CotangentState",
    "Method",
    "MethodEntry",
    "ParameterState",
    "State",
    "all_methods",
    "get_method",
    "get_methods",
]
