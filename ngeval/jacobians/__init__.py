"""Per-sample rows of the Jacobian: one capture path behind one class.

Everything that ngeval needs of single samples is a set of rows J_nᵀv for cotangents v at
sample n: v = u_n gives per-sample gradients, v = the unit vectors the logit Jacobian, v = the
columns of S the square root of the Fisher, v = sampled residuals the sampled gradients.
"""

from ngeval.jacobians.captured_rows import CapturedRows, row_combinations
from ngeval.jacobians.engine_choice import EngineChoice, choose_engine, recheck_engine
from ngeval.jacobians.one_pass import OnePass, PassRows
from ngeval.jacobians.row_source import (
    RowSource,
    gram_matrix,
    row_matrix,
    squared_column_sums,
    squared_norms,
    squared_sums,
)

__all__ = [
    "CapturedRows",
    "EngineChoice",
    "OnePass",
    "PassRows",
    "RowSource",
    "choose_engine",
    "gram_matrix",
    "recheck_engine",
    "row_combinations",
    "row_matrix",
    "squared_column_sums",
    "squared_norms",
    "squared_sums",
]
