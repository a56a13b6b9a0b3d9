"""The methods under study as optimizers (`torch.optim.Optimizer`) that people can train with."""

from ngeval.optim.exact import EF, NG, SF, iEF
from ngeval.fadam.optimizer import FAdam

__all__ = ["EF", "NG", "SF", "FAdam", "iEF"]
