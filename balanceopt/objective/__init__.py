"""Uni-modal losses in addition to the joint loss, one for each encoder."""

from balanceopt.objective._objective import UnimodalObjective

__all__ = ["UnimodalObjective"]
