"""``block-ng``: the natural gradient of each layer alone, with the layer's exact Fisher.

d_l(λ) = (F_ll + λI)⁻¹g_l for the diagonal blocks F_ll of F. The gap to ``ng`` is due to the
neglected interactions between layers; the gap of ``kfac`` to this method is due to the Kronecker
approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ngeval.curvature.fisher_blocks import FisherBlocks, fisher_blocks
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, Updates
from ngeval.methods.base import State
from ngeval.model.parameter_groups import make_groups
from ngeval.problem.problem import Problem


@dataclass(frozen=True)
class BlockNaturalGradient:
    """d_l(λ) = (F_ll + λI)⁻¹g_l for every layer l, a module that owns parameters."""

    name: str = "block-ng"

    def prepare(self, problem: Problem, kernel: Kernel, seed: int = 0) -> BlockState:
        """Factor every block.

        Raises:
            EngineError: a layer has more than 6000 parameters while the batch has more than 6000
                outputs, or the blocks do not fit in the memory budget.
        """
        counts = {name: p.numel() for name, p in problem.function.parameters.items()}
        return BlockState(fisher_blocks(kernel, make_groups(counts, "layer")))


class BlockState(State):
    """The natural gradients of the layers, from their factored blocks."""

    def __init__(self, blocks: FisherBlocks) -> None:
        self.blocks = blocks

    @property
    def largest_curvature(self) -> float:
        return self.blocks.largest

    @property
    def rank(self) -> int:
        """The rank at λ = 0."""
        return self.blocks.rank

    def gaps(self, dampings: Sequence[float]) -> np.ndarray:
        """How far γ may be from the exact one, relative, by probabilities that underflow."""
        return np.full(len(dampings), 4 * self.blocks.problem.distribution.whitening_error())

    def updates(self, dampings: Sequence[float]) -> Updates:
        """The updates of every λ; one pass over the rows computes as many as fit in memory."""
        problem = self.blocks.problem
        room = problem.rows.memory // (4 * problem.num_parameters * problem.dtype.itemsize)
        step = max(1, min(len(dampings), room))
        computed: dict[int, Tensor] = {}

        def update(index: int) -> Tensor:
            first = index // step * step
            if first not in computed:
                computed.clear()
                computed[first] = self.blocks.directions(dampings[first : first + step])
            return computed[first][index - first]

        forms = self.blocks.forms(dampings)
        return DirectionUpdates(len(dampings), update, is_solution=True, forms=forms)
