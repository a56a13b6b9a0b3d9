"""The methods by name: ngeval's own, optimizers, and those of installed plug-ins.

The table is plain data, so that listing methods and checking a name import no torch: a method's
module is imported when the method is built. A package adds methods by an entry point in the group
``ngeval.methods`` that names a `MethodEntry`, or a function of a method's full name and the text
after its colon.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from ngeval.errors import InputError, nearest_name
from ngeval.methods.optimizer.catalogue import OPTIMIZERS
from ngeval.utils.plugins import load_plugin, package_of, plugin_errors, plugins

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ngeval.methods.base import Method

GROUP = "ngeval.methods"
"""The entry-point group of plug-ins."""


@dataclass(frozen=True)
class MethodEntry:
    """A row of the table of methods.

    Attributes:
        formula: d(λ), or a short description.
        labels: where the labels in the curvature come from.
        parameter: describes the text that may follow the colon; empty if there is none.
        make: builds the method from its full name and the text after the colon.
        source: the package that it comes from.
    """

    formula: str
    labels: str
    parameter: str
    make: Callable[[str, str], Method]
    source: str = "ngeval"


def _within(path: str) -> Callable[[str, str], Method]:
    """A factory of this package by its path ``"module:attribute"``, imported when it is called.

    The factory is called with the method's full name and, where there is one, its parameter.
    """

    def make(name: str, parameter: str) -> Method:
        factory = pkgutil.resolve_name(f"ngeval.methods.{path}")
        method: Method = factory(name, parameter) if parameter else factory(name)
        return method

    return make


_DATA, _MODEL, _EXPECTATION, _RESCALED = "data", "the model", "expectation", "data, 1/‖u_n‖²"
_DRAWS, _RHO = "draws k (1)", "exponent ρ (1)"
_DIAG, _KFAC = _within("diag:Diagonal.parse"), _within("kfac:Kronecker.parse")
_KFAC_FORMULA, _EKFAC_FORMULA = "((A⊗B)/M + λI)⁻¹ g_l", "(U diag(s) Uᵀ + λI)⁻¹ g_l"
_REST = "diagonal|gradient|zero"
_WORDS = f"expand|reduce:exact|factored|pi:{_REST}"

METHODS: dict[str, MethodEntry] = {
    "sgd": MethodEntry("g", _DATA, "", _within("sgd:Sgd")),
    "ef": MethodEntry("Gᵀ(K + λI)⁻¹ 1", _DATA, "", _within("ef:EmpiricalFisher.parse")),
    "ief": MethodEntry("Gᵀ(K + λI)⁻¹ s", _DATA, "", _within("ef:EmpiricalFisher.parse")),
    "sf": MethodEntry("(F̂ + λI)⁻¹ g", _MODEL, _DRAWS, _within("sf:SampledFisher.parse")),
    "ng": MethodEntry("(F + λI)⁻¹ g", _EXPECTATION, "", _within("ng:NaturalGradient")),
    "block-ng": MethodEntry(
        "(F_ll + λI)⁻¹ g_l", _EXPECTATION, "", _within("block_ng:BlockNaturalGradient")
    ),
    "diag": MethodEntry("g / (diag F + λ)^ρ", _EXPECTATION, _RHO, _DIAG),
    "diag-sf": MethodEntry("g / (diag F̂ + λ)^ρ", _MODEL, f"{_DRAWS}:{_RHO}", _DIAG),
    "diag-ef": MethodEntry("g / (Σ_n g_n² + λ)^ρ", _DATA, _RHO, _DIAG),
    "diag-ief": MethodEntry("g / (Σ_n g_n²/s_n + λ)^ρ", _RESCALED, _RHO, _DIAG),
    "diag-ema": MethodEntry(
        "g / (v̂ + λ)^ρ",
        "the optimizer's state",
        "exponent ρ (½)",
        _within("diag_ema:NamedAccumulated.parse"),
    ),
    "kfac": MethodEntry(_KFAC_FORMULA, _EXPECTATION, _WORDS, _KFAC),
    "kfac-sf": MethodEntry(_KFAC_FORMULA, _MODEL, f"{_DRAWS}:{_WORDS}", _KFAC),
    "kfac-ef": MethodEntry(_KFAC_FORMULA, _DATA, _WORDS, _KFAC),
    "kfac-ief": MethodEntry(_KFAC_FORMULA, _RESCALED, _WORDS, _KFAC),
    "ekfac": MethodEntry(_EKFAC_FORMULA, _EXPECTATION, _REST, _KFAC),
    "ekfac-sf": MethodEntry(_EKFAC_FORMULA, _MODEL, f"{_DRAWS}:{_REST}", _KFAC),
    "ekfac-ef": MethodEntry(_EKFAC_FORMULA, _DATA, _REST, _KFAC),
    "ekfac-ief": MethodEntry(_EKFAC_FORMULA, _RESCALED, _REST, _KFAC),
}
"""ngeval's own methods; `all_methods` adds optimizers and plug-ins."""


def method_names() -> list[str]:
    """The name of every method: ngeval's own, optimizers, plug-ins. Imports nothing."""
    return list(dict.fromkeys([*METHODS, *OPTIMIZERS, *_plugins()]))


def check_name(name: str) -> str:
    """Refuse an unknown method, or a parameter that it does not take, without importing it.

    Returns:
        The name as ngeval writes it: the case of ``"iEF"`` or ``"SF:4"`` does not matter.
    """
    points = _plugins()  # for every name: it warns of a plug-in whose name is taken
    typed, colon, parameter = name.strip().partition(":")
    known = method_names()
    same = [family for family in known if family.lower() == typed.lower()]
    family = typed if typed in known or len(same) != 1 else same[0]
    name = f"{family}{colon}{parameter}"
    if entry := _builtin(family):
        _check_parameter(name, entry)
    elif family not in points:
        raise InputError(f"unknown method {name!r}; {nearest_name(family.lower(), known)}")
    return name


def all_methods() -> dict[str, MethodEntry]:
    """The entry of every method; that of a plug-in that fails to load has the reason as formula."""
    entries = METHODS | {name: _optimizer(name) for name in OPTIMIZERS if name not in METHODS}
    for name, point in _plugins().items():
        try:
            entries[name] = _loaded(point)
        except InputError as error:
            entries[name] = MethodEntry(
                str(error), "", "", lambda name, _: get_method(name), package_of(point)
            )
    return entries


def get_method(method: str | Method | Optimizer) -> Method:
    """Resolve a method given by name.

    Args:
        method: ``"ief"``, ``"sf:4"`` (four draws), ``"diag-ef:0.5"`` (ρ = ½), ``"kfac:reduce"``,
            an optimizer's name or the path of its class (``"adamw"``,
            ``"pytorch_optimizer.SOAP:20"``), a plug-in's, …, in any case (``"iEF"``); an optimizer,
            whose step is graded (see `OptimizerStep`); or an object with ``name`` and ``prepare``,
            which is returned unchanged.

    Raises:
        InputError: there is no such method, its parameter cannot be read, or a plug-in fails to
            load.

    >>> get_method("sf:4").mc_samples
    4
    """
    if not isinstance(method, str):
        return _from_object(method)
    name = check_name(method)
    family, _, parameter = name.partition(":")
    if builtin := _builtin(family):
        return builtin.make(name, parameter)
    point = _plugins()[family]
    entry = _loaded(point)
    _check_parameter(name, entry)
    with plugin_errors(point, name):
        built = entry.make(name, parameter)
        if not _is_method(built):
            raise TypeError(f"it has type {type(built).__name__}, without .name and .prepare")
    return built


def get_methods(methods: str | Iterable[str | Method | Optimizer]) -> list[Method]:
    """Resolve several methods in their order, or a comma list of names, by `get_method`.

    Raises:
        InputError: see `get_method`; there is no method; two methods have the same name.
    """
    items = methods.split(",") if isinstance(methods, str) else list(methods)
    for method in items:
        if isinstance(method, str):
            check_name(method)  # before the first method is built, which imports torch
    resolved = [get_method(method) for method in items]
    names = [method.name for method in resolved]
    if not names:
        raise InputError(f"no method given; {nearest_name('', METHODS)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"methods named twice: {', '.join(repeated)} (objects are distinguished by their name, "
            "as in ngeval.OptimizerStep(optimizer, name='mine'))"
        )
    return resolved


def _from_object(method: Method | Optimizer) -> Method:
    from torch.optim import Optimizer  # noqa: PLC0415  (names are resolved without torch)

    if isinstance(method, Optimizer):
        step: Callable[[Optimizer], Method] = pkgutil.resolve_name(
            "ngeval.methods.optimizer.step:OptimizerStep"
        )
        return step(method)
    if not _is_method(method):
        raise InputError(
            "a method is a name, an optimizer, or an object with .name and .prepare, not a "
            f"{type(method).__name__}"
        )
    return method


def _is_method(value: object) -> bool:
    return hasattr(value, "prepare") and hasattr(value, "name")


def _builtin(family: str) -> MethodEntry | None:
    """The entry of a name that is ngeval's own, an optimizer's, or the path of its class."""
    if family in METHODS:
        return METHODS[family]
    return _optimizer(family) if family in OPTIMIZERS or "." in family else None


def _optimizer(family: str) -> MethodEntry:
    known = OPTIMIZERS.get(family)
    return MethodEntry(
        known.description if known else f"step of {family}",
        "its state",
        "batches K at fixed weights (the checkpoint's state)",
        _within("optimizer.by_name:NamedOptimizer.parse"),
        "torch.optim" if known else family.partition(".")[0],
    )


def _check_parameter(name: str, entry: MethodEntry) -> None:
    family, colon, parameter = name.strip().partition(":")
    if colon and (not entry.parameter or not parameter):
        allowed = f"the {entry.parameter}" if entry.parameter else "no parameter"
        raise InputError(f"method {name!r}: {family} takes {allowed} after a colon")


def _plugins() -> dict[str, EntryPoint]:
    return plugins(GROUP, frozenset((*METHODS, *OPTIMIZERS)))


def _loaded(point: EntryPoint) -> MethodEntry:
    """The entry that a plug-in's entry point names."""
    entry = load_plugin(point)
    if isinstance(entry, MethodEntry):
        return replace(entry, source=package_of(point))
    if callable(entry):
        summary = (getattr(entry, "__doc__", None) or "").strip().partition("\n")[0]
        return MethodEntry(summary, "", "as the plug-in defines it", entry, package_of(point))
    raise InputError(
        f"method {point.name!r} of {package_of(point)}: {point.value!r} is neither an "
        "ngeval.MethodEntry nor a function (name, parameter) → method"
    )
