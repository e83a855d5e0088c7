"""Balanced multimodal training for any PyTorch model: one line around the optimizer."""

from balanceopt import functional
from balanceopt.modality import modality_groups
from balanceopt.modulation import AMSS, OGM, MaskUnits, Modulation, OptimizerHintWarning, attention_heads
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective import UnimodalObjective
from balanceopt.optim import MaskedSubnetworkSGD, ModulatedOptimizer, attach
from balanceopt.prediction import OPM
from balanceopt.recording import Recorder
from balanceopt.relearn import Diagnosis, ReLearnScheduler, diagnose

__version__ = "0.1.0"

__all__ = [
    "AMSS",
    "MaskUnits",
    "MaskedSubnetworkSGD",
    "OGM",
    "Diagnosis",
    "ModalityMonitor",
    "ModulatedOptimizer",
    "Modulation",
    "OptimizerHintWarning",
    "OPM",
    "ReLearnScheduler",
    "Recorder",
    "UnimodalObjective",
    "attach",
    "attention_heads",
    "diagnose",
    "functional",
    "modality_groups",
]
