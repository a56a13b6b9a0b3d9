"""``block-ng``: the natural gradient of each layer alone, with the layer's exact Fisher.

d_l(λ) = (F_ll + λI)⁻¹g_l for the diagonal blocks F_ll of F. What it loses against ``ng`` is lost by
leaving out what layers do to each other; what ``kfac`` loses against it, by the Kronecker step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ngeval.curvature.fisher_blocks import FisherBlocks, fisher_blocks
from ngeval.curvature.kernel import Kernel
from ngeval.curvature.updates import DirectionUpdates, Updates
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
            NumericalError: a label's probability underflows, so r is infinite.
        """
        counts = {name: p.numel() for name, p in problem.function.parameters.items()}
        return BlockState(fisher_blocks(kernel, make_groups(counts, "layer")))


class BlockState:
    """The layers' own natural gradients."""

    def __init__(self, blocks: FisherBlocks) -> None:
        """Keep the blocks."""
        self.blocks = blocks

    @property
    def largest_curvature(self) -> float:
        """The largest eigenvalue of all blocks."""
        return self.blocks.largest

    def direction(self, damping: float) -> Tensor:
        """The update d(λ), shape ``(P,)``."""
        return self.blocks.directions([damping])[0]

    def updates(self, dampings: Sequence[float]) -> Updates:
        """Those of every λ; a pass over the rows makes as many as there is room for."""
        problem = self.blocks.problem
        room = problem.rows.memory // (4 * problem.num_parameters * problem.dtype.itemsize)
        step = max(1, min(len(dampings), room))
        made: dict[int, Tensor] = {}

        def make(index: int) -> Tensor:
            first = index // step * step
            if first not in made:
                made.clear()
                made[first] = self.blocks.directions(dampings[first : first + step])
            return made[first][index - first]

        return DirectionUpdates(len(dampings), make)
