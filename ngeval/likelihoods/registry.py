"""The likelihoods by name: ngeval's own, and those of installed plug-ins.

A package adds a likelihood by an entry point in the group ``ngeval.likelihoods`` that names a
subclass of `Likelihood`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from ngeval.errors import InputError, nearest_name
from ngeval.likelihoods.base import Likelihood
from ngeval.likelihoods.bernoulli import Bernoulli
from ngeval.likelihoods.categorical import Categorical
from ngeval.likelihoods.counts import Poisson
from ngeval.likelihoods.gaussian import SQUARED_ERROR, Gaussian
from ngeval.likelihoods.gaussian_nll import GaussianNLL
from ngeval.likelihoods.heads import Heads
from ngeval.likelihoods.torch_losses import likelihood_of_loss
from ngeval.utils.plugins import load_plugin, package_of, plugin_errors, plugins

MSE = "mse"

GROUP = "ngeval.likelihoods"
"""The entry-point group of plug-ins."""

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian-nll": GaussianNLL,
}
"""ngeval's own likelihoods."""

Loss = str | Likelihood | Callable[..., Any] | Mapping[Any, Any]
"""A loss: a likelihood or its name, a loss of torch, or a mapping from outputs to such."""


def likelihood_names() -> list[str]:
    """The name of every likelihood, plug-ins included; no plug-in is imported."""
    return [*LIKELIHOODS, MSE, *_plugins()]


def get_likelihood(likelihood: Loss) -> Likelihood:
    """Resolve a loss to a likelihood.

    Args:
        likelihood: ``"categorical"``, ``"gaussian"`` (σ² = 1), ``"gaussian:0.5"`` (σ² = ½),
            ``"mse"`` (as ``nn.MSELoss()``), ``"bernoulli"``, ``"poisson"``, ``"gaussian-nll"``,
            the name of a plug-in's; a loss of torch, such as ``nn.CrossEntropyLoss(weight=w)``,
            see ``docs/losses.md``; a dict that gives each of a model's outputs
            such a loss, which are summed; or a `Likelihood`, which is returned unchanged.

    Raises:
        InputError: there is no such likelihood, its parameter cannot be read, or a plug-in fails
            to load.

    >>> get_likelihood("gaussian:0.5").variance
    0.5
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, Mapping):
        if not likelihood:
            raise InputError("the dict of losses is empty; give each output of the model one")
        return Heads(tuple((name, get_likelihood(part)) for name, part in likelihood.items()))
    if not isinstance(likelihood, str):
        return likelihood_of_loss(likelihood)
    if likelihood == MSE:
        return SQUARED_ERROR
    return _named(likelihood)


def _named(name: str) -> Likelihood:
    family, _, parameter = name.partition(":")
    point = _plugins().get(family)  # for every name: it warns of a plug-in whose name is taken
    if family in LIKELIHOODS:
        return LIKELIHOODS[family].parse(name, parameter)
    if point is None:
        raise InputError(f"unknown likelihood {name!r}; {nearest_name(family, likelihood_names())}")
    kind = load_plugin(point)
    if not (isinstance(kind, type) and issubclass(kind, Likelihood)):
        raise InputError(
            f"likelihood {point.name!r} of {package_of(point)}: {point.value!r} is not a subclass "
            "of ngeval.Likelihood"
        )
    with plugin_errors(point, name):
        built = kind.parse(name, parameter)
        if not isinstance(built, Likelihood):
            raise TypeError(f"its parse returned {type(built).__name__}, not a Likelihood")
    return built


def _plugins() -> dict[str, EntryPoint]:
    return plugins(GROUP, frozenset({*LIKELIHOODS, MSE}))
