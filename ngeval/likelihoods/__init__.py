"""Likelihoods: everything that the methods need to know of a loss, in logit space.

A `Likelihood` is a family of distributions; its ``bind`` gives the `OutputDistribution` p(y|z) at
given logits z, whose methods are the loss, its derivatives in z, and draws of labels. H, the Fisher
of the outputs, is C×C for each position and is never formed. For the softmax see Martens, "New
insights and perspectives on the natural gradient method" (arXiv 1412.1193), §9.
"""

from ngeval.likelihoods.base import DiagonalDistribution, Likelihood, OutputDistribution
from ngeval.likelihoods.bernoulli import Bernoulli, BernoulliDistribution
from ngeval.likelihoods.categorical import Categorical, CategoricalDistribution
from ngeval.likelihoods.counts import Poisson, PoissonDistribution
from ngeval.likelihoods.gaussian import Gaussian, GaussianDistribution
from ngeval.likelihoods.gaussian_nll import GaussianNLL, GaussianNLLDistribution
from ngeval.likelihoods.heads import Heads
from ngeval.likelihoods.registry import Loss, get_likelihood, likelihood_names
from ngeval.likelihoods.weighted import Weighted

__all__ = [
    "Bernoulli",
    "BernoulliDistribution",
    "Categorical",
    "CategoricalDistribution",
    "DiagonalDistribution",
    "Gaussian",
    "GaussianDistribution",
    "GaussianNLL",
    "GaussianNLLDistribution",
    "Heads",
    "Likelihood",
    "Loss",
    "OutputDistribution",
    "Poisson",
    "PoissonDistribution",
    "Weighted",
    "get_likelihood",
    "likelihood_names",
]
