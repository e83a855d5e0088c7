"""Losses on the encoders' features: uni-modal ones, what is made of both gradients, and total correlation."""

from balanceopt.objective._correlation import TotalCorrelationLoss
from balanceopt.objective._objective import UnimodalObjective
from balanceopt.objective._pareto import MMPareto

__all__ = ["MMPareto", "TotalCorrelationLoss", "UnimodalObjective"]
