"""The methods by name: ngeval's own, optimizers, and those of installed plug-ins.

A package adds methods by an entry point in the group ``ngeval.methods`` that names a
`MethodEntry`, or a function of a method's full name and the text after its colon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from torch.optim import Optimizer

from ngeval.curvature.kronecker_block import DAMPINGS
from ngeval.curvature.kronecker_factors import SHARINGS
from ngeval.errors import InputError, NgevalError, nearest_name
from ngeval.methods.base import Method
from ngeval.methods.block_ng import BlockNaturalGradient
from ngeval.methods.diag import Diagonal
from ngeval.methods.diag_ema import NamedAccumulated
from ngeval.methods.ef import EmpiricalFisher
from ngeval.methods.kfac import RESTS, Kronecker
from ngeval.methods.label_sources import DESCRIPTIONS, SAMPLED, SUFFIXES, Labels
from ngeval.methods.ng import NaturalGradient
from ngeval.methods.optimizer import OPTIMIZERS, NamedOptimizer, OptimizerStep
from ngeval.methods.sf import SampledFisher
from ngeval.methods.sgd import Sgd

GROUP = "ngeval.methods"
"""The entry-point group of plug-ins."""

MOST_DIGITS = 9
"""Of a number of draws; more is a typing error."""

Make = Callable[[str, str], Method]
"""From a method's full name and the text after its colon."""


@dataclass(frozen=True)
class MethodEntry:
    """One line of the table of methods.

    Attributes:
        formula: d(λ), or what it is.
        labels: where the labels in the curvature come from.
        parameter: what follows the colon, empty if nothing can.
        make: builds the method from its full name and the text after the colon.
        source: the package that it comes from.
    """

    formula: str
    labels: str
    parameter: str
    make: Make
    source: str = "ngeval"


def _draws(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS) or int(text) < 1:
        raise InputError(f"method {name[:80]!r}: the number of draws must be a whole number ≥ 1")
    return int(text)


def _exponent(name: str, text: str) -> float:
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not math.isfinite(exponent):
        raise InputError(f"method {name!r}: the exponent must be a number, as in diag-ef:0.5")
    return exponent


def _sampled(name: str, text: str) -> SampledFisher:
    return SampledFisher(name, _draws(name, text) if text else 1)


def _diagonal(source: str) -> Make:
    """``diag:ρ``; ``diag-sf:k:ρ``."""

    def make(name: str, text: str) -> Diagonal:
        parts = text.split(":") if text else []
        labels = Labels(source)
        if source == SAMPLED and parts:
            labels = Labels(source, _draws(name, parts.pop(0)))
        exponent = _exponent(name, parts.pop(0)) if parts else 1.0
        if parts:
            raise InputError(f"method {name!r} has more after its colon than there is to say")
        return Diagonal(name, labels, exponent)

    return make


def _kronecker(source: str, *, corrected: bool) -> Make:
    """Words in any order, as in ``kfac:reduce:pi``; draws are a number, as in ``kfac-sf:4``."""
    kinds = {"sharing": SHARINGS, "damping": DAMPINGS, "rest": RESTS}

    def make(name: str, text: str) -> Kronecker:
        labels, chosen = None, dict[str, str]()
        for word in text.split(":") if text else []:
            kind = next((kind for kind, words in kinds.items() if word in words), None)
            if source == SAMPLED and word.isdecimal() and labels is None:
                labels = Labels(source, _draws(name, word))
            elif kind is None or kind in chosen:
                known = [known for words in kinds.values() for known in words]
                what = "says one thing twice" if kind else f"has an unknown {word!r}"
                raise InputError(f"method {name!r} {what}; {nearest_name(word, known)}")
            else:
                chosen[kind] = word
        return Kronecker(name, labels or Labels(source), corrected=corrected, **chosen)

    return make


def _own_methods() -> dict[str, MethodEntry]:
    data, model, expectation = "data", "the model", "expectation"
    methods = {
        "sgd": MethodEntry("g", data, "", lambda name, _: Sgd(name)),
        "ef": MethodEntry("Gᵀ(K + λI)⁻¹ 1", data, "", lambda n, _: EmpiricalFisher(n, False)),
        "ief": MethodEntry("Gᵀ(K + λI)⁻¹ s", data, "", lambda n, _: EmpiricalFisher(n, True)),
        "sf": MethodEntry("(F̂ + λI)⁻¹ g", model, "draws k (1)", _sampled),
        "ng": MethodEntry("(F + λI)⁻¹ g", expectation, "", lambda n, _: NaturalGradient(n)),
        "block-ng": MethodEntry(
            "(F_ll + λI)⁻¹ g_l", expectation, "", lambda n, _: BlockNaturalGradient(n)
        ),
    }
    rho = "exponent ρ (1)"
    diagonals = {
        "": ("g / (diag F + λ)^ρ", rho),
        "-sf": ("g / (diag F̂ + λ)^ρ", f"draws k (1):{rho}"),
        "-ef": ("g / (Σ_n g_n² + λ)^ρ", rho),
        "-ief": ("g / (Σ_n g_n²/s_n + λ)^ρ", rho),
    }
    for suffix, (formula, parameter) in diagonals.items():
        source = SUFFIXES[suffix]
        methods[f"diag{suffix}"] = MethodEntry(
            formula, DESCRIPTIONS[source], parameter, _diagonal(source)
        )
    methods["diag-ema"] = MethodEntry(
        "g / (v̂ + λ)^ρ",
        "the optimizer's state",
        "exponent ρ (½)",
        NamedAccumulated.parse,
    )
    words = "|".join(SHARINGS) + ":" + "|".join(DAMPINGS) + ":" + "|".join(RESTS)
    for family, corrected, formula in (
        ("kfac", False, "((A⊗B)/M + λI)⁻¹ g_l"),
        ("ekfac", True, "(U diag(s) Uᵀ + λI)⁻¹ g_l"),
    ):
        for suffix, source in SUFFIXES.items():
            said = words if not corrected else "|".join(RESTS)
            said = f"draws k (1):{said}" if source == SAMPLED else said
            methods[family + suffix] = MethodEntry(
                formula, DESCRIPTIONS[source], said, _kronecker(source, corrected=corrected)
            )
    return methods


METHODS = _own_methods()
"""ngeval's own methods; `all_methods` adds optimizers and plug-ins."""


def all_methods() -> dict[str, MethodEntry]:
    """Every method that can be asked for by name; a plug-in that does not load says why."""
    found = dict(METHODS)
    for name in OPTIMIZERS:
        found.setdefault(name, _optimizer_entry(name))
    for point in _plugins():
        if point.name in found:
            continue
        try:
            found[point.name] = _loaded(point)
        except InputError as error:
            found[point.name] = MethodEntry(
                str(error), "", "", lambda name, _: get_method(name), _package(point)
            )
    return found


def get_method(method: str | Method | Optimizer) -> Method:
    """Resolve a method given by name.

    Args:
        method: ``"ief"``, ``"sf:4"`` (four draws), ``"diag-ef:0.5"`` (ρ = ½), ``"kfac:reduce"``,
            an optimizer's name or the path of its class (``"adamw"``,
            ``"pytorch_optimizer.SOAP:20"``), a plug-in's, …; an optimizer, whose step is graded
            (see `OptimizerStep`); or an object with ``name`` and ``prepare``, which is returned as
            it is.

    Raises:
        InputError: no such method, or its parameter cannot be read, or a plug-in does not load.

    >>> get_method("sf:4").mc_samples
    4
    """
    if isinstance(method, Optimizer):
        return OptimizerStep(method)
    if not isinstance(method, str):
        if not (hasattr(method, "prepare") and hasattr(method, "name")):
            raise InputError(
                "a method is a name, an optimizer, or an object with .name and .prepare, not a "
                f"{type(method).__name__}"
            )
        return method
    full = method.strip()
    family, colon, parameter = full.partition(":")
    entry = _entry(family)
    if entry is None:
        known = [*METHODS, *OPTIMIZERS, *(point.name for point in _plugins())]
        raise InputError(f"unknown method {method!r}; {nearest_name(family, known)}")
    if colon and (not entry.parameter or not parameter):
        allowed = f"the {entry.parameter}" if entry.parameter else "no parameter"
        raise InputError(f"method {method!r}: {family} takes {allowed} after a colon")
    try:
        return entry.make(full, parameter)
    except NgevalError:
        raise
    except Exception as error:
        if entry.source == "ngeval":
            raise
        raise InputError(
            f"method {method!r} of {entry.source} cannot be made: {type(error).__name__}: {error}"
        ) from error


def get_methods(methods: Iterable[str | Method | Optimizer]) -> list[Method]:
    """Resolve several methods, keeping their order and refusing an empty list or repetitions."""
    if isinstance(methods, str):
        methods = methods.split(",")
    resolved = [get_method(method) for method in methods]
    names = [method.name for method in resolved]
    if not names:
        raise InputError(f"no method given; {nearest_name('', METHODS)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"methods named twice: {', '.join(twice)} (objects can be told apart by their name, as "
            "in ngeval.OptimizerStep(optimizer, name='mine'))"
        )
    return resolved


def _entry(family: str) -> MethodEntry | None:
    """The entry of a name, None if there is none."""
    if family in METHODS:
        return METHODS[family]
    if family in OPTIMIZERS or "." in family:
        return _optimizer_entry(family)
    point = next((point for point in _plugins() if point.name == family), None)
    return None if point is None else _loaded(point)


def _optimizer_entry(family: str) -> MethodEntry:
    known = OPTIMIZERS.get(family)
    return MethodEntry(
        known.description if known else f"step of {family}",
        "its state",
        "batches K at fixed weights (the checkpoint's state)",
        lambda name, text: NamedOptimizer.parse(name, family, text),
        "torch.optim" if known else family.partition(".")[0],
    )


def _plugins() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _loaded(point: EntryPoint) -> MethodEntry:
    """What a plug-in's entry point names."""
    try:
        found = point.load()
    except Exception as error:  # a plug-in's import may raise anything
        raise InputError(
            f"method {point.name!r} of {_package(point)} cannot be loaded from {point.value!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(found, MethodEntry):
        return replace(found, source=_package(point))
    if callable(found):
        summary = (getattr(found, "__doc__", None) or "").strip().partition("\n")[0]
        return MethodEntry(summary, "", "as the plug-in says", found, _package(point))
    raise InputError(
        f"method {point.name!r} of {_package(point)}: {point.value!r} is no ngeval.MethodEntry and "
        "no function (name, parameter) → method"
    )
