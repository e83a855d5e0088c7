"""Uni-modal losses in addition to the joint loss, one for each encoder, and what is made of both gradients."""

from balanceopt.objective._objective import UnimodalObjective
from balanceopt.objective._pareto import MMPareto

__all__ = ["MMPareto", "UnimodalObjective"]
