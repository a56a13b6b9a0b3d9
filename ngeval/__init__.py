"""ngeval: how close is the update that an optimizer makes to the exact natural gradient?"""

from importlib.metadata import version as _version

from ngeval import optim
from ngeval.analysis.summary import summarize
from ngeval.curvature.natural_gradient import gamma_min
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
from ngeval.grading.evaluate import evaluate
from ngeval.grading.layer_table import layer_table
from ngeval.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ngeval.methods import METHODS, Method, MethodEntry, get_method
from ngeval.methods.diag_ema import AccumulatedDiagonal
from ngeval.methods.optimizer.step import OptimizerStep
from ngeval.problem.fisher import FisherOperator
from ngeval.problem.gamma import gamma, gamma_floor, gradient_norms, loss_change
from ngeval.problem.metric_batch import Metric
from ngeval.problem.problem import Problem
from ngeval.tasks import Task

__version__ = _version("ngeval")

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
    "InputError",
    "Likelihood",
    "Method",
    "MethodEntry",
    "Metric",
    "ModelError",
    "NgevalError",
    "NumericalError",
    "OptimizerStep",
    "OutputError",
    "Problem",
    "Task",
    "TaskError",
    "evaluate",
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
