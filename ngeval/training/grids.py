"""What a search tries: as many trainings for each optimizer, by a grid or drawn at random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ngeval.errors import InputError, nearest_name
from ngeval.training.optimizers import Settings, resolved, takes

KINDS = ("grid", "random")

Values = Sequence[float | None]
Grids = Mapping[str, Values] | Values | None
"""Values for all optimizers, or for some by name; None, or a name left out, is the default grid."""

AROUND = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""The default grid of learning rates: multiples of the optimizer's own."""

DAMPINGS: dict[str, tuple[float, ...]] = {
    "ef": (1e-7, 1e-1),
    "ief": (1e-7, 1e-1),
    "sf": (1.0, 10.0),
    "ng": (1.0, 10.0),
}
"""The default grid of dampings: the optimizer's own and another."""

MAX_TRAININGS = 1000
"""Of an optimizer in a search, or from seeds after it; more are a typing error."""

FEWEST_RATES = 3
"""With fewer learning rates for each, only the optimizer's own damping is tried by default."""


@dataclass(frozen=True)
class Trial:
    """What a training is tried with; None is the optimizer's own.

    Attributes:
        learning_rate: of the optimizer.
        damping: λ, None also for an optimizer without one.
    """

    learning_rate: float | None
    damping: float | None


def default_grids(name: str) -> tuple[list[float | None], list[float | None]]:
    """The learning rates and dampings that an optimizer is tried with where none are given.

    Raises:
        InputError: no such optimizer.
    """
    rate = resolved(name, Settings()).learning_rate
    rates: list[float | None] = [None]
    if rate is not None:
        rates = [float(f"{rate * factor:.3g}") for factor in AROUND]
    return rates, list(DAMPINGS.get(name.partition(":")[0], (None,)))


def plan_trials(
    names: Sequence[str],
    learning_rates: Grids,
    dampings: Grids,
    kind: str,
    trials: int | None,
    seed: int,
) -> dict[str, list[Trial]]:
    """The trainings that each optimizer is tried with: as many for one as for the others.

    A grid is every learning rate with every damping; of the default dampings only the optimizer's
    own, where ``trials`` are few. An optimizer without damping, or with fewer
    dampings than another, has more learning rates for it, evenly spaced (in their logarithm)
    between the same ends; so has a grid of which ``trials`` asks for another number. A random
    search draws both log-uniformly between the ends of the same grids, at the same places for
    every optimizer.

    Args:
        names: of the optimizers.
        learning_rates: see `Grids`.
        dampings: see `Grids`; optimizers without damping take no notice.
        kind: ``"grid"`` or ``"random"``.
        trials: trainings for each optimizer; None: those of the largest grid.
        seed: of the draws.

    Raises:
        InputError: unknown optimizer or kind, a value out of range, a damping though no optimizer
            has one, or grids that cannot be brought to one number of trainings.
    """
    _check_names(names, learning_rates, dampings)
    if kind not in KINDS:
        raise InputError(f"unknown search {kind!r}; write one of {', '.join(KINDS)}")
    check_count("trials", trials)
    if kind == "random" and trials is None:
        raise InputError("a random search needs a number of trials (--trials 8)")
    grids = {name: _grid(name, learning_rates, dampings) for name in names}
    if kind == "random":
        return {name: _drawn(name, *grids[name], trials or 0, seed) for name in names}
    budget = trials or max(len(rates) * len(values) for rates, values in grids.values())
    check_count("trials", budget)
    for name, (rates, values) in grids.items():
        if _chosen(name, dampings, ()) == () and _is_too_small(budget, len(values)):
            grids[name] = rates, [None]
        count = len(rates) * len(grids[name][1])
        if _chosen(name, learning_rates, ()) != () and budget < count:
            raise InputError(
                f"{name}: the learning rates and dampings given are {count} trainings, more than "
                f"the {budget} of --trials; give fewer values, or a random search"
            )
    return {name: _product(name, *grids[name], budget, trials is None) for name in names}


def check_count(what: str, count: int | None) -> None:
    """Raise unless so many trainings can be meant; None can.

    Raises:
        InputError: fewer than one, or more than `MAX_TRAININGS`.
    """
    if count is not None and not 1 <= count <= MAX_TRAININGS:
        raise InputError(
            f"the number of {what} must be at least 1 and at most {MAX_TRAININGS}, not {count}"
        )


def _is_too_small(budget: int, count: int) -> bool:
    """Whether so many default dampings would leave too few learning rates, or no grid at all."""
    return budget % count > 0 or budget < FEWEST_RATES * count


def _check_names(names: Sequence[str], learning_rates: Grids, dampings: Grids) -> None:
    if not names:
        raise InputError("give at least one optimizer")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise InputError(f"optimizer {twice[0]} is there twice")
    for grids in (learning_rates, dampings):
        for name in grids if isinstance(grids, Mapping) else ():
            if name not in names:
                raise InputError(
                    f"values for {name!r}, which is not tried; {nearest_name(name, names)}"
                )
    damped = [name for name in names if takes(name, "damping")]
    wanted = [d for d in dampings if d is not None] if isinstance(dampings, Sequence) else ()
    if wanted and not damped:
        raise InputError(f"{', '.join(names)}: no damping; leave it out, or train ef, ief, sf, ng")


def _grid(name: str, learning_rates: Grids, dampings: Grids) -> tuple[Values, Values]:
    """An optimizer's learning rates and dampings, checked one by one."""
    own_rates, own_dampings = default_grids(name)
    rates = _chosen(name, learning_rates, own_rates)
    values = _chosen(name, dampings, own_dampings)
    if not takes(name, "damping"):
        values = [None]
    for rate in rates:
        resolved(name, Settings(learning_rate=rate))
    for value in values:
        resolved(name, Settings(damping=value))
    if not rates or not values:
        raise InputError(f"{name}: no learning rate or damping to try")
    return sorted(set(rates), key=_order), sorted(set(values), key=_order)


def _order(value: float | None) -> float:
    return -math.inf if value is None else value


def _chosen(name: str, grids: Grids, default: Values) -> Values:
    if isinstance(grids, Mapping):
        return grids.get(name, default)
    return default if grids is None else grids


def _product(
    name: str, rates: Values, dampings: Values, budget: int, inferred: bool
) -> list[Trial]:
    count, rest = divmod(budget, len(dampings))
    if rest or (len(rates) == 1 and count > 1):
        origin = "as another optimizer's grid has" if inferred else "as --trials asks for"
        raise InputError(
            f"{name}: {len(rates)} learning rates and {len(dampings)} dampings make no grid of "
            f"{budget} trainings, {origin}, and every optimizer gets as many; give several "
            "learning rates, a number of trials that the dampings divide, or a random search"
        )
    return [Trial(rate, damping) for rate in _spread(rates, count) for damping in dampings]


def _spread(values: Values, count: int) -> Values:
    """So many values between the same ends, evenly in their logarithm, as rounded as typed."""
    if len(values) == count:
        return values
    ends = [value for value in (values[0], values[-1]) if value is not None]
    if count == 1:
        return [float(f"{math.exp(np.log(ends).mean()):.3g}")]
    return [float(f"{value:.3g}") for value in np.geomspace(ends[0], ends[-1], count)]


def _drawn(name: str, rates: Values, dampings: Values, trials: int, seed: int) -> list[Trial]:
    places = np.random.default_rng(seed).random((trials, 2))
    return [
        Trial(_between(name, rates, float(first)), _between(name, dampings, float(second)))
        for first, second in places
    ]


def _between(name: str, values: Values, place: float) -> float | None:
    """The value at a place in [0, 1) between a grid's ends, in the logarithm."""
    low, high = values[0], values[-1]
    if low is None or high is None or low == high:
        return low
    if low == 0:
        raise InputError(f"{name}: a random search draws in the logarithm, which 0 has none of")
    return float(f"{low * (high / low) ** place:.3g}")
