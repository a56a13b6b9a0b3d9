"""The likelihoods of torch's losses.

Reductions: the terms of a cross-entropy are summed over a sample's positions, whichever its
``reduction``. The other losses have a term for each output; with ``reduction="mean"`` ℓ_n is the
mean of a sample's terms, so that the mean ℓ_n of a batch is the loss, and with ``"sum"`` it is
their sum. torch's means over a batch with class weights or ignored labels divide by the sum of the
weights, which is no property of a single sample; that factor is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional

from ngeval.errors import InputError
from ngeval.likelihoods.base import Likelihood
from ngeval.likelihoods.bernoulli import Bernoulli
from ngeval.likelihoods.categorical import Categorical
from ngeval.likelihoods.counts import Poisson
from ngeval.likelihoods.gaussian import Gaussian
from ngeval.likelihoods.gaussian_nll import GaussianNLL


def _is_mean(loss: Any) -> bool:
    return bool(loss.reduction == "mean")


LOSSES: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: lambda loss: Categorical(
        loss.ignore_index, loss.weight, loss.label_smoothing, class_dim=1
    ),
    nn.NLLLoss: lambda loss: Categorical(
        loss.ignore_index, loss.weight, class_dim=1, log_probabilities=True
    ),
    nn.MSELoss: lambda loss: Gaussian(0.5, full=False, mean=_is_mean(loss)),
    nn.BCEWithLogitsLoss: lambda loss: Bernoulli(
        loss.pos_weight, mean=_is_mean(loss), weights=loss.weight
    ),
    nn.BCELoss: lambda loss: Bernoulli(
        probabilities=True, mean=_is_mean(loss), weights=loss.weight
    ),
    nn.MultiLabelSoftMarginLoss: lambda loss: Bernoulli(mean=True, weights=loss.weight),
    nn.GaussianNLLLoss: lambda loss: GaussianNLL(loss.full, loss.eps, mean=_is_mean(loss)),
    nn.PoissonNLLLoss: lambda loss: Poisson(
        loss.log_input, loss.full, 0.0 if loss.log_input else loss.eps, mean=_is_mean(loss)
    ),
}
"""How each loss becomes a likelihood; there is none for losses such as ``nn.L1Loss``."""

FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.mse_loss: nn.MSELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
}


def likelihood_of_loss(loss: Any) -> Likelihood:
    """The likelihood of a loss of ``torch.nn`` or ``torch.nn.functional``.

    Args:
        loss: such as ``nn.CrossEntropyLoss(label_smoothing=0.1)``, ``F.mse_loss`` or
            ``functools.partial(F.cross_entropy, weight=w)``.

    Raises:
        InputError: there is no likelihood for it, or an option of it has no counterpart.
    """
    module = _as_module(loss)
    for kind, make in LOSSES.items():
        # A subclass that computes something else is a different loss.
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return make(module)
    names = ", ".join(kind.__name__ for kind in LOSSES)
    what = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
    raise InputError(
        f"{what} is not a loss with a known likelihood (those of torch.nn are {names}); give the "
        "name of a likelihood, or write your own: docs/losses.md"
    )


def _as_module(loss: Any) -> Any:
    """A loss function with its options as the module that computes it; others are unchanged."""
    function, options = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, options = loss.func, loss.keywords
    if isinstance(function, type) and function in LOSSES:
        return function(**options)
    if not isinstance(function, Callable) or function not in FUNCTIONS:  # type: ignore[arg-type]
        return loss
    try:
        return FUNCTIONS[function](**options)
    except TypeError as error:
        raise InputError(f"{function.__name__}: {error}") from error
