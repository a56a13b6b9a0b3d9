"""What a run will cost, before it starts: `plan`, from units on parts of a batch."""

from ngeval.planning.plan import MARGIN, PROBE_SECONDS, Plan, plan

__all__ = ["MARGIN", "PROBE_SECONDS", "Plan", "plan"]
