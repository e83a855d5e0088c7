"""Optimizers that balance: the wrapper, the hook form."""

from balanceopt.optim._attach import AttachedModulation, attach
from balanceopt.optim._modulated import ModulatedOptimizer

__all__ = ["AttachedModulation", "ModulatedOptimizer", "attach"]
