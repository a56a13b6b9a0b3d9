"""The methods as optimizers (`torch.optim.Optimizer`) to train with."""

from ngeval.fadam.optimizer import FAdam
from ngeval.optim.exact import EF, NG, SF, iEF

__all__ = ["EF", "NG", "SF", "FAdam", "iEF"]
