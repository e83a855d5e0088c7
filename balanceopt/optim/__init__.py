"""Optimizers that balance: the wrappers, the hook form."""

from balanceopt.optim._attach import AttachedModulation, attach
from balanceopt.optim._masked_sgd import MaskedSubnetworkSGD
from balanceopt.optim._modulated import ModulatedOptimizer

__all__ = ["AttachedModulation", "MaskedSubnetworkSGD", "ModulatedOptimizer", "attach"]
