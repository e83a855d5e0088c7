"""Balanced multimodal training for any PyTorch model: one line around the optimizer."""

from balanceopt import functional
from balanceopt.modality import modality_groups
from balanceopt.modulation import OGM, Modulation, OptimizerHint
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim import ModulatedOptimizer, attach
from balanceopt.recording import Recorder

__all__ = [
    "OGM",
    "ModalityMonitor",
    "ModulatedOptimizer",
    "Modulation",
    "OptimizerHint",
    "Recorder",
    "attach",
    "functional",
    "modality_groups",
]
