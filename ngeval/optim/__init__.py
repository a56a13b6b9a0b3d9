"""The methods under study as optimizers (`torch.optim.Optimizer`) that people can train with."""

from ngeval.fadam.optimizer import FAdam
from ngeval.optim.exact import EF, NG, SF, iEF

__all__ = ["EF", "NG", "SF", "FAdam", "iEF"]
