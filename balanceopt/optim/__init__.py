"""Optimizers that balance modalities: wrappers of a base optimizer, and step hooks on one."""

from balanceopt.optim._attach import AttachedModulation, attach
from balanceopt.optim._checks import check_modulations
from balanceopt.optim._masked_sgd import MaskedSubnetworkSGD
from balanceopt.optim._modulated import ModulatedOptimizer
from balanceopt.optim._state import BARE_STATE, SEED, STEP

__all__ = [
    "BARE_STATE",
    "SEED",
    "STEP",
    "AttachedModulation",
    "MaskedSubnetworkSGD",
    "ModulatedOptimizer",
    "attach",
    "check_modulations",
]
