"""The methods by name: parsing of ``name:parameter`` and the table of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ngeval.errors import InputError, nearest_name
from ngeval.methods.base import (
    CotangentState,
    Method,
    ParameterState,
    State,
)
from ngeval.methods.diagonal import Diagonal, DiagonalEmpirical
from ngeval.methods.empirical import EmpiricalFisher
from ngeval.methods.gradient import Sgd
from ngeval.methods.natural import NaturalGradient
from ngeval.methods.sampled import SampledFisher

__all__ = [
    "METHODS",
    "CotangentState",
    "Method",
    "MethodEntry",
    "ParameterState",
    "State",
    "get_method",
    "get_methods",
]


@dataclass(frozen=True)
class MethodEntry:
    """One line of the table of methods.

    Attributes:
        formula: d(λ).
        labels: where the labels in the curvature come from.
        parameter: what follows the colon, empty if nothing can.
        make: builds the method from its full name and the text after the colon.
    """

    formula: str
    labels: str
    parameter: str
    make: Callable[[str, str], Method]


def _draws(name: str, text: str) -> SampledFisher:
    if not text:
        return SampledFisher(name, 1)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"method {name!r}: the number of draws must be a whole number ≥ 1")
    return SampledFisher(name, int(text))


def _exponent(name: str, text: str) -> DiagonalEmpirical:
    try:
        exponent = float(text or 1.0)
    except ValueError:
        exponent = math.nan
    if not math.isfinite(exponent):
        raise InputError(f"method {name!r}: the exponent must be a number, as in diag-ef:0.5")
    return DiagonalEmpirical(name, exponent)


METHODS: dict[str, MethodEntry] = {
    "sgd": MethodEntry("g", "data", "", lambda name, _: Sgd(name)),
    "ef": MethodEntry("Gᵀ(K + λI)⁻¹ 1", "data", "", lambda n, _: EmpiricalFisher(n, False)),
    "ief": MethodEntry("Gᵀ(K + λI)⁻¹ s", "data", "", lambda n, _: EmpiricalFisher(n, True)),
    "sf": MethodEntry("(F̂ + λI)⁻¹ g", "the model", "draws k (1)", _draws),
    "ng": MethodEntry("(F + λI)⁻¹ g", "expectation", "", lambda n, _: NaturalGradient(n)),
    "diag": MethodEntry("g / (diag F + λ)", "expectation", "", lambda n, _: Diagonal(n)),
    "diag-ef": MethodEntry("g / (Σ_n g_n² + λ)^ρ", "data", "exponent ρ (1)", _exponent),
}
"""Every method that ``methods=`` and ``--methods`` know by name."""


def get_method(method: str | Method) -> Method:
    """Resolve a method given by name.

    Args:
        method: ``"ief"``, ``"sf:4"`` (four draws), ``"diag-ef:0.5"`` (ρ = ½), …, or an object
            with ``name`` and ``prepare``, which is returned as it is.

    Raises:
        InputError: no such method, or its parameter cannot be read.

    >>> get_method("sf:4").mc_samples
    4
    """
    if not isinstance(method, str):
        if not (hasattr(method, "prepare") and hasattr(method, "name")):
            raise InputError(
                f"a method is a name or an object with .name and .prepare, not {method!r}"
            )
        return method
    family, colon, parameter = method.strip().partition(":")
    if family not in METHODS:
        raise InputError(f"unknown method {method!r}; {nearest_name(family, METHODS)}")
    entry = METHODS[family]
    if colon and (not entry.parameter or not parameter):
        allowed = f"the {entry.parameter}" if entry.parameter else "no parameter"
        raise InputError(f"method {method!r}: {family} takes {allowed} after a colon")
    return entry.make(method.strip(), parameter)


def get_methods(methods: Iterable[str | Method]) -> list[Method]:
    """Resolve several methods, keeping their order and refusing an empty list or repetitions."""
    if isinstance(methods, str):
        methods = methods.split(",")
    resolved = [get_method(method) for method in methods]
    names = [method.name for method in resolved]
    if not names:
        raise InputError(f"no method given; {nearest_name('', METHODS)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"methods named twice: {', '.join(twice)}")
    return resolved
