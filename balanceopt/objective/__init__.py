"""Losses on the encoders' features: uni-modal ones, what is made of both gradients, total correlation, competition."""

from balanceopt.objective._competition import CompetitionObjective
from balanceopt.objective._correlation import TotalCorrelationLoss
from balanceopt.objective._objective import UnimodalObjective
from balanceopt.objective._pareto import MMPareto

__all__ = ["CompetitionObjective", "MMPareto", "TotalCorrelationLoss", "UnimodalObjective"]
