"""Balanced multimodal training for any PyTorch model: one line around the optimizer."""

from balanceopt import functional
from balanceopt._method import Method
from balanceopt._versions import show_versions
from balanceopt.balancing import Balance, balance
from balanceopt.modality import modality_groups
from balanceopt.modulation import (
    AGM,
    AMSS,
    MLB,
    OGM,
    FixedModulation,
    GradientScaling,
    InfoReg,
    MaskUnits,
    Modulation,
    OptimizerHintWarning,
    StepContext,
    attention_heads,
)
from balanceopt.monitor import ModalityMonitor
from balanceopt.objective import CompetitionObjective, MMPareto, TotalCorrelationLoss, UnimodalObjective
from balanceopt.optim import MaskedSubnetworkSGD, ModulatedOptimizer, attach
from balanceopt.prediction import OPM, ForwardMethod, ModalityDropout
from balanceopt.probes import ProbeMonitor
from balanceopt.recording import Recorder
from balanceopt.relearn import BlendScheduler, Diagnosis, EpochMethod, ReLearnScheduler, diagnose
from balanceopt.reporting import Report, report

__version__ = "0.1.0"

__all__ = [
    "AGM",
    "AMSS",
    "MLB",
    "MMPareto",
    "MaskUnits",
    "MaskedSubnetworkSGD",
    "OGM",
    "Balance",
    "BlendScheduler",
    "CompetitionObjective",
    "Diagnosis",
    "EpochMethod",
    "FixedModulation",
    "ForwardMethod",
    "GradientScaling",
    "InfoReg",
    "Method",
    "ModalityDropout",
    "ModalityMonitor",
    "ModulatedOptimizer",
    "Modulation",
    "OptimizerHintWarning",
    "OPM",
    "ProbeMonitor",
    "ReLearnScheduler",
    "Recorder",
    "Report",
    "StepContext",
    "TotalCorrelationLoss",
    "UnimodalObjective",
    "attach",
    "attention_heads",
    "balance",
    "diagnose",
    "functional",
    "modality_groups",
    "report",
    "show_versions",
]
