"""Per-sample Jacobian rows of any model: one path of capture behind one class, `RowSource`.

All that ngeval needs of single samples is rows J_nᵀv for cotangents v at sample n: v = u_n gives
per-sample gradients, v = the unit vectors the logit Jacobian, v = the columns of S the square root
of the Fisher, v = sampled residuals the sampled gradients.

Three engines compute them:

- ``layers``: hooks record the inputs and the output gradients of each layer in one forward pass and
  one backward pass per cotangent; closed forms per layer give rows, or their inner products without
  any row. The fastest by far.
- ``vmap``: a VJP of the whole model under ``vmap`` over samples, which some models' code does not
  allow.
- ``loop``: one sample at a time by plain autograd, for any model.

`choose_engine` takes none of them on trust: by default it compares each engine's rows with tangents
and with plain autograd on the model's own batch.

Conventions: `cotangents` v has shape ``(N, Q, *positions, C)``, Q cotangents for each sample;
`samples` and `vectors` are slices of N and Q, and `units` of a parameter's first dimension. Row
n·Q + q is J_nᵀv_nq. Rows by parameter have shape ``(N, Q, *parameter.shape)`` in the dtype of the
model; their products are accumulated in float64, and sums over samples are never means.

Reading order, each file on top of those before it:

1. `terms`: what the rows of a parameter consist of. `inner_products`: products of rows, by
   whichever form takes fewer operations.
2. `layouts` (where a tensor keeps its samples), `capture_plan` (what to hook, and the record of a
   call), `layer_rules` and `recurrent` (from recorded calls to terms), `vjp_rows` (the same for
   modules without a closed form, and the other two engines), `joined_calls` (calls of one layer).
3. `capture` (the passes with hooks), `planner` (the making of the plan).
4. `rank_exchange` (terms of other ranks' rows). `row_source`: rows and reductions over a batch in
   bounded memory. `captured_rows`: rows that are used several times, and groups of parameters.
   `one_pass`: rows of a training step.
5. `probe`, `operation_count` and `engine_choice`: the check, the predicted time, and the choice
   of an engine.
"""

from ngeval.jacobians.captured_rows import CapturedRows
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
    "row_matrix",
    "squared_column_sums",
    "squared_norms",
    "squared_sums",
]
