"""Uni-modal losses beside the joint one: each encoder is asked for the class by itself."""

from balanceopt.objective._objective import UnimodalObjective

__all__ = ["UnimodalObjective"]
