"""ngeval: how close is the update that an optimizer makes to the exact natural gradient?

Each name below is imported when it is first used, so that ``import ngeval`` does not import torch.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from ngeval.errors import (
    CheckpointError,
    DependencyError,
    EngineError,
    InputError,
    ModelError,
    NgevalError,
    NumericalError,
    OutputError,
    TaskError,
)
from ngeval.utils.lazy import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ngeval import optim
    from ngeval.analysis.summary import summarize
    from ngeval.curvature.kernel import Kernel
    from ngeval.curvature.natural_gradient import gamma_min
    from ngeval.grading.evaluate import evaluate
    from ngeval.grading.gradient_norms import gradient_norms
    from ngeval.grading.layer_table import layer_table
    from ngeval.grading.loader import evaluate_loader
    from ngeval.likelihoods import (
        Bernoulli,
        Categorical,
        Gaussian,
        GaussianNLL,
        Likelihood,
        OutputDistribution,
        Poisson,
    )
    from ngeval.methods import METHODS, Method, MethodEntry, get_method
    from ngeval.methods.diag_ema import AccumulatedDiagonal
    from ngeval.methods.optimizer.step import OptimizerStep
    from ngeval.problem.fisher import FisherOperator
    from ngeval.problem.gamma import gamma, gamma_floor, loss_change
    from ngeval.problem.metric_batch import Metric
    from ngeval.problem.problem import Problem
    from ngeval.tasks import Task

__version__ = _version("ngeval")

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "ngeval": ["optim"],
        "ngeval.analysis.summary": ["summarize"],
        "ngeval.curvature.kernel": ["Kernel"],
        "ngeval.curvature.natural_gradient": ["gamma_min"],
        "ngeval.grading.evaluate": ["evaluate"],
        "ngeval.grading.gradient_norms": ["gradient_norms"],
        "ngeval.grading.layer_table": ["layer_table"],
        "ngeval.grading.loader": ["evaluate_loader"],
        "ngeval.likelihoods": [
            "Bernoulli",
            "Categorical",
            "Gaussian",
            "GaussianNLL",
            "Likelihood",
            "OutputDistribution",
            "Poisson",
        ],
        "ngeval.methods": ["METHODS", "Method", "MethodEntry", "get_method"],
        "ngeval.methods.diag_ema": ["AccumulatedDiagonal"],
        "ngeval.methods.optimizer.step": ["OptimizerStep"],
        "ngeval.problem.fisher": ["FisherOperator"],
        "ngeval.problem.gamma": ["gamma", "gamma_floor", "loss_change"],
        "ngeval.problem.metric_batch": ["Metric"],
        "ngeval.problem.problem": ["Problem"],
        "ngeval.tasks": ["Task"],
    },
)

__all__ = [
    "METHODS",
    "AccumulatedDiagonal",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "DependencyError",
    "EngineError",
    "FisherOperator",
    "Gaussian",
    "GaussianNLL",
    "InputError",
    "Kernel",
    "Likelihood",
    "Method",
    "MethodEntry",
    "Metric",
    "ModelError",
    "NgevalError",
    "NumericalError",
    "OptimizerStep",
    "OutputDistribution",
    "OutputError",
    "Poisson",
    "Problem",
    "Task",
    "TaskError",
    "evaluate",
    "evaluate_loader",
    "gamma",
    "gamma_floor",
    "gamma_min",
    "get_method",
    "gradient_norms",
    "layer_table",
    "loss_change",
    "optim",
    "summarize",
]
