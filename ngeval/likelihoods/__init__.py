"""Likelihoods: everything that the methods need to know of a loss, in logit space.

A likelihood turns outputs (logits) z into a distribution p(y|z). Per sample n it provides

- the loss ℓ = −log p(y|z), summed over the sample's positions,
- the logit residual u = ∇_z ℓ,
- the Fisher of the output distribution H = E_{y~p}[u uᵀ], as products only,
- a factor S with S Sᵀ = H, and r = S⁺u, so that uᵀH⁺u = ‖r‖²,
- draws of labels from the model's own distribution.

Shapes: logits are ``(N, *positions, C)``; tangents and cotangents have that shape behind any
number of leading dimensions. Everything is computed in float64 whatever the model's dtype,
and H is never formed. Formulas: DESIGN table "Likelihoods"; H of the softmax goes back to
Martens, "New insights and perspectives on the natural gradient method" (arXiv 1412.1193), §9.
"""

from __future__ import annotations

from ngeval.errors import InputError, nearest_name
from ngeval.likelihoods.base import Likelihood, OutputDistribution
from ngeval.likelihoods.bernoulli import Bernoulli, BernoulliDistribution
from ngeval.likelihoods.categorical import Categorical, CategoricalDistribution
from ngeval.likelihoods.gaussian import Gaussian, GaussianDistribution

__all__ = [
    "Bernoulli",
    "BernoulliDistribution",
    "Categorical",
    "CategoricalDistribution",
    "Gaussian",
    "GaussianDistribution",
    "Likelihood",
    "OutputDistribution",
    "get_likelihood",
]


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Resolve a likelihood given by name.

    Args:
        likelihood: ``"categorical"``, ``"gaussian"`` (σ² = 1), ``"gaussian:0.5"`` (σ² = ½),
            ``"bernoulli"``, or a `Likelihood`, which is returned as it is.

    Raises:
        InputError: no such name, or its parameter is not a number.

    >>> get_likelihood("gaussian:0.5").variance
    0.5
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    family, _, parameter = str(likelihood).partition(":")
    if family == "gaussian":
        try:
            variance = float(parameter or 1.0)
        except ValueError as error:
            raise InputError(
                f"likelihood {likelihood!r}: write the variance as gaussian:0.5"
            ) from error
        return Gaussian(variance)
    plain: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli}
    if family not in plain or parameter:
        raise InputError(
            f"unknown likelihood {likelihood!r}; {nearest_name(family, [*plain, 'gaussian'])}"
        )
    return plain[family]()
