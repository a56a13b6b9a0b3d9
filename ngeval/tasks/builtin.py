"""The tasks that come with ngeval, described without building them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltinTask:
    """A task that comes with ngeval.

    Attributes:
        function: ``package.module:name`` of the function that returns the task.
        description: one line for ``ngeval tasks``.
        num_parameters: of its model.
    """

    function: str
    description: str
    num_parameters: int


BUILTIN_TASKS = {
    "digits-mlp": BuiltinTask(
        "ngeval.tasks.digits:digits_mlp",
        "MLP 64-256-256-10 on scikit-learn's handwritten digits (softmax cross-entropy)",
        85_002,
    ),
    "digits-cnn": BuiltinTask(
        "ngeval.tasks.digits:digits_cnn",
        "three convolutions on the same digits, 15,338 parameters (softmax cross-entropy)",
        15_338,
    ),
    "digits-regression": BuiltinTask(
        "ngeval.tasks.digits:digits_regression",
        "the MLP predicts centre, spread and slant of the ink (Gaussian, σ² = 1)",
        83_460,
    ),
}
"""The tasks that come with ngeval, by name."""
